"""What a family writes: lines of text, with the facts that stand in them."""

from __future__ import annotations

import re
from random import Random
from typing import Callable, Iterator, NamedTuple


class Fact(NamedTuple):
    """One value of a line, and how it is asked for.

    Attributes:
        mark: which of the line's marks holds the value.
        ask: the question; it does not contain the value.
        tell: a sentence that restates the question, with ``_`` for the value.
    """

    mark: int
    ask: str
    tell: str


class Line(NamedTuple):
    """A line of a page.

    Attributes:
        text: what is written; plain English words and numbers.
        spans: of each mark, the characters ``start, end`` of ``text``.
        facts: what can be asked about it.
        key: the mark that names the line in lists, if it is listed.
        column: where it stands among lines side by side, if the page has columns.
    """

    text: str
    spans: tuple[tuple[int, int], ...]
    facts: tuple[Fact, ...] = ()
    key: int | None = None
    column: int | None = None

    def value(self, mark: int) -> str:
        start, end = self.spans[mark]
        return self.text[start:end]


class Family(NamedTuple):
    """A kind of page.

    Attributes:
        noun: what a page of it is called, as in "the receipt".
        heading: its first line; small pages have none.
        lines: its other lines, more than any page holds, each about 15 pieces or fewer.
        listed: what the keys of its lines are, in the plural.
        shuffled: whether a page's lines may be put into any order.
    """

    noun: str
    heading: Callable[[Random], Line]
    lines: Callable[[Random], Iterator[Line]]
    listed: str
    shuffled: bool = False


def line(
    marked: str, *facts: tuple[int, str, str], key: int | None = None, column: int | None = None
) -> Line:
    """A line from its text with ``[marks]`` and its facts as ``(mark, ask, tell)``."""
    text, spans = "", []
    for index, part in enumerate(re.split(r"[\[\]]", marked)):
        if index % 2:
            spans.append((len(text), len(text) + len(part)))
        text += part
    return Line(text, tuple(spans), tuple(Fact(*fact) for fact in facts), key, column)


def titled(text: str) -> Callable[[Random], Line]:
    """A heading that is the same on every page."""
    return lambda r: line(text)
