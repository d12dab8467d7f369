"""Lines of pieces to a page: where the lines stand, what is blank and what is decorated."""

from __future__ import annotations

from itertools import groupby
from math import ceil
from random import Random
from typing import NamedTuple, Sequence

from benchmarks.reader.pages.page import BLANK, DECORATIONS, Page

WIDTHS = range(8, 33)
SIZE_TOLERANCE, BLANK_TOLERANCE = 0.15, 0.05
DECORATED = 0.4  # share of the blank runs that are decorated


class Text(NamedTuple):
    """One line: its pieces, and its place among lines that stand side by side."""

    pieces: list[str]
    column: int | None = None


class Strip(NamedTuple):
    """One row before it has its place: what stands in it as ``(line, first piece, last piece + 1, x)``."""

    runs: list[tuple[int, int, int, int]]
    width: int


def lay_out(r: Random, texts: Sequence[Text], size: int, blank_share: float) -> tuple[Page, list[list[int]]]:
    """A page of about ``size`` cells with all lines in order, and the cells of each line's pieces.

    Lines start in rows of their own, indented together and with blank rows between them, where that
    leaves no more cells blank than asked for. Otherwise they run on, with gaps between them.

    Raises:
        ValueError: no grid of this size holds the lines with this share blank.
    """
    width, height, strips = _shape(r, texts, size, blank_share)
    lengths = [len(text.pieces) for text in texts]
    places = (
        _run_on(r, lengths, width * height, gaps=blank_share > 0)
        if strips is None
        else _in_rows(r, strips, lengths, width, height)
    )
    cells = [BLANK] * (width * height)
    for text, where in zip(texts, places):
        for piece, place in zip(text.pieces, where):
            cells[place] = piece
    grid = [cells[start : start + width] for start in range(0, len(cells), width)]
    _decorate(r, grid)
    return Page(tuple(map(tuple, grid))), places


def _shape(
    r: Random, texts: Sequence[Text], size: int, blank_share: float
) -> tuple[int, int, list[Strip] | None]:
    """Width, height and rows of one of the grids that come close; no rows where the lines must run on."""
    total = sum(len(text.pieces) for text in texts)
    found = []
    for width in WIDTHS:
        strips = _strips(texts, width)
        for height in range(ceil(total / width), int(size * (1 + SIZE_TOLERANCE)) // width + 1):
            cells = width * height
            off = max(
                abs(cells / size - 1) / SIZE_TOLERANCE, abs(1 - total / cells - blank_share) / BLANK_TOLERANCE
            )
            if off <= 1 and height <= 4 * width:
                found.append((off, width, height, strips if blank_share and len(strips) <= height else None))
    if not found:
        raise ValueError(f"{total} pieces do not fill a page of {size} cells that is {blank_share:.0%} blank")
    best = min(off for off, *_ in found)
    close = [shape for off, *shape in found if off <= max(best, 0.5)]
    return r.choice([shape for shape in close if shape[2] is not None] or close)


def _strips(texts: Sequence[Text], width: int) -> list[Strip]:
    """Rows for the lines: side by side where they have columns that are wide enough, else wrapped."""
    columns = 1 + max((text.column or 0) for text in texts)
    pitch = width // columns
    abreast = columns > 1 and all(len(t.pieces) <= pitch for t in texts if t.column is not None)
    strips: list[Strip] = []
    last = None
    for index, (pieces, column) in enumerate(texts):
        if abreast and column is not None:
            run = (index, 0, len(pieces), column * pitch)
            if last is None or column <= last:
                strips.append(Strip([run], width))
            else:
                strips[-1].runs.append(run)
            last = column
            continue
        last = None
        for start in range(0, len(pieces), width):
            end = min(start + width, len(pieces))
            strips.append(Strip([(index, start, end, 0)], end - start))
    return strips


def _in_rows(r: Random, strips: list[Strip], lengths: list[int], width: int, height: int) -> list[list[int]]:
    """The cells of each piece where rows are spread over the height in a few blocks."""
    blank_rows = height - len(strips)
    most = min(len(strips) + 1, max(1, blank_rows))
    cuts = r.sample(range(len(strips) + 1), r.randint(min(3, most), most))
    gaps = dict.fromkeys(cuts, 0)
    for _ in range(blank_rows):
        gaps[r.choice(cuts)] += 1
    places: list[list[int]] = [[0] * length for length in lengths]
    y = indent = 0
    for index, strip in enumerate(strips):
        if index in gaps or index == 0:
            y += gaps.get(index, 0)
            block = strips[index : min((cut for cut in cuts if cut > index), default=len(strips))]
            indent = r.choice((0, r.randint(0, width - max(strip.width for strip in block))))
        for line, start, end, x in strip.runs:
            first = y * width + indent + x
            places[line][start:end] = range(first, first + end - start)
        y += 1
    return places


def _run_on(r: Random, lengths: list[int], cells: int, gaps: bool) -> list[list[int]]:
    """The cells of each piece where lines follow each other; the rest is blank after lines or at the end."""
    blanks = [0] * len(lengths)
    for _ in range((cells - sum(lengths)) * gaps):
        blanks[r.randrange(len(lengths))] += 1
    places, at = [], 0
    for length, blank in zip(lengths, blanks):
        places.append(list(range(at, at + length)))
        at += length + blank
    return places


def _decorate(r: Random, grid: list[list[str]]) -> None:
    """Fills some of the blank runs: whole blank rows that follow each other become one picture."""
    wholly = [not any(row) for row in grid]
    for blank, block in groupby(range(len(grid)), key=wholly.__getitem__):
        rows = list(block)
        if not blank:
            for y in rows:
                _decorate_row(r, grid[y])
        elif r.random() < DECORATED:
            width = len(grid[0])
            left = r.randint(0, width // 2)
            right = r.randint(left + 1, width)
            picture = r.choice(DECORATIONS)
            for y in rows:
                grid[y][left:right] = [picture] * (right - left)


def _decorate_row(r: Random, row: list[str]) -> None:
    start = 0
    for blank, run in groupby(list(row), key=lambda cell: cell == BLANK):
        end = start + len(list(run))
        if blank and r.random() < DECORATED / 2:
            row[start:end] = [r.choice(DECORATIONS)] * (end - start)
        start = end
