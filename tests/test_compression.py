"""Each compression against its definition, written out token by token."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import HEADS, patterns

from lsg_attn import LSGPattern
from lsg_attn.compression import Tokens, compress, lsh_directions, slots_of

TYPES = ("norm", "pooling", "bos_pooling", "stride", "block_stride", "lsh")


def expected_map(pattern, query, key, keep, head, scale):
    """{slot: {token: weight}} and the kept slots, for one head; query and key (T, head_dim), keep a list."""
    num_tokens, size, f = len(keep), pattern.block_size, pattern.sparsity_factor
    padded = -(-num_tokens // size) * size
    kept = [keep[t] if t < num_tokens else False for t in range(padded)]
    slots = {n: {} for n in range(padded // f)}
    kind = pattern.compression
    if kind == "identity":
        slots = {t: {t: 1.0} for t in range(padded)}
    elif kind == "stride":
        slots = {n: {n * f + head % f: 1.0} for n in slots}
    elif kind == "block_stride":
        step = pattern.step
        slots = {n: {n // step * size + (head * step + n % step) % size: 1.0} for n in slots}
    elif kind == "norm":
        c = pattern.chunk
        for start in range(0, padded, c):
            order = sorted(
                range(start, start + c), key=lambda t: (-key[t].norm().item() if kept[t] else 1.0, t)
            )  # padding last, ties by position
            for j, t in enumerate(reversed(order[: c // f])):  # ascending norm
                slots[start // f + j] = {t: 1.0}
    elif kind in ("pooling", "bos_pooling"):
        for n in slots:
            group = [t for t in range(n * f, n * f + f) if kept[t]]
            if kind == "pooling":
                slots[n] = {t: 1 / (len(group) + 1e-6) for t in group}
            elif group:
                weights = torch.softmax(torch.stack([query[0] @ key[t] for t in group]) * scale, 0)
                slots[n] = dict(zip(group, weights.tolist(), strict=True))
    else:
        directions = [d[head].double() for d in lsh_directions(pattern, HEADS, key.shape[1])]
        c = pattern.chunk
        for start in range(0, padded, c):
            rows = [
                (key[t] if kept[t] else torch.zeros_like(key[0]), [t] if kept[t] else [])
                for t in range(start, start + c)
            ]
            for m, direction in zip(pattern.lsh_buckets, directions, strict=True):
                buckets = [(torch.zeros_like(key[0]), []) for _ in range(m)]
                for x, members in rows:
                    unit = x / x.norm() if members and x.norm() > 0 else torch.zeros_like(x)
                    products = unit @ direction
                    to = int(torch.cat([products, -products]).argmax()) if m > 1 else 0
                    buckets[to] = (buckets[to][0] + x, buckets[to][1] + members)
                rows = buckets
            for j, (_, members) in enumerate(rows):
                slots[start // f + j] = {t: 1 / (len(members) + 1e-8) for t in members}
    return slots, [any(kept[t] for t in slots[n]) for n in slots]


@given(patterns(types=TYPES), st.data())
def test_map_equals_the_definition(pattern, data):
    num_tokens = data.draw(st.integers(2 * pattern.block_size + 1, 5 * pattern.block_size + 1))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    query, key = (torch.randn(1, HEADS, num_tokens, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    keep = torch.rand(1, num_tokens, generator=generator) < data.draw(st.sampled_from([0.0, 0.3, 0.8, 1.1]))
    scale = data.draw(st.sampled_from([0.5, 1.7]))
    compression = compress(pattern, Tokens(query, key, keep, scale))
    if not pattern.has_sparse:
        assert compression is None
        return
    for head in range(HEADS):
        full_key = torch.nn.functional.pad(key[0, head], (0, 0, 0, pattern.block_size))
        slots, kept = expected_map(pattern, query[0, head], full_key, keep[0].tolist(), head, scale)
        assert compression.keep[0, head].tolist() == kept
        weights = torch.zeros(len(slots), num_tokens, dtype=torch.float64)
        for n, members in slots.items():
            for t, weight in members.items():
                if t < num_tokens and keep[0, t]:
                    weights[n, t] = weight
        got = torch.zeros_like(weights)
        got[compression.slot[0, head], torch.arange(num_tokens)] = compression.weight[0, head].double()
        torch.testing.assert_close(got, weights, rtol=1e-12, atol=1e-12)
        if compression.token is not None:
            chosen = compression.token[0, head]
            assert [n for n in range(len(slots)) if kept[n] and {int(chosen[n])} != set(slots[n])] == []


@given(patterns(types=TYPES), st.integers(0, 99))
def test_transpose_is_the_adjoint_of_apply(pattern, seed):
    generator = torch.Generator().manual_seed(seed)
    num_tokens = 3 * pattern.block_size + 1
    x, query = (torch.randn(2, HEADS, num_tokens, 4, generator=generator) for _ in range(2))
    keep = torch.rand(2, num_tokens, generator=generator) < 0.7
    compression = compress(pattern, Tokens(query.double(), x.double(), keep, 0.5))
    if compression is None:
        assert not pattern.has_sparse
        return
    dslots = torch.randn(*compression.keep.shape, 4, generator=generator, dtype=torch.float64)
    into, back = compression.apply(x.double()), compression.transpose(dslots)
    torch.testing.assert_close((into * dslots).sum(), (x.double() * back).sum())


def test_directions_repeat_and_differ_with_the_seed():
    first, again, other = (lsh_directions(LSGPattern(sparsity_type="lsh", lsh_seed=seed), 4, 16) for seed in (1, 1, 2))
    assert [d.shape for d in first] == [(4, 16, 64), (4, 16, 32)]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_weights_are_at_least_float32(dtype):
    x = torch.randn(1, 2, 40, 8, dtype=dtype)
    pattern = LSGPattern(block_size=8, sparse_block_size=8, sparsity_factor=4, sparsity_type="pooling")
    compression = compress(pattern, Tokens(x, x, torch.ones(1, 40, dtype=torch.bool), 1 / math.sqrt(8)))
    assert compression.weight.dtype == torch.float32
    assert compression.apply(x).dtype == dtype


def test_compilation_is_no_export():
    """A graph for any length has slots of one more block, and torch 2.11 calls a compilation an export."""
    pattern, length = LSGPattern(16, 16, 2), 3 * 16
    compiled = torch.compile(lambda x: x.new_empty(slots_of(pattern, x.shape[0])), backend="eager", dynamic=False)
    assert compiled(torch.zeros(length)).shape[0] == pattern.num_slots(length)
