"""The launch of a compression, where a call needs one: ranking by norm, pooling, or hashing."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..call import Call
from ..compression import lsh_directions
from ..kernels.compress import _lsg_lsh_kernel, _lsg_norm_kernel, _lsg_pool_kernel
from ..pattern import LSGPattern
from .launch import Launch, block_d, cdiv, key_arguments, next_power_of_2, scale_log2
from .results import Results
from .schedules import NORM, POOL, lsh_tuning
from .variant import variant_of, without_scores

# Tokens that are ranked, and groups that are pooled at a time.
_RANKED, _POOLED = 128, 32


def directions_of(call: Call) -> tuple[Tensor, ...]:
    """The directions of each hashing round as the kernel reads them: float32, contiguous, on the call's device."""
    if not call.rule.is_hashed:
        return ()
    if not call.projections:
        return _seeded_directions(call.pattern, call.query.shape[1], call.query.shape[3], call.query.device)
    return tuple(x.to(torch.float32).contiguous() for x in call.projections)


@lru_cache(maxsize=32)  # the copy waits for the device
def _seeded_directions(pattern: LSGPattern, heads: int, head_dim: int, device: torch.device) -> tuple[Tensor, ...]:
    return tuple(x.to(device) for x in lsh_directions(pattern, heads, head_dim))


def plan_compression(
    call: Call, results: Results, target: str, directions: tuple[Tensor, ...] = ()
) -> list[Launch]:  # fmt: skip
    """The launch, if there is one, that fills the compression's part of ``results``.

    ``directions``: from :func:`directions_of`. Without them ``lsh`` does not hash, but goes by ``results.slot``.
    """
    rule = call.rule
    if rule.lookup == "indexed":
        return [_plan_ranking(call, results)]
    if rule.lookup != "compressed":
        return []  # the attention kernel finds its slots by arithmetic
    if rule.is_hashed:
        return [_plan_hashing(call, results, target, directions)]
    return [_plan_pooling(call, results)]


def _plan_ranking(call: Call, results: Results) -> Launch:
    arguments = _arguments(call, results)
    del arguments["v_ptr"], arguments["v_strides"]
    block_c = min(_RANKED, max(16, next_power_of_2(call.pattern.chunk)))
    programs = _num_chunks(call) * cdiv(call.pattern.chunk, block_c)
    return Launch(_lsg_norm_kernel, programs, {**arguments, "BLOCK_C": block_c}, NORM)


def _plan_pooling(call: Call, results: Results) -> Launch:
    by_query = call.rule.has_weight_gradient
    arguments = {
        **_arguments(call, results),
        **_outputs(results),
        "q_ptr": call.query if by_query else None,
        "q_strides": call.query.stride() if by_query else None,
        "scale_log2": scale_log2(call),
        "BY_QUERY": by_query,
        "BLOCK_N": _POOLED,
        "BLOCK_D": block_d(call),
    }
    return Launch(_lsg_pool_kernel, _num_heads(call) * cdiv(call.num_slots, _POOLED), arguments, POOL)


def _plan_hashing(call: Call, results: Results, target: str, directions: tuple[Tensor, ...]) -> Launch:
    chunk = call.pattern.chunk
    arguments = {
        **_arguments(call, results),
        **_outputs(results),
        "slot_ptr": results.slot,
        "direction_ptrs": directions or None,
        "BLOCK_C": max(16, next_power_of_2(chunk)),
        "BLOCK_N": max(16, next_power_of_2(chunk // call.pattern.sparsity_factor)),
    }
    return Launch(_lsg_lsh_kernel, _num_chunks(call), arguments, lsh_tuning(target))


def _arguments(call: Call, results: Results) -> dict[str, Any]:
    """What every compression kernel is given."""
    # The kernels of a compression do not depend on how the attention kernel finds its keys.
    variant = without_scores(variant_of(call))._replace(sparsity=call.rule.name)
    index = results.slot_index
    return {**key_arguments(call), "V": variant, "index_ptr": index, "index_stride": index.stride(1)}


def _outputs(results: Results) -> dict[str, Any]:
    return {
        "sparse_k_ptr": results.sparse_key,
        "sparse_v_ptr": results.sparse_value,
        "sparse_strides": results.sparse_key.stride(),
        "weight_ptr": results.weight,
    }


def _num_heads(call: Call) -> int:
    """Heads of all sequences."""
    return call.num_sequences * int(call.query.shape[1])


def _num_chunks(call: Call) -> int:
    """Chunks of tokens in all heads, as many in each as in the longest sequence; each gives c // f slots."""
    return _num_heads(call) * (call.num_slots * call.pattern.sparsity_factor // call.pattern.chunk)
