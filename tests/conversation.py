"""Conversations over HTTP: every turn sends all that was said before it, byte for byte."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from pathlib import Path

import requests
from PIL import Image

from tests.prompts import words
from tests.serving import Server, data_url


@dataclass(frozen=True)
class Conversation:
    """What has been said so far. The model writes printable ASCII, so its text gives back its tokens."""

    text: str = ""
    images: tuple[Image.Image, ...] = ()
    videos: tuple[Path, ...] = ()

    def ask(self, text: str, images: tuple[Image.Image, ...] = (), video: Path | None = None) -> Conversation:
        """The user's next turn."""
        picture = "<|vision_start|><|image_pad|><|vision_end|>" * len(images)
        picture += "<|vision_start|><|video_pad|><|vision_end|>" if video else ""
        turn = f"<|im_start|>user\n{picture}{text}<|im_end|>\n<|im_start|>assistant\n"
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


def twins(server: Server) -> dict:
    """``GET /kv_policy/twins``."""
    return server._checked(requests.get(server.url + "/kv_policy/twins", timeout=60))


def evict_exact_kv(server: Server, pool: int) -> None:
    """Everything but twins leaves a pool of ``pool`` slots: a text-only request needs all the rest.

    Its own KV stays out of the tree, so that the next request finds the pool free.
    """
    # SGLang keeps the KV of a request that names this host, its own dummy, out of the tree.
    length = pool - twins(server)["slots"] - 8
    text = words(random.Random(pool), length)[:length]
    params = {"max_new_tokens": 1, "temperature": 0.0}
    server.many([{"text": text, "sampling_params": params, "bootstrap_host": "2.2.2.2"}])
