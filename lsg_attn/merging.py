"""The softmax over all keys from those over parts of them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Merged(NamedTuple):
    """The output (..., head_dim) and the log-sum-exp (...) over all parts, and the weight (parts, ...) of each part."""

    out: Tensor
    lse: Tensor
    weights: Tensor


def merge(outs: Tensor, lses: Tensor) -> Merged:
    """Merge the outputs (parts, ..., head_dim) of softmaxes over parts of the keys, by their log-sum-exps (parts, ...).

    A log-sum-exp is -inf where a part has no key that is seen. Sums are in the order of the parts.
    """
    lse = lses.logsumexp(0)
    weights = (lses - lse.masked_fill(lse == -torch.inf, 0)).exp()
    return Merged((weights.unsqueeze(-1) * outs).sum(0), lse, weights)


def merge_backward(merged: Merged, number: int, out: Tensor, dout: Tensor, dlse: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of part ``number``'s output and log-sum-exp, from the merged ones; ``out``: the part's output."""
    weight = merged.weights[number]
    return weight.unsqueeze(-1) * dout, weight * (((out - merged.out) * dout).sum(-1) + dlse)
