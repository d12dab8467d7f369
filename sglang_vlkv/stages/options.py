"""Options of a policy: the fields of its dataclass, and what a wrong value is told."""

from __future__ import annotations

import reprlib
from dataclasses import field
from typing import Mapping


def choice(default: str, *others: str):
    """A dataclass field whose value is one of these words."""
    return field(default=default, metadata={"choices": (default, *others)})


def text_stays():
    """A ``modality_floors`` field that keeps all that is not part of a picture or video."""
    return field(default_factory=lambda: {"text": 1.0, "system": 1.0, "audio": 1.0})


def require(ok: bool, option: str, value: object, allowed: str) -> None:
    """Raises ValueError naming ``option``, what it is and what it must be, unless ``ok``."""
    if not ok:
        raise ValueError(f"{option} is {shortened(value)}; it must be {allowed}")


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 200


def shortened(value: object) -> str:
    """Its ``repr`` for an error message: cut where it is long or deep."""
    return _SHORT.repr(value)


def is_number(value: object) -> bool:
    """A boolean is none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _annotation(kind: object) -> str:
    """A type as it is written: ``int``, ``Sequence[int]``."""
    return kind.__name__ if isinstance(kind, type) else str(kind).rsplit(".", 1)[-1]


def check_type(policy: str, option, value: object) -> None:
    """Raises ValueError unless ``value`` fits the dataclass field ``option``."""
    kinds = {
        "float": ((int, float), "a number"),
        "int": ((int,), "an integer"),
        "bool": ((bool,), "true or false"),
        "str": ((str,), "a string"),
        "Sequence[int]": ((list, tuple), "a list of integers"),
        "Mapping[str, float]": ((Mapping,), "an object of modality names to fractions"),
    }
    kind = option.type if isinstance(option.type, str) else _annotation(option.type)
    if kind in kinds:  # others are the policy's own to check
        types, words = kinds[kind]
        fits = isinstance(value, types) and (bool in types or not isinstance(value, bool))
        require(fits, f"{policy} option {option.name}", value, words)
    if kind == "float" and isinstance(value, int):
        require(abs(value) < 2**63, f"{policy} option {option.name}", value, "a number that a float holds")
    integers = {"int": [value], "Sequence[int]": value}.get(kind, [])
    for number in integers:
        fits = isinstance(number, int) and not isinstance(number, bool) and abs(number) < 2**31
        require(fits, f"{policy} option {option.name}", value, f"{words} of at most 31 bits")
    choices = option.metadata.get("choices")
    if choices:
        require(value in choices, option.name, value, f"one of {', '.join(choices)}")
