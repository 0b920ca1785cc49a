"""Inputs and comparisons for the tests and the benchmarks."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .functional import lsg_attention
from .pattern import LSGPattern

# Largest relative RMS error of out and of each gradient, compared with float64.
TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
PADDINGS = ("none", "right", "left", "ends", "middle", "random", "all")


class Inputs(NamedTuple):
    """Queries, keys, values and an output gradient (batch, heads, length, head_dim); a bool mask (batch, length)."""

    query: Tensor
    key: Tensor
    value: Tensor
    dout: Tensor
    attention_mask: Tensor


def make_inputs(
    batch: int, heads: int, length: int, head_dim: int, dtype: torch.dtype = torch.float32, padding: str = "none",
    garbage: float = 0.0, num_kept: int = 0, seed: int = 0,
) -> Inputs:  # fmt: skip
    """Draw inputs from a normal distribution.

    Args:
        batch, heads, length, head_dim: the shape of the inputs.
        dtype: the dtype of the inputs. They are drawn in float64 and rounded.
        padding: where the mask is false, one of ``PADDINGS``. Padded stretches get shorter along the batch.
        garbage: if not 0, padded queries, keys and values are this number with random signs, and ``dout`` is 0 there.
        num_kept: the number of leading positions that are never padding.
        seed: the seed of the random numbers.

    Raises:
        ValueError: ``padding`` is unknown.
    """
    generator = torch.Generator().manual_seed(seed)
    shape = batch, heads, length, head_dim
    query, key, value, dout = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(4))
    mask = _mask(padding, batch, length, generator)
    mask[:, :num_kept] = True
    if garbage:
        padded = ~mask[:, None, :, None]
        for x in (query, key, value):
            x.copy_(torch.where(padded, x.sign() * garbage, x))
        dout.masked_fill_(padded, 0)
    return Inputs(query.to(dtype), key.to(dtype), value.to(dtype), dout.to(dtype), mask)


def _mask(padding: str, batch: int, length: int, generator: torch.Generator) -> Tensor:
    mask = torch.ones(batch, length, dtype=torch.bool)
    for entry in range(batch):
        cut = length // (3 + entry)
        if padding == "right":
            mask[entry, length - cut :] = False
        elif padding == "left":
            mask[entry, :cut] = False
        elif padding == "ends":
            mask[entry, : cut // 2] = mask[entry, length - cut :] = False
        elif padding == "middle":
            mask[entry, cut : 2 * cut] = False
        elif padding == "random":
            mask[entry] = torch.rand(length, generator=generator) < 0.6
        elif padding == "all":
            mask[entry] = False
        elif padding != "none":
            raise ValueError(f"padding: expected one of {PADDINGS}, got {padding!r}")
    return mask


def relative_rms(actual: Tensor, expected: Tensor) -> float:
    """RMS of ``actual - expected``, divided by the RMS of ``expected``, in float64.

    The divisor is at least 1e-3, for inputs of size 1: where a gradient vanishes, both tensors are rounding errors.
    """
    actual, expected = actual.detach().double(), expected.detach().double()
    if not expected.numel():
        return 0.0
    error, size = (x.pow(2).mean().sqrt().item() for x in (actual - expected, expected))
    return error / max(size, 1e-3)


def assert_close(name: str, actual: Tensor, expected: Tensor, tolerance: float | None = None) -> None:
    """Check the relative RMS error of ``actual``.

    Args:
        name: the tensor's name in error messages.
        actual, expected: tensors of one shape.
        tolerance: the largest error allowed; by default the value in ``TOLERANCES`` for ``actual.dtype``.

    Raises:
        AssertionError: the error is too large, the shapes differ, or ``actual`` is not finite.
    """
    tolerance = TOLERANCES[actual.dtype] if tolerance is None else tolerance
    if actual.shape != expected.shape:
        raise AssertionError(f"{name}: expected shape {tuple(expected.shape)}, got {tuple(actual.shape)}")
    error = relative_rms(actual, expected)
    if not error <= tolerance:  # fails for NaN, too
        raise AssertionError(f"{name}: relative RMS error {error:.2e} is above {tolerance:.0e}")


def run_attention(inputs: Inputs, pattern: LSGPattern, **options: Any) -> dict[str, Tensor]:
    """Call :func:`lsg_attn.lsg_attention` with ``options`` and return ``out, dquery, dkey, dvalue`` by name."""
    query, key, value = (x.detach().requires_grad_() for x in inputs[:3])
    out = lsg_attention(query, key, value, pattern, inputs.attention_mask, **options)
    out.backward(inputs.dout)
    grads = (query.grad, key.grad, value.grad)
    names = ("out", "dquery", "dkey", "dvalue")
    return {name: x for name, x in zip(names, (out.detach(), *grads), strict=True) if x is not None}


def run_reference(inputs: Inputs, pattern: LSGPattern, **options: Any) -> dict[str, Tensor]:
    """As :func:`run_attention`, but with the reference implementation and the inputs in float64."""
    query, key, value, dout, mask = inputs
    exact = Inputs(query.double(), key.double(), value.double(), dout.double(), mask)
    return run_attention(exact, pattern, implementation="reference", **options)
