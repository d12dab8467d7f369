"""Conversations over HTTP: every turn sends all that was said before it, byte for byte."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from pathlib import Path

import requests
from PIL import Image

from tests.prompts import words
from tests.serving import POSITIONS, Server, data_url, user_turn


@dataclass(frozen=True)
class Conversation:
    """What has been said so far. The model writes printable ASCII, so its text gives back its tokens."""

    text: str = ""
    images: tuple[Image.Image, ...] = ()
    videos: tuple[Path, ...] = ()

    def ask(self, text: str, images: tuple[Image.Image, ...] = (), video: Path | None = None) -> Conversation:
        """The user's next turn."""
        turn = user_turn(text, len(images), video is not None)
        videos = self.videos + ((video,) if video else ())
        return Conversation(self.text + turn, self.images + tuple(images), videos)

    def answered(self, answer: dict) -> Conversation:
        """The answer, and the end of its message."""
        return replace(self, text=self.text + answer["text"] + "<|im_end|>\n")

    def body(self, max_new_tokens: int = 16, **options) -> dict:
        """The JSON of ``/generate``."""
        body = Server.body("", max_new_tokens=max_new_tokens, **options) | {"text": self.text}
        if self.images:
            body["image_data"] = [data_url(image) for image in self.images]
        if self.videos:
            body["video_data"] = [str(video) for video in self.videos]
        return body


def talk(server: Server, said, custom: dict | None = None, before=None, length: int = 16):
    """The prompts and answers of a conversation; ``before`` runs before every turn but the first."""
    conversation, prompts, answers = Conversation(), [], []
    for turn in said:
        if prompts and before is not None:
            before()
        conversation = conversation.ask(*turn)
        [answer] = server.many([conversation.body(length, custom=POSITIONS | (custom or {}))])
        prompts.append(conversation)
        answers.append(answer)
        conversation = conversation.answered(answer)
    return prompts, answers


def twins(server: Server) -> dict:
    """``GET /kv_policy/twins``."""
    return server._checked(requests.get(server.url + "/kv_policy/twins", timeout=60))


def evict_exact_kv(server: Server, pool: int) -> dict:
    """Everything but twins leaves a pool of ``pool`` slots: a text-only request needs all the rest.

    Its own KV stays out of the tree, so that the next request finds the pool free. Returns its answer.
    """
    # SGLang keeps the KV of a request that names this host, its own dummy, out of the tree.
    length = pool - twins(server)["slots"] - 8
    text = words(random.Random(pool), length)[:length]
    params = {"max_new_tokens": 1, "temperature": 0.0}
    [answer] = server.many([{"text": text, "sampling_params": params, "bootstrap_host": "2.2.2.2"}])
    return answer
