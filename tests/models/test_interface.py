"""attn_implementation="lsg" in plain encoders: equal to dense masks, and refused where it would be wrong."""

import copy

import pytest
import torch
import transformers
from family_recordings import tiny
from packaging.version import Version
from transformers import AutoModel, BertConfig, BertModel, RobertaConfig, RobertaModel

from lsg_attn import LSGPattern
from lsg_attn.compression import Tokens, compress
from lsg_attn.models import use_lsg
from lsg_attn.models.bert import BERT
from lsg_attn.reference import visible_in_slots, visible_slots, visible_tokens

SUPPORTED = Version(transformers.__version__) >= Version("5.0.1")
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 99}
SIZES |= {"max_position_embeddings": 256, "initializer_range": 0.2, "pad_token_id": 1}
needs_interface = pytest.mark.skipif(not SUPPORTED, reason="transformers before 5 has no such interface for encoders")


def modern_bert(**keys):
    from transformers import ModernBertConfig, ModernBertModel

    special = {"bos_token_id": 2, "eos_token_id": 3, "cls_token_id": 2, "sep_token_id": 3}
    config = ModernBertConfig(**SIZES, **special, local_attention=16, **keys)
    torch.manual_seed(0)
    return ModernBertModel(config).eval()


def bert(**keys):
    torch.manual_seed(0)
    return BertModel(BertConfig(**SIZES, **keys)).eval()


def roberta(**keys):
    torch.manual_seed(0)
    return RobertaModel(RobertaConfig(**SIZES, **keys)).eval()


def document(length, padding):
    """Ids (2, length) and their mask; the second row has padding on the side that is asked for."""
    ids = torch.randint(5, 99, (2, length), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    if padding == "right":
        mask[1, -20:] = 0
    elif padding == "left":
        mask[1, :20] = 0
    return ids, mask


def dense_mask(pattern, mask, heads=4):
    """(batch, heads, T, T) bool: who sees whom, as tokens; for patterns whose compressed keys are tokens."""
    length = mask.shape[1]
    rows = torch.zeros(1, heads, length - pattern.num_global_tokens, 2)
    keep = torch.ones(1, length - pattern.num_global_tokens, dtype=torch.bool)
    compression = compress(pattern, Tokens(rows, rows, keep, 1.0))
    seen = visible_tokens(pattern, length).expand(heads, -1, -1).clone()
    if compression is not None:
        slots = visible_slots(pattern, length)
        for head in range(heads):
            seen[head, :, pattern.num_global_tokens :] |= visible_in_slots(slots, compression, head)
    return seen & mask.bool()[:, None, None, :]


@needs_interface
@pytest.mark.parametrize("make", [modern_bert, bert, roberta])
@pytest.mark.parametrize("padding", ["none", "right", "left"])
@pytest.mark.parametrize("sparsity_type", ["none", "stride", "block_stride"])
@torch.no_grad()
def test_equals_a_dense_mask(make, padding, sparsity_type):
    pattern = LSGPattern(8, 8, 2, sparsity_type, num_global_tokens=2)
    ids, mask = document(101, padding)
    plain, model = make(attn_implementation="sdpa"), use_lsg(make(), pattern)
    keep = mask.bool()
    if make is modern_bert:  # its first layer is dense, its second has a window: compare the first
        plain.config.layer_types = model.config.layer_types = ["full_attention", "full_attention"]
        plain, model = (
            type(x)._from_config(x.config, attn_implementation=y) for x, y in ((plain, "sdpa"), (model, "lsg"))
        )
        model.load_state_dict(plain.state_dict())
        plain, model = plain.eval(), model.eval()
    # positions must not depend on the mask's shape
    positions = {"position_ids": torch.arange(101)[None] + (2 if make is roberta else 0)}
    expected = plain(ids, attention_mask=dense_mask(pattern, mask), **positions).last_hidden_state
    got = model(ids, attention_mask=mask, **positions).last_hidden_state
    torch.testing.assert_close(got[keep], expected[keep], atol=1e-5, rtol=1e-5)
    full = plain(ids, attention_mask=mask, **positions).last_hidden_state
    assert not torch.allclose(full[keep], expected[keep], atol=1e-3)


@needs_interface
@pytest.mark.parametrize("make", [modern_bert, bert, roberta])
@pytest.mark.parametrize("padding", ["none", "right", "left"])
@torch.no_grad()
def test_short_documents_equal_sdpa(make, padding):
    """Attention is then full; a layer with a sliding window keeps it."""
    ids, mask = document(101, padding)
    plain, model = make(attn_implementation="sdpa"), make(attn_implementation="lsg")
    got, expected = (x(ids, attention_mask=mask).last_hidden_state[mask.bool()] for x in (model, plain))
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    if make is modern_bert:
        assert "sliding_attention" in model.config.layer_types


@needs_interface
def test_gradients_and_saved_pattern(tmp_path):
    pattern = LSGPattern(8, 8, 2, "pooling")
    model = use_lsg(bert(), pattern)
    ids, mask = document(101, "right")
    model(ids, mask).last_hidden_state.square().mul(torch.linspace(-1, 1, 32)).sum().backward()
    assert all(x.grad is not None for name, x in model.named_parameters() if "pooler" not in name)
    model.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path, attn_implementation="lsg").eval()
    with torch.no_grad():
        # A copy: weights mapped from a file may not be aligned to vectors, which changes how some CPUs' matmul rounds.
        assert torch.equal(copy.deepcopy(again)(ids, mask)[0], model(ids, mask)[0])
        assert not torch.allclose(AutoModel.from_pretrained(tmp_path)(ids, mask)[0], model(ids, mask)[0], atol=1e-3)


@needs_interface
def test_what_would_be_wrong_is_refused():
    ids, mask = document(40, "right")
    model = bert(attn_implementation="lsg")
    with pytest.raises(ValueError, match=r"expected a mask \(batch, T\) of padding, got shape \(2, 1, 40, 40\)"):
        model(ids, attention_mask=torch.ones(2, 1, 40, 40, dtype=torch.bool))
    decoder = bert(attn_implementation="lsg", is_decoder=True, add_cross_attention=True)
    with pytest.raises(ValueError, match="expected an encoder whose tokens all see each other"):
        decoder(ids, attention_mask=mask)
    for folder in (
        transformers.BartModel(transformers.BartConfig(d_model=16, encoder_layers=1, decoder_layers=1, vocab_size=99)),
        decoder,
    ):
        with pytest.raises(ValueError, match=r"expected an encoder, got a .*, which decodes"):
            use_lsg(folder)
    gpt = transformers.GPT2Model(transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=99))
    gpt.set_attn_implementation("lsg")
    with pytest.raises(ValueError, match="expected an encoder"):
        gpt(ids, attention_mask=mask)
    with pytest.raises(ValueError, match="got a LSGBertModel, which has LSG attention"):
        use_lsg(tiny(BERT))


def test_bad_arguments():
    with pytest.raises(TypeError, match="pattern: expected an LSGPattern, got dict"):
        use_lsg(bert(), {"block_size": 8})
    with pytest.raises(TypeError, match="model: expected a model of transformers, got Linear"):
        use_lsg(torch.nn.Linear(2, 2))
    if not SUPPORTED:
        with pytest.raises(ValueError, match=r"expected transformers >= 5.0.1.*got"):
            use_lsg(bert())
    else:
        with pytest.raises(ValueError, match="pattern: expected one that is not causal"):
            use_lsg(bert(), LSGPattern(causal=True))
