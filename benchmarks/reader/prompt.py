"""How pages and questions become token ids: what the chat template makes of them, cell by cell."""

from __future__ import annotations

from typing import Iterable

import torch
from tokenizers import Tokenizer

from benchmarks.reader.pages.arrangements import Message
from benchmarks.reader.pages.page import BLANK, DECORATIONS, Page

IM_START, IM_END, VISION_START, VISION_END, VISION_PAD, IMAGE_PAD, VIDEO_PAD = range(1, 8)
SPECIAL = {
    VISION_START: "<|vision_start|>",
    VISION_END: "<|vision_end|>",
    VISION_PAD: "<|vision_pad|>",
    IMAGE_PAD: "<|image_pad|>",
    VIDEO_PAD: "<|video_pad|>",
}
"""SmolLM2's reserved tokens that take Qwen2.5-VL's roles."""

MEANING = {BLANK: "    "} | dict(zip(DECORATIONS, ("||||", "....", "####", "++", "%%", "~~", "----")))
"""What the tower says of a cell without text: indentation, and what text is decorated with."""

IGNORED = -100


class Prompter:
    """Ids of chats; they equal the tokenizer's over the chat template, with a cell's token for each pad."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        [self.newline] = self.encode("\n")

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def pieces(self, text: str) -> list[str]:
        """The :data:`.pages.page.Encode` of this tokenizer."""
        return [self.tokenizer.decode([i]) for i in self.encode(text)]

    def cell(self, cell: str) -> int:
        """The token whose embedding stands for a cell.

        Raises:
            ValueError: the cell holds more than one piece.
        """
        ids = self.encode(MEANING.get(cell, cell))
        if len(ids) != 1:
            raise ValueError(f"a cell holds one word piece; {cell!r} has {len(ids)}")
        return ids[0]

    def page(self, page: Page) -> list[int]:
        return [VISION_START, *map(self.cell, page.cells), VISION_END]

    def prompt(self, messages: Iterable[Message]) -> list[int]:
        """A chat up to where the assistant begins to speak."""
        return self.chat(messages)[0] + [IM_START, *self.encode("assistant\n")]

    def chat(self, messages: Iterable[Message]) -> tuple[list[int], list[int]]:
        """Ids of a chat, and labels: the ids themselves in what the assistant says, else ``IGNORED``."""
        ids, labels = [], []
        for message in messages:
            content = [*self._content(f"{message['role']}\n", *message["content"]), IM_END]
            head = len(self.encode(f"{message['role']}\n"))
            says = content[head:] if message["role"] == "assistant" else [IGNORED] * (len(content) - head)
            ids += [IM_START, *content, self.newline]
            labels += [IGNORED] * (1 + head) + says + [IGNORED]
        return ids, labels

    def _content(self, *parts: str | Page) -> list[int]:
        """Neighbouring texts are read as one."""
        ids, text = [], ""
        for part in parts:
            if isinstance(part, Page):
                ids += self.encode(text) + self.page(part)
                text = ""
            else:
                text += part
        return ids + self.encode(text)


def delimit(embeddings: torch.Tensor, newline: int) -> None:
    """Let the ends of a picture be read as line breaks and never be written: half of a break's embedding."""
    embeddings[[VISION_START, VISION_END]] = 0.5 * embeddings[newline]
