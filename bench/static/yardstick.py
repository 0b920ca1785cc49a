"""Dense flash attention with nothing to decide: no mask, no pattern, whole tiles only (arXiv 2307.08691).

What one tile costs here is the yardstick for the loops of the kernels. These are compiled, never launched.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from lsg_attn.fused.launch import Launch
from lsg_attn.fused.schedules import Schedule
from lsg_attn.kernels.primitives import LN2, MIN_SCORE


@triton.jit
def _rows(ptr, strides, head, num_heads, start, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """Pointers (BLOCK, BLOCK_D) to rows of one head of a tensor (batch, heads, length, head_dim)."""
    batch, index = (head // num_heads).to(tl.int64), (head % num_heads).to(tl.int64)
    ptr += batch * strides[0] + index * strides[1] + start.to(tl.int64) * strides[2]
    return ptr + tl.arange(0, BLOCK)[:, None] * strides[2] + tl.arange(0, BLOCK_D)[None, :] * strides[3]


@triton.jit
def _flash_fwd_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, scale_log2,
    q_strides, k_strides, v_strides, out_strides, num_heads, length,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """BLOCK_M queries of one head over all keys. Grid: batch * heads * (length / BLOCK_M). Writes ``out``, ``lse``."""
    tiles = length // BLOCK_M
    head, row = tl.program_id(0) // tiles, tl.program_id(0) % tiles * BLOCK_M
    zero = row * 0
    q = tl.load(_rows(q_ptr, q_strides, head, num_heads, row, BLOCK_M, BLOCK_D))
    k_ptrs = _rows(k_ptr, k_strides, head, num_heads, zero, BLOCK_N, BLOCK_D)
    v_ptrs = _rows(v_ptr, v_strides, head, num_heads, zero, BLOCK_N, BLOCK_D)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    row_max, row_sum = tl.full((BLOCK_M,), MIN_SCORE, tl.float32), tl.zeros((BLOCK_M,), tl.float32)
    for _ in tl.range(0, length, BLOCK_N):
        k, v = tl.load(k_ptrs), tl.load(v_ptrs)
        scores = tl.dot(q, tl.trans(k))
        new_max = tl.maximum(row_max, tl.max(scores, 1))
        rescale = tl.exp2((row_max - new_max) * scale_log2)
        probs = tl.exp2(scores * scale_log2 - (new_max * scale_log2)[:, None])
        row_sum = row_sum * rescale + tl.sum(probs, 1)
        acc = tl.dot(probs.to(v.dtype), v, acc * rescale[:, None])
        row_max = new_max
        k_ptrs += BLOCK_N * k_strides[2]
        v_ptrs += BLOCK_N * v_strides[2]
    out_ptrs = _rows(out_ptr, out_strides, head, num_heads, row, BLOCK_M, BLOCK_D)
    tl.store(out_ptrs, (acc * (1.0 / row_sum)[:, None]).to(out_ptr.dtype.element_ty))
    lse = (row_max * scale_log2 + tl.log2(row_sum)) * LN2
    tl.store(lse_ptr + head.to(tl.int64) * length + row + tl.arange(0, BLOCK_M), lse)


@triton.jit
def _flash_bwd_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, dq_ptr, dk_ptr, dv_ptr, scale_log2,
    q_strides, k_strides, v_strides, out_strides, num_heads, length,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The gradients of BLOCK_M queries of one head, or of as many keys and values; ``lse`` is in base 2.

    Grid: batch * heads * 2 (length / BLOCK_M). Writes ``dq``, or ``dk`` and ``dv``, laid out as ``q``, ``k`` and ``v``.
    """
    tiles = length // BLOCK_M
    head, tile = tl.program_id(0) // (2 * tiles), tl.program_id(0) % (2 * tiles)
    row, zero = tile % tiles * BLOCK_M, tile * 0
    lse_ptr += head.to(tl.int64) * length
    delta_ptr += head.to(tl.int64) * length
    if tile < tiles:
        q = tl.load(_rows(q_ptr, q_strides, head, num_heads, row, BLOCK_M, BLOCK_D))
        dout = tl.load(_rows(dout_ptr, out_strides, head, num_heads, row, BLOCK_M, BLOCK_D))
        offs_m = row + tl.arange(0, BLOCK_M)
        lse, delta = tl.load(lse_ptr + offs_m), tl.load(delta_ptr + offs_m)
        k_ptrs = _rows(k_ptr, k_strides, head, num_heads, zero, BLOCK_N, BLOCK_D)
        v_ptrs = _rows(v_ptr, v_strides, head, num_heads, zero, BLOCK_N, BLOCK_D)
        dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        for _ in tl.range(0, length, BLOCK_N):
            k, v = tl.load(k_ptrs), tl.load(v_ptrs)
            probs = tl.exp2(tl.dot(q, tl.trans(k)) * scale_log2 - lse[:, None])
            dscores = probs * (tl.dot(dout, tl.trans(v)) - delta[:, None])
            dq = tl.dot(dscores.to(k.dtype), k, dq)
            k_ptrs += BLOCK_N * k_strides[2]
            v_ptrs += BLOCK_N * v_strides[2]
        ptrs = _rows(dq_ptr, q_strides, head, num_heads, row, BLOCK_M, BLOCK_D)
        tl.store(ptrs, (dq * (scale_log2 * LN2)).to(dq_ptr.dtype.element_ty))
    else:
        k = tl.load(_rows(k_ptr, k_strides, head, num_heads, row, BLOCK_M, BLOCK_D))
        v = tl.load(_rows(v_ptr, v_strides, head, num_heads, row, BLOCK_M, BLOCK_D))
        q_ptrs = _rows(q_ptr, q_strides, head, num_heads, zero, BLOCK_N, BLOCK_D)
        dout_ptrs = _rows(dout_ptr, out_strides, head, num_heads, zero, BLOCK_N, BLOCK_D)
        dk, dv = tl.zeros((BLOCK_M, BLOCK_D), tl.float32), tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        for start in tl.range(0, length, BLOCK_N):
            q, dout = tl.load(q_ptrs), tl.load(dout_ptrs)
            offs_m = start + tl.arange(0, BLOCK_N)
            lse, delta = tl.load(lse_ptr + offs_m), tl.load(delta_ptr + offs_m)
            probs = tl.exp2(tl.dot(k, tl.trans(q)) * scale_log2 - lse[None, :])  # (BLOCK_M keys, BLOCK_N queries)
            dscores = probs * (tl.dot(v, tl.trans(dout)) - delta[None, :])
            dv = tl.dot(probs.to(dout.dtype), dout, dv)
            dk = tl.dot(dscores.to(q.dtype), q, dk)
            q_ptrs += BLOCK_N * q_strides[2]
            dout_ptrs += BLOCK_N * out_strides[2]
        ptrs = _rows(dk_ptr, k_strides, head, num_heads, row, BLOCK_M, BLOCK_D)
        tl.store(ptrs, (dk * (scale_log2 * LN2)).to(dk_ptr.dtype.element_ty))
        ptrs = _rows(dv_ptr, v_strides, head, num_heads, row, BLOCK_M, BLOCK_D)
        tl.store(ptrs, dv.to(dv_ptr.dtype.element_ty))


def forward_yardstick(dtype: torch.dtype, head_dim: int, schedule: Schedule) -> Launch:
    """The launch of a dense forward on tensors laid out as a projection returns them. ``head_dim``: a power of two."""
    return _launch(_flash_fwd_kernel, ("q", "k", "v", "out"), ("lse",), dtype, head_dim, schedule)


def backward_yardstick(dtype: torch.dtype, head_dim: int, schedule: Schedule) -> Launch:
    """The launch of a dense backward; arguments as for :func:`forward_yardstick`."""
    names = ("q", "k", "v", "dout", "dq", "dk", "dv")
    return _launch(_flash_bwd_kernel, names, ("lse", "delta"), dtype, head_dim, schedule)


def _launch(
    kernel: Any, tensors: tuple[str, ...], sums: tuple[str, ...], dtype: torch.dtype, head_dim: int, schedule: Schedule
) -> Launch:
    batch, heads, length = 2, 16, 4096
    rows = torch.empty(batch, length, heads, head_dim, dtype=dtype, device="meta").transpose(1, 2)
    arguments = {
        **{f"{name}_ptr": rows for name in tensors},
        **{f"{name}_ptr": torch.empty(batch, heads, length, device="meta") for name in sums},
        **{f"{name}_strides": rows.stride() for name in ("q", "k", "v", "out")},
        "scale_log2": head_dim**-0.5,
        "num_heads": heads,
        "length": length,
        "BLOCK_M": schedule.block_m,
        "BLOCK_N": schedule.block_n,
        "BLOCK_D": head_dim,
    }
    programs = batch * heads * (length // schedule.block_m)
    return Launch(kernel, programs, arguments, schedule.tuning)
