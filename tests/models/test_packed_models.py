"""Padding-free batches: documents packed by transformers' collator give the states that each has alone."""

import inspect

import pytest
import torch
from family_recordings import SEQ2SEQ, tiny
from transformers import DataCollatorWithFlattening

from lsg_attn.models.families import FAMILIES

ENCODERS = [family for family in FAMILIES if family not in SEQ2SEQ]
each_family = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.title)
each_encoder = pytest.mark.parametrize("family", ENCODERS, ids=lambda family: family.title)
LENGTHS = (90, 1, 33, 5)
pytestmark = pytest.mark.filterwarnings("ignore:`.*gradient_checkpointing.*` is deprecated")


def documents():
    """Documents of several lengths, and the collator's packing of them."""
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(5, 90, (n,), generator=generator) for n in LENGTHS]
    collate = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_position_ids=False)
    batch = collate([{"input_ids": x.tolist()} for x in ids])
    batch.pop("labels")
    return ids, dict(batch)


def encoder_of(model):
    return model.get_encoder() if model.config.is_encoder_decoder else model


@each_family
@pytest.mark.parametrize("pool_with_global", [True, False])
@torch.no_grad()
def test_packed_documents_are_apart(family, pool_with_global):
    model = encoder_of(tiny(family, pad_token_id=98))
    model.config.pool_with_global = pool_with_global
    ids, batch = documents()
    got = model(**batch)
    alone = [model(x.unsqueeze(0)) for x in ids]
    states, num_globals = got.last_hidden_state, model.config.num_global_tokens
    expected = torch.cat([x.last_hidden_state for x in alone], dim=1)
    torch.testing.assert_close(states, expected, atol=1e-5, rtol=1e-5)
    if getattr(got, "pooler_output", None) is not None:
        torch.testing.assert_close(got.pooler_output, torch.cat([x.pooler_output for x in alone]), atol=1e-5, rtol=1e-5)
    all_states = model(**batch, output_hidden_states=True).hidden_states
    assert {x.shape[1] for x in all_states} == {sum(LENGTHS) + num_globals * len(LENGTHS)}


@each_encoder
def test_gradients_reach_all_with_checkpointing(family):
    model = tiny(family, pad_token_id=98).train()  # without dropout
    _, batch = documents()
    grads = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.zero_grad()
        model(**batch).last_hidden_state.square().sum().backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert any("global_embeddings" in name for name in grads[0])
    torch.testing.assert_close(*grads)


@each_encoder
@torch.no_grad()
def test_heads_give_what_they_give_alone_or_refuse(family):
    """The logits of each token or document."""
    ids, batch = documents()
    refused = set()
    for cls in family.models[1:]:
        model = tiny(family, cls, pad_token_id=98)
        if "cu_seq_lens_q" not in inspect.signature(cls.forward).parameters and not takes_any(cls.forward):
            continue  # of an older transformers
        if not getattr(model, model.base_model_prefix).packs_documents:
            with pytest.raises(ValueError, match="cu_seq_lens_q: expected None, as the model's head"):
                model(**batch)
            refused.add(cls.__name__.rpartition("For")[2])
            continue
        got = model(**batch)[0]
        alone = [model(x.unsqueeze(0))[0] for x in ids]
        torch.testing.assert_close(got, torch.cat(alone, dim=1 if got.dim() == 3 else -2), atol=1e-5, rtol=1e-5)
    assert not refused & {"MaskedLM", "TokenClassification", "CausalLM"}


def takes_any(function):
    return any(x.kind == x.VAR_KEYWORD for x in inspect.signature(function).parameters.values())


@torch.no_grad()
def test_causal_documents_are_apart():
    family = next(x for x in ENCODERS if x.title == "BERT")
    model = tiny(family, pad_token_id=98, is_decoder=True)
    ids, batch = documents()
    expected = torch.cat([model(x.unsqueeze(0)).last_hidden_state for x in ids], dim=1)
    torch.testing.assert_close(model(**batch).last_hidden_state, expected, atol=1e-5, rtol=1e-5)


def test_what_cannot_be_packed_is_refused():
    family = next(x for x in ENCODERS if x.title == "BERT")
    model = tiny(family)
    _, batch = documents()
    for change, message in (
        ({"attention_mask": torch.ones_like(batch["input_ids"])}, "attention_mask: expected none with cu_seq_lens_q"),
        ({"max_length_q": None}, "expected both for packed documents"),
        ({"max_length_q": 50, "max_length_k": None}, "at most max_length_q=50 apart"),
        ({"max_length_k": 7}, "max_length_k: expected max_length_q = 90, got 7"),
        ({"cu_seq_lens_k": batch["cu_seq_lens_q"] + 1}, "cu_seq_lens_k: expected cu_seq_lens_q"),
        ({"input_ids": batch["input_ids"].expand(2, -1)}, "packed into a batch of 1, got one of 2"),
        ({"input_ids": batch["input_ids"][:, 1:]}, "expected increasing values from 0 to 128"),
    ):
        with pytest.raises(ValueError, match=message):
            model(**(batch | change))
    model.config.mask_first_token = True
    with pytest.raises(ValueError, match=r"config.mask_first_token: expected none"):
        model(**batch)


def test_an_encoder_decoder_refuses_packed_documents():
    model = tiny(SEQ2SEQ[0])
    _, batch = documents()
    with pytest.raises(ValueError, match="cu_seq_lens_q: expected None, as the decoder would see all"):
        model(**batch, decoder_input_ids=torch.ones(1, 3, dtype=torch.int64))
