"""The drawing as one HTML file that needs nothing else: everything is inline, the heat is drawn on canvas."""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Sequence
from importlib.resources import files
from string import Template

import numpy as np
from PIL import Image

from sglang_vlkv.inspect.heat import DARK, DIM, FRAME, TINT, Visual, colours
from sglang_vlkv.inspect.subject import Subject, shown
from sglang_vlkv.printable import printable

LARGEST = ((1, 1280), (16, 640))  # by number of frames: the longer side of their pictures, in pixels
SMALLEST = 320  # where there are more frames
PARTS = ("page.html", "page.css", "page.js")
STEPS = 201  # colours from 0% to 100%


def render(subject: Subject) -> str:
    """The page; it opens with the subject's choice."""
    template, style, script = map(resource, PARTS)
    return Template(template).substitute(
        question=_text(subject.answer.question),
        answer=_text(subject.answer.text.strip()),
        facts="".join(f"<li>{_text(fact)}</li>" for fact in subject.facts),
        config=_text(subject.kept.report.get("config", "none: the prompt was left alone")),
        style=style,
        script=script,
        data=_json(_data(subject)),
    )


def _text(words: str) -> str:
    """For an element; lines stay."""
    return html.escape(printable(words, keep="\n\t"))


def _data(subject: Subject) -> dict:
    """What ``page.js`` reads."""
    kept = subject.kept
    return {
        "layer": subject.choice.layer,
        "head": subject.choice.head,
        "alone": kept.left_alone is not None,
        "kept": [[_bits(row) for row in heads] for heads in kept.mask],
        "tokens": [shown(token) for token in subject.answer.tokens],
        "rows": kept.report.get("kept_per_layer"),
        "sparsity": kept.report.get("sparsity_per_layer"),
        "visuals": [_visual(*both) for both in zip(kept.visuals, subject.pictures, strict=True)],
        "colours": colours(np.linspace(0, 1, STEPS)).tolist(),
        "tint": TINT,
        "frame": FRAME,
        "dim": DIM,
        "dark": DARK,
    }


def _visual(visual: Visual, shows: Sequence[Image.Image]) -> dict:
    side = next((side for most, side in LARGEST if len(shows) <= most), SMALLEST)
    return {
        "name": visual.name,
        "positions": visual.positions.tolist(),
        "grid": visual.grid,
        "pictures": [_data_url(picture, side) for picture in shows],
    }


def _bits(row: np.ndarray) -> str:
    """``[n]`` bool in base64; position p is bit p % 8, from the lowest, of byte p // 8."""
    return base64.b64encode(np.packbits(row, bitorder="little").tobytes()).decode()


def _data_url(picture: Image.Image, side: int) -> str:
    """The smaller of PNG and JPEG, at most ``side`` pixels wide and high."""
    picture = picture.copy()
    picture.thumbnail((side, side))
    encoded = []
    for kind, options in (("png", {"optimize": True}), ("jpeg", {"quality": 88})):
        buffer = io.BytesIO()
        picture.save(buffer, format=kind, **options)
        encoded.append((buffer.getvalue(), kind))
    data, kind = min(encoded, key=lambda one: len(one[0]))
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def _json(data: dict) -> str:
    """JSON that may stand in a script element."""
    return json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")


def resource(name: str) -> str:
    """A file beside this one."""
    return files("sglang_vlkv.inspect").joinpath(name).read_text(encoding="utf-8")
