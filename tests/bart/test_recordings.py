"""Every recorded checkpoint reproduces the original's outputs, in each format of storage."""

import json

import pytest
import torch
from checkpoints import CLASSIFY, GENERATE, SEQ2SEQ, encoder_mask, recorded
from transformers import AutoModelForSeq2SeqLM, AutoModelForSequenceClassification

from lsg_attn.bart import LSGBartForConditionalGeneration, LSGBartForSequenceClassification

CHECKPOINTS = [
    *((folder, AutoModelForSeq2SeqLM, LSGBartForConditionalGeneration) for folder in SEQ2SEQ),
    (CLASSIFY, AutoModelForSequenceClassification, LSGBartForSequenceClassification),
]
checkpoints = pytest.mark.parametrize(
    ("folder", "auto_class", "model_class"), CHECKPOINTS, ids=[folder.name for folder, *_ in CHECKPOINTS]
)
ATOL = 1e-4


def load(cls, folder, **overrides):
    """Load a model and check that its tensors are exactly those of the folder."""
    model, info = cls.from_pretrained(folder, output_loading_info=True, **overrides)
    assert not any(info.values()), info
    return model.eval()


@torch.no_grad()
def check(model, folder):
    """Compare the model's outputs with the recording."""
    inputs, results = recorded(folder)
    out = model(**inputs)
    keep = encoder_mask(model, inputs["attention_mask"])
    assert out.encoder_last_hidden_state.shape == results["encoder_last_hidden_state"].shape
    difference = (out.encoder_last_hidden_state - results["encoder_last_hidden_state"])[keep].abs().max()
    assert difference < ATOL
    assert (out.logits - results["logits"]).abs().max() < ATOL


@checkpoints
@pytest.mark.parametrize("implementation", ["auto", "reference"])
def test_outputs_equal_the_recording(folder, auto_class, model_class, implementation):
    model = load(auto_class, folder, attention_implementation=implementation)
    assert type(model) is model_class
    check(model, folder)


@checkpoints
def test_bin_checkpoint_with_tied_weights(folder, auto_class, model_class, tmp_path):
    """Old .bin files store a tied weight once under each of its names."""
    model = load(model_class, folder)
    assert "model.encoder.embed_tokens.weight" in model.state_dict()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    loaded = load(auto_class, tmp_path, use_safetensors=False)
    assert loaded.model.encoder.embed_tokens.weight is loaded.model.shared.weight
    check(loaded, folder)


@checkpoints
def test_a_saved_checkpoint_loads_again(folder, auto_class, model_class, tmp_path):
    model = load(model_class, folder)
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["model_type"] == "lsg_bart"
    assert written["architectures"] == [model_class.__name__]
    assert not {"auto_map", "base_model_prefix", "attention_implementation"} & set(written)
    for cls in (auto_class, model_class):
        again = load(cls, tmp_path)
        assert type(again) is model_class
        assert all(torch.equal(x, y) for x, y in zip(again.parameters(), model.parameters(), strict=True))
        check(again, folder)


@pytest.mark.parametrize("folder", SEQ2SEQ, ids=[folder.name for folder in SEQ2SEQ])
@pytest.mark.parametrize(("name", "num_beams"), [("greedy", 1), ("beam4", 4)])
def test_generated_ids_equal_the_recording(folder, name, num_beams):
    inputs, results = recorded(folder)
    inputs.pop("decoder_input_ids")
    out = load(LSGBartForConditionalGeneration, folder).generate(**inputs, num_beams=num_beams, **GENERATE)
    assert torch.equal(out, results[name])


@checkpoints
@torch.no_grad()
def test_more_padding_changes_nothing(folder, auto_class, model_class):
    """Padding with random ids at the end does not change the recorded logits."""
    inputs, results = recorded(folder)
    batch = len(inputs["input_ids"])
    garbage = torch.randint(5, 500, (batch, 37))
    inputs["input_ids"] = torch.cat([inputs["input_ids"], garbage], dim=1)
    inputs["attention_mask"] = torch.cat([inputs["attention_mask"], torch.zeros_like(garbage)], dim=1)
    assert (load(model_class, folder)(**inputs).logits - results["logits"]).abs().max() < ATOL
