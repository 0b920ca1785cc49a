"""Causal patterns in the kernels: against the reference in float64, and that what is later is not even read."""

from dataclasses import replace

import pytest
import torch
from comparing import GRADIENTS, check
from running import DTYPES, UNUSUAL_PATTERNS, attend, name_of, padded_inputs, unusual_inputs, use_parts_of, use_tiles_of

from lsg_attn import SPARSITY_TYPES, LSGPattern
from lsg_attn.testing import Inputs, make_inputs

SHAPES = [  # (tokens, head_dim, num_global_tokens, padding) for blocks of B = 32: T = 7B-3, 5B+1, 9B
    (7 * 32 - 3, 40, 17, "middle"),
    (5 * 32 + 1, 64, 0, "left"),
    (9 * 32, 24, 130, "random"),
]


@pytest.mark.parametrize("sparsity_type", SPARSITY_TYPES)
def test_each_type(sparsity_type):
    """Blocks are smaller than tiles. With padding at the front, the first rows see nothing."""
    i = SPARSITY_TYPES.index(sparsity_type)
    tokens, head_dim, num_globals, padding = SHAPES[i % 3]
    pattern = LSGPattern(32, 32, 4, sparsity_type, num_globals, causal=True)
    check(padded_inputs(pattern, tokens, head_dim, DTYPES[(i + i // 3) % 3], padding), pattern)


@pytest.mark.every_kernel
@pytest.mark.parametrize(("sparsity_type", "dtype"), [("norm", torch.bfloat16), ("bos_pooling", torch.float32)])
def test_blocks_as_large_as_a_tile(sparsity_type, dtype):
    """The default pattern but for its globals."""
    pattern = LSGPattern(sparsity_type=sparsity_type, num_global_tokens=5, causal=True)
    check(padded_inputs(pattern, 4 * 128 - 60, 64, dtype, "ends", 1), pattern)


@pytest.mark.parametrize("tile", [(16, 32), (32, 64), (64, 16), (128, 64)])
@pytest.mark.parametrize("tokens", [64 + 37, 3 * 64 + 5])
def test_tiles_on_the_diagonal(tokens, tile, monkeypatch):
    """Also in a dense sequence; of a tile of keys, or of queries, the diagonal may be in a part or in several."""
    use_tiles_of(*tile, monkeypatch)
    pattern = LSGPattern(64, 64, 2, "stride", 2, causal=True)
    check(make_inputs(1, 1, 2 + tokens, 16, padding="random", garbage=1e3, num_kept=3), pattern)


def test_scores_so_low_that_a_query_of_zeros_would_overflow(monkeypatch):
    """Of a query that a tile of queries reads as zeros, the probability of a key would be inf."""
    use_tiles_of(32, 64, monkeypatch)
    inputs = make_inputs(1, 1, 200, 16)
    inputs.query[..., 0] += 30
    inputs.key[..., 0] -= 30
    got = attend(inputs, LSGPattern(64, 64, 2, "stride", 0, causal=True))
    assert got.lse.max() < -128
    assert all(x.isfinite().all() for x in got)


@pytest.mark.parametrize("pattern", UNUSUAL_PATTERNS[::3], ids=name_of)
def test_unusual_patterns(pattern):
    check(unusual_inputs(pattern), replace(pattern, causal=True))


@pytest.mark.parametrize("sizes", [(1 << 30, 0, 0, "none"), (16, (1 << 31) - 1, 4, "pooling")])
def test_sizes_beyond_any_sequence(sizes):
    check(make_inputs(1, 1, 1 + 59, 16), LSGPattern(*sizes, causal=True))


def test_globals_see_themselves_alone(monkeypatch):
    """They are so many that even they have several parts, of which some keep nothing."""
    use_parts_of(16, monkeypatch)
    inputs = make_inputs(1, 2, 70 + 150, 16)
    inputs.attention_mask[:, 16:48] = inputs.attention_mask[:, 100:140] = False
    check(inputs, LSGPattern(32, num_global_tokens=70, sparsity_type="none", causal=True))


@pytest.mark.parametrize("sparsity_type", SPARSITY_TYPES)
def test_a_later_token_changes_no_earlier_row(sparsity_type):
    """Bit for bit, with a cut within a tile; and earlier rows give later tokens no gradient."""
    pattern, cut = LSGPattern(32, 32, 4, sparsity_type, 1, causal=True), 1 + 101
    inputs = make_inputs(1, 1, 1 + 170, 16)
    inputs.dout[:, :, cut:] = 0
    later = (torch.arange(1 + 170) >= cut)[:, None]
    changed = Inputs(*(torch.where(later, 30 * x.flip(2), x) for x in inputs[:3]), *inputs[3:])
    first, again = attend(inputs, pattern), attend(changed, pattern)
    for name, x, y in zip(first._fields, first, again, strict=True):
        assert torch.equal(x[:, :, :cut], y[:, :, :cut]), name
    for name in GRADIENTS:
        assert not getattr(again, name)[:, :, cut:].any(), name


@pytest.mark.parametrize("sparsity_type", ["norm", "pooling"])
def test_blocks_to_the_right_are_not_read(sparsity_type):
    """NaN in them would show, whatever its probability: in keys that lie right of queries, and queries left of keys."""
    pattern, cut = LSGPattern(128, 64, 4, sparsity_type, 2, causal=True), 2 + 256
    inputs = make_inputs(1, 1, 2 + 512, 16)
    key, value, query, dout = (x.clone() for x in (inputs.key, inputs.value, inputs.query, inputs.dout))
    key[:, :, cut:] = value[:, :, cut:] = query[:, :, 2:cut] = dout[:, :, 2:cut] = torch.nan
    left = attend(inputs._replace(key=key, value=value), pattern)
    for name in ("out", "lse", "dquery"):
        assert getattr(left, name)[:, :, :cut].isfinite().all(), name
    right = attend(inputs._replace(query=query, dout=dout), pattern)
    for name in ("out", "lse", *GRADIENTS):
        assert getattr(right, name)[:, :, cut:].isfinite().all(), name
