"""Heads of queries that share a head of keys, and heads that are a part of a larger call's."""

import pytest
import torch
from comparing import assert_equals_reference, assert_same_bits, check, with_repeated_keys
from running import DTYPES, Attended, attend, call_of, forward, grouped, padded_inputs, use_parts_of

from lsg_attn import SPARSITY_TYPES, LSGPattern
from lsg_attn.fused import variant
from lsg_attn.testing import Inputs, make_inputs

GROUPS = [(4, 2), (6, 3), (4, 4)]  # (heads, heads that share keys)
SHAPES = [(7 * 32 - 3, 40, 17, "middle"), (5 * 32 + 1, 24, 0, "left"), (4 * 32, 64, 2, "random")]


@pytest.mark.parametrize("sparsity_type", SPARSITY_TYPES)
def test_shared_keys(sparsity_type):
    """Equal to repeating them: each head compresses them anew. Every other pattern is causal."""
    i = SPARSITY_TYPES.index(sparsity_type)
    (heads, group), (tokens, head_dim, num_globals, padding) = GROUPS[i % 3], SHAPES[i % 3]
    pattern = LSGPattern(32, 32, 4, sparsity_type, num_globals, causal=i % 2 == 1)
    inputs = padded_inputs(pattern, tokens, head_dim, DTYPES[(i + i // 3) % 3], padding, heads)
    check(grouped(inputs, group), pattern)


@pytest.mark.every_kernel
@pytest.mark.parametrize("sparsity_type", ["norm", "bos_pooling"])
def test_shared_keys_change_no_bit_of_out(sparsity_type):
    """Blocks are as large as a tile. The gradients of keys are sums over heads."""
    pattern = LSGPattern(sparsity_type=sparsity_type)
    inputs = grouped(padded_inputs(pattern, 3 * 128 - 60, 64, torch.bfloat16, "ends", 2), 2)
    got, expected = attend(inputs, pattern), attend(with_repeated_keys(inputs), pattern)
    for name in ("out", "lse", "dquery"):
        assert torch.equal(getattr(got, name), getattr(expected, name)), name
    assert_equals_reference(got, inputs, pattern)


def test_shared_keys_and_parts_of_the_globals(monkeypatch):
    """Each head has parts of the gradients of the global keys that it shares."""
    use_parts_of(16, monkeypatch)
    pattern = LSGPattern(32, 32, 4, "bos_pooling", 20)
    check(grouped(make_inputs(2, 4, 20 + 100, 16, padding="random", num_kept=21), 2), pattern)


def test_shared_keys_with_offsets_of_64_bits(monkeypatch):
    """Twice, with the same bits."""
    monkeypatch.setattr(variant, "_INT32", 0)
    pattern = LSGPattern(32, 32, 4, "lsh", 3)
    inputs = grouped(padded_inputs(pattern, 100, 16, torch.float32, "ends", 4), 2)
    assert variant.variant_of(call_of(inputs, pattern)).is_wide
    got = attend(inputs, pattern)
    assert_equals_reference(got, inputs, pattern)
    assert_same_bits(attend(inputs, pattern), got)


@pytest.mark.parametrize(("group", "first", "causal"), [(1, 1, False), (2, 2, True)])
@pytest.mark.parametrize("sparsity_type", ["stride", "block_stride"])
def test_heads_that_are_a_part_of_others(sparsity_type, group, first, causal):
    """With the number of the first, they choose the tokens that they choose among all heads."""
    pattern = LSGPattern(32, 32, 4, sparsity_type, 3, causal=causal)
    inputs = grouped(padded_inputs(pattern, 100, 16, torch.float32, "random", 4), group)
    queries, keys = slice(first, first + 2), slice(first // group, (first + 2) // group)
    query, key, value, dout, mask = inputs
    part = Inputs(query[:, queries], key[:, keys], value[:, keys], dout[:, queries], mask)
    out, lse, dquery, dkey, dvalue = attend(inputs, pattern)
    expected = Attended(out[:, queries], lse[:, queries], dquery[:, queries], dkey[:, keys], dvalue[:, keys])
    assert_same_bits(attend(part, pattern, first_head=4 + first), expected)
    assert not torch.equal(forward(part, pattern).out, expected.out)
