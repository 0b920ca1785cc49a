"""Which keys each query sees, against set arithmetic on tokens."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import HEADS, cases

from lsg_attn import LSGPattern
from lsg_attn.blockwise.layout import Layout
from lsg_attn.compression import Tokens, compress
from lsg_attn.reference import visible_slots, visible_tokens


@given(cases(causal=None))
def test_windows_equal_the_definition(case):
    pattern, length, _ = case
    first, size, sparse = pattern.num_global_tokens, pattern.block_size, pattern.sparse_block_size
    num_tokens = length - first
    raw = visible_tokens(pattern, length)
    slots = visible_slots(pattern, length)
    assert slots.shape[1] == (0 if num_tokens <= 2 * size else -(-num_tokens // size) * pattern.step)
    for q in range(length):
        for t in range(length):
            near = abs((q - first) // size - (t - first) // size) <= 1
            seen = q < first or near or num_tokens <= 2 * size
            assert raw[q, t] == (t < first or (seen and (not pattern.causal or t <= q)))
        block = (q - first) // size
        for n in range(slots.shape[1]):
            left, right = (block - 1) * pattern.step, (block + 2) * pattern.step
            inside = left - sparse <= n < left or (right <= n < right + sparse and not pattern.causal)
            assert slots[q, n] == (q >= first and inside)


@given(cases(causal=None))
def test_no_token_is_counted_twice(case):
    pattern, length, _ = case
    first = pattern.num_global_tokens
    raw, slots = visible_tokens(pattern, length), visible_slots(pattern, length)
    tokens = torch.randn(1, HEADS, length - first, 4, dtype=torch.float64)
    keep = torch.ones(1, length - first, dtype=torch.bool)
    compression = compress(pattern, Tokens(tokens, tokens, keep, 0.5))
    for head in range(HEADS if compression else 0):
        seen = raw.long()
        seen[:, first:] += slots[:, compression.slot[0, head]] * (compression.weight[0, head] > 0)
        assert seen.max() <= 1
    assert compression or not slots.any()


@given(cases(types=("norm", "block_stride", "lsh", "stride", "pooling")))
def test_compressed_keys_of_a_block_come_from_that_block(case):
    pattern, length, _ = case
    tokens = torch.randn(1, HEADS, length - pattern.num_global_tokens, 4, dtype=torch.float64)
    keep = torch.ones(1, tokens.shape[2], dtype=torch.bool)
    compression = compress(pattern, Tokens(tokens, tokens, keep, 0.5))
    if compression is None:
        assert pattern.num_slots(tokens.shape[2]) == 0
        return
    block_of_token = torch.arange(tokens.shape[2]) // pattern.block_size
    block_of_slot = compression.slot // pattern.step
    assert (block_of_slot == block_of_token)[compression.weight > 0].all()


@given(cases(causal=None), st.integers(1, 5))
def test_windows_have_what_the_reference_sees(case, step):
    """Rows hold the number of their key. The window of a block has the keys that its queries see, each once."""
    pattern, length, _ = case
    layout = Layout(pattern, length)
    rows = torch.arange(length + layout.num_slots)[None, :, None]
    sources = {"sequence": rows[:, :length], "slots": rows[:, length:]}
    expected = torch.cat([visible_tokens(pattern, length), visible_slots(pattern, length)], dim=1)
    blocks = 0
    for first, stop in layout.spans(step):
        assert first == blocks < stop <= first + step
        blocks, windows = stop, layout.windows(first, stop)
        got = windows.gather(sources, rows.new_empty(1, stop - first, windows.size, 1))[0, :, :, 0]
        for block in range(first, stop):
            start, end = layout.queries(block, block + 1)
            assert torch.equal(got[block - first].sort().values, expected[start:end].any(0).nonzero().flatten())
    assert blocks == len(layout.blocks)


@given(cases(causal=None), st.integers(1, 5))
def test_scatter_add_is_the_transpose_of_gather(case, step):
    pattern, length, _ = case
    layout = Layout(pattern, length)
    for first, stop in layout.spans(step):
        sizes = {"sequence": length, "slots": layout.num_slots}
        rows = {name: torch.randn(2, size, 3, dtype=torch.float64) for name, size in sizes.items()}
        into = {name: torch.zeros_like(x) for name, x in rows.items()}
        windows = layout.windows(first, stop)
        src = torch.randn(2, stop - first, windows.size, 3, dtype=torch.float64)
        windows.scatter_add(into, src)
        gathered = windows.gather(rows, torch.empty_like(src))
        torch.testing.assert_close((gathered * src).sum(), sum((rows[name] * into[name]).sum() for name in rows))


def test_step_and_reach():
    pattern = LSGPattern(block_size=128, sparse_block_size=128, sparsity_factor=2)
    assert (pattern.step, pattern.num_slots(4096), pattern.num_slots(256)) == (64, 2048, 0)
    assert (pattern.reach(4096), pattern.reach(300), pattern.reach(10)) == (128, 64, 0)


@pytest.mark.parametrize(
    ("parameters", "expected"),
    [
        ({"sparsity_type": "lsh", "sparse_block_size": 4, "sparsity_factor": 4}, "bos_pooling"),
        ({"sparsity_type": "lsh"}, "lsh"),
        ({"sparsity_type": "norm", "sparsity_factor": 1}, "identity"),
        ({"sparsity_type": "norm", "sparsity_factor": 0}, "none"),
        ({"sparsity_type": "norm", "sparse_block_size": 0}, "none"),
    ],
)
def test_compression_in_effect(parameters, expected):
    assert LSGPattern(**parameters).compression == expected
