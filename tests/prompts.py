"""Prompts drawn from a seed: random pictures, random words, random sizes."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image, ImageDraw

from tests.serving import ROOT, Server

CLIP = ROOT / "examples" / "clip.mp4"
WORDS = "how many red blue circles squares left right above below count list the picture which".split()


@dataclass
class Prompt:
    text: str
    images: list[Image.Image] = field(default_factory=list)
    video: Path | None = None

    def body(self, max_new_tokens: int = 16, **options) -> dict:
        return Server.body(self.text, self.images, self.video, max_new_tokens, **options)


def words(rng: random.Random, count: int) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(count))


def picture(rng: random.Random, width: int, height: int) -> Image.Image:
    image = Image.new("RGB", (width, height), tuple(rng.randrange(256) for _ in range(3)))
    draw = ImageDraw.Draw(image)
    for _ in range(rng.randint(5, 25)):
        x, y = rng.randrange(width), rng.randrange(height)
        box = (x, y, x + rng.randint(8, 120), y + rng.randint(8, 120))
        shape = rng.choice([draw.ellipse, draw.rectangle])
        shape(box, fill=tuple(rng.randrange(256) for _ in range(3)))
    return image


def draw_prompt(seed: int, kind: str) -> Prompt:
    """``kind``: image, images (2-3), video, text, or long (a larger image)."""
    rng = random.Random(f"{kind}{seed}")
    text = words(rng, rng.randint(4, 20))

    def side(low: int, high: int) -> int:
        return 28 * rng.randint(low, high)

    if kind == "image":
        return Prompt(text, [picture(rng, side(14, 20), side(14, 20))])
    if kind == "images":
        count = rng.randint(2, 3)
        return Prompt(text, [picture(rng, side(10, 14), side(10, 14)) for _ in range(count)])
    if kind == "long":
        return Prompt(text, [picture(rng, side(28, 34), side(28, 34))])
    if kind == "video":
        return Prompt(text, video=CLIP)
    assert kind == "text", kind
    return Prompt(words(rng, rng.randint(60, 120)))
