"""The launches of a backward: two to five, and at most one combine."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..call import Call
from ..kernels.backward import _lsg_bwd_dq_dkv_kernel, _lsg_bwd_slots_kernel
from ..kernels.heads import SUMS_PADDED
from ..kernels.reduce import _lsg_bwd_combine_kernel, _lsg_bwd_sums_kernel, _lsg_bwd_weights_kernel
from .compress import plan_compression
from .launch import (
    COMBINED,
    Launch,
    attention_arguments,
    block_d,
    cdiv,
    key_arguments,
    run_on,
    section_arguments,
    split_globals,
)
from .results import Results, Saved, restore, slot_rows, token_rows
from .schedules import COMBINE, SUMS, WEIGHTS, Schedule, backward_schedule, hides_by_branch, target_of
from .variant import variant_of, without_scores

# ``sums`` has its rows in multiples of so many, see kernels/heads.py.
_PADDED = int(SUMS_PADDED.value)
# Rows whose products with dout are summed, and tokens whose weights are differentiated at a time.
_SUMMED, _WEIGHED = 64, 32


class Gradients(NamedTuple):
    """The gradients of a call's inputs, shaped as they are."""

    query: Tensor
    key: Tensor
    value: Tensor


def allocate_gradients(call: Call) -> Gradients:
    """Uninitialised gradients of ``call``, of its inputs' dtypes, and their strides where those are dense."""
    return Gradients(*(torch.empty_like(x) for x in (call.query, call.key, call.value)))


def launch_backward(call: Call, saved: Saved, dout: Tensor, dlse: Tensor | None = None) -> Gradients:
    """Run the backward of ``call`` on the GPU that its tensors are on, without waiting for it.

    ``saved``: of the results of its forward; ``dout, dlse``: the gradients of its output and log-sum-exp,
    of any strides.
    """
    results, gradients, device = restore(call, saved), allocate_gradients(call), call.query.device
    run_on(device, plan_backward(call, results, dout, gradients, target_of(device), dlse=dlse))
    return gradients


def plan_backward(
    call: Call, results: Results, dout: Tensor, gradients: Gradients, target: str, schedule: Schedule | None = None,
    dlse: Tensor | None = None,
) -> list[Launch]:  # fmt: skip
    """The launches, in order, that fill ``gradients`` on a GPU of architecture ``target``.

    ``results``: only what is ``Saved`` of them need be there; the rows of slots are made again, where ``lsh`` need not
    hash again. ``schedule``: for a tool that tries others than the table's.
    """
    query, variant = call.query, variant_of(call, dout)
    heads, head_dim = query.shape[1], query.shape[3]
    if schedule is None:
        schedule = backward_schedule(target, query.dtype, head_dim, variant.has_dropout, variant.causal)
    sums = _scratch(call, query.shape[0], heads, _sums_rows(call), 2)
    dslot = _scratch(call, 2, query.shape[0], heads, slot_rows(call) if call.num_slots else 0, head_dim)
    attention = {
        **attention_arguments(call, results, variant),
        "dout_ptr": dout,
        "sums_ptr": sums,
        "sums_stride": sums.shape[2],
        "dslot_k_ptr": dslot[0],
        "dslot_v_ptr": dslot[1],
        "dout_strides": dout.stride(),
        "slot_strides": dslot[0].stride(),
        "BLOCK_M": schedule.block_m,
        "BLOCK_N": schedule.block_n,
    }
    weights = _plan_weights(call, results, attention) if call.rule.has_weight_gradient else None
    launches = (
        *(plan_compression(call, results, target) if variant.sparsity == "compressed" else ()),
        _plan_sums(call, results, dout, dlse, sums),
        Launch(
            _lsg_bwd_slots_kernel,
            call.num_sequences * heads * cdiv(call.num_slots, schedule.block_m),
            attention,
            schedule.tuning,
        ),
        *(() if weights is None else (weights,)),
        *_plan_gradients(call, results, gradients, attention, weights, target, schedule),
    )
    return [launch for launch in launches if launch.programs]


def _scratch(call: Call, *shape: int) -> Tensor:
    return call.query.new_empty(shape, dtype=torch.float32)


def _sequence_sums_rows(call: Call) -> int:
    """Rows of sums of a sequence, of packed ones of the longest: ``sums_rows`` in kernels/heads.py."""
    return (cdiv(call.pattern.num_global_tokens, _PADDED) + cdiv(call.num_tokens, _PADDED) + 1) * _PADDED


def _sums_rows(call: Call) -> int:
    """Rows of sums in a head; of packed sequences, enough that each has its own where ``sums_of`` there says."""
    if call.cu_seqlens is None:
        return _sequence_sums_rows(call)
    of_globals = cdiv(call.pattern.num_global_tokens, _PADDED)
    return int(call.query.shape[2] // _PADDED + call.num_sequences * (of_globals + 2)) * _PADDED


def _plan_sums(call: Call, results: Results, dout: Tensor, dlse: Tensor | None, sums: Tensor) -> Launch:
    heads, section = call.query.shape[1], section_arguments(call)
    tiles = _sequence_sums_rows(call) // _SUMMED
    arguments = {
        "out_ptr": results.out,
        "dout_ptr": dout,
        "lse_ptr": results.lse,
        "dlse_ptr": None if dlse is None else dlse.contiguous(),
        "cu_ptr": call.cu_seqlens,
        "sums_ptr": sums,
        "out_strides": results.out.stride(),
        "dout_strides": dout.stride(),
        "sums_stride": sums.shape[2],
        "num_heads": heads,
        "num_tokens": call.num_tokens,
        "length": call.query.shape[2],
        **{name: section[name] for name in ("first_query", "stop_query")},
        "NUM_GLOBALS": call.pattern.num_global_tokens,
        "HEAD_DIM": call.query.shape[3],
        "BLOCK_M": _SUMMED,
        "BLOCK_D": block_d(call),
    }
    return Launch(_lsg_bwd_sums_kernel, call.num_sequences * heads * tiles, arguments, SUMS)


def _plan_weights(call: Call, results: Results, attention: dict[str, Any]) -> Launch:
    """The launch that brings gradients to the scores of the first token's query, which give tokens their weights."""
    batch, heads, _, head_dim = call.query.shape
    tiles, programs = cdiv(call.num_tokens, _WEIGHED), call.num_sequences * heads
    arguments = {
        **key_arguments(call),
        **{name: attention[name] for name in ("sparse_k_ptr", "sparse_v_ptr", "sparse_strides", "scale_log2")},
        **{name: attention[name] for name in ("dslot_k_ptr", "dslot_v_ptr", "slot_strides", "BLOCK_D")},
        "weight_ptr": results.weight,
        "dscore_ptr": _scratch(call, batch, heads, token_rows(call)),
        "bos_part_ptr": _scratch(call, programs, tiles, head_dim),
        "V": without_scores(attention["V"]),
        "BLOCK_M": _WEIGHED,
    }
    return Launch(_lsg_bwd_weights_kernel, programs * tiles, arguments, WEIGHTS)


def _plan_gradients(
    call: Call, results: Results, gradients: Gradients, attention: dict[str, Any], weights: Launch | None,
    target: str, schedule: Schedule,
) -> list[Launch]:  # fmt: skip
    """The launch of dq, dk and dv, and the combine of what that, and the launch of weights, leave in parts."""
    bos_part = None if weights is None else weights.arguments["bos_part_ptr"]
    batch, heads, head_dim = call.num_sequences, call.query.shape[1], call.query.shape[3]
    num_globals, variant = call.pattern.num_global_tokens, attention["V"]
    split = split_globals(call, schedule.block_m, num_globals + call.num_tokens)
    tiles = cdiv(call.num_tokens, schedule.block_m)
    part = _scratch(call, 3, batch * heads, split.num_parts, num_globals, head_dim)
    outputs = {
        "dq_ptr": gradients.query,
        "dk_ptr": gradients.key,
        "dv_ptr": gradients.value,
        "dq_part_ptr": part[0],
        "dk_part_ptr": part[1],
        "dv_part_ptr": part[2],
        "dq_strides": gradients.query.stride(),
        "dk_strides": gradients.key.stride(),
        "dv_strides": gradients.value.stride(),
        "part_strides": part[0].stride(),
        **{name: attention[name] for name in ("cu_ptr", "num_tokens", "length")},
        "num_heads": heads,
        "part_size": split.part_size,
        "num_parts": split.num_parts,
    }
    dq_dkv = {
        **attention,
        **outputs,
        "weight_ptr": results.weight if variant.sparsity == "compressed" else None,
        "batch": batch,
        "slot_ptr": results.slot if call.rule.saved == "slot" else None,
        "dscore_ptr": None if weights is None else weights.arguments["dscore_ptr"],
        "BLOCK_G": split.block,
        "BRANCH": hides_by_branch(target, call.query.dtype),
    }
    combine = {
        **outputs,
        "bos_part_ptr": bos_part,
        "num_tiles": 0 if bos_part is None else bos_part.shape[1],
        "NUM_GLOBALS": num_globals,
        "GROUP": variant.group,
        "HEAD_DIM": head_dim,
        "BLOCK_T": _WEIGHED,
        "BLOCK_N": COMBINED,
        "BLOCK_D": attention["BLOCK_D"],
    }
    programs = batch * ((heads + call.key.shape[1]) * tiles + 2 * heads * split.programs)
    return [
        Launch(_lsg_bwd_dq_dkv_kernel, programs, dq_dkv, schedule.tuning),
        Launch(_lsg_bwd_combine_kernel, batch * heads * (num_globals + (bos_part is not None)), combine, COMBINE),
    ]
