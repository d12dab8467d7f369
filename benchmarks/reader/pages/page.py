"""The contract: what a page, a question and a sample are."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Callable, Literal

Encode = Callable[[str], list[str]]
"""Text to decoded word pieces, leading spaces kept: ``"".join(encode(text)) == text``."""

Kind = Literal["word", "number", "list", "summary", "caption"]

BLANK = ""
LINE_END = "\n"
"""Stands after the last piece of every line of text: a piece like any other, drawn as a mark of its own.

So is ``" "``, which the model's tokenizer puts before a digit: neither looks like ``BLANK``.
"""

DECORATIONS = ("#stripes", "#dots", "#box", "#cross", "#shade", "#wave", "#rule")
"""Cells that the renderer draws and that mean nothing."""


@dataclass(frozen=True)
class Page:
    """A grid of cells, read in raster order: one cell is one visual token.

    Attributes:
        rows: ``[height][width]`` word pieces, ``BLANK`` or one of ``DECORATIONS``; equally long.

    Raises:
        ValueError: the grid is empty or not rectangular.
    """

    rows: tuple[tuple[str, ...], ...]

    def __post_init__(self):
        widths = {len(row) for row in self.rows}
        if len(widths) != 1 or widths == {0}:
            raise ValueError(f"a page has rows of one width; here they are {sorted(widths)} cells wide")

    @property
    def height(self) -> int:
        return len(self.rows)

    @property
    def width(self) -> int:
        return len(self.rows[0])

    @cached_property
    def cells(self) -> tuple[str, ...]:
        """All cells in raster order; ``Question.places`` are indices into it."""
        return tuple(cell for row in self.rows for cell in row)

    @property
    def text(self) -> str:
        """What can be read, line by line."""
        return "".join(filter(holds_text, self.cells))

    @property
    def blank_share(self) -> float:
        """Share of the cells that hold no piece: blank or decorated."""
        return 1 - sum(map(holds_text, self.cells)) / len(self.cells)


def holds_text(cell: str) -> bool:
    return cell != BLANK and cell not in DECORATIONS


@dataclass(frozen=True)
class Question:
    """One thing to ask about a page.

    Attributes:
        text: what is asked, with how long the answer is to be.
        answer: what an output is graded by: the value itself, or the items of a list joined by ``", "``.
        reply: what a perfect reader says, and a model is trained on: ``answer``, or sentences around it.
        kind: "word" and "number" ask for one value.
        length: tokens of the reply, roughly: 1 (the value), 5 (a sentence that restates the question and ends
            with the value), 20 (a list) or 80 (a summary of a section, a caption of the page).
        places: cells of ``page`` that hold the answer, in the order in which they are said. For a value,
            entry ``i`` is the cell of its piece ``i``; lists leave out what stands between the items;
            summaries and captions name the cells of their facts.
        page: which of the sample's pages it is about.
    """

    text: str
    answer: str
    reply: str
    kind: Kind
    length: Literal[1, 5, 20, 80]
    places: tuple[int, ...]
    page: int = 0


@dataclass(frozen=True)
class Sample:
    """Pages that belong together, and questions whose answers they hold.

    Attributes:
        family: what kind of page; several are joined by "+".
        seed: the same family, seed, size and share give the same sample.
    """

    pages: tuple[Page, ...]
    questions: tuple[Question, ...]
    family: str
    seed: int

    def asked(self, *kinds: Kind, length: int | None = None) -> tuple[Question, ...]:
        """The questions of these kinds (all if none is named) and of this length."""
        return tuple(
            q for q in self.questions if q.kind in (kinds or (q.kind,)) and length in (None, q.length)
        )
