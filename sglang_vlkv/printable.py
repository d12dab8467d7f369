"""What others chose, such that it can do nothing to a terminal, a log or a page."""

from __future__ import annotations

import unicodedata

_JOINERS = "\u200c\u200d"  # parts of words and of emoji


def printable(text: object, keep: str = "") -> str:
    r"""``text`` with a backslash escape (``\n``, ``\x1b``, ``\u202e``) for every control character.

    These are C0, DEL, C1 and all else that moves a cursor, ends a line, turns the direction of what
    follows or cannot be seen, and lone surrogates. A backslash itself stays: what is shown is for people,
    not to be read back.

    Args:
        keep: what stays of them, such as ``"\n\t"`` where a text has lines.
    """
    text = str(text)
    if text.isprintable():
        return text
    return "".join(_escaped(char) if _controls(char) and char not in keep else char for char in text)


def _controls(char: str) -> bool:
    return unicodedata.category(char) in ("Cc", "Cf", "Cs", "Zl", "Zp") and char not in _JOINERS


def _escaped(char: str) -> str:
    return char.encode("unicode_escape").decode()
