"""lsg_attention: the entry point for batches of one length; checks its arguments."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Literal, overload

import torch
from torch import Tensor

from .call import Call
from .checks import integer, number, probability, type_name
from .dispatch import answer, check_implementation
from .masking import check_mask
from .pattern import LSGPattern

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@overload
def lsg_attention(
    query: Tensor, key: Tensor, value: Tensor, pattern: LSGPattern, attention_mask: Tensor | None = ...,
    dropout_p: float = ..., scale: float | None = ..., implementation: str = ...,
    lsh_projections: Sequence[Tensor] | None = ..., *, return_lse: Literal[False] = ..., first_head: int | None = ...,
) -> Tensor: ...  # fmt: skip
@overload
def lsg_attention(
    query: Tensor, key: Tensor, value: Tensor, pattern: LSGPattern, attention_mask: Tensor | None = ...,
    dropout_p: float = ..., scale: float | None = ..., implementation: str = ...,
    lsh_projections: Sequence[Tensor] | None = ..., *, return_lse: Literal[True], first_head: int | None = ...,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
def lsg_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: LSGPattern,
    attention_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
    implementation: str = "auto",
    lsh_projections: Sequence[Tensor] | None = None,
    *,
    return_lse: bool = False,
    first_head: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Local + Sparse + Global attention (arXiv 2210.15497): one softmax over a window, compressed and global keys.

    Differentiable in query, key and value: once and by reverse mode with ``"triton"``, ``"cpp"`` and ``"torch"``;
    twice, and by ``torch.func``, with ``"reference"``. The choice that ``norm``, ``lsh``, ``stride`` and
    ``block_stride`` make has no gradient.

    Args:
        query, key, value: (batch, heads, G+T, head_dim), of one device and one dtype out of float64, float32,
            bfloat16, float16; any strides. The first G = ``pattern.num_global_tokens`` positions are global.
            T need not be a multiple of the block size. Key and value may have fewer heads, which divide the query's
            (grouped-query attention): head h of the query reads key head ``h // (heads / key heads)``.
        pattern: who sees whom.
        attention_mask: (batch, G+T), or (batch, T) where the globals are visible; bool or integer, true or nonzero
            for a token, false or 0 for padding. Padding is not seen. Its values never matter to other rows as long as
            its scores are finite in the dtype. One exception: ``bos_pooling`` weights by the query of the first token,
            even if that is padding. A query that sees nothing gives 0.
        dropout_p: probability, in [0, 1), that an attention probability is zeroed; the rest is scaled by 1/(1-p).
            It applies whenever it is not 0: pass 0 in evaluation. Seeded by ``torch.manual_seed``; from one seed,
            implementations draw different masks.
        scale: factor of the scores (those of ``bos_pooling`` too); ``1/sqrt(head_dim)`` by default.
        implementation: ``"triton"`` (fused kernels, on CUDA and ROCm devices), ``"cpp"`` (block-wise C++ for CPUs,
            compiled on first use), ``"torch"`` (block-wise, in PyTorch), ``"reference"`` (a dense mask: slow, memory
            quadratic in length), or ``"auto"``, the first of these that can run.
        lsh_projections: for ``lsh``, the random directions of each round in order, each (heads, head_dim, m//2) for
            the round's m = ``pattern.lsh_buckets[i]`` buckets, instead of those of ``pattern.lsh_seed``.
        return_lse: return the log-sum-exp as well, as merging with other attentions needs it. It is differentiable.
        first_head: where heads are shared out over processes, the number of the first of these among all heads. What
            ``stride`` and ``block_stride`` choose depends on a head's number; ``lsh`` needs ``lsh_projections`` then,
            as its draws depend on the number of all heads.

    Returns:
        (batch, heads, G+T, head_dim), of query's dtype, also under autocast. In float16 and bfloat16 ``"torch"`` and
        ``"reference"`` round scores and probabilities to that dtype, as the plain computation does; ``"triton"`` and
        ``"cpp"`` only the probabilities. With ``return_lse`` also (batch, heads, G+T) float32, or float64 for
        float64 inputs: the natural log-sum-exp of each query's scaled scores, before dropout; -inf where it sees
        nothing.

    Raises:
        TypeError: an argument is not of the type named above.
        ValueError: shapes, dtypes or devices do not fit, a number is out of range, or the implementation cannot run.
    """
    _check_tensors(query, key, value)
    _, heads, length, head_dim = query.shape
    if not isinstance(pattern, LSGPattern):
        raise TypeError(f"pattern: expected an LSGPattern, got {type_name(pattern)}")
    if pattern.num_global_tokens > length:
        raise ValueError(
            f"num_global_tokens: expected at most the sequence's length {length}, got {pattern.num_global_tokens}"
        )
    check_implementation(implementation)
    if not isinstance(return_lse, bool):
        raise TypeError(f"return_lse: expected a bool, got {type_name(return_lse)}")
    check_mask(attention_mask, query, pattern.num_global_tokens)
    dropout_p = probability("dropout_p", dropout_p)
    scale = 1.0 / math.sqrt(head_dim) if scale is None else number("scale", scale)
    projections = _projections(lsh_projections, pattern, heads, head_dim, query.device)
    if first_head is not None:
        first_head = integer("first_head", first_head, 0)
        if pattern.rule.is_hashed and not projections:
            raise ValueError(
                "lsh_projections: expected tensors where first_head is given, as the draws depend on the number of all "
                "heads; lsg_attn.compression.lsh_directions makes those of all heads"
            )
    call = Call(query, key, value, attention_mask, None, projections, dropout_p, scale, pattern, first_head or 0)
    # A graph may be for any length: it does not ask whether this one has slots.
    is_uncovered = first_head is None and pattern.rule.varies_by_head and pattern.sparsity_factor > heads
    if is_uncovered and (torch.compiler.is_compiling() or call.num_slots):
        warnings.warn(
            f"sparsity_type={pattern.sparsity_type!r} covers all tokens only with at least sparsity_factor="
            f"{pattern.sparsity_factor} heads; there are {heads}",
            stacklevel=2,
        )
    return answer(call, implementation, return_lse)


def _check_tensors(query: Tensor, key: Tensor, value: Tensor) -> None:
    for name, x in (("query", query), ("key", key), ("value", value)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}: expected a torch.Tensor, got {type_name(x)}")
        if x.dtype not in _DTYPES:
            raise TypeError(f"{name}: expected a dtype out of {_DTYPES}, got {x.dtype}")
        if x.dim() != 4:
            raise ValueError(f"{name}: expected 4 dimensions (batch, heads, G+T, head_dim), got shape {tuple(x.shape)}")
        for what in ("dtype", "device"):
            expected, got = getattr(query, what), getattr(x, what)
            if got != expected:
                raise ValueError(f"{name}: expected query's {what} {expected}, got {got}")
        if x.shape[1] == 0 or x.shape[-1] == 0:
            raise ValueError(
                f"{name}: expected at least one head and a head_dim of at least 1, got shape {tuple(x.shape)}"
            )
    batch, heads, length, head_dim = query.shape
    if key.shape != (batch, key.shape[1], length, head_dim) or heads % key.shape[1]:
        raise ValueError(
            f"key: expected query's shape {tuple(query.shape)}, or a number of heads that divides {heads}, "
            f"got {tuple(key.shape)}"
        )
    if value.shape != key.shape:
        raise ValueError(f"value: expected key's shape {tuple(key.shape)}, got {tuple(value.shape)}")


def _projections(
    projections: Sequence[Tensor] | None, pattern: LSGPattern, heads: int, head_dim: int, device: torch.device
) -> tuple[Tensor, ...]:
    if projections is None:
        return ()
    if not pattern.rule.is_hashed:
        raise ValueError(f"lsh_projections: expected None, as this pattern compresses by {pattern.compression!r}")
    shapes = [(heads, head_dim, buckets // 2) for buckets in pattern.lsh_buckets]
    if not isinstance(projections, (list, tuple)):
        raise TypeError(f"lsh_projections: expected a list or tuple, got {type_name(projections)}")
    for x in projections:
        if not isinstance(x, Tensor):
            raise TypeError(f"lsh_projections: expected tensors, got {type_name(x)}")
        if x.dtype not in _DTYPES:
            raise TypeError(f"lsh_projections: expected a dtype out of {_DTYPES}, got {x.dtype}")
        if x.device != device:
            raise ValueError(f"lsh_projections: expected query's device {device}, got {x.device}")
    got = [tuple(x.shape) for x in projections]
    if got != shapes:
        raise ValueError(f"lsh_projections: expected shapes {shapes}, got {got}")
    return tuple(projections)
