"""lsg_attention: the entry point for batches of one length; checks its arguments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, overload

from torch import Tensor

from .arguments import checked_call
from .dispatch import answer
from .pattern import LSGPattern
from .varlen import nested_attention


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
            (grouped-query attention): head h of the query reads key head ``h // (heads / key heads)``. Jagged nested
            tensors (batch, heads, j, head_dim) have sequences of several lengths, as in :func:`lsg_attention_varlen`.
        pattern: who sees whom.
        attention_mask: (batch, G+T), or (batch, T) where the globals are visible, or one row for all; bool or integer,
            true or nonzero for a token, false or 0 for padding. Padding is not seen. Its values never matter to other
            rows as long as its scores are finite in the dtype. One exception: ``bos_pooling`` weights by the query of
            the first token, even if that is padding. A query that sees nothing gives 0.
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
    if any(isinstance(x, Tensor) and x.is_nested for x in (query, key, value)):
        if attention_mask is not None:
            raise ValueError("attention_mask: expected None for nested tensors, which have no padding")
        found: Tensor | tuple[Tensor, Tensor] = nested_attention(
            query, key, value, pattern, dropout_p, scale, implementation, lsh_projections, return_lse=return_lse,
            first_head=first_head,
        )  # fmt: skip
        return found
    call = checked_call(
        query, key, value, pattern, attention_mask, dropout_p, scale, lsh_projections, first_head
    )  # fmt: skip
    return answer(call, implementation, return_lse)
