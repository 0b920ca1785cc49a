"""LSG-BART behaves like BART in transformers: inputs, outputs, heads, generation, dtypes."""

import copy
import pickle

import accelerate
import pytest
import torch
import transformers
from checkpoints import GENERATE, NORM, SEQ2SEQ, TINY, recorded, seq2seq
from packaging.version import Version
from torch.nn.functional import pad
from transformers import BartConfig, BartForCausalLM, BartForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutput

from lsg_attn.bart import (
    LSGBartConfig,
    LSGBartForCausalLM,
    LSGBartForConditionalGeneration,
    LSGBartForQuestionAnswering,
    LSGBartModel,
)
from lsg_attn.testing import TOLERANCES, relative_rms

RECENT = Version(transformers.__version__) >= Version("4.53")
each = pytest.mark.parametrize("folder", SEQ2SEQ, ids=[folder.name for folder in SEQ2SEQ])


def tiny(cls=LSGBartForConditionalGeneration, **keys):
    """A small random model in evaluation mode, and ids of two documents without padding, each with one EOS."""
    torch.manual_seed(0)
    model = cls(LSGBartConfig(**{**TINY, **keys})).eval()
    ids = torch.randint(4, 99, (2, 101))
    ids[:, 0], ids[:, -1] = 0, 2
    return model, ids


@each
@torch.no_grad()
def test_equivalent_inputs_give_the_same_outputs(folder):
    """input_ids, inputs_embeds and both kinds of encoder_outputs; tuples; hidden states."""
    inputs, results = recorded(folder)
    model = seq2seq(folder)
    mask, start = inputs["attention_mask"], inputs["decoder_input_ids"]
    caller_mask = mask.clone()
    states = model.get_encoder()(inputs["input_ids"], mask)
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    for given in (
        {"inputs_embeds": embeds},
        {"encoder_outputs": states},
        {"encoder_outputs": (states.last_hidden_state,)},
        {"input_ids": inputs["input_ids"]},
    ):
        for return_dict in (True, False):
            out = model(attention_mask=mask, decoder_input_ids=start, return_dict=return_dict, **given)
            torch.testing.assert_close(out[0], results["logits"], atol=1e-4, rtol=0)
            assert isinstance(out, tuple) is not return_dict
    assert torch.equal(mask, caller_mask)

    config, length = model.config, inputs["input_ids"].shape[1]
    out = model(**inputs, output_hidden_states=True)
    assert len(out.encoder_hidden_states) == len(out.decoder_hidden_states) == config.encoder_layers + 1
    assert {x.shape[1] for x in out.encoder_hidden_states} == {config.num_global_tokens + length}
    last = model.get_encoder()(inputs["input_ids"], mask, output_hidden_states=True, return_dict=False)
    assert torch.equal(last[0][:, 1:], last[1][-1][:, last[1][-1].shape[1] - last[0].shape[1] + 1 :])
    assert type(states) is BaseModelOutput


@pytest.mark.parametrize("scale_embedding", [False, True])
@torch.no_grad()
def test_a_short_document_without_globals_is_encoded_as_by_bart(scale_embedding):
    """For T <= 2B, every token sees all tokens, as in BART."""
    model, ids = tiny(num_global_tokens=0, block_size=64, sparse_block_size=64, scale_embedding=scale_embedding)
    plain = BartForConditionalGeneration(BartConfig(**model.config.to_dict())).eval()
    states = model.state_dict()
    states.pop("model.encoder.global_embeddings.weight")
    plain.load_state_dict(states)
    mask = torch.ones_like(ids)
    mask[1, 70:] = 0
    given = {"attention_mask": mask, "decoder_input_ids": ids[:, :5]}
    for inputs in ({"input_ids": ids}, {"inputs_embeds": torch.randn(2, 101, 32)}):
        assert relative_rms(model(**inputs, **given).logits, plain(**inputs, **given).logits) < 1e-5


@torch.no_grad()
def test_no_mask_equals_a_mask_of_ones():
    for keys in ({}, {"mask_first_token": True}, {"pass_global_tokens_to_decoder": False}):
        model, ids = tiny(**keys)
        expected = model(ids, attention_mask=torch.ones_like(ids), decoder_input_ids=ids[:, :7]).logits
        assert torch.equal(model(ids, decoder_input_ids=ids[:, :7]).logits, expected)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int32, torch.float16, torch.float64])
@torch.no_grad()
def test_masks_of_any_dtype(dtype):
    model, ids = tiny()
    mask = torch.ones_like(ids)
    mask[1, 50:] = 0
    encoded = model.get_encoder()(ids, mask)[0]
    assert torch.equal(model.get_encoder()(ids, mask.to(dtype))[0], encoded)


@torch.no_grad()
def test_changing_the_configuration_changes_a_model():
    """A built model follows later changes to its configuration, as if it had been built with them."""
    changes = {"num_global_tokens": 3, "mask_first_token": True, "block_size": 8, "sparsity_type": "stride"}
    changes |= {"pass_global_tokens_to_decoder": False}
    (model, ids), (other, _) = tiny(num_global_tokens=2), tiny(**changes)
    given = {"input_ids": ids, "decoder_input_ids": ids[:, :5]}
    before = model(**given).logits
    for key, value in changes.items():
        setattr(model.config, key, value)
    assert torch.equal(model(**given).logits, other(**given).logits)
    assert not torch.equal(before, other(**given).logits)
    model.config.block_size = 9
    with pytest.raises(ValueError, match="sparsity_factor must divide block_size"):
        model(**given)


@torch.no_grad()
def test_copies_and_resized_vocabularies(tmp_path):
    model, ids = tiny()
    given = {"input_ids": ids, "decoder_input_ids": ids[:, :5]}
    expected = model(**given).logits
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(**given).logits, expected)
    model.resize_token_embeddings(120, mean_resizing=False) if RECENT else model.resize_token_embeddings(120)
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    larger = LSGBartForConditionalGeneration.from_pretrained(tmp_path).eval()
    assert larger.model.encoder.embed_tokens.weight is larger.model.shared.weight
    assert larger.lm_head.weight.shape == (120, 32)
    torch.testing.assert_close(larger(**given).logits[..., :99], expected)


@torch.no_grad()
def test_offloaded_weights():
    """Offloaded weights exist only while their module is called, so the model must call modules."""
    model, ids = tiny()
    expected = model(ids, decoder_input_ids=ids[:, :5]).logits
    accelerate.cpu_offload(model, execution_device="cpu")
    assert model.model.encoder.global_embeddings.weight.is_meta
    assert torch.equal(model(ids, decoder_input_ids=ids[:, :5]).logits, expected)


@torch.no_grad()
def test_mask_first_token_hides_it_from_all():
    model, ids = tiny(mask_first_token=True, num_global_tokens=3)
    other = ids.clone()
    other[:, 0] = 50
    start = ids[:, :5]
    assert torch.equal(model(ids, decoder_input_ids=start).logits, model(other, decoder_input_ids=start).logits)
    states = model.get_encoder()(ids)  # also with precomputed states
    assert torch.equal(
        model(encoder_outputs=states, decoder_input_ids=start).logits, model(ids, decoder_input_ids=start).logits
    )


@pytest.mark.parametrize("length", [1, 15, 32, 33, 256])
@pytest.mark.parametrize("sparsity_type", ["norm", "bos_pooling", "lsh", "none"])
@torch.no_grad()
def test_any_length_and_number_of_globals(length, sparsity_type):
    """The block-wise implementation agrees with the dense reference."""
    for num_globals in (0, 1, 17):
        keys = {"num_global_tokens": num_globals, "sparsity_type": sparsity_type, "adaptive": False}
        model, _ = tiny(LSGBartModel, **keys)
        ids = torch.randint(4, 99, (2, length))
        mask = torch.ones_like(ids)
        mask[1, length // 2 + 1 :] = 0
        states = model.encoder(ids, mask).last_hidden_state
        dense, _ = tiny(LSGBartModel, **keys, attention_implementation="reference")
        expected = dense.encoder(ids, mask).last_hidden_state
        keep = pad(mask, (num_globals, 0), value=1).bool()
        assert states.shape == (2, num_globals + length, 32)
        assert relative_rms(states[keep], expected[keep]) < TOLERANCES[torch.float32]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"head_mask": torch.ones(2, 4)}, "head_mask: expected None, got Tensor"),
        ({"inputs_embeds": torch.zeros(2, 101, 32)}, "exactly one of input_ids and inputs_embeds, got both"),
        ({"attention_mask": torch.ones(2, 103)}, r"attention_mask: expected shape"),
    ],
)
def test_bad_encoder_inputs_are_refused(arguments, message):
    model, ids = tiny(LSGBartModel)
    for call in (model.encoder, model):
        with pytest.raises(ValueError, match=message):
            call(ids, **arguments)


def test_bad_lengths_masks_and_missing_inputs_are_refused():
    model, ids = tiny()
    with pytest.raises(ValueError, match="expected at most max_position_embeddings=256 tokens, got 303"):
        model(ids.repeat(1, 3))
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds, got neither"):
        model.get_encoder()()
    states = model.get_encoder()(ids)
    mask = torch.ones(2, 102)  # wrong: it includes the global token
    with pytest.raises(ValueError, match=r"expected shape \(batch, T\) = \(2, 101\), got \(2, 102\)"):
        model(encoder_outputs=states, attention_mask=mask, decoder_input_ids=ids[:, :3])


@pytest.mark.parametrize("precomputed", [True, False])
@torch.no_grad()
def test_decoder_attentions(precomputed):
    """The encoder has none, which one warning says."""
    model, ids = tiny(attn_implementation="eager")
    given = {"decoder_input_ids": ids[:, :5], "output_attentions": True}
    if precomputed:
        out = model(encoder_outputs=model.get_encoder()(ids), **given)
    else:
        with pytest.warns(UserWarning, match="output_attentions: the encoder's are None"):
            out = model(ids, **given)
        with pytest.warns(UserWarning, match="output_attentions: the encoder's are None") as warned:
            words = model.generate(ids, max_new_tokens=3, output_attentions=True, return_dict_in_generate=True)
        assert len(warned) == 1
        assert len(words.cross_attentions) == len(words.decoder_attentions) == 3
        assert words.encoder_attentions is None
    assert out.encoder_attentions is None
    assert [x.shape for x in out.cross_attentions] == [(2, 4, 5, 102)] * 2
    assert [x.shape for x in out.decoder_attentions] == [(2, 4, 5, 5)] * 2


@torch.no_grad()
def test_question_answering_head_and_decoder_alone():
    """Both work with the weights of a recorded model and agree with its decoder."""
    inputs, _ = recorded(NORM)
    model = seq2seq()
    states = model.model(**inputs).last_hidden_state

    reader = LSGBartForQuestionAnswering.from_pretrained(NORM).eval()
    out = reader(**inputs)
    expected = reader.qa_outputs(states)
    torch.testing.assert_close(torch.stack([out.start_logits, out.end_logits], dim=-1), expected, atol=1e-5, rtol=1e-5)

    decoder = LSGBartForCausalLM(LSGBartConfig.from_pretrained(NORM)).eval()
    decoder.load_state_dict({name: x for name, x in model.state_dict().items() if name in decoder.state_dict()})
    plain = BartForCausalLM(decoder.config).eval()
    plain.load_state_dict(decoder.state_dict())
    ids = inputs["decoder_input_ids"]
    encoded = model.get_encoder()(inputs["input_ids"]).last_hidden_state
    got = decoder(ids, encoder_hidden_states=encoded).logits
    assert torch.equal(got, plain(ids, encoder_hidden_states=encoded).logits)
    torch.testing.assert_close(
        got, model(inputs["input_ids"], decoder_input_ids=ids).logits - model.final_logits_bias, atol=1e-5, rtol=1e-5
    )


@each
def test_generation_repeats_and_takes_precomputed_inputs(folder):
    """Sampling is determined by the seed. Given encoder_outputs or inputs_embeds, the recorded ids come out."""
    inputs, results = recorded(folder)
    given = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    model = seq2seq(folder)
    sampled = []
    for _ in range(2):
        torch.manual_seed(3)
        sampled.append(model.generate(**given, max_new_tokens=16, do_sample=True, num_beams=2))
    assert torch.equal(*sampled)
    with torch.no_grad():
        states = model.get_encoder()(**given)
    early = model.generate(attention_mask=given["attention_mask"], encoder_outputs=states, **GENERATE)
    assert torch.equal(early, results["greedy"])
    with torch.no_grad():
        embeds = model.get_input_embeddings()(given["input_ids"])
    early = model.generate(inputs_embeds=embeds, attention_mask=given["attention_mask"], **GENERATE)
    assert torch.equal(early, results["greedy"])


@pytest.mark.skipif(not RECENT, reason="BART had no static cache before transformers 4.53")
@each
def test_generation_with_a_static_cache(folder):
    inputs, results = recorded(folder)
    inputs.pop("decoder_input_ids")
    out = seq2seq(folder).generate(**inputs, **GENERATE, cache_implementation="static")
    assert torch.equal(out, results["greedy"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@each
@torch.no_grad()
def test_half_precision_error_is_bounded_by_the_reference(folder, dtype):
    """The encoder's error against float64 is less than twice the reference's error in the same dtype."""
    inputs, _ = recorded(folder)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    exact = seq2seq(folder, attention_implementation="reference").double().get_encoder()(ids, mask)[0]
    keep = pad(mask, (exact.shape[1] - ids.shape[1], 0), value=1).bool()
    errors = {}
    for implementation in ("auto", "reference"):
        model = seq2seq(folder, attention_implementation=implementation).to(dtype)
        states = model.get_encoder()(ids, mask)[0]
        assert states.dtype == dtype
        errors[implementation] = relative_rms(states[keep], exact[keep])
        assert model(**inputs).logits.dtype == dtype
    assert errors["auto"] < 2 * errors["reference"]


@torch.no_grad()
def test_float16_overflow_is_clamped_as_in_bart():
    model, ids = tiny(LSGBartModel)
    layer = model.half().encoder.layers[-1]
    layer.final_layer_norm.weight.fill_(6e4)
    assert model.encoder(ids).last_hidden_state.isfinite().all()
