"""Conversations about pictures as batches: many questions behind one picture's prefix."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from tokenizers import Tokenizer

from sglang_vlkv.tinyvlm import tasks
from sglang_vlkv.tinyvlm.tokenizer import TOKEN_ID

TOLD, DIGIT, COLOUR = range(3)


class Turns(NamedTuple):
    """One conversation as token ids, without the picture's prefix.

    Attributes:
        ids: From after the last ``<|vision_end|>`` to before the last ``<|im_end|>``.
        labels: The token to predict from each of ``ids``, -1 for those that are not trained.
        last: Whether the token belongs to the last answer.
        shown: What the label is: TOLD if the text determines it, else DIGIT or COLOUR of the picture.
        next: The visual token that follows on the path or line, where it decides the label; else -1.
        cells: What the last answer needs.
    """

    ids: list[int]
    labels: list[int]
    last: list[bool]
    shown: list[int]
    next: list[int]
    cells: tuple[int, ...]


class Batch(NamedTuple):
    """Pictures of one shape with packed questions; B pictures, P prefix and T question tokens.

    Attributes:
        grids: Sprite numbers [B, pictures, rows, columns].
        prefix: Token ids [P]; positions: M-RoPE [3, 1, P].
        visual: Where the prefix holds visual tokens, bool [P].
        tail, labels: [B, T]
        tail_positions: [3, B, T]
        mask: bool [B, T, P + T], as the model takes it.
        owner: Which question a token belongs to, [B, T], -1 for padding.
        last: bool [B, T], tokens of the last answer: decoded after the cache was compressed.
        shown: As in ``Turns``, [B, T].
        next: What of the prefix follows on the path or line, [B, T], -1 where nothing does.
        needed: bool [B, T, P], the visual tokens that the row's question needs.
    """

    grids: torch.Tensor
    prefix: torch.Tensor
    positions: torch.Tensor
    visual: torch.Tensor
    tail: torch.Tensor
    labels: torch.Tensor
    tail_positions: torch.Tensor
    mask: torch.Tensor
    owner: torch.Tensor
    last: torch.Tensor
    shown: torch.Tensor
    next: torch.Tensor
    needed: torch.Tensor


class Packer:
    """Turns scenes and questions into batches."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._known: dict[str, list[int]] = {}
        self.digits = torch.tensor([self._ids(f" {digit}")[0] for digit in range(10)])
        self.colours = torch.tensor([self._ids(f" {name}")[0] for name in tasks.NAMES])
        self._digits, self._colours = set(self.digits.tolist()), set(self.colours.tolist())
        self._end = TOKEN_ID["<|im_end|>"]

    def _ids(self, text: str) -> list[int]:
        if text not in self._known:
            self._known[text] = self._tokenizer.encode(text).ids
        return self._known[text]

    def turns(self, questions: tuple[tasks.Question, ...]) -> Turns:
        ids, labels, last, shown, following = [], [], [], [], []
        for turn, question in enumerate(questions):
            asked = [] if turn == 0 else self._ids("<|im_end|>\n<|im_start|>user\n")
            asked = asked + self._words(question.text) + self._ids("<|im_end|>\n<|im_start|>assistant\n")
            answer = self._words(question.answer)
            ids += asked + answer
            labels += [-1] * (len(asked) - 1) + answer + [self._end]
            cells = list(question.cells)
            if question.text.startswith("path"):  # " path", colour, digit, colour, digit, ...
                steps = [cells[i // 2] if i % 2 and i > 2 else -1 for i in range(len(answer))]
            elif question.text.startswith("read"):  # " line", digit, digit, ...
                steps = [-1, *cells[1:]]
            else:
                steps = [-1] * len(answer)
            following += [-1] * (len(asked) - 1) + steps + [-1]
            shown += [TOLD] * (len(asked) - 1) + self._shown(question, answer) + [TOLD]
            last += [False] * len(asked) + [turn + 1 == len(questions)] * len(answer)
        return Turns(ids, labels, last, shown, following, questions[-1].cells)

    def _shown(self, question: tasks.Question, answer: list[int]) -> list[int]:
        numbered = question.text.startswith(("picture", "frame"))
        told = {"list": 0, "path": 2}.get(question.text.split()[0], len(answer))
        shown = []
        for i, token in enumerate(answer):
            if token in self._digits and not (numbered and i == 1):
                shown.append(DIGIT)
            else:
                shown.append(COLOUR if token in self._colours and i >= told else TOLD)
        return shown

    def _words(self, text: str) -> list[int]:
        """As ``_ids``; a word with its leading space is a token or a few, so words are known."""
        head, *rest = text.split(" ")
        return [*(self._ids(head) if head else []), *(i for word in rest for i in self._ids(" " + word))]

    def pack(self, grids: np.ndarray, packed: list[list[Turns]], video: bool = False) -> Batch:
        """grids: [B, pictures, rows, columns]; packed: per picture or pair of pictures, its questions."""
        prefix, positions = prefix_of(self._ids("<|im_start|>user\n"), grids.shape[1:], video)
        visual = prefix == TOKEN_ID["<|video_pad|>" if video else "<|image_pad|>"]
        size, length = len(packed), max(sum(len(t.ids) for t in row) for row in packed)
        tail = torch.zeros(size, length, dtype=torch.long)
        labels, owner, following = torch.full((3, size, length), -1)
        shown = torch.full((size, length), TOLD)
        start = torch.zeros(size, length, dtype=torch.long)
        last = torch.zeros(size, length, dtype=torch.bool)
        needed = torch.zeros(size, length, len(prefix), dtype=torch.bool)
        cells = visual.nonzero().squeeze(1)
        for row, questions in enumerate(packed):
            at = 0
            for number, turns in enumerate(questions):
                here = slice(at, at + len(turns.ids))
                tail[row, here] = torch.tensor(turns.ids)
                labels[row, here] = torch.tensor(turns.labels)
                last[row, here] = torch.tensor(turns.last)
                shown[row, here] = torch.tensor(turns.shown)
                after = torch.tensor(turns.next)
                following[row, here] = torch.where(after < 0, -1, cells[after])
                owner[row, here], start[row, here] = number, at
                needed[row, here, cells[list(turns.cells)]] = True
                at += len(turns.ids)
        column = torch.arange(length)
        own = (owner[:, :, None] == owner[:, None, :]) & (column[:, None] >= column)
        mask = torch.cat([torch.ones_like(needed), own], dim=-1)
        tail_positions = (positions.max() + 1 + column - start).expand(3, -1, -1)
        return Batch(
            torch.from_numpy(grids), prefix, positions, visual, tail, labels, tail_positions, mask,
            owner, last, shown, following, needed,
        )  # fmt: skip


def prefix_of(
    head: list[int], shape: tuple[int, int, int], video: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids [P] and M-RoPE positions [3, 1, P] up to the last ``<|vision_end|>``.

    Args:
        head: Ids before the first ``<|vision_start|>``.
        shape: Pictures, rows and columns in visual tokens; a video's pictures are its temporal patches.
        video: One video in place of the pictures, at two frames per second.
    """
    pictures, rows, columns = shape
    ids, positions = list(head), [torch.arange(len(head)).expand(3, -1)]

    def text(token: str) -> None:
        ids.append(TOKEN_ID[token])
        positions.append((positions[-1].max() + 1).expand(3, 1))

    y, x = torch.arange(rows).repeat_interleave(columns), torch.arange(columns).repeat(rows)
    for media in range(1 if video else pictures):
        text("<|vision_start|>")
        first = positions[-1].max() + 1
        patches = pictures if video else 1
        ids += [TOKEN_ID["<|video_pad|>" if video else "<|image_pad|>"]] * (patches * rows * columns)
        for patch in range(patches):
            # A temporal patch of two frames lasts one second, which is two positions.
            positions.append(first + torch.stack([torch.full_like(y, 2 * patch), y, x]))
        if video:
            positions = [torch.cat(positions, dim=1)]
        text("<|vision_end|>")
    return torch.tensor(ids), torch.cat(positions, dim=1)[:, None]
