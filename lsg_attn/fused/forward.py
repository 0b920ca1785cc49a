"""The launches of a forward: at most one compression, the attention, and at most one combine.

Planning is apart from running, so that tools can count launches, and compile them for GPUs that are not here.
"""

from __future__ import annotations

import torch

from ..call import Call
from ..kernels.forward import _lsg_fwd_combine_kernel, _lsg_fwd_kernel
from .compress import directions_of, plan_compression
from .launch import COMBINED, Launch, attention_arguments, cdiv, run_on, split_globals
from .results import Results, allocate
from .schedules import COMBINE, Schedule, forward_schedule, hides_by_branch, target_of
from .variant import Variant, variant_of


def launch_forward(call: Call) -> Results:
    """Run the forward of ``call`` on the GPU that its tensors are on, without waiting for it."""
    results, device = allocate(call), call.query.device
    run_on(device, plan_forward(call, results, target_of(device)))
    return results


def plan_forward(call: Call, results: Results, target: str, schedule: Schedule | None = None) -> list[Launch]:
    """The launches, in order, that fill ``results`` on a GPU of architecture ``target``.

    ``schedule``: of the attention kernel, for a tool that tries others than the table's.
    """
    query, variant = call.query, variant_of(call)
    if schedule is None:
        schedule = forward_schedule(target, query.dtype, query.shape[3], call.pattern.block_size, variant.has_dropout)
    launches = (
        *plan_compression(call, results, target, directions_of(call)),
        *_plan_attention(call, results, variant, target, schedule),
    )
    return [launch for launch in launches if launch.programs]


def _plan_attention(
    call: Call, results: Results, variant: Variant, target: str, schedule: Schedule
) -> list[Launch]:  # fmt: skip
    query, pattern = call.query, call.pattern
    batch, heads, head_dim = call.num_sequences, query.shape[1], query.shape[3]
    num_globals = pattern.num_global_tokens
    split = split_globals(call, schedule.block_m, num_globals + (0 if pattern.causal else call.num_tokens))
    part = query.new_empty(batch * heads, split.num_parts, num_globals, head_dim, dtype=torch.float32)
    shared = attention_arguments(call, results, variant)
    outputs = {
        "out_ptr": results.out,
        "lse_ptr": results.lse,
        "part_ptr": part,
        "part_lse_ptr": part.new_empty(batch * heads, split.num_parts, num_globals),
        "out_strides": results.out.stride(),
        "part_strides": part.stride(),
        **{name: shared[name] for name in ("kept_scale", "cu_ptr", "num_tokens", "length", "BLOCK_D")},
        "num_heads": heads,
        "part_size": split.part_size,
        "num_parts": split.num_parts,
    }
    tiles = {
        "BLOCK_M": schedule.block_m,
        "BLOCK_N": schedule.block_n,
        "BLOCK_G": split.block,
        "BRANCH": hides_by_branch(target, query.dtype),
    }
    attention = {**shared, **outputs, "batch": batch, **tiles}
    combine = {**outputs, "NUM_GLOBALS": num_globals, "HEAD_DIM": head_dim, "BLOCK_N": COMBINED}
    programs = batch * heads * (split.programs + cdiv(call.num_tokens, schedule.block_m))
    return [
        Launch(_lsg_fwd_kernel, programs, attention, schedule.tuning),
        Launch(_lsg_fwd_combine_kernel, batch * heads * num_globals, combine, COMBINE),
    ]
