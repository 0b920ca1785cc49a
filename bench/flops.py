"""The arithmetic of attention and encoders, and a step that does their matrix products alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from bench.cases import FORWARD, TimedCase
from lsg_attn import LSGPattern
from lsg_attn.blockwise.sweep import dtype_of_products

# Products per score. Forward: with key, with value. Backward: with key again, dout with value, and dq, dk, dv.
PRODUCTS, BACKWARD_PRODUCTS = 2, 5


def num_scores(pattern: LSGPattern, num_tokens: int) -> int:
    """The scores of one head without padding: pairs of a query and a raw or compressed key that it sees."""
    first, slots = pattern.num_global_tokens, pattern.num_slots(num_tokens)
    scores = first * (first if pattern.causal else first + num_tokens)
    for block in range(pattern.num_blocks(num_tokens)):
        rows = min(pattern.block_size, num_tokens - block * pattern.block_size)
        local, *sparse = pattern.local_window(block), *pattern.sparse_windows(block)
        keys = min(local[1], num_tokens) - max(local[0], 0)
        keys += sum(max(min(stop, slots) - max(start, 0), 0) for start, stop in sparse)
        scores += rows * (first + keys) - (rows * (rows - 1) // 2 if pattern.causal else 0)
    return scores


def flops(case: TimedCase, scores: int) -> int:
    """The floating-point operations of a case's matrix products, given the scores of one head.

    A backward counts as five products per score, as in FlashAttention's papers, and two per linear layer.
    """
    size, forward = case.size, case.step == FORWARD
    products = PRODUCTS if forward else PRODUCTS + BACKWARD_PRODUCTS
    attention = 2 * products * size.head_dim * case.batch * size.heads * scores
    if case.level == "attention":
        return attention
    weights = size.width * (4 * size.width + 2 * size.feed_forward)
    return size.layers * (attention + 2 * (1 if forward else 3) * case.batch * case.tokens * weights)


class Bound(NamedTuple):
    """A step of matrix products, and the factor from its time to the time of a case's products."""

    step: Callable[[], None]
    scale: float


PRODUCTS_ALONE, LARGE = BOUNDS = ("matmul", "large matmul")
_ROWS = {"cpu": 1536, "cuda": 8192}  # rows and columns of a product that is large enough for a device's full rate


def matmul_bounds(case: TimedCase) -> dict[str, Bound]:
    """What PyTorch takes for the matrix products of LSG attention, or of an encoder with it, and for nothing else.

    ``"large matmul"`` is one large product, scaled to the same number of operations. ``"matmul"``, on a CPU only, are
    the products themselves: one ``torch.bmm`` for each product of the block windows and each linear layer, on buffers
    that all layers share. The global queries are left out. Both are of the case's dtype, or of float32 where the CPU
    has no fast products of it.
    """
    dtype = dtype_of_products(torch.empty(0, dtype=case.dtype, device=case.device))
    rows = _ROWS[case.device]
    left, right = (torch.randn(rows, rows, dtype=dtype, device=case.device) for _ in range(2))
    out = torch.empty_like(left)

    def multiply() -> None:
        torch.mm(left, right, out=out)

    alone = {} if case.device == "cuda" else {PRODUCTS_ALONE: Bound(_products(case, dtype), 1.0)}
    return alone | {LARGE: Bound(multiply, flops(case, num_scores(case.pattern, case.tokens)) / (2 * rows**3))}


def _products(case: TimedCase, dtype: torch.dtype) -> Callable[[], None]:
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
        if case.step != FORWARD:  # a layer (tokens, k) x (k, n) has the gradients of its input and its weight
            shapes += [(1, tokens, n, k) for _, _, k, n in linear] + [(1, k, tokens, n) for _, _, k, n in linear]

    def buffer(*sizes: int) -> torch.Tensor:
        return torch.randn(sizes, dtype=dtype, device=case.device)

    buffers = {(b, m, k, n): (buffer(b, m, k), buffer(b, k, n), buffer(b, m, n)) for b, m, k, n in shapes}

    def step() -> None:
        for _ in range(layers):
            for shape in shapes:
                left, right, out = buffers[shape]
                torch.bmm(left, right, out=out)

    return step
