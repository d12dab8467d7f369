"""A splitter to stand in for a model's tokenizer, so that pages can be tested without one."""

from __future__ import annotations

import re


def stand_in(text: str) -> list[str]:
    """Digits alone, words with the space before them in parts of up to five letters, all else alone."""
    return re.findall(r" ?[A-Za-z]{1,5}|\d| ?[^\w\s]|\s|.", text)
