"""The log-sum-exp that attention returns beside its output, and its gradient."""

import pytest
import torch
from hypothesis import given, settings
from strategies import cases

from lsg_attn import SPARSITY_TYPES, LSGPattern, lsg_attention
from lsg_attn.blockwise import library
from lsg_attn.compression import Tokens, compress
from lsg_attn.reference import visible_slots, visible_tokens
from lsg_attn.testing import TOLERANCES, make_inputs

needs_library = pytest.mark.skipif(library.missing_reason() is not None, reason=str(library.missing_reason()))
F64 = torch.float64
EACH = [
    ("reference", F64),
    ("torch", F64),
    ("torch", torch.float32),
    pytest.param("cpp", torch.float32, marks=needs_library),
    pytest.param("cpp", torch.bfloat16, marks=needs_library),
    ("torch", torch.bfloat16),
]


def exact(query, key, value, mask, pattern):
    """Out and log-sum-exp from all scores, in float64; -inf where a query sees nothing."""
    first, length = pattern.num_global_tokens, query.shape[2]
    visible = visible_tokens(pattern, length) & mask[:, None, None]
    tokens = Tokens(query[:, :, first:], key[:, :, first:], mask[:, first:], query.shape[3] ** -0.5)
    if (compression := compress(pattern, tokens)) is not None:
        slots = visible_slots(pattern, length) & compression.keep[:, :, None]
        visible = torch.cat([visible.expand(*slots.shape[:3], -1), slots], 3)
        key, value = (torch.cat([x, compression.apply(x[:, :, first:])], 2) for x in (key, value))
    scores = (query @ key.mT * query.shape[3] ** -0.5).masked_fill(~visible, -torch.inf)
    lse = scores.logsumexp(-1)
    sees_nothing = (lse == -torch.inf).unsqueeze(-1)
    return (scores - lse.unsqueeze(-1)).exp().masked_fill(sees_nothing, 0) @ value, lse


def differentiate(attend, inputs, dlse, uses_out=True):
    """Out, log-sum-exp, and the gradients of their sums with dout and dlse, where that is finite."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs[:3]]
    out, lse = attend(*leaves)
    loss = (lse.masked_fill(lse == -torch.inf, 0) * dlse).sum()
    if uses_out:
        loss = loss + (out * inputs.dout).sum()
    return out, lse, *torch.autograd.grad(loss, leaves, allow_unused=True)


def check(pattern, inputs, implementation, uses_out=True):
    """Compare with float64; where a gradient vanishes, with the size of the others."""
    mask, dtype = inputs.attention_mask, inputs.query.dtype
    dlse = torch.randn(inputs.query.shape[:3], generator=torch.Generator().manual_seed(1), dtype=F64)

    def attend(*x):
        return lsg_attention(*x, pattern, mask, implementation=implementation, return_lse=True)

    doubles = inputs._replace(**{name: getattr(inputs, name).double() for name in ("query", "key", "value", "dout")})
    expected = differentiate(lambda *x: exact(*x, mask, pattern), doubles, dlse, uses_out)
    got = differentiate(attend, inputs, dlse.to(torch.promote_types(dtype, torch.float32)), uses_out)
    assert got[1].dtype == torch.promote_types(dtype, torch.float32)
    assert torch.equal(got[1] == -torch.inf, expected[1] == -torch.inf)
    for x, y in zip(got, expected, strict=True):
        x, y = (torch.zeros_like(inputs.value, dtype=F64) if z is None else z.double() for z in (x, y))
        finite = y.isfinite()
        error, size = ((z[finite] ** 2).mean().sqrt().item() if finite.any() else 0.0 for z in (x - y, y))
        assert error <= TOLERANCES[dtype] * max(size, 0.1), (error, size)


@pytest.mark.parametrize(("implementation", "dtype"), EACH)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("sparsity_type", SPARSITY_TYPES)
def test_each_type(sparsity_type, causal, implementation, dtype):
    """Rows of the last batch entry see nothing."""
    pattern = LSGPattern(16, 16, 4, sparsity_type, 3, causal=causal)
    inputs = make_inputs(3, 4, 3 + 93, 16, dtype, "random", num_kept=4)
    inputs.attention_mask[2] = False
    if sparsity_type in ("norm", "lsh") and dtype != F64:
        # in float64 as in the inputs' dtype the same tokens are chosen
        inputs = inputs._replace(key=(inputs.key * 8).round() / 8)
    check(pattern, inputs, implementation)


@pytest.mark.parametrize("implementation", ["torch", pytest.param("cpp", marks=needs_library)])
@settings(max_examples=80)
@given(case=cases(causal=None))
def test_small_patterns(implementation, case):
    pattern, length, padding = case
    dtype = F64 if implementation == "torch" else torch.float32
    check(pattern, make_inputs(2, 3, length, 4, dtype, padding), implementation)


@pytest.mark.parametrize("implementation", ["reference", "torch", pytest.param("cpp", marks=needs_library)])
def test_a_loss_of_the_log_sum_exp_alone(implementation):
    """No gradient reaches the output, and none the values."""
    check(LSGPattern(16, 16, 4, "pooling", 2), make_inputs(2, 2, 2 + 70, 8), implementation, uses_out=False)


@pytest.mark.parametrize("implementation", ["reference", "torch", pytest.param("cpp", marks=needs_library)])
@pytest.mark.parametrize("sparsity_type", ["none", "stride", "block_stride"])
def test_parts_of_the_keys_merge(sparsity_type, implementation):
    """Attention over two halves of the keys, each weighted by the exponential of its log-sum-exp, is that over all."""
    pattern = LSGPattern(16, 16, 4, sparsity_type, 3)
    inputs = make_inputs(2, 4, 3 + 93, 8)
    half = torch.rand(inputs.attention_mask.shape, generator=torch.Generator().manual_seed(0)) < 0.5
    half[1] = True  # the other half has no key
    whole, *parts = (
        lsg_attention(*inputs[:3], pattern, mask, implementation=implementation, return_lse=True)
        for mask in (inputs.attention_mask, half, ~half)
    )
    lse = torch.stack([part[1] for part in parts])
    weights = lse.softmax(0).unsqueeze(-1)
    torch.testing.assert_close(lse.logsumexp(0), whole[1], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        sum(w * part[0] for w, part in zip(weights, parts, strict=True)), whole[0], atol=1e-5, rtol=1e-5
    )


def test_it_compiles_with_its_gradient():
    pattern, inputs = LSGPattern(16, 16, 4, "norm", 3), make_inputs(1, 2, 3 + 90, 8)
    dlse = torch.randn(1, 2, 93)

    def attend(*x):
        return lsg_attention(*x, pattern, return_lse=True)

    expected = differentiate(attend, inputs, dlse)
    got = differentiate(torch.compile(attend, fullgraph=True), inputs, dlse)
    torch.testing.assert_close(got, expected)
