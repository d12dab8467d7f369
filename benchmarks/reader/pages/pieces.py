"""The pieces of pages: all that there are, and a splitter that makes them without a model."""

from __future__ import annotations

import re
from itertools import chain, islice
from random import Random

from benchmarks.reader.pages import words
from benchmarks.reader.pages.families import FAMILIES
from benchmarks.reader.pages.page import LINE_END, Encode

LINES = 200  # of a family: all of its sentences and digits come up


def vocabulary(encode: Encode) -> list[str]:
    """Every piece that stands on pages, sorted: what a tower must be able to read.

    Those of the held-out families are among them: what is held out are their pages and questions.
    """
    pieces = {LINE_END}
    for name, listed in vars(words).items():
        if name.isupper():
            pieces.update(chain.from_iterable(encode(f" {entry}") for entry in listed))
    for family in FAMILIES.values():
        r = Random(0)
        for line in (family.heading(r), *islice(family.lines(r), LINES)):
            pieces.update(encode(f" {line.text}"))
    return sorted(pieces)


def stand_in(text: str) -> list[str]:
    """Digits alone, words with the space before them in parts of up to five letters, all else alone."""
    return re.findall(r" ?[A-Za-z]{1,5}|\d| ?[^\w\s]|\s|.", text)
