"""Packed sequences, jagged nested tensors and fewer key heads: each equal to what the reference gives apart."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import patterns
from torch.utils.checkpoint import checkpoint

from lsg_attn import SPARSITY_TYPES, LSGAttention, LSGPattern, lsg_attention, lsg_attention_varlen
from lsg_attn.blockwise import library
from lsg_attn.testing import assert_close

needs_library = pytest.mark.skipif(library.missing_reason() is not None, reason=str(library.missing_reason()))
FAST = ["torch", pytest.param("cpp", marks=needs_library)]
DTYPES = {"reference": torch.float64, "torch": torch.float64, "cpp": torch.float32}
PATTERN = LSGPattern(8, 8, 2, num_global_tokens=2)


def packed(lengths, heads, key_heads, dtype, head_dim=4):
    """Query, key, value and dout (total, heads, head_dim), and cu_seqlens."""
    generator = torch.Generator().manual_seed(0)
    total = sum(lengths)
    shapes = [(total, n, head_dim) for n in (heads, key_heads, key_heads, heads)]
    rows = [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]
    return *(x.requires_grad_() for x in rows[:3]), rows[3], torch.tensor([0, *lengths]).cumsum(0).int()


def apart(query, key, value, dout, cu_seqlens, pattern):
    """Out, log-sum-exp and gradients by the reference in float64: a sequence at a time, a key head for each head."""
    leaves = [x.detach().double().requires_grad_() for x in (query, key, value)]
    group = query.shape[1] // key.shape[1]
    q, k, v = leaves[0], *(x.repeat_interleave(group, 1) for x in leaves[1:])
    outs, lses = [q[:0]], [q[:0, :, 0]]
    for start, stop in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
        if start < stop:
            rows = (x[start:stop].transpose(0, 1).unsqueeze(0) for x in (q, k, v))
            out, lse = lsg_attention(*rows, pattern, implementation="reference", return_lse=True)
            outs.append(out[0].transpose(0, 1))
            lses.append(lse[0].transpose(0, 1))
    out, lse = torch.cat(outs), torch.cat(lses)
    return out, lse, *torch.autograd.grad((out * dout).sum() + lse.sin().sum(), leaves, materialize_grads=True)


def check(got, expected):
    for name, x, y in zip(("out", "lse", "dquery", "dkey", "dvalue"), got, expected, strict=True):
        size = max(expected[4].square().mean().sqrt().item(), 1e-3) if expected[4].numel() else 1.0
        error = (x.double() - y).square().mean().sqrt().item() if y.numel() else 0.0
        bound = 1e-10 if x.dtype == torch.float64 else 3e-6
        assert x.shape == y.shape
        assert error <= bound * max(size, 1.0), f"{name}: error {error:.1e}"


@st.composite
def packings(draw):
    """A pattern, and lengths of sequences: none, globals alone, one token, dense, several blocks."""
    pattern = draw(patterns(causal=None))
    first, block = pattern.num_global_tokens, pattern.block_size
    some = [0, first, first + 1, first + 2 * block, first + 2 * block + 1, first + 5 * block + 3]
    return pattern, draw(st.lists(st.sampled_from(some), max_size=5))


@pytest.mark.parametrize("implementation", ["reference", *FAST])
@given(packing=packings(), group=st.sampled_from([1, 2, 4]))
def test_sequences_are_apart(implementation, packing, group):
    pattern, lengths = packing
    query, key, value, dout, cu_seqlens = inputs = packed(lengths, 4, 4 // group, DTYPES[implementation])
    longest = max(lengths, default=0)
    out, lse = lsg_attention_varlen(
        query, key, value, cu_seqlens, longest, pattern, implementation=implementation, return_lse=True
    )
    loss = (out * dout).sum() + lse.sin().sum()
    grads = torch.autograd.grad(loss, (query, key, value), materialize_grads=True)  # of no row, key has none
    check((out, lse, *grads), apart(*inputs, pattern))


@pytest.mark.parametrize("implementation", FAST)
@pytest.mark.parametrize("sparsity_type", SPARSITY_TYPES)
def test_bits_are_those_of_each_sequence_alone(sparsity_type, implementation):
    pattern = LSGPattern(16, 16, 4, sparsity_type, 2)
    query, key, value, _, cu_seqlens = packed([70, 0, 2, 150, 33], 4, 4, DTYPES[implementation])
    out = lsg_attention_varlen(query, key, value, cu_seqlens.long(), 999, pattern, implementation=implementation)
    for start, stop in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
        rows = (x[start:stop].transpose(0, 1).unsqueeze(0) for x in (query, key, value))
        if start < stop:
            alone = lsg_attention(*rows, pattern, implementation=implementation)
            assert torch.equal(out[start:stop], alone[0].transpose(0, 1))


def test_dropout_differs_between_sequences_and_repeats_in_the_backward():
    """Out is linear in value: its change along a gradient is what the gradient says, if both drop the same."""
    query, key, value, dout, cu_seqlens = packed([60, 60], 2, 1, torch.float64)
    with torch.no_grad():
        for x in (query, key, value):
            x[60:] = x[:60]
    torch.manual_seed(5)
    out = lsg_attention_varlen(query, key, value, cu_seqlens, 60, PATTERN, dropout_p=0.3)
    assert not torch.equal(out[:60], out[60:])
    (dvalue,) = torch.autograd.grad(out, value, dout)
    torch.manual_seed(5)
    moved = lsg_attention_varlen(query, key, value + 0.5 * dvalue, cu_seqlens, 60, PATTERN, dropout_p=0.3)
    torch.testing.assert_close(((moved - out) * dout).sum(), 0.5 * dvalue.square().sum())


@pytest.mark.parametrize("implementation", FAST)
@pytest.mark.parametrize("sparsity_type", SPARSITY_TYPES)
@pytest.mark.parametrize("causal", [False, True])
def test_fewer_key_heads_are_those_repeated(sparsity_type, causal, implementation):
    """In a padded batch with dropout's way through the operator left out; many heads in a group, and few."""
    pattern, dtype = LSGPattern(16, 8, 2, sparsity_type, 3, causal=causal), DTYPES[implementation]
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(2, 83, generator=generator) < 0.7
    mask[:, :4] = True
    query, dout = torch.randn(2, 2, 6, 83, 8, generator=generator, dtype=dtype)
    for key_heads in (1, 2, 3):
        key, value = torch.randn(2, 2, key_heads, 83, 8, generator=generator, dtype=dtype)
        found = []
        for name, group in ((implementation, 1), ("reference", 6 // key_heads)):
            exact = torch.float64 if name == "reference" else dtype
            leaves = [x.detach().to(exact).requires_grad_() for x in (query, key, value)]
            rows = (leaves[0], *(x.repeat_interleave(group, 1) for x in leaves[1:]))
            out = lsg_attention(*rows, pattern, mask, implementation=name)
            found.append((out, *torch.autograd.grad((out * dout * mask[:, None, :, None]).sum(), leaves)))
        for name, x, y in zip(("out", "dquery", "dkey", "dvalue"), *found, strict=True):
            keep = mask[:, None, :, None]
            assert_close(name, x * keep, y * keep, 1e-10 if dtype == torch.float64 else 3e-6)


def nested(rows, cu_seqlens):
    return torch.nested.nested_tensor_from_jagged(rows, cu_seqlens.long()).transpose(1, 2)


@pytest.mark.parametrize("key_heads", [1, 4])
def test_nested_tensors_are_packed_sequences(key_heads):
    query, key, value, dout, cu_seqlens = packed([40, 0, 3, 18], 4, key_heads, torch.float64)
    rows = [nested(x, cu_seqlens) for x in (query, key, value)]
    out, lse = lsg_attention(*rows, PATTERN, return_lse=True)
    assert out.is_nested
    assert out.shape[:2] == (4, 4)
    expected = lsg_attention_varlen(query, key, value, cu_seqlens, 40, PATTERN, return_lse=True)
    torch.testing.assert_close(out.transpose(1, 2).values(), expected[0])
    torch.testing.assert_close(lse.transpose(1, 2).values(), expected[1])
    got = torch.autograd.grad((out.transpose(1, 2).values() * dout).sum(), (query, key, value))
    torch.testing.assert_close(got, torch.autograd.grad((expected[0] * dout).sum(), (query, key, value)))


def test_compiles_with_lengths_that_change():
    """One node of a graph, forward and backward, whatever the lengths."""

    def run(query, key, value, cu_seqlens):
        return lsg_attention_varlen(query, key, value, cu_seqlens, 100, PATTERN).square().sum()

    compiled = torch.compile(run, fullgraph=True, dynamic=True)
    for lengths in ([30, 20], [5, 60, 2, 9]):
        *leaves, _, cu_seqlens = packed(lengths, 4, 2, torch.float32)
        expected = torch.autograd.grad(run(*leaves, cu_seqlens), leaves)
        torch.testing.assert_close(torch.autograd.grad(compiled(*leaves, cu_seqlens), leaves), expected)


@pytest.mark.parametrize("sparsity_type", ["norm", "lsh", "stride"])
def test_layer_takes_packed_rows(sparsity_type):
    layer = LSGAttention(12, 3, LSGPattern(8, 8, 2, sparsity_type, 2)).double()
    lengths = [40, 3, 0, 20]
    rows = torch.randn(63, 12, dtype=torch.float64)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    expected = torch.cat([layer(x.unsqueeze(0))[0] for x in rows.split(lengths) if len(x)])
    torch.testing.assert_close(layer(rows, cu_seqlens=cu_seqlens, max_seqlen=40), expected)
    again = checkpoint(layer, rows.requires_grad_(), cu_seqlens=cu_seqlens, max_seqlen=40, use_reentrant=False)
    torch.testing.assert_close(again, expected)


ROWS = torch.randn(10, 2, 4)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"query": ROWS[None]}, ValueError, r"query: expected 3 dimensions \(total, heads, head_dim\)"),
        ({"key": ROWS[:9]}, ValueError, "key: expected query's shape"),
        ({"key": ROWS.repeat(1, 2, 1)}, ValueError, "a number of heads that divides 2"),
        ({"value": ROWS[:, :1]}, ValueError, "value: expected key's shape"),
        ({"cu_seqlens": [0, 10]}, TypeError, "cu_seqlens: expected a torch.Tensor, got list"),
        ({"cu_seqlens": torch.tensor([0.0, 10.0])}, TypeError, "int32 and int64, got torch.float32"),
        ({"cu_seqlens": torch.tensor([[0, 10]])}, ValueError, r"expected one dimension \(n \+ 1,\)"),
        ({"cu_seqlens": torch.tensor([0, 9])}, ValueError, "expected values from 0 to total = 10, got 0 to 9"),
        ({"cu_seqlens": torch.tensor([1, 10])}, ValueError, "got 1 to 10"),
        ({"cu_seqlens": torch.tensor([0, 9, 10])}, ValueError, "at least num_global_tokens=2, got one of 1"),
        ({"cu_seqlens": torch.tensor([0, 8, 4, 10])}, ValueError, "got one of -4"),
        ({"max_seqlen": 9}, ValueError, "max_seqlen: expected at least the longest sequence's 10, got 9"),
        ({"max_seqlen": 9.5}, TypeError, "max_seqlen: expected an int"),
        ({"implementation": "triton"}, ValueError, "cannot run"),
    ],
)
def test_errors(change, error, message):
    arguments = {"query": ROWS, "key": ROWS, "value": ROWS, "cu_seqlens": torch.tensor([0, 10]), "max_seqlen": 10}
    with pytest.raises(error, match=message):
        lsg_attention_varlen(**(arguments | {"pattern": PATTERN} | change))


def test_errors_of_nested_tensors():
    rows = torch.randn(10, 2, 4)
    a, b = nested(rows, torch.tensor([0, 4, 10])), nested(rows, torch.tensor([0, 5, 10]))
    with pytest.raises(ValueError, match="key: expected query's lengths"):
        lsg_attention(a, b, a, PATTERN)
    with pytest.raises(ValueError, match="attention_mask: expected None for nested tensors"):
        lsg_attention(a, a, a, PATTERN, torch.ones(2, 6))
    with pytest.raises(ValueError, match="value: expected a jagged nested tensor"):
        lsg_attention(a, a, torch.randn(2, 2, 6, 4), PATTERN)


def test_errors_of_the_layer():
    layer = LSGAttention(8, 2, PATTERN)
    cu_seqlens = torch.tensor([0, 10])
    with pytest.raises(ValueError, match=r"expected shape \(total, 8\), got \(1, 10, 8\)"):
        layer(torch.randn(1, 10, 8), cu_seqlens=cu_seqlens, max_seqlen=10)
    with pytest.raises(ValueError, match="max_seqlen: expected an int with cu_seqlens"):
        layer(torch.randn(10, 8), cu_seqlens=cu_seqlens)
    with pytest.raises(ValueError, match="max_seqlen: expected None without cu_seqlens"):
        layer(torch.randn(1, 10, 8), max_seqlen=10)
    with pytest.raises(ValueError, match="attention_mask: expected None with cu_seqlens"):
        layer(torch.randn(10, 8), torch.ones(1, 10), cu_seqlens=cu_seqlens, max_seqlen=10)
