"""What the reader is trained on: chats about pages of the training split."""

from __future__ import annotations

from random import Random
from typing import Iterator

from benchmarks.reader.pages.arrangements import SINGLE, Message
from benchmarks.reader.pages.draw import draw, together
from benchmarks.reader.pages.page import Sample
from benchmarks.reader.pages.splits import SEEDS, families
from benchmarks.reader.prompt import Prompter

SHORTEST = 100  # cells of a page
BLANK = (0.0, 0.0, 0.5, 0.8)
TURNS = 12
LONG_ANSWERS = 0.3  # share of the chats that end with a list, a summary or a caption
TWO_PAGES = 0.1  # share of the chats about short pages
ARRANGED = {"question_after": 6, "question_before": 2, "question_around": 2, "page_twice": 1}


def lessons(prompter: Prompter, r: Random, longest: int) -> Iterator[tuple[list[int], list[int]]]:
    """Ids and labels of chats without end; pages of 100 cells are the likeliest.

    Args:
        longest: cells of a page.
    """
    while True:
        size = round(SHORTEST * (longest / SHORTEST) ** (r.random() ** 3))
        names = r.sample(families("training"), 2 if size < 200 and r.random() < TWO_PAGES else 1)
        drawn = [_page(prompter, r, name, size) for name in names]
        sample = together(drawn) if len(drawn) > 1 else drawn[0]
        if sample.questions:
            yield prompter.chat(_chat(r, sample))


def _page(prompter: Prompter, r: Random, family: str, size: int) -> Sample:
    return draw(family, r.choice(SEEDS["training"]), size, r.choice(BLANK), prompter.pieces, facts=TURNS)


def _chat(r: Random, sample: Sample) -> list[Message]:
    short = [question for question in sample.questions if question.length <= 5]
    long = [question for question in sample.questions if question.length > 5]
    once = {question.answer: question for question in r.sample(short, len(short))}
    questions = [*once.values()][:TURNS]
    if long and r.random() < LONG_ANSWERS:
        questions.insert(r.choice((0, len(questions))), r.choice(long))
    [arrangement] = r.choices([*ARRANGED], [*ARRANGED.values()])
    first = SINGLE[arrangement](sample, questions[0])
    later = [_said("user", question.text) for question in questions[1:]]
    replies = [_said("assistant", question.reply) for question in questions]
    return [message for pair in zip([*first, *later], replies) for message in pair]


def _said(role: str, text: str) -> Message:
    return Message(role=role, content=[text])
