"""From a call to its launches: at most one compression, the attention, and at most one combine.

Planning is apart from running, so that tools can count launches, and compile them for GPUs that are not here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from triton import cdiv, next_power_of_2

from .call import Call, Results, allocate, variant_of
from .kernels.compress import _lsg_lsh_kernel, _lsg_norm_kernel, _lsg_pool_kernel
from .kernels.forward import _lsg_fwd_combine_kernel, _lsg_fwd_kernel
from .kernels.schedules import COMBINE, NORM, POOL, Tuning, forward_schedule, lsh_tuning, target_of

# Positions that a program of the global queries attends to, for each tile of them: about what a tile of tokens sees.
# More tiles get longer parts, so that the parts of a long sequence take at most half its 16-bit keys' memory.
_PART = 512
# Tokens that are ranked, groups that are pooled, and parts that are combined at a time.
_RANKED, _POOLED, _COMBINED = 128, 32, 32


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


def launch_forward(call: Call) -> Results:
    """Run the forward of ``call`` on the GPU that its tensors are on, without waiting for it."""
    results, device = allocate(call), call.query.device
    with torch.cuda.device(device):
        for launch in plan_forward(call, results, target_of(device)):
            launch.run()
    return results


def plan_forward(call: Call, results: Results, target: str) -> list[Launch]:
    """The launches, in order, that fill ``results`` on a GPU of architecture ``target``."""
    launches = (*_plan_compression(call, results, target), *_plan_attention(call, results, target))
    return [launch for launch in launches if launch.programs]


def _plan_attention(call: Call, results: Results, target: str) -> list[Launch]:
    query, pattern, variant = call.query, call.pattern, variant_of(call)
    batch, heads, length, head_dim = query.shape
    num_globals, is_compressed = pattern.num_global_tokens, variant.sparsity == "compressed"
    schedule = forward_schedule(target, query.dtype, head_dim, pattern.block_size, variant.has_dropout)
    block_g = min(schedule.block_m, max(16, next_power_of_2(num_globals)))
    global_tiles = cdiv(num_globals, block_g)
    part_size = _PART * max(global_tiles, 1)
    num_parts = cdiv(length, part_size) if num_globals else 0
    part = query.new_empty(batch * heads, num_parts, num_globals, head_dim, dtype=torch.float32)
    outputs = {
        "out_ptr": results.out,
        "lse_ptr": results.lse,
        "part_ptr": part,
        "part_lse_ptr": part.new_empty(batch * heads, num_parts, num_globals),
        "out_strides": results.out.stride(),
        "part_strides": part.stride(),
        "kept_scale": 1.0 / (1.0 - call.dropout_p),
        "num_heads": heads,
        "num_parts": num_parts,
        "BLOCK_D": _block_d(call),
    }
    attention = {
        **_inputs(call),
        **outputs,
        "q_ptr": query,
        "q_strides": query.stride(),
        "index_ptr": results.slot_index if is_compressed or variant.sparsity == "indexed" else None,
        "sparse_k_ptr": results.sparse_key if is_compressed else None,
        "sparse_v_ptr": results.sparse_value if is_compressed else None,
        "sparse_strides": results.sparse_key.stride() if is_compressed else None,
        "scale_log2": call.scale * math.log2(math.e),
        "seed": call.seed,
        "threshold": round(call.dropout_p * (1 << 31)),
        "part_size": part_size,
        "V": variant,
        "BLOCK_M": schedule.block_m,
        "BLOCK_N": schedule.block_n,
        "BLOCK_G": block_g,
    }
    combine = {**outputs, "length": length, "NUM_GLOBALS": num_globals, "HEAD_DIM": head_dim, "BLOCK_N": _COMBINED}
    programs = batch * heads * (global_tiles * num_parts + cdiv(call.num_tokens, schedule.block_m))
    return [
        Launch(_lsg_fwd_kernel, programs, attention, schedule.tuning),
        Launch(_lsg_fwd_combine_kernel, batch * heads * num_globals, combine, COMBINE),
    ]


def _plan_compression(call: Call, results: Results, target: str) -> list[Launch]:
    query, pattern, compression = call.query, call.pattern, call.compression
    if compression not in ("norm", "pooling", "bos_pooling", "lsh"):
        return []  # the attention kernel finds its slots by arithmetic
    # What only the attention kernel is compiled for must not make another kernel of a compression.
    variant = variant_of(call)._replace(sparsity=compression, has_dropout=False)
    arguments = {**_inputs(call), "V": variant, "index_ptr": results.slot_index}
    heads = query.shape[0] * query.shape[1]  # of all the batch
    if compression == "norm":
        block_c = min(_RANKED, max(16, next_power_of_2(pattern.chunk)))
        del arguments["v_ptr"], arguments["v_strides"]
        arguments |= {"CHUNK": pattern.chunk, "BLOCK_C": block_c}
        programs = heads * _num_chunks(call) * cdiv(pattern.chunk, block_c)
        return [Launch(_lsg_norm_kernel, programs, arguments, NORM)]
    arguments |= {
        "sparse_k_ptr": results.sparse_key,
        "sparse_v_ptr": results.sparse_value,
        "sparse_strides": results.sparse_key.stride(),
        "weight_ptr": results.weight,
    }
    if compression in ("pooling", "bos_pooling"):
        by_query = compression == "bos_pooling"
        arguments |= {
            "q_ptr": query if by_query else None,
            "q_strides": query.stride() if by_query else None,
            "scale_log2": call.scale * math.log2(math.e),
            "BY_QUERY": by_query,
            "BLOCK_N": _POOLED,
            "BLOCK_D": _block_d(call),
        }
        return [Launch(_lsg_pool_kernel, heads * cdiv(call.num_slots, _POOLED), arguments, POOL)]
    arguments |= {
        "slot_ptr": results.slot,
        "direction_ptrs": call.directions,
        "CHUNK": pattern.chunk,
        "BLOCK_C": max(16, next_power_of_2(pattern.chunk)),
        "BLOCK_N": max(16, next_power_of_2(pattern.chunk // pattern.sparsity_factor)),
    }
    return [Launch(_lsg_lsh_kernel, heads * _num_chunks(call), arguments, lsh_tuning(target))]


def _inputs(call: Call) -> dict[str, Any]:
    """The arguments that the attention and every compression take."""
    mask = call.attention_mask
    return {
        "k_ptr": call.key,
        "v_ptr": call.value,
        "mask_ptr": mask,
        "k_strides": call.key.stride(),
        "v_strides": call.value.stride(),
        "mask_batch_stride": None if mask is None else mask.stride(0),
        "mask_stride": None if mask is None else mask.stride(1),
        "num_heads": call.query.shape[1],
        "num_tokens": call.num_tokens,
        "num_slots": call.num_slots,
    }


def _num_chunks(call: Call) -> int:
    """Chunks of tokens in a head, of which each gives c // f slots."""
    return call.num_slots * call.pattern.sparsity_factor // call.pattern.chunk


def _block_d(call: Call) -> int:
    """head_dim as a tile has it."""
    return int(max(16, next_power_of_2(call.query.shape[3])))
