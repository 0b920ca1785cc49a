"""From a call to the launches of its forward: at most one compression, the attention, and at most one combine.

Planning is apart from running, so that tools can count launches, and compile them for GPUs that are not here.
"""

from __future__ import annotations

import torch
from triton import cdiv, next_power_of_2

from ..call import Call, Results, allocate, variant_of
from ..kernels.compress import _lsg_lsh_kernel, _lsg_norm_kernel, _lsg_pool_kernel
from ..kernels.forward import _lsg_fwd_combine_kernel, _lsg_fwd_kernel
from .launch import COMBINED, Launch, attention_arguments, block_d, key_arguments, run_on, scale_log2, split_globals
from .schedules import COMBINE, NORM, POOL, Schedule, forward_schedule, lsh_tuning, target_of

# Tokens that are ranked, and groups that are pooled at a time.
_RANKED, _POOLED = 128, 32


def launch_forward(call: Call) -> Results:
    """Run the forward of ``call`` on the GPU that its tensors are on, without waiting for it."""
    results, device = allocate(call), call.query.device
    run_on(device, plan_forward(call, results, target_of(device)))
    return results


def plan_forward(call: Call, results: Results, target: str, schedule: Schedule | None = None) -> list[Launch]:
    """The launches, in order, that fill ``results`` on a GPU of architecture ``target``.

    ``schedule``: of the attention kernel, for a tool that tries others than the table's.
    """
    query, has_dropout = call.query, variant_of(call).has_dropout
    if schedule is None:
        schedule = forward_schedule(target, query.dtype, query.shape[3], call.pattern.block_size, has_dropout)
    launches = (*plan_compression(call, results, target), *_plan_attention(call, results, schedule))
    return [launch for launch in launches if launch.programs]


def _plan_attention(call: Call, results: Results, schedule: Schedule) -> list[Launch]:
    query, pattern, variant = call.query, call.pattern, variant_of(call)
    batch, heads, length, head_dim = query.shape
    num_globals = pattern.num_global_tokens
    split = split_globals(call, schedule.block_m)
    part = query.new_empty(batch * heads, split.num_parts, num_globals, head_dim, dtype=torch.float32)
    shared = attention_arguments(call, results, variant)
    outputs = {
        "out_ptr": results.out,
        "lse_ptr": results.lse,
        "part_ptr": part,
        "part_lse_ptr": part.new_empty(batch * heads, split.num_parts, num_globals),
        "out_strides": results.out.stride(),
        "part_strides": part.stride(),
        "kept_scale": shared["kept_scale"],
        "num_heads": heads,
        "num_parts": split.num_parts,
        "BLOCK_D": shared["BLOCK_D"],
    }
    tiles = {"BLOCK_M": schedule.block_m, "BLOCK_N": schedule.block_n, "BLOCK_G": split.block}
    attention = {**shared, **outputs, "part_size": split.part_size, **tiles}
    combine = {**outputs, "length": length, "NUM_GLOBALS": num_globals, "HEAD_DIM": head_dim, "BLOCK_N": COMBINED}
    programs = batch * heads * (split.programs + cdiv(call.num_tokens, schedule.block_m))
    return [
        Launch(_lsg_fwd_kernel, programs, attention, schedule.tuning),
        Launch(_lsg_fwd_combine_kernel, batch * heads * num_globals, combine, COMBINE),
    ]


def plan_compression(call: Call, results: Results, target: str) -> list[Launch]:
    """The launch, if there is one, that fills the compression's part of ``results``.

    That of ``lsh`` hashes, or without directions goes by ``results.slot``.
    """
    query, pattern, compression = call.query, call.pattern, call.compression
    if compression not in ("norm", "pooling", "bos_pooling", "lsh"):
        return []  # the attention kernel finds its slots by arithmetic
    # What only the attention kernel is compiled for must not make another kernel of a compression.
    variant = variant_of(call)._replace(sparsity=compression, has_dropout=False)
    arguments = {**key_arguments(call), "V": variant, "index_ptr": results.slot_index}
    heads = query.shape[0] * query.shape[1]  # of all the batch
    if compression == "norm":
        block_c = min(_RANKED, max(16, next_power_of_2(pattern.chunk)))
        del arguments["v_ptr"], arguments["v_strides"]
        arguments["BLOCK_C"] = block_c
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
            "scale_log2": scale_log2(call),
            "BY_QUERY": by_query,
            "BLOCK_N": _POOLED,
            "BLOCK_D": block_d(call),
        }
        return [Launch(_lsg_pool_kernel, heads * cdiv(call.num_slots, _POOLED), arguments, POOL)]
    arguments |= {
        "slot_ptr": results.slot,
        "direction_ptrs": call.directions or None,
        "BLOCK_C": max(16, next_power_of_2(pattern.chunk)),
        "BLOCK_N": max(16, next_power_of_2(pattern.chunk // pattern.sparsity_factor)),
    }
    return [Launch(_lsg_lsh_kernel, heads * _num_chunks(call), arguments, lsh_tuning(target))]


def _num_chunks(call: Call) -> int:
    """Chunks of tokens in a head, of which each gives c // f slots."""
    return call.num_slots * call.pattern.sparsity_factor // call.pattern.chunk
