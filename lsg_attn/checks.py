"""Checks of arguments. Their errors state what was expected and what was given."""

from __future__ import annotations

import math
import numbers
import operator
from typing import NoReturn


def integer(name: str, value: object, least: int) -> int:
    """Return ``value``, which may be a numpy or torch integer, as an int of at least ``least``.

    Raises:
        TypeError: it is not an integer.
        ValueError: it is too small.
    """
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)  # type: ignore[arg-type]  # a float raises TypeError
    except TypeError:
        raise TypeError(f"{name}: expected an int, got {value!r} ({type_name(value)})") from None
    if number < least:
        raise ValueError(f"{name}: expected an int >= {least}, got {number}")
    return number


def number(name: str, value: object) -> float:
    """Return ``value``, which may be a numpy number, as a finite float.

    Raises:
        TypeError: it is not a real number.
        ValueError: it is infinite or NaN.
    """
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise TypeError(f"{name}: expected a number, got {type_name(value)}")
    finite = float(value)
    if not -math.inf < finite < math.inf:  # math.isfinite would break the graph under torch.compile(dynamic=True)
        raise ValueError(f"{name}: expected a finite number, got {value}")
    return finite


def probability(name: str, value: object) -> float:
    """Return ``value`` as a float in [0, 1).

    Raises:
        TypeError: it is not a real number.
        ValueError: it is outside [0, 1).
    """
    p = number(name, value)
    if not 0.0 <= p < 1.0:
        raise ValueError(f"{name}: expected a probability in [0, 1), got {p}")
    return p


def refuse_second_derivative() -> NoReturn:
    """Raise the RuntimeError of an implementation whose gradients cannot be differentiated."""
    raise RuntimeError("this attention can be differentiated once; use implementation='reference' to do so again")


def type_name(value: object) -> str:
    """The name of the value's type."""
    return type(value).__name__
