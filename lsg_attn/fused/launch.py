"""A kernel launch as data: what runs, and what a tool can count or compile for a GPU that is not here."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from ..call import Call
from .results import Results
from .schedules import Tuning
from .variant import Variant

# Parts that are combined at a time.
COMBINED = 32
# Positions that a program of the globals goes over, for each tile of them: about what a tile of tokens does. More
# tiles get longer parts, so that the parts of a long sequence take less memory than its 16-bit keys: half of it in a
# forward, and in a backward, which has parts of three gradients, three quarters.
_PART = 512
_SECTION = ("first_query", "stop_query", "first_seen", "first_token", "whole_tokens", "whole_slots")


@dataclass(frozen=True)
class Launch:
    """A kernel, its arguments by name, and how many programs of it to run. Tensors may be meta if it is not run."""

    kernel: Any  # a triton JITFunction
    programs: int
    arguments: dict[str, Any]
    tuning: Tuning

    @property
    def options(self) -> dict[str, Any]:
        """The compiler's options. To fuse a product and a sum is not every version's default."""
        return {**self.tuning._asdict(), "enable_fp_fusion": True}

    def run(self) -> None:
        """Launch on the current device and stream."""
        self.kernel[(self.programs,)](**self.arguments, **self.options)


def run_on(device: torch.device, launches: Iterable[Launch]) -> None:
    """Launch on a GPU's current stream, without waiting for it."""
    with torch.cuda.device(device):
        for launch in launches:
            launch.run()


def key_arguments(call: Call) -> dict[str, Any]:
    """The arguments of every kernel that looks at keys."""
    mask = call.attention_mask
    return {
        "k_ptr": call.key,
        "v_ptr": call.value,
        "mask_ptr": mask,
        "cu_ptr": call.cu_seqlens,
        "k_strides": call.key.stride(),
        "v_strides": call.value.stride(),
        "mask_batch_stride": None if mask is None else mask.stride(0),
        "mask_stride": None if mask is None else mask.stride(1),
        "num_heads": call.query.shape[1],
        "num_tokens": call.num_tokens,
        "num_slots": call.num_slots,
        "length": call.query.shape[2],
    }


def attention_arguments(call: Call, results: Results, variant: Variant) -> dict[str, Any]:
    """The arguments of every kernel that computes scores."""
    is_compressed = variant.sparsity == "compressed"
    return {
        **key_arguments(call),
        "q_ptr": call.query,
        "q_strides": call.query.stride(),
        "index_ptr": results.slot_index if is_compressed or variant.sparsity == "indexed" else None,
        "index_stride": results.slot_index.stride(1),
        "sparse_k_ptr": results.sparse_key if is_compressed else None,
        "sparse_v_ptr": results.sparse_value if is_compressed else None,
        "sparse_strides": results.sparse_key.stride() if is_compressed else None,
        "scale_log2": scale_log2(call),
        "kept_scale": 1.0 / (1.0 - call.dropout_p),
        "seed": call.seed_value(),
        "threshold": round(call.dropout_p * (1 << 31)),
        **section_arguments(call),
        "V": variant,
        "BLOCK_D": block_d(call),
    }


def section_arguments(call: Call) -> dict[str, int | None]:
    """The arguments of every kernel that knows of sections: ``Section`` in kernels/heads.py."""
    section, pattern = call.section, call.pattern
    if section is None:
        return dict.fromkeys(_SECTION)
    first_seen = 0 if section.has_globals else pattern.num_global_tokens
    whole = (section.num_tokens, pattern.num_slots(section.num_tokens))
    values = (section.start, section.stop, first_seen, section.first_token, *whole)
    return dict(zip(_SECTION, values, strict=True))


def cdiv(a: int, b: int) -> int:
    """a / b rounded up. Triton's own takes as long as a small tensor operator."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The least power of two that is n, which is above 0, or more."""
    return 1 << (n - 1).bit_length()


def scale_log2(call: Call) -> float:
    """The scale of scores that are exponents of two."""
    return call.scale * math.log2(math.e)


def block_d(call: Call) -> int:
    """head_dim as a tile has it."""
    return max(16, next_power_of_2(call.query.shape[3]))


@dataclass(frozen=True)
class Globals:
    """How the work on a head's globals is split: into tiles of ``block`` rows, and parts of the sequence."""

    block: int
    tiles: int
    part_size: int
    num_parts: int

    @property
    def programs(self) -> int:
        """One for each tile and part."""
        return self.tiles * self.num_parts


def split_globals(call: Call, block_m: int, positions: int) -> Globals:
    """The split of the first ``positions`` of the sequence, where tiles of tokens have ``block_m`` rows."""
    num_globals = call.pattern.num_global_tokens
    block = min(block_m, max(16, next_power_of_2(max(num_globals, 1))))
    tiles = cdiv(num_globals, block)
    part_size = _PART * max(tiles, 1)
    return Globals(block, tiles, part_size, cdiv(positions, part_size) if num_globals else 0)
