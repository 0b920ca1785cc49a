"""Training: gradient checkpointing, a compiled encoder, dropout, mixed precision, transformers' Trainer."""

import pytest
import torch
from checkpoints import CLASSIFY, TINY, recorded
from torch import nn
from transformers import Trainer, TrainingArguments

from lsg_attn.bart import LSGBartConfig, LSGBartForConditionalGeneration, LSGBartForSequenceClassification
from lsg_attn.testing import TOLERANCES, relative_rms


def tiny(**keys):
    """A small random model in training mode, by default without dropout, and a batch for it."""
    torch.manual_seed(0)
    model = LSGBartForConditionalGeneration(LSGBartConfig(**{**TINY, "dropout": 0.0, **keys})).train()
    ids = torch.randint(4, 99, (2, 101))
    mask = torch.ones_like(ids)
    mask[1, 60:] = 0
    return model, {"input_ids": ids, "attention_mask": mask, "labels": ids[:, :9].contiguous()}


def gradients(model, batch):
    """The loss and every parameter's gradient by name."""
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return loss.detach(), {name: x.grad for name, x in model.named_parameters() if x.grad is not None}


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_.*able` is deprecated")
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(use_reentrant):
    """Dropout draws the same bits again. Each layer of the encoder runs twice."""
    model, batch = tiny(dropout=0.1, attention_dropout=0.1)
    torch.manual_seed(1)
    loss, expected = gradients(model, batch)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    calls = []
    for layer in model.model.encoder.layers:
        layer.self_attn.register_forward_hook(lambda *_: calls.append(1))
    torch.manual_seed(1)
    again, got = gradients(model, batch)
    assert len(calls) == 2 * model.config.encoder_layers
    assert torch.equal(loss, again)
    assert got.keys() == expected.keys()
    names = [name for name in got if not name.endswith("k_proj.bias")]  # its gradient is only rounding error
    assert all(relative_rms(got[name], expected[name]) < TOLERANCES[torch.float32] for name in names)
    model.gradient_checkpointing_disable()
    calls.clear()
    gradients(model, batch)
    assert len(calls) == model.config.encoder_layers


def test_compiled_encoder_is_one_graph_and_equals_eager():
    """Its states and the gradient of its global embeddings agree at two lengths."""
    model, batch = tiny()
    encoder = model.get_encoder()
    compiled = torch.compile(encoder, fullgraph=True, dynamic=True)
    for length in (101, 83):
        ids, mask = batch["input_ids"][:, :length], batch["attention_mask"][:, :length]
        results = []
        for run in (encoder, compiled):
            encoder.zero_grad()
            states = run(ids, mask)[0]
            states.square().mul(torch.linspace(-1, 1, 32)).sum().backward()
            results.append((states.detach(), encoder.global_embeddings.weight.grad.clone()))
        for expected, got in zip(*results, strict=True):
            assert relative_rms(got, expected) < 1e-5


def test_dropout_applies_in_training_only():
    """Each dropout changes the states in training and none does in evaluation. LayerDrop skips layers."""
    _, batch = tiny()
    ids = batch["input_ids"]
    for key in ("dropout", "attention_dropout", "activation_dropout"):
        model, _ = tiny(**{key: 0.3})
        encoder = model.get_encoder()
        assert not torch.equal(encoder(ids)[0], encoder(ids)[0])
        encoder.eval()
        assert torch.equal(encoder(ids)[0], encoder(ids)[0])
    model, _ = tiny(encoder_layerdrop=1.0)
    states = model.get_encoder()(ids, output_hidden_states=True).hidden_states
    assert torch.equal(states[0], states[-1])


def test_mixed_precision_gradients():
    model, batch = tiny()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, got = gradients(model, batch)
    assert loss.isfinite()
    _, expected = gradients(model, batch)
    names = [name for name in got if "encoder.layers" in name and "k_proj.bias" not in name]
    assert names
    assert all(got[name].dtype == torch.float32 and relative_rms(got[name], expected[name]) < 0.1 for name in names)


class Batches(torch.utils.data.Dataset):
    """The recorded documents, each labelled with its index."""

    def __init__(self):
        self.inputs = recorded(CLASSIFY).inputs

    def __len__(self):
        return len(self.inputs["input_ids"])

    def __getitem__(self, index):
        return {**{name: x[index] for name, x in self.inputs.items()}, "labels": torch.tensor(index)}


def test_trainer_learns_and_saves(tmp_path):
    """A classifier memorizes two documents. The saved model gives the same logits."""
    model = LSGBartForSequenceClassification.from_pretrained(CLASSIFY)
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=15,
        learning_rate=3e-3,
        per_device_train_batch_size=2,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=Batches())
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 15
    assert float(losses[-1]) < 0.5 * float(losses[0])
    trainer.save_model(str(tmp_path / "saved"))
    saved = LSGBartForSequenceClassification.from_pretrained(tmp_path / "saved").eval()
    inputs = recorded(CLASSIFY).inputs
    with torch.no_grad():
        assert torch.equal(saved(**inputs).logits, model.eval()(**inputs).logits)
    assert nn.functional.cross_entropy(saved(**inputs).logits, torch.tensor([0, 1])) < float(losses[0])
