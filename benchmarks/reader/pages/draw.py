"""Draws samples: a family, a seed, a size and a blank share give a page and its questions."""

from __future__ import annotations

from dataclasses import replace
from itertools import chain
from random import Random
from typing import Sequence

from benchmarks.reader.pages.families import FAMILIES
from benchmarks.reader.pages.layout import Text, lay_out
from benchmarks.reader.pages.lines import Family, Line
from benchmarks.reader.pages.page import LINE_END, Encode, Sample
from benchmarks.reader.pages.questions import Placed, ask

SIZES = range(100, 2001)
HEADED = 60  # pages with fewer pieces have no heading
NEAR = 0.02  # of the wanted pieces: what may be missing or too much
TRIES = 10  # lines that would only lead away, before what is there must do


def draw(family: str, seed: int, size: int, blank_share: float, encode: Encode, facts: int = 8) -> Sample:
    """One page with its questions.

    Args:
        family: one of ``FAMILIES``.
        size: cells of the page, 100 to 2,000; met within 15%.
        blank_share: of the cells, how many are blank or decorated; met within 5 points.
        encode: the tokenizer of the model that reads the page.
        facts: values that are asked for, at most; each by two questions.

    Raises:
        ValueError: an argument is out of its range, or ``encode`` does not keep the text.
    """
    if family not in FAMILIES:
        raise ValueError(f"there is no family {family!r}; choose one of {', '.join(FAMILIES)}")
    if size not in SIZES:
        raise ValueError(f"size is {size}; a page has {SIZES.start} to {SIZES.stop - 1} cells")
    if not 0 <= blank_share <= 0.8:
        raise ValueError(f"blank_share is {blank_share}; it must be between 0 and 0.8")
    r, kind = Random(f"{family}/{seed}/{size}/{float(blank_share)}"), FAMILIES[family]
    lines = _written(r, kind, size * (1 - blank_share), encode)
    texts = [Text(pieces, line.column) for line, pieces in lines]
    page, places = lay_out(r, texts, size, blank_share)
    placed = [Placed(line, pieces, cells) for (line, pieces), cells in zip(lines, places)]
    return Sample((page,), ask(r, kind, placed, encode, facts), family, seed)


def together(samples: Sequence[Sample]) -> Sample:
    """Several samples of one page each as one of several pages; every question still has one answer.

    Raises:
        ValueError: one has several pages, or two are of one family, so that a question could be about either.
    """
    if any(len(sample.pages) != 1 for sample in samples):
        raise ValueError("a sample to be put with others must have one page")
    families = [sample.family for sample in samples]
    if len(set(families)) < len(families):
        raise ValueError(
            f"pages in one prompt must be of different families; these are {', '.join(families)}"
        )
    questions = chain.from_iterable(
        (replace(question, page=index) for question in sample.questions)
        for index, sample in enumerate(samples)
    )
    pages = tuple(sample.pages[0] for sample in samples)
    return Sample(pages, tuple(questions), "+".join(families), samples[0].seed)


def _written(r: Random, family: Family, wanted: float, encode: Encode) -> list[tuple[Line, list[str]]]:
    """A heading if there is room, and the lines that come nearest to ``wanted`` pieces."""
    heading = [_split(family.heading(r), encode)] if wanted >= HEADED else []
    body: list[tuple[Line, list[str]]] = []
    total, misses = sum(len(pieces) for _, pieces in heading), 0
    for line in family.lines(r):
        line, pieces = _split(line, encode)
        nearer = abs(total + len(pieces) - wanted) < abs(total - wanted)
        if nearer or not body:
            body.append((line, pieces))
            total += len(pieces)
        misses += not nearer
        if abs(total - wanted) <= NEAR * wanted or misses == TRIES:
            break
    if family.shuffled:
        r.shuffle(body)
    return heading + body


def _split(line: Line, encode: Encode) -> tuple[Line, list[str]]:
    """The line's pieces; it begins with a space, so that its first word is the piece that it is elsewhere."""
    pieces = encode(f" {line.text}")
    if "".join(pieces) != f" {line.text}":
        raise ValueError(f"encode made {pieces} of {line.text!r}: the pieces must spell the text")
    return line, [*pieces, LINE_END]
