"""Attention dropout in the kernels: which probabilities are dropped, by a Philox written here, and how often."""

import numpy as np
import pytest
import torch
from comparing import with_repeated_keys
from running import attend, dense_scores, forward, grouped, use_tiles_of

from lsg_attn import LSGPattern
from lsg_attn.compression import lsh_directions
from lsg_attn.testing import Inputs, assert_close, make_inputs

SEED = 0x1234_5678_9ABC_DEF
NAMES = ("out", "dquery", "dkey", "dvalue")


def philox(seed, counter):
    """Philox4x32-10 of 64-bit counters (Salmon et al., SC 2011): four words of 32 bits each."""
    mask = np.uint64(0xFFFFFFFF)
    c = [counter & mask, counter >> np.uint64(32), np.zeros_like(counter), np.zeros_like(counter)]
    key = [seed & 0xFFFFFFFF, seed >> 32]
    for _ in range(10):
        a, b = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        k0, k1 = (np.uint64(k) for k in key)
        c = [(b >> np.uint64(32)) ^ c[1] ^ k0, b & mask, (a >> np.uint64(32)) ^ c[3] ^ k1, a & mask]
        key = [(key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return np.stack(c, -1)


def kept(pattern, shape, columns, p, seed=SEED):
    """(batch, heads, length, columns) bool: a counter for each head, four queries (globals apart) and column."""
    batch, heads, length = shape
    first = pattern.num_global_tokens
    rows = np.concatenate([np.arange(first), -(-first // 4) * 4 + np.arange(length - first)])
    groups = -(-first // 4) + -(-(length - first) // 4)
    group = np.arange(batch * heads)[:, None] * groups + rows // 4
    words = philox(seed, (group[..., None] * columns + np.arange(columns)).astype(np.uint64))
    drawn = np.take_along_axis(words, (rows % 4)[None, :, None, None], -1)[..., 0]
    return torch.from_numpy((drawn >> np.uint64(1)) >= round(p * 2**31)).view(batch, heads, length, columns)


def with_dropout(inputs, pattern, p):
    """Out, dquery, dkey, dvalue of dense LSG attention in float64 that drops what the kernels should drop."""
    _, heads, _, head_dim = inputs.query.shape
    leaves = [x.double().requires_grad_() for x in inputs[:3]]
    exact = with_repeated_keys(Inputs(*leaves, *inputs[3:]))
    scores, value = dense_scores(exact, pattern, lsh_directions(pattern, heads, head_dim), head_dim**-0.5)
    probs = scores.softmax(-1) * kept(pattern, scores.shape[:3], scores.shape[3], p) / (1 - p)
    out = probs @ value
    return out.detach(), *torch.autograd.grad(out, leaves, inputs.dout.double())


def check(inputs, pattern, p):
    """Compare out and gradients of the kernels."""
    got = attend(inputs, pattern, dropout_p=p, seed=SEED)
    for name, expected in zip(NAMES, with_dropout(inputs, pattern, p), strict=True):
        assert_close(name, getattr(got, name).cpu(), expected)


@pytest.mark.parametrize("sparsity_type", ["norm", "bos_pooling", "lsh"])
def test_the_generator_decides_what_is_dropped(sparsity_type):
    """The sequence is so long that windows of tiles start at blocks that are no multiple of four."""
    pattern = LSGPattern(18, 18, 6, sparsity_type, 5)
    check(make_inputs(1, 2, 5 + 215, 16, padding="random", num_kept=6), pattern, 0.3)


@pytest.mark.parametrize("tile", [(16, 16), (64, 32), (128, 64)])
def test_tiles_do_not_decide_what_is_dropped(tile, monkeypatch):
    use_tiles_of(*tile, monkeypatch)
    pattern = LSGPattern(32, 32, 2, "pooling", 3)  # with 16 slots a block, as many as the smallest tiles
    check(make_inputs(1, 2, 3 + 170, 16, padding="right"), pattern, 0.5)


@pytest.mark.parametrize(("sparsity_type", "tile"), [("norm", (32, 64)), ("bos_pooling", (64, 32)), ("lsh", (128, 64))])
def test_of_causal_patterns_and_shared_keys(sparsity_type, tile, monkeypatch):
    """Tiles are smaller than a block, also of keys than of queries, and larger."""
    use_tiles_of(*tile, monkeypatch)
    pattern = LSGPattern(64, 32, 4, sparsity_type, 3, causal=True)
    check(grouped(make_inputs(1, 2, 3 + 200, 16, padding="random", num_kept=4), 2), pattern, 0.3)


def test_mean_and_variance_of_dropout():
    """Equal keys and values of 1: out is the mean of Bernoulli draws over 1 - p."""
    inputs = make_inputs(1, 4, 2 + 200, 16)
    inputs.query.zero_()
    inputs.value.fill_(1.0)
    p = 0.2
    out = forward(inputs, LSGPattern(32, 0, 2, num_global_tokens=2), dropout_p=p, seed=3).out.cpu()[:, :, 34:162, 0]
    keys = 2 + 3 * 32
    error = (p / (1 - p) / keys / out.numel()) ** 0.5
    assert abs(out.mean() - 1) < 5 * error
    assert abs(out.var() / (p / (1 - p) / keys) - 1) < 0.3
