"""Tile sizes, warps and stages of each kernel, by GPU and head_dim: one table, and where its rows come from."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Tuning(NamedTuple):
    """Warps of a program, and stages of its software pipeline."""

    num_warps: int
    num_stages: int


class Schedule(NamedTuple):
    """Rows that a program has results of, rows of the other side that it takes at a time, and its tuning."""

    block_m: int
    block_n: int
    tuning: Tuning


# Every row below was compiled (torch 2.13.0, triton 3.8.0 and in part 3.6.0) and chosen for its registers, spills,
# shared memory, blocks per multiprocessor and the instructions of a tile. A row that was measured says so: on an NVIDIA
# H200 with torch 2.11.0 and triton 3.6.0, for norm in bfloat16. `bench/results/h200` has what it was compared to.
COMBINE = Tuning(num_warps=4, num_stages=1)
NORM = Tuning(num_warps=4, num_stages=1)
POOL = Tuning(num_warps=4, num_stages=1)
SUMS = Tuning(num_warps=4, num_stages=1)
WEIGHTS = Tuning(num_warps=4, num_stages=1)

# The attention kernel and its backward, by (largest head_dim, with dropout): rows of 16-bit types for a kind of GPU,
# then of float32, whose products are made without tensor cores.
_HOPPER = {
    (64, False): Schedule(128, 64, Tuning(4, 3)),  # measured; a fourth stage: 0.995 of its time
    (64, True): Schedule(64, 64, Tuning(4, 2)),  # 128 rows spill 600 bytes: philox needs the registers
    (128, False): Schedule(128, 32, Tuning(4, 3)),  # measured: 0.92 of the time of 64 keys with 8 warps
    (128, True): Schedule(128, 64, Tuning(8, 3)),
    (256, False): Schedule(64, 64, Tuning(8, 2)),  # 32 keys: half as many instructions again
    (256, True): Schedule(64, 32, Tuning(8, 2)),  # 64 keys spill 76 bytes
}
_BLACKWELL = _HOPPER | {
    (64, False): Schedule(128, 64, Tuning(8, 2)),  # 4 warps spill 144 bytes
    (128, False): Schedule(128, 64, Tuning(8, 2)),
    (128, True): Schedule(128, 64, Tuning(8, 2)),
}
_AMPERE = _BLACKWELL | {
    (64, False): Schedule(128, 64, Tuning(4, 2)),
    (128, False): Schedule(128, 64, Tuning(8, 2)),  # 64 rows of 4 warps: 1.4 times the instructions
    (128, True): Schedule(64, 64, Tuning(4, 2)),  # 128 rows spill 1000 bytes
    (256, False): Schedule(32, 32, Tuning(4, 2)),  # 64 rows of 8 warps: 1.3 times the instructions
    (256, True): Schedule(32, 32, Tuning(4, 2)),
}
_SMALL = _AMPERE | {  # 99 KB of shared memory in a block
    (64, True): Schedule(64, 32, Tuning(4, 2)),
    (128, False): Schedule(128, 32, Tuning(8, 2)),  # 64 keys spill 72 bytes
    (128, True): Schedule(64, 32, Tuning(4, 2)),
}
_SMALL_BLACKWELL = _SMALL | {
    (64, False): Schedule(128, 64, Tuning(8, 2)),  # 4 warps spill 124 bytes
    (128, False): Schedule(64, 32, Tuning(4, 2)),  # 128 rows spill 420 bytes
}
_AMD = _SMALL | {  # 64 KB of it
    (64, False): Schedule(64, 64, Tuning(4, 2)),
    (64, True): Schedule(64, 64, Tuning(4, 2)),
    (128, False): Schedule(64, 32, Tuning(4, 2)),
    (256, False): Schedule(64, 16, Tuning(4, 2)),
    (256, True): Schedule(64, 16, Tuning(4, 2)),
}
_RDNA_TARGETS = ("gfx11", "gfx12")
_RDNA = {  # 256 registers of a lane, and rows of head_dim 128 spill in any tile
    (64, False): Schedule(64, 32, Tuning(8, 1)),  # 64 keys spill 224 bytes, a second stage 92
    (64, True): Schedule(64, 32, Tuning(8, 1)),
}
_FLOAT32 = {
    (64, False): Schedule(64, 32, Tuning(8, 2)),
    (64, True): Schedule(64, 32, Tuning(8, 2)),
    (128, False): Schedule(16, 16, Tuning(4, 2)),  # 32 rows: up to 68 bytes; and keys: 1900 bytes with 200 globals
    (128, True): Schedule(32, 16, Tuning(8, 2)),  # 32 keys spill 600 bytes
    (256, False): Schedule(16, 16, Tuning(4, 2)),
    (256, True): Schedule(16, 16, Tuning(4, 2)),
}
_FLOAT32_SMALL = _FLOAT32 | {
    (128, True): Schedule(16, 16, Tuning(4, 2)),  # 32 rows spill 88 bytes
}
_FLOAT32_AMD = _FLOAT32 | {
    (128, False): Schedule(32, 32, Tuning(4, 2)),  # 8 warps of 64 lanes spill 172 bytes with dropout
    (128, True): Schedule(32, 32, Tuning(4, 2)),
}
_FLOAT32_RDNA = {
    (64, False): Schedule(16, 32, Tuning(8, 1)),  # 32 rows spill 304 bytes
    (64, True): Schedule(16, 16, Tuning(8, 1)),
}


# 128 rows with two gradients each take all registers of 8 warps, and 4 spill.
_BACKWARD_HOPPER = {
    (64, False): Schedule(64, 64, Tuning(4, 3)),  # measured: 0.84 of the time of two stages
    (64, True): Schedule(64, 64, Tuning(4, 2)),
    (128, False): Schedule(64, 32, Tuning(4, 3)),  # measured: half the time of 64 and 64 rows with 8 warps
    (128, True): Schedule(32, 32, Tuning(4, 2)),  # 64 rows spill 228 bytes
    (256, False): Schedule(16, 32, Tuning(4, 2)),  # with triton 3.6, 32 rows spill 256 bytes
    (256, True): Schedule(16, 32, Tuning(4, 2)),
}
_BACKWARD_BLACKWELL = _BACKWARD_HOPPER | {
    (64, False): Schedule(64, 64, Tuning(4, 2)),  # a third stage spills 96 bytes
    (128, False): Schedule(64, 32, Tuning(8, 2)),  # 64 of the other side spill 84 bytes
    (128, True): Schedule(64, 32, Tuning(8, 2)),
}
_BACKWARD_AMPERE = _BACKWARD_HOPPER | {
    (64, False): Schedule(64, 32, Tuning(4, 2)),  # 64 of the other side spill 76 bytes
    (64, True): Schedule(32, 32, Tuning(4, 2)),  # 64 rows spill 116 bytes, or with 8 warps are one block
    (128, False): Schedule(32, 64, Tuning(4, 2)),  # with triton 3.6, 64 rows spill 700 bytes and more
    (128, True): Schedule(32, 64, Tuning(4, 2)),
}
_BACKWARD_SMALL_BLACKWELL = _BACKWARD_AMPERE | {
    (128, True): Schedule(32, 32, Tuning(4, 2)),  # 64 rows spill 68 bytes
}
_CAUSAL_BACKWARD_SMALL_BLACKWELL = {
    (128, False): Schedule(32, 32, Tuning(4, 2)),  # 64 of the other side spill 148 bytes
}
_BACKWARD_AMD = {
    (64, False): Schedule(64, 16, Tuning(4, 2)),  # 32 of the other side: one block instead of three
    (64, True): Schedule(64, 16, Tuning(4, 2)),
    (128, False): Schedule(64, 16, Tuning(4, 2)),
    (128, True): Schedule(64, 16, Tuning(4, 2)),
    (256, False): Schedule(32, 16, Tuning(4, 2)),
    (256, True): Schedule(32, 16, Tuning(4, 2)),
}
_BACKWARD_FLOAT32 = {
    (64, False): Schedule(32, 32, Tuning(8, 2)),
    (64, True): Schedule(32, 32, Tuning(8, 2)),
    (128, False): Schedule(32, 16, Tuning(8, 2)),
    (128, True): Schedule(32, 16, Tuning(8, 2)),  # 32 of the other side spill 80 bytes
    (256, False): Schedule(16, 16, Tuning(8, 2)),
    (256, True): Schedule(16, 16, Tuning(8, 2)),
}
_BACKWARD_FLOAT32_LARGE = _BACKWARD_FLOAT32 | {  # of datacenters' Ampere and Hopper
    (128, False): Schedule(16, 16, Tuning(4, 2)),  # with 32 rows ptxas spills 92 to 124 bytes to fit a third block
}
_BACKWARD_FLOAT32_AMD = _BACKWARD_AMD | {
    (64, False): Schedule(32, 16, Tuning(4, 2)),  # 32 of the other side: one block instead of two
    (64, True): Schedule(32, 16, Tuning(4, 2)),
    (128, False): Schedule(32, 16, Tuning(4, 2)),
    (128, True): Schedule(32, 16, Tuning(4, 2)),
}
_BACKWARD_RDNA = {
    (64, False): Schedule(32, 16, Tuning(4, 1)),  # 32 of the other side spill 208 bytes
    (64, True): Schedule(32, 16, Tuning(4, 1)),
}
_BACKWARD_FLOAT32_RDNA = {
    (64, False): Schedule(16, 16, Tuning(8, 1)),  # 32 rows spill 692 bytes
    (64, True): Schedule(16, 16, Tuning(16, 1)),
}


_SAME: dict[tuple[int, bool], Schedule] = {}


class _Kind(NamedTuple):
    """The rows of one kind of GPU and dtype, and those that the backward of a causal pattern has in place of others."""

    forward: dict[tuple[int, bool], Schedule]
    backward: dict[tuple[int, bool], Schedule]
    causal_backward: dict[tuple[int, bool], Schedule] = _SAME


def target_of(device: torch.device) -> str:
    """The name of a CUDA or ROCm device's architecture: ``"sm_90"``, ``"gfx942"``."""
    if torch.version.hip:
        name: str = torch.cuda.get_device_properties(device).gcnArchName
        return name.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def missing_rows(target: str, dtype: torch.dtype, head_dim: int, is_hashed: bool) -> list[str]:
    """What a GPU of architecture ``target`` has too few registers for, of a call of this dtype and head_dim."""
    is_float32 = dtype == torch.float32
    largest = max(limit for limit, _ in _kind_of(target, is_float32).forward)
    missing = []
    if largest < head_dim <= 256:  # more is too much for any GPU
        missing.append(f"head_dim is {head_dim}, the kernels take up to {largest} on {target}")
    if is_hashed and is_float32 and target.startswith(_RDNA_TARGETS):
        missing.append(f"the dtype is {dtype}, the kernels hash only 16-bit types on {target}")
    return missing


def row_key(head_dim: int, has_dropout: bool) -> tuple[int, bool]:
    """The key that the row for a head_dim has in the tables."""
    return next(limit for limit in (64, 128, 256) if head_dim <= limit), has_dropout


def forward_schedule(target: str, dtype: torch.dtype, head_dim: int, block_size: int, has_dropout: bool) -> Schedule:
    """The tile sizes of the attention kernel.

    While a block is smaller than a tile's rows they are halved, down to 64: rows of several blocks read the windows of
    them all.
    """
    rows = _kind_of(target, dtype == torch.float32).forward
    schedule = rows[row_key(head_dim, has_dropout)]
    while schedule.block_m > 64 and schedule.block_m > block_size:
        schedule = schedule._replace(block_m=schedule.block_m // 2)
    return schedule


def backward_schedule(
    target: str, dtype: torch.dtype, head_dim: int, has_dropout: bool, causal: bool = False
) -> Schedule:  # fmt: skip
    """The tile sizes of the backward: ``block_m`` queries or keys with gradients, ``block_n`` of the other side."""
    kind, key = _kind_of(target, dtype == torch.float32), row_key(head_dim, has_dropout)
    return kind.causal_backward.get(key, kind.backward[key]) if causal else kind.backward[key]


def hides_by_branch(target: str, dtype: torch.dtype) -> bool:
    """Whether kernels hide keys in a branch of a tile's own, see ``BRANCH`` in ``kernels/walk.py``.

    Products of Hopper's and of datacenter Blackwell's tensor cores stay as they are through a branch. On other GPUs the
    compiler takes those of a branch through shared memory, in each tile; float32's products are not made by them.
    """
    return dtype != torch.float32 and target.startswith("sm_") and 90 <= int(target.removeprefix("sm_")) < 120


def lsh_tuning(target: str) -> Tuning:
    """The tuning of the hashing kernel: 8 warps of 64 lanes spill, and so do 4 of 32."""
    has_wide_warps = target.startswith("gfx") and not target.startswith(_RDNA_TARGETS)
    return Tuning(num_warps=4 if has_wide_warps else 8, num_stages=1)


def _kind_of(target: str, is_float32: bool) -> _Kind:
    if target.startswith(_RDNA_TARGETS):
        return _Kind(_FLOAT32_RDNA, _BACKWARD_FLOAT32_RDNA) if is_float32 else _Kind(_RDNA, _BACKWARD_RDNA)
    if target.startswith("gfx"):
        return _Kind(_FLOAT32_AMD, _BACKWARD_FLOAT32_AMD) if is_float32 else _Kind(_AMD, _BACKWARD_AMD)
    capability = int(target.removeprefix("sm_"))
    if is_float32 and (capability in (80, 87) or 90 <= capability < 100):
        return _Kind(_FLOAT32, _BACKWARD_FLOAT32_LARGE)
    if capability in (80, 87):
        return _Kind(_AMPERE, _BACKWARD_AMPERE)
    if is_float32:
        return _Kind(_FLOAT32 if capability >= 90 else _FLOAT32_SMALL, _BACKWARD_FLOAT32)
    if 90 <= capability < 100:
        return _Kind(_HOPPER, _BACKWARD_HOPPER)
    if 100 <= capability < 120:
        return _Kind(_BLACKWELL, _BACKWARD_BLACKWELL)
    if capability >= 120:
        return _Kind(_SMALL_BLACKWELL, _BACKWARD_SMALL_BLACKWELL, _CAUSAL_BACKWARD_SMALL_BLACKWELL)
    return _Kind(_SMALL, _BACKWARD_AMPERE)  # fits what is not known here, too
