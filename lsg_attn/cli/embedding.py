"""A sentence encoder's embedding of a text, at once or in pieces, for the demo and the bench."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

PIECE = 512  # tokens, with the first and the last


def mean_state(model: Any, ids: Tensor) -> Tensor:
    """The mean (width,) of a model's last states of ids (1, tokens)."""
    states: Tensor = model(ids).last_hidden_state
    return states[0].mean(0)


def pieces(ids: Tensor) -> list[Tensor]:
    """Cut ids (1, tokens) into pieces of up to 512, each between the first and the last token (CLS and SEP)."""
    return [torch.cat([ids[:, :1], inner, ids[:, -1:]], dim=1) for inner in ids[:, 1:-1].split(PIECE - 2, dim=1)]
