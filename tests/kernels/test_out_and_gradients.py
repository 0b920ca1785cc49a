"""The forward kernels against the reference in float64, on inputs whose padding holds garbage."""

import pytest
import recordings
import torch
from running import (
    DEVICE,
    UNUSUAL_PATTERNS,
    default_inputs,
    dense_scores,
    each_type_and_dtype,
    forward,
    name_of,
    padded_inputs,
    to_double,
    unusual_inputs,
)
from strategies import AWKWARD_SHAPES

from lsg_attn import SPARSITY_TYPES, LSGPattern, lsg_attention
from lsg_attn.compression import lsh_directions
from lsg_attn.fused import launch
from lsg_attn.testing import TOLERANCES, Inputs, assert_close, make_inputs


def reference(inputs, pattern, **options):
    query, key, value, _, mask = to_double(inputs)
    return lsg_attention(query, key, value, pattern, mask, implementation="reference", **options)


def reference_lse(inputs, pattern, directions, scale):
    """The log-sum-exp of each query's scores, +inf where it sees nothing."""
    lse = dense_scores(inputs, pattern, directions, scale)[0].logsumexp(-1)
    return lse.masked_fill(lse == -torch.inf, torch.inf)


def check(inputs, pattern, scale=None):
    """Rows of padding, whose queries are garbage too, need only be finite."""
    heads, head_dim = inputs.query.shape[1], inputs.query.shape[3]
    scale = head_dim**-0.5 if scale is None else scale
    rows = inputs.attention_mask[:, None, :, None]
    results = forward(inputs, pattern, scale=scale)
    out, lse = results.out.cpu(), results.lse.cpu()
    assert out.isfinite().all()
    assert_close("out", out * rows, reference(inputs, pattern, scale=scale) * rows, TOLERANCES[out.dtype])
    expected = reference_lse(inputs, pattern, lsh_directions(pattern, heads, head_dim), scale)
    assert torch.equal(lse.isinf(), expected.isinf())
    seen = rows[..., 0] & expected.isfinite()
    assert_close("lse", lse.where(seen, 0.0), expected.where(seen, 0.0), TOLERANCES[out.dtype])


@pytest.mark.parametrize(
    ("sparsity_type", "dtype", "tokens", "head_dim", "num_globals", "padding"), each_type_and_dtype(AWKWARD_SHAPES)
)
def test_each_type_and_dtype(sparsity_type, dtype, tokens, head_dim, num_globals, padding):
    pattern = LSGPattern(32, 32, 4, sparsity_type, num_globals)
    check(padded_inputs(pattern, tokens, head_dim, dtype, padding), pattern)


@pytest.mark.parametrize("sparsity_type", SPARSITY_TYPES)
def test_blocks_as_large_as_a_tile(sparsity_type):
    pattern = LSGPattern(sparsity_type=sparsity_type)
    check(default_inputs(pattern), pattern)


@pytest.mark.parametrize("pattern", UNUSUAL_PATTERNS, ids=name_of)
def test_unusual_patterns(pattern):
    check(unusual_inputs(pattern), pattern)


@pytest.mark.parametrize("path", recordings.PATHS, ids=lambda path: path.stem)
def test_recording(path):
    """What the original gave (lsg-converter 0.1.9)."""
    pattern, inputs, directions, results = recordings.load(path)
    assert_close("out", forward(inputs, pattern, directions=directions).out.cpu(), results["out"])


@pytest.mark.parametrize(
    ("head_dim", "dtype"),
    [(1, torch.float16), (16, torch.float32), (200, torch.bfloat16), (256, torch.float16), (256, torch.float32)],
)
def test_head_dims(head_dim, dtype):
    pattern = LSGPattern(16, 16, 4, "pooling")
    check(padded_inputs(pattern, 100, head_dim, dtype, "right"), pattern)


def test_masks():
    """Of the tokens or of all positions, of any integer type and strides, and none where all are tokens."""
    pattern = LSGPattern(16, 16, 4, "stride", 3)
    inputs = Inputs(*(x.to(DEVICE) for x in make_inputs(2, 1, 3 + 60, 16, padding="random", num_kept=3)))
    mask = inputs.attention_mask
    expected = forward(inputs, pattern).out
    wide = torch.zeros(2, 63, 2, dtype=torch.int64, device=DEVICE)
    wide[..., 0] = mask * 7
    for same in (mask[:, 3:], mask.int(), wide[..., 0], mask.t().contiguous().t()):
        assert torch.equal(forward(inputs, pattern, attention_mask=same).out, expected)
    ones = inputs._replace(attention_mask=torch.ones_like(mask))
    assert_close("out", forward(inputs, pattern, attention_mask=None).out.cpu(), reference(ones, pattern), 1e-5)


def test_strides():
    """The (batch, length, heads, head_dim) memory of a projection, one query for all heads, columns of a matrix."""
    pattern = LSGPattern(16, 16, 4, "pooling", 3)
    # on the device before they get their strides, as a copy to it would not keep them
    inputs = Inputs(*(x.to(DEVICE) for x in make_inputs(2, 2, 3 + 90, 16, padding="right")))
    expected = forward(inputs, pattern).out
    query, key, value = inputs[:3]
    strided = (
        query.transpose(1, 2).contiguous().transpose(1, 2),
        torch.stack([key, key], -1)[..., 0],
        value.mT.contiguous().mT,
    )
    assert torch.equal(forward(Inputs(*strided, *inputs[3:]), pattern).out, expected)
    expanded = inputs._replace(query=query[:, :1].expand_as(query))
    whole = inputs._replace(query=query[:, :1].repeat(1, 2, 1, 1))
    assert torch.equal(forward(expanded, pattern).out, forward(whole, pattern).out)
    assert expected.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("scale", [1e-3, 1.7, 40.0])
@pytest.mark.parametrize("padding", ["none", "left"])
def test_scales(scale, padding):
    """Without globals, so that some rows see nothing of the first tiles."""
    check(make_inputs(1, 2, 130, 16, padding=padding, garbage=1e3), LSGPattern(16, 16, 4, "stride", 0), scale=scale)


@pytest.mark.parametrize("sizes", [(1 << 30, 0, 0, "none"), (16, (1 << 31) - 1, 4, "pooling")])
def test_sizes_that_mean_no_limit(sizes):
    check(make_inputs(1, 1, 1 + 59, 16), LSGPattern(*sizes))


@pytest.mark.parametrize("sparsity_type", SPARSITY_TYPES)
def test_queries_that_see_nothing(sparsity_type):
    """Everything is padding in one sequence; in the other, all that the first blocks and their slots see."""
    pattern = LSGPattern(16, 16, 4, sparsity_type, 3)
    inputs = make_inputs(2, 2, 3 + 200, 16, torch.float16)
    inputs.attention_mask[0] = False
    inputs.attention_mask[1, : 3 + 160] = False
    results = forward(inputs, pattern)
    assert not results.out[0].any()
    assert (results.lse[0] == torch.inf).all()
    assert not results.out[1, :, 3:19].any()
    assert (results.lse[1, :, 3:19] == torch.inf).all()
    rows = inputs.attention_mask[1, :, None]
    assert_close("out", results.out[1].cpu() * rows, reference(inputs, pattern)[1] * rows)


@pytest.mark.parametrize("shape", [(0, 2, 40, 16), (1, 2, 3, 16), (1, 1, 4, 16)])
def test_nothing_or_globals_alone(shape):
    inputs = make_inputs(*shape)
    pattern = LSGPattern(16, num_global_tokens=3)
    assert_close("out", forward(inputs, pattern).out.cpu(), reference(inputs, pattern), 1e-5)


def test_many_parts_of_the_global_queries(monkeypatch):
    """More parts than the combine takes at once, and some that see nothing."""
    monkeypatch.setattr(launch, "_PART", 16)
    inputs = make_inputs(1, 2, 2 + 40 * 16, 16)
    inputs.attention_mask[:, 16 * 7 : 16 * 9] = False
    check(inputs, LSGPattern(64, num_global_tokens=2, sparsity_type="none"))


@pytest.mark.parametrize("sparsity_type", SPARSITY_TYPES)
def test_as_callers_call_it(sparsity_type):
    """By lsg_attention, whose "auto" takes the kernels."""
    pattern = LSGPattern(16, 16, 4, sparsity_type, 3, lsh_seed=5)
    inputs = make_inputs(2, 2, 3 + 90, 16, torch.float16, "right", num_kept=3)
    query, key, value, _, mask = (x.to(DEVICE) for x in inputs)
    got = lsg_attention(query, key, value, pattern, mask, scale=0.4)
    assert torch.equal(got, forward(inputs, pattern, scale=0.4).out)
    assert_close("out", got.cpu(), reference(inputs, pattern, scale=0.4))


def test_dropout_as_callers_call_it():
    """Seeded by torch.manual_seed."""
    pattern = LSGPattern(16, num_global_tokens=3)
    inputs = make_inputs(1, 2, 3 + 60, 16)
    query, key, value = (x.to(DEVICE) for x in inputs[:3])

    def drop(seed):
        torch.manual_seed(seed)
        return lsg_attention(query, key, value, pattern, dropout_p=0.5, implementation="triton")

    torch.manual_seed(1)
    seed = int(torch.randint(1 << 62, ()))
    assert torch.equal(drop(1), forward(inputs, pattern, attention_mask=None, dropout_p=0.5, seed=seed).out)
    assert not torch.equal(drop(1), drop(2))


@pytest.mark.parametrize("sparsity_type", ["norm", "pooling"])
def test_the_same_bits_again(sparsity_type):
    inputs = make_inputs(2, 2, 3 + 150, 16, torch.float16, padding="random")
    first, again = (
        forward(inputs, LSGPattern(16, 16, 4, sparsity_type, 3), dropout_p=0.1, seed=5).out for _ in range(2)
    )
    assert torch.equal(first, again)
