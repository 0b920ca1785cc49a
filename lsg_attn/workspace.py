"""Scratch memory that is used again: what a CPU would else spend on fresh memory is most of a small step's time."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .tracing import is_exporting


class Workspace:
    """Named scratch memory that is used again and again, so that it stays in cache."""

    def __init__(self, like: Tensor, dtype: torch.dtype | None = None) -> None:
        """Memory on the device of ``like``, of its dtype unless another is given."""
        self._like, self.dtype = like, dtype or like.dtype
        self._memory: dict[str, Tensor] = {}

    def empty(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """An uninitialised tensor in the memory called ``name``; what was there is lost.

        One name goes with one dtype.
        """
        if is_exporting():  # the compiler plans memory itself
            return self._like.new_empty(shape, dtype=dtype or self.dtype)
        size = math.prod(shape)
        if name not in self._memory or self._memory[name].numel() < size:
            self._memory[name] = self._like.new_empty(size, dtype=dtype or self.dtype)
        return self._memory[name][:size].view(shape)

    def matmul(self, name: str, a: Tensor, b: Tensor, alpha: float = 1.0) -> Tensor:
        """alpha * a @ b for (n, rows, k) and (n, k, columns), in the memory called ``name``."""
        return matmul_out(self.empty(name, a.shape[0], a.shape[1], b.shape[2]), a, b, alpha)


def matmul_out(out: Tensor, a: Tensor, b: Tensor, alpha: float = 1.0) -> Tensor:
    """Write alpha * a @ b, batched, to out and return it."""
    return torch.baddbmm(out, a, b, beta=0, alpha=alpha, out=out)
