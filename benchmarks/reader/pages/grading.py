"""What counts as a right answer."""

from __future__ import annotations

import re
from typing import Literal

from benchmarks.reader.pages.page import Question

# Digits with what may join them (12.50, 9:15, 1,200, 1/2), a sign, and letters or digits that touch them.
NUMBER = re.compile(r"(?<![^\W_])-?[^\W_]*\d[^\W_]*(?:[.,:/-][^\W_]*\d[^\W_]*)*")


def grade(question: Question, output: str) -> float | None:
    """How right an output is.

    Only its first line that holds anything counts: a reader that goes on must not find the answer by
    chance. For the same reason an output with other numbers than the answer and the question's is wrong.

    Returns:
        1 or 0 for a value; for a list the share of its items that come in order (extra ones count
        against it); None for summaries and captions, whose measure is token agreement.
    """
    line = output.strip().split("\n")[0]
    if question.kind == "word":
        return float(says(line, question.answer, "word"))
    if question.kind == "number":
        return float(set(NUMBER.findall(line)) - set(NUMBER.findall(question.text)) == {question.answer})
    if question.kind == "list":
        return _in_order(*(list(map(_words, _items(text))) for text in (question.answer, line)))
    return None


def says(text: str, value: str, kind: Literal["word", "number"]) -> bool:
    """Whether ``text`` holds ``value``: words as whole words in any case, numbers digit by digit.

    A number inside a longer one (15 in 915, in 9:15, in 15.20, in 15th, in -15) is another number.
    """
    if kind == "number":
        return value in NUMBER.findall(text)
    return f" {_words(value)} " in f" {_words(text)} "


def _words(text: str) -> str:
    """Its words in lower case with one space between, without punctuation or emphasis."""
    return " ".join(re.findall(r"[^\W_]+", text.lower()))


def _items(text: str) -> list[str]:
    """The items of a list as a model may write it: by commas, semicolons or a last "and"."""
    return [item for item in re.split(r"[,;]|\band\b", text) if _words(item)]


def _in_order(wanted: list[str], given: list[str]) -> float:
    """Longest common subsequence, as a share of the longer list."""
    longest = [0] * (len(given) + 1)
    for item in wanted:
        before = longest[:]
        for index, other in enumerate(given):
            longest[index + 1] = (
                before[index] + 1 if item == other else max(before[index + 1], longest[index])
            )
    return longest[-1] / max(len(wanted), len(given))
