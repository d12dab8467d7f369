"""From the facts of a page to questions, with the cells that answer them."""

from __future__ import annotations

from random import Random
from typing import Iterator, NamedTuple, Sequence

from benchmarks.reader.pages.grading import says
from benchmarks.reader.pages.lines import Fact, Family, Line
from benchmarks.reader.pages.page import Encode, Question

LIST_TOKENS, LONG_TOKENS = 20, 80
NEARLY, ENOUGH = 0.9, 0.75  # of these: where an answer stops growing, and the least that is asked for


class Placed(NamedTuple):
    """A line on its page.

    Attributes:
        line: what the family wrote.
        pieces: its word pieces, which stand for ``" " + line.text``.
        places: the cell of each.
    """

    line: Line
    pieces: list[str]
    places: list[int]

    def cells(self, mark: int) -> tuple[int, ...]:
        """The cells that hold a mark.

        Raises:
            ValueError: a piece holds the mark and more than a space before it.
        """
        start, end = (1 + at for at in self.line.spans[mark])
        found, spelled, at = [], "", 0
        for piece, place in zip(self.pieces, self.places):
            if at < end and at + len(piece) > start:
                found.append(place)
                spelled += piece
            at += len(piece)
        if spelled.strip() != self.line.value(mark):
            raise ValueError(f"{self.line.value(mark)!r} is no whole number of the pieces {self.pieces}")
        return tuple(found)

    def told(self, fact: Fact) -> str:
        return fact.tell.replace("_", self.line.value(fact.mark))


def ask(
    r: Random, family: Family, lines: Sequence[Placed], encode: Encode, facts: int
) -> tuple[Question, ...]:
    """``facts`` values, each alone and in a sentence; where there is enough, a list, a summary, a caption."""
    keyed = [line for line in lines if line.line.key is not None]
    return (
        *_values(r, lines, facts),
        *_list(r, family, keyed, encode),
        *_summary(r, family, lines, encode),
        *_caption(family, lines, keyed, encode),
    )


def _values(r: Random, lines: Sequence[Placed], count: int) -> Iterator[Question]:
    """As many numbers as words where the page has both; none whose question says it."""
    kinds: dict[str, list[tuple[Placed, Fact]]] = {"word": [], "number": []}
    for placed in lines:
        for fact in placed.line.facts:
            value = placed.line.value(fact.mark)
            kind = "number" if value[0].isdigit() else "word"
            if not says(fact.ask, value, kind):
                kinds[kind].append((placed, fact))
    for found in kinds.values():
        r.shuffle(found)
    few, many = sorted(kinds, key=lambda kind: len(kinds[kind]))
    share = {few: min(count // 2, len(kinds[few]))}
    share[many] = count - share[few]
    for kind in ("word", "number"):
        for placed, fact in kinds[kind][: share[kind]]:
            value, cells = placed.line.value(fact.mark), placed.cells(fact.mark)
            alone = f"{fact.ask} Answer with the {kind} only."
            yield Question(alone, value, value, kind, 1, cells)
            yield Question(fact.ask, value, placed.told(fact), kind, 5, cells)


def _list(r: Random, family: Family, keyed: Sequence[Placed], encode: Encode) -> Iterator[Question]:
    """The keys that follow a key, in order."""
    names = [placed.line.value(placed.line.key) for placed in keyed]
    for first in r.sample(range(len(names)), len(names)):
        for end in range(first + 2, len(names) + 1):
            answer = ", ".join(names[first + 1 : end])
            if len(encode(answer)) >= LIST_TOKENS * NEARLY:
                cells = [c for placed in keyed[first + 1 : end] for c in placed.cells(placed.line.key)]
                text = (
                    f"Which {end - first - 1} {family.listed} come after {names[first]} in the {family.noun}?"
                )
                yield Question(text, answer, f"{answer}.", "list", 20, tuple(cells))
                return


def _summary(r: Random, family: Family, lines: Sequence[Placed], encode: Encode) -> Iterator[Question]:
    """Everything that stands between two keys, in sentences."""
    starts = [index for index, placed in enumerate(lines) if placed.line.key is not None]
    r.shuffle(starts)
    for start in starts:
        told, cells, last = [], [], start
        for index, placed in enumerate(lines[start:], start):
            if placed.line.key is not None and index > start:
                if len(encode(" ".join(told))) >= LONG_TOKENS * NEARLY:
                    break
                last = index
            told += map(placed.told, placed.line.facts)
            cells += [cell for fact in placed.line.facts for cell in placed.cells(fact.mark)]
        if last > start and len(encode(" ".join(told))) >= ENOUGH * LONG_TOKENS:
            first, final = (lines[at].line.value(lines[at].line.key) for at in (start, last))
            text = f"Summarize the {family.noun} from {first} to {final}."
            yield Question(text, " ".join(told), " ".join(told), "summary", 80, tuple(cells))
            return


def _caption(
    family: Family, lines: Sequence[Placed], keyed: Sequence[Placed], encode: Encode
) -> Iterator[Question]:
    """What kind of page it is, where it begins and ends, and facts from all over it."""
    if len(keyed) < 2:
        return
    ends = (keyed[0], keyed[-1])
    first, last = (placed.line.value(placed.line.key) for placed in ends)
    opening = f"This is a {family.noun}. Its {family.listed} go from {first} to {last}."
    telling = [placed for placed in lines if placed.line.facts]
    for count in range(min(len(telling), LONG_TOKENS // 5), 0, -1):
        chosen = [telling[index * len(telling) // count] for index in range(count)]
        told = " ".join([opening, *(placed.told(placed.line.facts[0]) for placed in chosen)])
        if len(encode(told)) <= LONG_TOKENS * 1.1:
            break
    if len(encode(told)) >= ENOUGH * LONG_TOKENS:
        cells = [cell for placed in ends for cell in placed.cells(placed.line.key)]
        cells += [cell for placed in chosen for cell in placed.cells(placed.line.facts[0].mark)]
        yield Question(f"Write a caption for the {family.noun}.", told, told, "caption", 80, tuple(cells))
