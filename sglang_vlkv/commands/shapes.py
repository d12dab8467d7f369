"""Whether JSON of somebody else's is what it should be."""

from __future__ import annotations

import math
from types import NoneType, UnionType
from typing import get_args, get_origin

LARGEST = 2**63


def fits(value: object, kind: object) -> bool:
    """Whether a JSON value is of a type: ``str``, ``bool``, ``int`` (from 0, below 2**63), ``float`` (finite;
    an int is one), ``list`` and ``dict`` (of such, where it says so), or a union of them."""
    if isinstance(kind, UnionType):
        return any(fits(value, one) for one in get_args(kind))
    inner, kind = get_args(kind), get_origin(kind) or kind
    if kind is NoneType or kind is None:
        return value is None
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < LARGEST
    if kind is float:
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return number and abs(value) < LARGEST and math.isfinite(value)
    if not isinstance(value, kind):
        return False
    if kind is dict and inner:
        return all(fits(name, inner[0]) and fits(one, inner[1]) for name, one in value.items())
    return kind is not list or not inner or all(fits(one, inner[0]) for one in value)


def lacks(value: object, kinds: dict[str, object]) -> str | None:
    """The first of the fields ``kinds`` that is missing in an object or of another type; None where
    it has them all."""
    if not isinstance(value, dict):
        return "object"
    wrong = (name for name, kind in kinds.items() if name not in value or not fits(value[name], kind))
    return next(wrong, None)
