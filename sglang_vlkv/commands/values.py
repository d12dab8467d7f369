"""What a command line may give: each is the ``type`` of an argument, and says what it must be."""

from __future__ import annotations

import json
import math
import os
from argparse import ArgumentTypeError
from pathlib import Path
from typing import Callable, NoReturn
from urllib.parse import urlsplit

MOST = 2**31 - 1  # of what is counted


def whole(least: int = 1, most: int = MOST) -> Callable[[str], int]:
    """A whole number in [least, most]."""

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = None
        if value is None or not least <= value <= most:
            up_to = f" of at least {least:,}" if most == MOST else f" from {least:,} to {most:,}"
            _refuse(text, f"a whole number{up_to}")
        return value

    return read


def number(words: str, fits: Callable[[float], bool]) -> Callable[[str], float]:
    """A finite number that ``fits``; ``words`` say which do."""

    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and fits(value)):
            _refuse(text, words)
        return value

    return read


positive = number("a finite number above 0", lambda value: value > 0)
not_negative = number("a finite number of at least 0", lambda value: value >= 0)
share = number("a number above 0 and at most 1", lambda value: 0 < value <= 1)
port = whole(1, 65_535)


def file(text: str) -> Path:
    """One that can be read."""
    try:
        with open(text, "rb") as opened:
            opened.read(1)
    except OSError as error:
        raise ArgumentTypeError(f"{text} cannot be read: {error.strerror}") from None
    return Path(text)


def new_file(text: str) -> Path:
    """One that can be written, so that no work is lost at its end."""
    path = Path(text)
    if path.is_dir():
        raise ArgumentTypeError(f"{text} cannot be written: it is a folder")
    if not path.parent.is_dir():
        raise ArgumentTypeError(f"{text} cannot be written: there is no folder {path.parent}")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ArgumentTypeError(f"{text} cannot be written: permission denied")
    return path


def folder(text: str) -> Path:
    """One that is there."""
    if not Path(text).is_dir():
        raise ArgumentTypeError(f"{text} is no folder")
    return Path(text)


def new_folder(text: str) -> Path:
    """One that is there or can be made, with those above it."""
    path = Path(text)
    there = next(above for above in (path, *path.absolute().parents) if above.exists())
    if not there.is_dir():
        raise ArgumentTypeError(f"{text} cannot be made: {there} is no folder")
    if not os.access(there, os.W_OK):
        raise ArgumentTypeError(f"{text} cannot be written: permission denied")
    return path


def json_object(text: str) -> dict:
    """A JSON object."""
    try:
        value = json.loads(text, parse_constant=lambda name: _refuse(name, "a number that JSON has"))
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        _refuse(text, 'a JSON object such as {"kv_policy": "h2o"}')
    return value


def server(text: str) -> str:
    """The URL of a server, without a slash at its end."""
    try:
        parts = urlsplit(text)
        good = parts.scheme in ("http", "https") and parts.hostname.encode("idna") and parts.port != 0
    except (ValueError, AttributeError):  # no host
        good = False
    plain = text.isascii() and text.isprintable() and " " not in text
    if not good or not plain or parts.query or parts.fragment:
        _refuse(text, "the URL of a server such as http://127.0.0.1:30000")
    return text.rstrip("/")


def key(text: str) -> str:
    """An API key: what an HTTP header holds."""
    if not text.isascii() or not text.isprintable():
        raise ArgumentTypeError("a key has printable ASCII characters only")  # and is not repeated here
    return text


def _refuse(text: str, words: str) -> NoReturn:
    shown = text if len(text) <= 200 else f"{text[:200]}..."
    raise ArgumentTypeError(f"{shown!r} is not {words}")
