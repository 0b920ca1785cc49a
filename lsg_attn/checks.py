"""Checks of arguments, whose errors say what was expected and what came."""

from __future__ import annotations

import math
import numbers
import operator


def integer(name: str, value: object, least: int) -> int:
    """``value`` as an int, also from numpy and torch integers; TypeError or ValueError if it is none or too small."""
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
    """``value`` as a finite float, also from numpy floats; TypeError or ValueError if it is none."""
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise TypeError(f"{name}: expected a number, got {type_name(value)}")
    finite = float(value)
    if not -math.inf < finite < math.inf:  # math.isfinite would break a graph of torch.compile(dynamic=True)
        raise ValueError(f"{name}: expected a finite number, got {value}")
    return finite


def probability(name: str, value: object) -> float:
    """``value`` as a float in [0, 1); TypeError or ValueError if it is none."""
    p = number(name, value)
    if not 0.0 <= p < 1.0:
        raise ValueError(f"{name}: expected a probability in [0, 1), got {p}")
    return p


def type_name(value: object) -> str:
    """The name of the value's type."""
    return type(value).__name__
