"""lsg_attention: the one entry point; checks its arguments and chooses an implementation."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .blockwise import blockwise_attention
from .pattern import LSGPattern
from .reference import reference_attention

_IMPLEMENTATIONS: dict[str, Callable[..., Tensor]] = {
    "auto": blockwise_attention,
    "torch": blockwise_attention,
    "reference": reference_attention,
}
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


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
) -> Tensor:
    """Local + Sparse + Global attention (arXiv 2210.15497): one softmax over a window, compressed and global keys.

    Differentiable once in query, key and value. The choice that ``norm``, ``lsh``, ``stride`` and ``block_stride``
    make among tokens has no gradient.

    Args:
        query, key, value: (batch, heads, G+T, head_dim), of one device and one dtype out of float64, float32,
            bfloat16, float16; any strides. The first G = ``pattern.num_global_tokens`` positions are global.
            T need not be a multiple of the block size.
        pattern: who sees whom.
        attention_mask: (batch, G+T), or (batch, T) where the globals are visible; bool or integer, true or nonzero
            for a token, false or 0 for padding. Padding is not seen; what it holds never matters if it is finite,
            but for ``bos_pooling``, which pools by the first token's query even where that is padding.
            A query that sees nothing gives 0.
        dropout_p: probability, in [0, 1), that an attention probability is zeroed; the rest is scaled by 1/(1-p).
            It applies whenever it is not 0: pass 0 in evaluation. Seeded by ``torch.manual_seed``.
        scale: factor of the scores (those of ``bos_pooling`` too); ``1/sqrt(head_dim)`` by default.
        implementation: ``"torch"`` (block-wise), ``"reference"`` (a dense mask: slow, memory quadratic in length),
            ``"triton"``, or ``"auto"``, the fastest that can run.
        lsh_projections: for ``lsh``, the random directions of each round in order, each (heads, head_dim, m//2) for
            the round's m = ``pattern.lsh_buckets[i]`` buckets, instead of those of ``pattern.lsh_seed``.

    Returns:
        (batch, heads, G+T, head_dim), of query's dtype.

    Raises:
        TypeError: an argument is not of the type named above.
        ValueError: shapes, dtypes or devices do not fit, a number is out of range, or the implementation can not run.
    """
    _check_tensors(query, key, value)
    _, heads, length, head_dim = query.shape
    _check(isinstance(pattern, LSGPattern), TypeError, f"pattern: expected an LSGPattern, got {_type(pattern)}")
    _check(
        pattern.num_global_tokens <= length,
        ValueError,
        f"num_global_tokens: expected at most the sequence's length {length}, got {pattern.num_global_tokens}",
    )
    check_implementation(implementation)
    keep = _keep(attention_mask, query, pattern.num_global_tokens)
    dropout_p = _number("dropout_p", dropout_p)
    _check(0.0 <= dropout_p < 1.0, ValueError, f"dropout_p: expected a probability in [0, 1), got {dropout_p}")
    scale = 1.0 / math.sqrt(head_dim) if scale is None else _number("scale", scale)
    _check(math.isfinite(scale), ValueError, f"scale: expected a finite number, got {scale}")
    projections = _projections(lsh_projections, pattern, heads, head_dim)
    if pattern.compression in ("stride", "block_stride") and pattern.sparsity_factor > heads:
        warnings.warn(
            f"sparsity_type={pattern.sparsity_type!r} covers all tokens only with at least sparsity_factor="
            f"{pattern.sparsity_factor} heads; there are {heads}",
            stacklevel=2,
        )
    return _IMPLEMENTATIONS[implementation](query, key, value, keep, pattern, dropout_p, scale, projections)


def check_implementation(implementation: str) -> None:
    """Check the name of an implementation, and that it can run in this version.

    Raises:
        TypeError: it is not a string.
        ValueError: there is none of that name, or it can not run.
    """
    _check(isinstance(implementation, str), TypeError, f"implementation: expected a str, got {_type(implementation)}")
    _check(
        implementation != "triton",
        ValueError,
        "implementation='triton' can not run: this version has no Triton kernels yet; use 'auto' or 'torch'",
    )
    _check(
        implementation in _IMPLEMENTATIONS,
        ValueError,
        f"implementation: expected 'auto', 'triton', 'torch' or 'reference', got {implementation!r}",
    )


def _check_tensors(query: Tensor, key: Tensor, value: Tensor) -> None:
    for name, x in (("query", query), ("key", key), ("value", value)):
        _check(isinstance(x, Tensor), TypeError, f"{name}: expected a torch.Tensor, got {_type(x)}")
        _check(x.dtype in _DTYPES, TypeError, f"{name}: expected a dtype out of {_DTYPES}, got {x.dtype}")
        _check(
            x.dim() == 4,
            ValueError,
            f"{name}: expected 4 dimensions (batch, heads, G+T, head_dim), got shape {tuple(x.shape)}",
        )
        for what in ("shape", "dtype", "device"):
            expected, got = getattr(query, what), getattr(x, what)
            _check(got == expected, ValueError, f"{name}: expected query's {what} {expected}, got {got}")
    _check(
        query.shape[1] > 0 and query.shape[-1] > 0,
        ValueError,
        f"query: expected at least one head and a head_dim of at least 1, got shape {tuple(query.shape)}",
    )


def _keep(attention_mask: Tensor | None, query: Tensor, num_global_tokens: int) -> Tensor:
    """The mask as (batch, G+T) bool, true for a token."""
    batch, _, length, _ = query.shape
    if attention_mask is None:
        return torch.ones(batch, length, dtype=torch.bool, device=query.device)
    _check(
        isinstance(attention_mask, Tensor),
        TypeError,
        f"attention_mask: expected a torch.Tensor, got {_type(attention_mask)}",
    )
    _check(
        not attention_mask.is_floating_point() and not attention_mask.is_complex(),
        TypeError,
        f"attention_mask: expected bool or integers (nonzero for a token), got {attention_mask.dtype}",
    )
    shapes = (batch, length - num_global_tokens), (batch, length)
    _check(
        tuple(attention_mask.shape) in shapes,
        ValueError,
        f"attention_mask: expected shape (batch, T) = {shapes[0]} or (batch, G+T) = {shapes[1]}, "
        f"got {tuple(attention_mask.shape)}",
    )
    _check(
        attention_mask.device == query.device,
        ValueError,
        f"attention_mask: expected query's device {query.device}, got {attention_mask.device}",
    )
    return torch.nn.functional.pad(attention_mask != 0, (length - attention_mask.shape[1], 0), value=True)


def _projections(
    projections: Sequence[Tensor] | None, pattern: LSGPattern, heads: int, head_dim: int
) -> tuple[Tensor, ...] | None:
    if projections is None:
        return None
    _check(
        pattern.compression == "lsh",
        ValueError,
        f"lsh_projections: expected None, as this pattern compresses by {pattern.compression!r}",
    )
    shapes = [(heads, head_dim, buckets // 2) for buckets in pattern.lsh_buckets]
    got = [tuple(x.shape) if isinstance(x, Tensor) else _type(x) for x in projections]
    _check(got == shapes, ValueError, f"lsh_projections: expected tensors of shapes {shapes}, got {got}")
    return tuple(projections)


def _number(name: str, value: float) -> float:
    _check(
        isinstance(value, (int, float)) and not isinstance(value, bool),
        TypeError,
        f"{name}: expected a number, got {_type(value)}",
    )
    return float(value)


def _type(value: object) -> str:
    return type(value).__name__


def _check(condition: bool, error: type[Exception], message: str) -> None:
    if not condition:
        raise error(message)
