"""The models of all families behave like transformers' own: inputs, outputs, heads, training, causal models."""

import copy
import pickle
import warnings

import peft
import pytest
import torch
import transformers
from family_recordings import CASES, FOLDER, SEQ2SEQ, class_of, document, load, name_of, tiny, tiny_config
from torch.nn.functional import pad

import lsg_attn.models
from lsg_attn.models.families import FAMILIES
from lsg_attn.testing import relative_rms

each_family = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.title)
ENCODERS = [family for family in FAMILIES if family not in SEQ2SEQ]
each_encoder = pytest.mark.parametrize("family", ENCODERS, ids=lambda family: family.title)


pytestmark = pytest.mark.filterwarnings("ignore:`.*gradient_checkpointing.*` is deprecated")  # transformers 5, and PEFT


def encoder_of(model):
    return model.get_encoder() if model.config.is_encoder_decoder else model


def head(family, suffix):
    return next(cls for cls in family.models if cls.__name__.endswith(suffix))


@each_family
@torch.no_grad()
def test_equivalent_inputs_give_the_same_states(family):
    """Embeddings, tuples, masks of any dtype, no mask, garbage in padding; hidden states have the globals in front."""
    encoder = encoder_of(tiny(family, pad_token_id=98))  # no token is padding by its id
    ids, mask = document()
    before = mask.clone()
    expected = encoder(ids, mask).last_hidden_state
    assert expected.shape == (2, 101 + (0 if encoder.config.drops_global_tokens else 3), 32)
    words = encoder.embed_words(ids) if family in SEQ2SEQ else encoder.get_input_embeddings()(ids)
    keep = pad(mask, (expected.shape[1] - 101, 0), value=1).bool()
    for got in (
        encoder(inputs_embeds=words, attention_mask=mask)[0],
        encoder(ids, mask, return_dict=False)[0],
        *(encoder(ids, mask.to(dtype))[0] for dtype in (torch.bool, torch.uint8, torch.float16)),
        encoder(torch.where(mask.bool(), ids, 7), mask)[0],
    ):
        torch.testing.assert_close(got[keep], expected[keep], atol=1e-5, rtol=1e-5)
    assert torch.equal(encoder(ids)[0], encoder(ids, torch.ones_like(ids))[0])
    assert torch.equal(mask, before)
    states = encoder(ids, mask, output_hidden_states=True).hidden_states
    assert [x.shape for x in states] == [(2, 104, 32)] * 3


@each_family
@pytest.mark.parametrize("length", [1, 15, 32, 33, 100])
@torch.no_grad()
def test_more_padding_changes_nothing(family, length):
    """On the right for all; where positions are counted from the first token, also its own number of tokens."""
    encoder = encoder_of(tiny(family))
    ids, mask = document(length=length, padding=length // 3)
    longer, longer_mask = (torch.cat([x, x.new_full((2, 41), y)], dim=1) for x, y in ((ids, 5), (mask, 0)))
    got, expected = encoder(longer, longer_mask)[0], encoder(ids, mask)[0]
    keep = pad(mask, (expected.shape[1] - length, 0), value=1).bool()
    torch.testing.assert_close(got[:, : expected.shape[1]][keep], expected[keep], atol=1e-5, rtol=1e-5)


@each_family
def test_bad_inputs_are_refused(family):
    encoder = encoder_of(tiny(family))
    ids, mask = document()
    for arguments, message in (
        ({"head_mask": torch.ones(2, 4)}, "head_mask: expected None, got Tensor"),
        ({"inputs_embeds": torch.zeros(2, 101, 32)}, "exactly one of input_ids and inputs_embeds, got both"),
        ({"attention_mask": torch.ones(2, 104)}, "attention_mask: expected shape"),
        ({"attention_mask": torch.ones(2, 101, 101)}, "attention_mask: expected shape"),
    ):
        with pytest.raises(ValueError, match=message):
            encoder(ids, **arguments)
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds, got neither"):
        encoder(attention_mask=mask)
    with pytest.raises(TypeError, match="atention_mask"):
        encoder(ids, atention_mask=mask)
    with pytest.raises(ValueError, match=r"expected at most max_position_embeddings.* tokens, got 303"):
        encoder(ids.repeat(1, 3))
    with pytest.raises(TypeError, match=f"config: expected an {family.config_class.__name__}, got"):
        family.models[0](family.config_class.plain_class())


@each_encoder
def test_what_an_encoder_cannot_do_is_refused(family):
    model, (ids, _) = tiny(family), document()
    for arguments, message in (
        ({"output_attentions": True}, "output_attentions: expected False, got True"),
        ({"use_cache": True}, "use_cache: expected False"),
        ({"encoder_hidden_states": torch.zeros(2, 5, 32)}, "encoder_hidden_states: expected None"),
    ):
        with pytest.raises(ValueError, match=message):
            model(ids, **arguments)
    if "position_embedding_type" in family.config_class.plain_class().to_dict():
        with pytest.raises(ValueError, match="position_embedding_type: expected 'absolute', got 'relative_key'"):
            tiny(family, position_embedding_type="relative_key")


@each_family
def test_every_head_trains_and_reloads(family, tmp_path):
    """Gradients reach every trainable parameter, with checkpointing too, and a saved model loads without a warning."""
    for cls in family.convertible:
        model = tiny(family, cls)
        ids, mask = document(padding=0)
        ids[:, -1] = 2  # BART's and mBART's classification reads the state at EOS
        inputs = {"input_ids": ids, "attention_mask": mask}
        if cls.__name__.endswith("ForMultipleChoice"):
            inputs = {name: x[None] for name, x in inputs.items()}
        if model.config.is_encoder_decoder and "SequenceC" not in cls.__name__:
            inputs["decoder_input_ids"] = ids[:, :9].contiguous()
        grads = []
        for checkpointing in (False, True):
            model.train()
            if checkpointing:
                model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            model.zero_grad()
            out = model(**inputs, use_cache=False) if model.config.is_encoder_decoder else model(**inputs)
            found = [x for x in out.to_tuple() if torch.is_tensor(x) and x.is_floating_point()]
            sum((x * torch.linspace(-1, 1, x.shape[-1])).square().sum() for x in found).backward()
            grads.append({name: x.grad for name, x in model.named_parameters() if x.grad is not None})
            trainable = {name for name, x in model.named_parameters() if x.requires_grad}
            assert trainable == set(grads[-1]), (cls, trainable ^ set(grads[-1]))
        for name, x in grads[0].items():
            if not name.endswith(("k_proj.bias", "key.bias", "k_lin.bias")):  # these are only rounding error
                assert relative_rms(grads[1][name], x) < 1e-4, (cls, name)
        model.eval().gradient_checkpointing_disable()
        model.save_pretrained(tmp_path / cls.__name__)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            again = load(tmp_path / cls.__name__, cls)
        with torch.no_grad():
            # Copies: weights mapped from a file may not be aligned, and some CPUs' matmul then rounds differently.
            for other in (copy.deepcopy(again), pickle.loads(pickle.dumps(again))):
                assert torch.equal(other(**inputs)[0], model(**inputs)[0])


@each_family
@torch.no_grad()
def test_bfloat16_and_compiled(family):
    encoder = encoder_of(tiny(family))
    ids, mask = document()
    keep = pad(mask, (0 if encoder.config.drops_global_tokens else 3, 0), value=1).bool()
    expected = encoder(ids, mask)[0][keep]
    if family.title in ("BERT", "mBART"):  # a compilation takes seconds: one family of each kind
        compiled = torch.compile(encoder, fullgraph=True)(ids, mask)[0][keep]
        assert relative_rms(compiled, expected) < 1e-5
    half = encoder.to(torch.bfloat16)(ids, mask)[0][keep]
    assert half.dtype == torch.bfloat16
    assert relative_rms(half, expected) < 0.1


@pytest.mark.parametrize("folder", [x for x in CASES if "causal" in x.name], ids=name_of)
@torch.no_grad()
def test_causal_models(folder):
    """No later token changes a logit, at any length; greedy generation picks the last logit's largest each time."""
    model = load(folder)
    for length in (5, 33, 80):
        ids, _ = document(length=length)
        other = ids.clone()
        other[:, length // 2 :] = 9
        got, expected = (model(x, use_cache=False).logits[:, : length // 2] for x in (other, ids))
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    ids, _ = document(length=40)
    with pytest.raises(ValueError, match="use_cache=False"):
        model.generate(ids, max_new_tokens=3, do_sample=False, use_cache=True)
    got = model.generate(ids, max_new_tokens=3, do_sample=False, use_cache=False, eos_token_id=None)
    for _ in range(3):
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(got, ids)


@pytest.mark.parametrize(
    "family", [f for f in ENCODERS if f.title not in ("DistilBERT", "ALBERT")], ids=lambda f: f.title
)
@torch.no_grad()
def test_cross_attention(family):
    """Over states of any length, with their mask; T need not be a multiple of the block size, as in the original."""
    keys = {"is_decoder": True, "add_cross_attention": True}
    model, (ids, mask) = tiny(family, **keys), document(padding=0)
    states = torch.randn(2, 11, 32)
    seen = torch.ones(2, 11)
    seen[:, 7:] = 0
    garbage = states.clone()
    garbage[:, 7:] = 1e3
    expected = model(ids, mask, encoder_hidden_states=states[:, :7])[0]
    got = model(ids, mask, encoder_hidden_states=garbage, encoder_attention_mask=seen)[0]
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(model(ids, mask)[0], expected)


@pytest.mark.parametrize("family", [f for f in ENCODERS if f.title in ("DistilBERT", "ALBERT")], ids=lambda f: f.title)
@torch.no_grad()
def test_causal_distilbert_and_albert_do_not_leak(family):
    """In the original their global tokens see later tokens."""
    model, (ids, mask) = tiny(family, is_decoder=True), document(padding=0)
    other = ids.clone()
    other[:, 70:] = 9
    assert torch.equal(model(ids, mask)[0][:, :70], model(other, mask)[0][:, :70])


@torch.no_grad()
def test_segments_and_positions_of_the_caller():
    model, (ids, mask) = tiny(ENCODERS[0]), document()
    segments = torch.ones_like(ids)
    assert not torch.allclose(model(ids, mask, token_type_ids=segments)[0], model(ids, mask)[0])
    assert torch.equal(model(ids, mask, token_type_ids=0 * segments)[0], model(ids, mask)[0])
    assert torch.equal(model(ids, mask, position_ids=torch.arange(101)[None])[0], model(ids, mask)[0])
    without = tiny(next(f for f in ENCODERS if f.title == "DistilBERT"))
    with pytest.raises(ValueError, match="token_type_ids: expected None without segments"):
        without(ids, mask, token_type_ids=segments)


@each_family
def test_peft_finds_what_to_adapt(family):
    """LoRA on the projections of LSG attention, named as in the plain model."""
    names = {"DistilBERT": ["q_lin", "v_lin"], "BART": ["q_proj", "v_proj"]}
    names["mBART"] = names["Pegasus"] = names["BART"]
    targets = names.get(family.title, ["query", "value"])
    model = peft.get_peft_model(tiny(family), peft.LoraConfig(target_modules=targets, init_lora_weights=False))
    encoder = encoder_of(model.get_base_model())
    ids, mask = document()
    encoder(ids, mask)[0].square().mul(torch.linspace(-1, 1, 32)).sum().backward()
    adapted = [name for name, x in encoder.named_parameters() if "lora" in name]
    assert len(adapted) >= 4
    assert all(dict(encoder.named_parameters())[name].grad is not None for name in adapted)


PIPELINES = {
    "fill-mask": ("ForMaskedLM", "the [MASK] of"),
    "text-classification": ("ForSequenceClassification", "some words"),
    "token-classification": ("ForTokenClassification", "some words"),
    "feature-extraction": ("Model", "some words"),
    "question-answering": ("ForQuestionAnswering", {"question": "which words", "context": "some words of text"}),
}


@pytest.mark.filterwarnings("ignore:__array__ implementation")  # transformers 4's own
@pytest.mark.parametrize("task", PIPELINES)
def test_pipelines(task):
    """With the plain model's tokenizer, for a checkpoint in this library's format."""
    if task not in transformers.pipelines.SUPPORTED_TASKS:
        pytest.skip("this version of transformers has no such pipeline")
    suffix, given = PIPELINES[task]
    folder = FOLDER / "bert/base_512"
    cls = head(ENCODERS[0], suffix)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of new heads
        model, tokenizer = lsg_attn.models.convert(
            folder, 600, architecture=cls.__name__, block_size=16, sparse_block_size=16
        )
    run = transformers.pipeline(task, model=model, tokenizer=tokenizer)
    assert run(**given) if isinstance(given, dict) else run(given)


class Documents(torch.utils.data.Dataset):
    """Two documents, the second with padding, each labelled with its index."""

    def __len__(self):
        return 2

    def __getitem__(self, index):
        ids, mask = document()
        return {"input_ids": ids[index], "attention_mask": mask[index], "labels": torch.tensor(index)}


def test_trainer_memorizes_two_documents(tmp_path):
    family = ENCODERS[1]
    model = tiny(family, head(family, "ForSequenceClassification"), num_labels=2)
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=15, learning_rate=3e-3, per_device_train_batch_size=2, logging_steps=1,
        save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=Documents())
    trainer.train()
    losses = [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.5 * losses[0]


@each_family
def test_configurations(family):
    """Equality by all keys, pickle, and errors that name a key, also as overrides of a published checkpoint."""
    config = tiny_config(family)
    assert pickle.loads(pickle.dumps(config)) == config
    assert config != tiny_config(family, attention_implementation="reference")
    assert tiny_config(family, sparsity_type=None).lsg_pattern().sparsity_type == "none"
    folder = (
        next(x for x in CASES if class_of(x).config_class is family.config_class) if family.title != "BART" else None
    )
    for keys, error, message in (
        ({"sparsity_type": "mean"}, ValueError, "sparsity_type: expected one of"),
        ({"block_size": 30, "sparsity_factor": 4}, ValueError, "sparsity_factor must divide block_size"),
        ({"pool_with_global": "yes"}, TypeError, "pool_with_global: expected a bool, got 'yes'"),
        ({"num_global_tokens": 513}, ValueError, "num_global_tokens: expected at most 512, got 513"),
    ):
        with pytest.raises(error, match=message):
            family.config_class(**keys)
        if folder is not None:
            with pytest.raises(error, match=message):
                class_of(folder).from_pretrained(folder, **keys)


@torch.no_grad()
def test_a_pattern_changed_after_loading_is_followed():
    model, (ids, mask) = tiny(ENCODERS[0]), document()
    other = tiny(ENCODERS[0], block_size=8, sparsity_type="stride")
    assert not torch.allclose(model(ids, mask)[0], other(ids, mask)[0])
    model.config.block_size, model.config.sparsity_type = 8, "stride"
    assert torch.equal(model(ids, mask)[0], other(ids, mask)[0])
