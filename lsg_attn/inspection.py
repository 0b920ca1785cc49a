"""What a few queries attend to, as probabilities over all positions, to look at."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .arguments import checked_call
from .checks import type_name
from .dispatch import refuse_shared_out
from .pattern import LSGPattern
from .reference import probabilities, scores_of, with_all_heads


def attention_weights(
    query: Tensor,
    key: Tensor,
    pattern: LSGPattern,
    attention_mask: Tensor | None = None,
    *,
    rows: Sequence[int] | Tensor,
    scale: float | None = None,
    lsh_projections: Sequence[Tensor] | None = None,
) -> Tensor:
    """The attention probabilities of some queries over the globals and tokens.

    The probability of a compressed key goes to the tokens that it is made of, by their weights in it. So
    ``weights @ value`` is what :func:`lsg_attention` gives these queries. A row sums to 1; where it sees means of
    tokens, to a little less, as do the weights of a mean in the original.

    Args:
        query, key, pattern, attention_mask, scale, lsh_projections: as in :func:`lsg_attention`.
        rows: positions of queries from 0 to G+T-1, integers or a tensor of them (rows,).

    Returns:
        (batch, heads, rows, G+T), of query's dtype.

    Raises:
        TypeError, ValueError: as :func:`lsg_attention` says, or ``rows`` are no positions.
    """
    refuse_shared_out("attention_weights")
    call = checked_call(query, key, key, pattern, attention_mask, 0.0, scale, lsh_projections, None)
    length, first = query.shape[2], pattern.num_global_tokens
    scores, visible, compression = scores_of(with_all_heads(call), _positions(rows, length))
    probs = probabilities(scores, visible)
    if compression is None:
        return probs
    weights, of_slots = probs[..., :length].clone(), probs[..., length:]
    slot = compression.slot.unsqueeze(-2).expand(*of_slots.shape[:-1], -1)
    weights[..., first:] += of_slots.gather(-1, slot) * compression.weight.unsqueeze(-2).to(probs.dtype)
    return weights


def _positions(rows: Sequence[int] | Tensor, length: int) -> Tensor:
    """The rows as a CPU tensor, checked."""
    try:
        found = torch.as_tensor(rows, device="cpu")
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"rows: expected integers, got {type_name(rows)}") from None
    if found.is_floating_point() or found.is_complex() or found.dtype == torch.bool:
        raise TypeError(f"rows: expected integers, got {found.dtype}")
    if found.dim() != 1 or not len(found):
        raise ValueError(f"rows: expected one or more positions (rows,), got shape {tuple(found.shape)}")
    if not 0 <= int(found.min()) <= int(found.max()) < length:
        raise ValueError(
            f"rows: expected positions from 0 to {length - 1}, got {int(found.min())} to {int(found.max())}"
        )
    return found.long()
