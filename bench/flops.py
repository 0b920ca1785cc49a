"""How much arithmetic attention and encoders are, and the time of the matrix products alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from bench.cases import FORWARD, TimedCase
from lsg_attn import LSGPattern

# Products that a score takes part in: with key and value; and key again, dout with value, and the sums dq, dk, dv.
PRODUCTS, BACKWARD_PRODUCTS = 2, 5


def num_scores(pattern: LSGPattern, num_tokens: int) -> int:
    """Scores of one head: pairs of a query and a key, raw or compressed, that it sees where nothing is padding."""
    first, slots = pattern.num_global_tokens, pattern.num_slots(num_tokens)
    scores = first * (first + num_tokens)
    for block in range(pattern.num_blocks(num_tokens)):
        rows = min(pattern.block_size, num_tokens - block * pattern.block_size)
        local, *sparse = pattern.local_window(block), *pattern.sparse_windows(block)
        keys = min(local[1], num_tokens) - max(local[0], 0)
        keys += sum(max(min(stop, slots) - max(start, 0), 0) for start, stop in sparse)
        scores += rows * (first + keys)
    return scores


def flops(case: TimedCase, scores: int) -> int:
    """Floating-point operations of a case's matrix products, given its scores in each head.

    A backward counts five products of each score, as FlashAttention's papers do, and two of each linear layer.
    """
    size, forward = case.size, case.step == FORWARD
    products = PRODUCTS if forward else PRODUCTS + BACKWARD_PRODUCTS
    attention = 2 * products * size.head_dim * case.batch * size.heads * scores
    if case.level == "attention":
        return attention
    weights = size.width * (4 * size.width + 2 * size.feed_forward)
    return size.layers * (attention + 2 * (1 if forward else 3) * case.batch * case.tokens * weights)


class Bound(NamedTuple):
    """A step of matrix products, and how many times longer those of a case would take."""

    step: Callable[[], None]
    scale: float


_GPU_ROWS = 8192  # of a product that a GPU does at its full rate


def matmul_bound(case: TimedCase) -> Bound:
    """What the arithmetic of LSG attention, or of an encoder with it, takes where nothing else is done.

    On a CPU: the products themselves, of the block windows and the linear layers, as one ``torch.bmm`` each with
    operands in place, layers sharing theirs. The queries of the globals are left out. On a GPU, where scores would not
    be written to memory: one large product of the same dtype, scaled to as many operations.
    """
    if case.device != "cuda":
        return Bound(_products(case), 1.0)
    left, right = (torch.randn(_GPU_ROWS, _GPU_ROWS, dtype=case.dtype, device=case.device) for _ in range(2))
    out = torch.empty_like(left)

    def step() -> None:
        torch.mm(left, right, out=out)

    return Bound(step, flops(case, num_scores(case.pattern, case.tokens)) / (2 * _GPU_ROWS**3))


def _products(case: TimedCase) -> Callable[[], None]:
    pattern, size = case.pattern, case.size
    batch = case.batch * size.heads * pattern.num_blocks(case.tokens)
    window = 3 * pattern.block_size + pattern.num_global_tokens
    window += 2 * pattern.sparse_block_size if pattern.has_sparse else 0
    rows, dim = pattern.block_size, size.head_dim
    if pattern.is_dense(case.tokens):
        batch, rows, window = case.batch * size.heads, case.length, case.length
    score, row, column = (batch, rows, dim, window), (batch, rows, window, dim), (batch, window, rows, dim)
    shapes = [score, row] if case.step == FORWARD else [score, row, score, score, row, column, column]
    layers = 1
    if case.level == "encoder":
        tokens, layers = case.batch * case.tokens, size.layers
        square, wide = (1, tokens, size.width, size.width), (1, tokens, size.width, size.feed_forward)
        narrow = (1, tokens, size.feed_forward, size.width)
        linear = [square] * 4 + [wide, narrow]
        shapes += linear
        if case.step != FORWARD:  # of a layer (tokens, k) x (k, n): its input's gradient, and its weight's
            shapes += [(1, tokens, n, k) for _, _, k, n in linear] + [(1, k, tokens, n) for _, _, k, n in linear]

    def buffer(*sizes: int) -> torch.Tensor:
        return torch.randn(sizes, dtype=case.dtype, device=case.device)

    buffers = {(b, m, k, n): (buffer(b, m, k), buffer(b, k, n), buffer(b, m, n)) for b, m, k, n in shapes}

    def step() -> None:
        for _ in range(layers):
            for shape in shapes:
                left, right, out = buffers[shape]
                torch.bmm(left, right, out=out)

    return step
