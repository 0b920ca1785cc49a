"""The attention mask: a check of the two shapes that callers may pass, and their conversion to one."""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import type_name


def check_mask(
    attention_mask: Tensor | None, query: Tensor, num_global_tokens: int, name: str = "attention_mask"
) -> None:
    """Check a mask (batch or 1, T) or (batch or 1, G+T) for queries (batch, heads, G+T, head_dim).

    Raises:
        TypeError: the mask is not a tensor of bool or integers.
        ValueError: its shape or device does not match the queries.
    """
    if attention_mask is None:
        return
    if not isinstance(attention_mask, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type_name(attention_mask)}")
    if attention_mask.is_floating_point() or attention_mask.is_complex():
        raise TypeError(f"{name}: expected bool or integers (nonzero for a token), got {attention_mask.dtype}")
    batch, _, length, _ = query.shape
    shapes = (batch, length - num_global_tokens), (batch, length)
    shape = tuple(attention_mask.shape)
    if len(shape) != 2 or shape[0] not in (batch, 1) or shape[1] not in (shapes[0][1], shapes[1][1]):
        raise ValueError(
            f"{name}: expected shape (batch, T) = {shapes[0]} or (batch, G+T) = {shapes[1]}, or a batch of 1; "
            f"got {shape}"
        )
    if attention_mask.device != query.device:
        raise ValueError(f"{name}: expected query's device {query.device}, got {attention_mask.device}")


def full_mask(attention_mask: Tensor | None, query: Tensor) -> Tensor:
    """Convert a checked mask to (batch, G+T) bool, true for a token. A (batch, T) mask gets true for the globals."""
    batch, _, length, _ = query.shape
    if attention_mask is None:
        return torch.ones(batch, length, dtype=torch.bool, device=query.device)
    return torch.nn.functional.pad(attention_mask != 0, (length - attention_mask.shape[1], 0), value=True)
