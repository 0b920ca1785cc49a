"""Comparison with lsg-converter's models, which need an old transformers: each type, head and flag."""

import pytest
import torch
import transformers
from checkpoints import BASE, TINY
from packaging.version import Version

import lsg_attn.bart
from lsg_attn.testing import relative_rms

if Version(transformers.__version__) >= Version("4.48"):
    pytest.skip("lsg-converter raises a NameError since transformers 4.48", allow_module_level=True)

original = pytest.importorskip("lsg_converter.bart.modeling_lsg_bart")

HEADS = ("Model", "ForConditionalGeneration", "ForSequenceClassification", "ForQuestionAnswering", "ForCausalLM")


def pair(head, **keys):
    """The original model and ours, with the same weights."""
    torch.manual_seed(0)
    theirs = getattr(original, f"LSGBart{head}")(original.LSGBartConfig(**TINY, **keys)).eval()
    ours = getattr(lsg_attn.bart, f"LSGBart{head}")(lsg_attn.bart.LSGBartConfig(**TINY, **keys)).eval()
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def inputs(model, length=128):
    """Ids (2, length), each document with one EOS at its end, and their mask."""
    ids = torch.randint(4, 99, (2, length))
    mask = torch.ones_like(ids)
    mask[1, 90:] = 0
    ids[:, 0], ids[0, -1], ids[1, 89], ids[1, 90:] = 0, 2, 2, 1
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("sparsity_type", ["norm", "pooling", "stride", "block_stride", None])
def test_outputs_and_gradients_of_each_head(head, sparsity_type):
    theirs, ours = pair(head, sparsity_type=sparsity_type, num_global_tokens=3)
    given = inputs(ours)
    weights = None  # of the loss: the plain sum of a layer norm's output has no gradient
    outputs = {}
    for model in (theirs, ours):
        copies = {name: x.clone() for name, x in given.items()}
        out = model(**copies, use_cache=False)
        first = next(x for x in out.to_tuple() if x.is_floating_point())
        weights = torch.randn_like(first) if weights is None else weights
        (first * weights).sum().backward()
        outputs[model] = first.detach()
    assert relative_rms(outputs[ours], outputs[theirs]) < 1e-5
    gradients = dict(ours.named_parameters())
    seen = 0
    for name, parameter in theirs.named_parameters():
        if parameter.grad is None or name.endswith("k_proj.bias"):  # the latter's gradient is only rounding error
            continue
        assert relative_rms(gradients[name].grad, parameter.grad) < 1e-4, name
        seen += 1
    assert seen > 20


@pytest.mark.parametrize("passes", [True, False])
@pytest.mark.parametrize("pools", [True, False])
@pytest.mark.parametrize("masks", [True, False])
@torch.no_grad()
def test_flags(passes, pools, masks):
    keys = {"pass_global_tokens_to_decoder": passes, "pool_with_global": pools or masks, "mask_first_token": masks}
    theirs, ours = pair("ForConditionalGeneration", **keys, num_global_tokens=2, sparsity_type="norm")
    given = inputs(ours, length=99)
    given["attention_mask"][:] = 1
    expected = theirs(**{name: x.clone() for name, x in given.items()})
    got = ours(**given)
    assert relative_rms(got.logits, expected.logits) < 1e-5
    assert relative_rms(got.encoder_last_hidden_state, expected.encoder_last_hidden_state) < 1e-5


@pytest.mark.filterwarnings("ignore:The `use_auth_token` argument")
@pytest.mark.parametrize(("positions", "length"), [(64, 100), (512, 700), (1024, 4096), (600, 500), (4096, 8192)])
def test_conversion(positions, length, tmp_path):
    """All tensors are equal, except global tokens with random positions: the random numbers differ."""
    from lsg_converter import LSGConverter
    from transformers import AutoTokenizer, BartConfig, BartForConditionalGeneration

    torch.manual_seed(0)
    keys = {**TINY, "vocab_size": 600, "max_position_embeddings": positions}
    source = BartForConditionalGeneration(BartConfig(**keys, architectures=["BartForConditionalGeneration"]))
    source.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(BASE).save_pretrained(tmp_path)
    theirs, _ = LSGConverter(max_sequence_length=length).convert_from_pretrained(str(tmp_path), num_global_tokens=4)
    ours, _ = lsg_attn.bart.convert(tmp_path, length, num_global_tokens=4)
    states = ours.state_dict()
    assert states.keys() == theirs.state_dict().keys()
    for name, expected in theirs.state_dict().items():
        got = states[name]
        if "global_embeddings" in name and positions < 512:
            keep = torch.tensor([j for j in range(512) if (j % 8) * 64 + j // 8 < positions])
            order = (keep % 8) * 64 + keep // 8
            assert len(order) == positions
            got, expected = got[keep], expected[keep]
        assert torch.equal(got, expected), name
