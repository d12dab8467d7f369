"""What a running server answers about pages: ``python -m benchmarks.reader.answers --url URL``.

Asks the questions of the report split through ``/v1/chat/completions``, pages as pictures, and prints the
share of right answers by family and size. Without a policy: the accuracy that policies are measured against.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Iterator, NamedTuple

from benchmarks.reader import render, wheel
from benchmarks.reader.language import tokenizer
from benchmarks.reader.pages.arrangements import SINGLE, Message
from benchmarks.reader.pages.families import HELD_OUT
from benchmarks.reader.pages.grading import grade
from benchmarks.reader.pages.page import Page, Question, Sample
from benchmarks.reader.pages.splits import draw_for, families
from benchmarks.reader.prompt import Prompter
from sglang_vlkv.commands import Problem
from sglang_vlkv.tinyvlm.ask import chat, data_url

ROOM = {1: 24, 5: 48, 20: 80, 80: 160}  # tokens an answer may have, by its expected length
WORKERS = 2  # pages at once


class Asked(NamedTuple):
    """One question, and what came back; ``right`` is None where there is nothing to grade."""

    family: str
    size: int
    blank_share: float
    arrangement: str
    question: Question
    output: str
    right: float | None


def openai(messages: list[Message], style: str) -> list[dict]:
    """The messages as OpenAI's API has them, pages as PNG in data URLs."""

    def part(content: str | Page) -> dict:
        if isinstance(content, Page):
            return {"type": "image_url", "image_url": {"url": data_url(render.draw(content, style))}}
        return {"type": "text", "text": content}

    return [{"role": m["role"], "content": [part(content) for content in m["content"]]} for m in messages]


def ask(
    url: str, sample: Sample, blank_share: float, arrangement: str, style: str, count: int
) -> Iterator[Asked]:
    """``count`` questions from all over a sample's, one chat each."""
    [page] = sample.pages
    all_questions = sample.questions
    count = min(count, len(all_questions))
    for question in (all_questions[index * len(all_questions) // count] for index in range(count)):
        messages = openai(SINGLE[arrangement](sample, question), style)
        output, _ = chat(url, messages, max_tokens=ROOM[question.length])
        right = grade(question, output)
        yield Asked(sample.family, len(page.cells), blank_share, arrangement, question, output, right)


def record(asked: Asked) -> str:
    """A line of JSON."""
    return json.dumps(asked._asdict() | {"question": asked.question.text, "answer": asked.question.answer})


def table(asked: list[Asked], sizes: list[int]) -> Iterator[str]:
    """Right answers of all, by family (rows) and wanted size (columns), and by kind and arrangement."""
    graded = [each for each in asked if each.right is not None]

    def share(chosen: list[Asked]) -> str:
        return f"{sum(a.right for a in chosen) / len(chosen):.2f} of {len(chosen):3}" if chosen else "-"

    nearest = {id(a): min(sizes, key=lambda size: abs(size - a.size)) for a in graded}
    yield " | ".join(["family".ljust(16), *(f"{size} cells".ljust(11) for size in sizes), "all"])
    for family in sorted({a.family for a in graded}, key=lambda family: (family in HELD_OUT, family)):
        of = [a for a in graded if a.family == family]
        cells = [share([a for a in of if nearest[id(a)] == size]).ljust(11) for size in sizes]
        yield " | ".join([(family + " *" * (family in HELD_OUT)).ljust(16), *cells, share(of)])
    cells = [share([a for a in graded if nearest[id(a)] == size]).ljust(11) for size in sizes]
    yield " | ".join(["all".ljust(16), *cells, share(graded)])
    for name in ("kind", "length"):
        groups = defaultdict(list)
        for a in graded:
            groups[getattr(a.question, name)].append(a)
        yield name + ": " + ", ".join(f"{group} {share(of)}" for group, of in groups.items())
    yield "* held out of training"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", default="http://127.0.0.1:30000")
    parser.add_argument("--sizes", type=int, nargs="+", default=[150, 300, 600, 1000], help="cells of a page")
    parser.add_argument("--blank", type=float, nargs="+", default=[0.0, 0.5, 0.8], help="shares, in turns")
    parser.add_argument("--arrangement", choices=SINGLE, default="question_after")
    parser.add_argument("--style", choices=render.STYLES, default="large")
    parser.add_argument("--pages", type=int, default=1, help="of every family and size")
    parser.add_argument("--questions", type=int, default=6, help="of every page")
    parser.add_argument("--first", type=int, default=0, help="index of the first page in the report split")
    parser.add_argument("--out", type=Path, help="JSON lines of all questions and answers")
    arguments = parser.parse_args()
    try:
        pieces = Prompter(tokenizer(wheel.gguf())).pieces
    except wheel.Unavailable as error:
        print(error, file=sys.stderr)
        sys.exit(2)

    def one(task: tuple[str, int, int, float]) -> list[Asked]:
        family, index, size, blank = task
        sample, style = draw_for("report", family, index, size, blank, pieces), arguments.style
        return [*ask(arguments.url, sample, blank, arguments.arrangement, style, arguments.questions)]

    tasks = [
        (family, index, size, arguments.blank[(index + turn) % len(arguments.blank)])
        for index in range(arguments.first, arguments.first + arguments.pages)
        for turn, size in enumerate(arguments.sizes)
        for family in families("report")
    ]
    asked: list[Asked] = []
    with ThreadPoolExecutor(WORKERS) as pool, open(arguments.out or os.devnull, "w") as out:
        try:
            for found in pool.map(one, tasks):
                asked += found
                print(*map(record, found), sep="\n", file=out, flush=True)
        except Problem as error:
            pool.shutdown(cancel_futures=True)
            sys.exit(f"{error} ({len(asked)} questions were answered)")
    print(*table(asked, arguments.sizes), sep="\n")


if __name__ == "__main__":
    main()
