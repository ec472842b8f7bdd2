"""Numbers for people to read, rounded to the side on which what is said stays true."""

from __future__ import annotations

import math
from decimal import ROUND_CEILING, ROUND_FLOOR, Context, Decimal


def up(value: float, digits: int = 4) -> str:
    """An upper bound in so many significant digits, not below ``value``.

    >>> up(1.51501), up(3.0), up(1e-5), up(float("inf"))
    ('1.516', '3', '1e-05', 'inf')
    """
    return _rounded(value, digits, ROUND_CEILING)


def down(value: float, digits: int = 4) -> str:
    """A lower bound in so many significant digits, not above ``value``.

    >>> down(1.51599), down(0.0)
    ('1.515', '0')
    """
    return _rounded(value, digits, ROUND_FLOOR)


def _rounded(value: float, digits: int, side: str) -> str:
    if not math.isfinite(value):
        return str(value)
    # the shortest text that reads back as the number: 1e-5 is meant, not the digits of its binary fraction
    rounded = Context(prec=digits, rounding=side).plus(Decimal(repr(float(value))))
    text = f"{float(rounded):.{digits}g}"
    return text if Decimal(text) == rounded else str(rounded)
