"""Ways to put pages and questions into a chat, whatever serves it."""

from __future__ import annotations

from itertools import chain, islice, zip_longest
from typing import Iterable, Sequence, TypedDict

from benchmarks.reader.pages.page import Page, Question, Sample


class Message(TypedDict):
    """One message of a chat; a page of its content is a picture to whoever sends it."""

    role: str
    content: list[str | Page]


def question_after(sample: Sample, question: Question) -> list[Message]:
    """All pages of the sample, and the question."""
    return [_user(*sample.pages, question.text)]


def question_before(sample: Sample, question: Question) -> list[Message]:
    return [_user(question.text, *sample.pages)]


def question_around(sample: Sample, question: Question) -> list[Message]:
    """The question on both sides of the pages."""
    return [_user(question.text, *sample.pages, question.text)]


def page_twice(sample: Sample, question: Question) -> list[Message]:
    """All pages, the same again, and the question."""
    return [_user(*sample.pages, *sample.pages, question.text)]


SINGLE = {
    arrange.__name__: arrange for arrange in (question_after, question_before, question_around, page_twice)
}
"""Arrangements of one question by name; samples of several pages are made by ``draw.together``."""


def apart(questions: Iterable[Question], count: int) -> tuple[Question, ...]:
    """The first ``count`` of them that have an answer of their own.

    Raises:
        ValueError: there are fewer.
    """
    found = {question.answer: question for question in reversed(list(questions))}
    if len(found) < count:
        raise ValueError(f"the page has {len(found)} different answers; {count} turns need as many")
    return tuple(islice(reversed(found.values()), count))


def turns(sample: Sample, questions: Sequence[Question]) -> list[Message]:
    """The user's messages of a conversation: the first shows the pages, each asks something else.

    Raises:
        ValueError: two questions have the same answer, so that a later turn could repeat an earlier one.
    """
    if len({question.answer for question in questions}) < len(questions):
        raise ValueError("the turns of a conversation must ask for different answers")
    first, *later = questions
    return [_user(*sample.pages, first.text), *(_user(question.text) for question in later)]


def conversation(asked: Sequence[Message], replies: Sequence[str]) -> list[Message]:
    """The chat up to the first message without a reply, which it ends with.

    Sent turn by turn with what the server said, these are the turns of one conversation. Sent once,
    with replies from elsewhere (a twin's, or ``Question.reply``), it is a conversation that returns.

    Raises:
        ValueError: nothing is left to be answered.
    """
    if len(replies) >= len(asked):
        raise ValueError(f"{len(replies)} replies to {len(asked)} messages leave nothing to answer")
    said = [Message(role="assistant", content=[reply]) for reply in replies]
    pairs = zip_longest(asked[: len(said) + 1], said)
    return [message for message in chain.from_iterable(pairs) if message is not None]


def returning(sample: Sample, questions: Sequence[Question]) -> list[Message]:
    """A conversation that comes with its history: all but the last question have a perfect reader's reply."""
    return conversation(turns(sample, questions), [question.reply for question in questions[:-1]])


def _user(*content: str | Page) -> Message:
    return Message(role="user", content=list(content))
