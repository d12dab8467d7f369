"""What a report says about every position of the prompt, and its colours."""

from __future__ import annotations

import math
from functools import cached_property
from typing import NamedTuple

import numpy as np
from PIL import Image

from sglang_vlkv.commands.shapes import lacks
from sglang_vlkv.printable import printable

TINT = 0.5  # how much of a kept token's colour is the heat's, inside its frame
FRAME = 12  # a cell of so many pixels has a frame of one
DIM = 0.35  # brightness of what was dropped, which is also grey
DARK = 62  # of green: on colours with less, white text is easier to read than black
# From dropped to kept by all; brighter is more, also for those who do not see the hues.
_STOPS = np.array(
    [(40, 40, 40), (128, 38, 118), (196, 40, 78), (238, 92, 50), (253, 174, 60), (255, 246, 170)]
)


class Choice(NamedTuple):
    """A layer and a KV head by number; None stands for all of them."""

    layer: int | None = None
    head: int | None = None


ALL = Choice()


class Visual(NamedTuple):
    """An image or a video of the prompt.

    Attributes:
        modality: "image" or "video".
        number: counted from 1 within its modality.
        positions: of its tokens in the prompt, ascending, ``[m]``.
        grid: (time, height, width) in tokens; None where the model does not state it.
    """

    modality: str
    number: int
    positions: np.ndarray
    grid: tuple[int, int, int] | None

    @property
    def name(self) -> str:
        return f"{printable(self.modality)} {self.number}"


MOST_TOKENS = 2**24  # of a prompt that is drawn
_ALWAYS = {"policy": str, "prompt_tokens": int, "visual": list[dict]}
_COMPACTED = {
    "budget": float, "config": str, "positions": list[list[list[int]]], "kept_per_layer": list[int],
    "sparsity_per_layer": list[float] | None, "kept_bytes": int, "full_bytes": int,
}  # fmt: skip
_VISUAL = {"modality": str, "spans": list[list[int]], "grid": list[int] | None}


def unreadable(report: object) -> str | None:
    """The field of a report with ``kv_report`` that is not as :class:`Kept` reads it; None if all are."""
    if (field := lacks(report, _ALWAYS)) is not None:
        return field
    n = report["prompt_tokens"]
    if not 0 < n <= MOST_TOKENS:
        return "prompt_tokens"
    for visual in report["visual"]:
        if (field := lacks(visual, _VISUAL)) is not None:
            return field
        if not all(len(span) == 2 and span[0] < span[1] <= n for span in visual["spans"]):
            return "spans"
        size, grid = sum(end - start for start, end in visual["spans"]), visual["grid"]
        if not size or grid is not None and (len(grid) != 3 or math.prod(grid) != size):
            return "grid"
    if "positions" not in report:
        return lacks(report, {"reason": str})
    if (field := lacks(report, _COMPACTED)) is not None:
        return field
    layers, sparsity = report["positions"], report["sparsity_per_layer"]
    if not layers or not layers[0] or len({len(heads) for heads in layers}) > 1:
        return "positions"
    if any(position >= n for heads in layers for head in heads for position in head):
        return "positions"
    lengths = {len(layers), len(report["kept_per_layer"]), len(layers if sparsity is None else sparsity)}
    return "kept_per_layer" if len(lengths) > 1 else None


class Kept:
    """Which layer and head kept what, out of a report with ``kv_report``.

    Attributes:
        report: the server's.
        left_alone: why all rows were kept; None where the prompt was compacted. Then the one layer and
            head of ``mask`` stand for all.
        mask: ``[L, H, n]`` bool.
        visuals: in the order of the prompt.
    """

    def __init__(self, report: dict) -> None:
        self.report, n = report, report["prompt_tokens"]
        self.left_alone: str | None = None if "positions" in report else report["reason"]
        layers = report.get("positions", [[range(n)]])
        self.mask = np.zeros((len(layers), len(layers[0]), n), dtype=bool)
        for layer, heads in enumerate(layers):
            for head, positions in enumerate(heads):
                self.mask[layer, head, np.asarray(positions, dtype=np.int64)] = True
        self.visuals: list[Visual] = []
        for one in report["visual"]:
            number = 1 + sum(other.modality == one["modality"] for other in self.visuals)
            positions = np.concatenate([np.arange(*span) for span in one["spans"]])
            grid = tuple(one["grid"]) if one["grid"] else None
            self.visuals.append(Visual(one["modality"], number, positions, grid))

    @property
    def num_layers(self) -> int:
        return self.mask.shape[0]

    @property
    def num_heads(self) -> int:
        return self.mask.shape[1]

    @cached_property
    def text_positions(self) -> np.ndarray:
        """Positions that hold no visual token, ascending."""
        text = np.ones(self.mask.shape[2], dtype=bool)
        for visual in self.visuals:
            text[visual.positions] = False
        return text.nonzero()[0]

    def heat(self, choice: Choice = ALL) -> np.ndarray:
        """Share of the chosen (layer, head) pairs that kept each position, ``[n]``."""
        layers, heads = (slice(None) if one is None else [one] for one in choice)
        return self.mask[layers][:, heads].mean(axis=(0, 1))

    def map_of(self, visual: Visual, choice: Choice = ALL) -> np.ndarray:
        """:meth:`heat` as it lies in the picture, ``[time, height, width]``; needs a grid."""
        return self.heat(choice)[visual.positions].reshape(visual.grid)

    def per_frame(self, visual: Visual, choice: Choice = ALL) -> np.ndarray:
        """Tokens that a head keeps of each frame (temporal group) on average, ``[time]``."""
        return self.map_of(visual, choice).sum(axis=(1, 2))


def colours(heat: np.ndarray) -> np.ndarray:
    """``[...]`` in [0, 1] -> ``[..., 3]`` uint8."""
    at = np.linspace(0, 1, len(_STOPS))
    return np.stack([np.interp(heat, at, channel) for channel in _STOPS.T], axis=-1).round().astype(np.uint8)


def paint(picture: Image.Image, heat: np.ndarray) -> Image.Image:
    """The picture with every token's cell framed and tinted by its heat, grey and dark where that is 0.

    The less heat, the more a cell is like a dropped one.

    Args:
        picture: RGB, of any size.
        heat: ``[height, width]`` of the grid, which covers all of the picture.
    """
    pixels = np.asarray(picture, dtype=np.float32)
    rows, above = _cells(pixels.shape[0], heat.shape[0])
    columns, left = _cells(pixels.shape[1], heat.shape[1])
    spread = heat[rows][:, columns, None]
    framed = (above[:, None] | left)[..., None]
    grey = pixels @ np.array([0.299, 0.587, 0.114], dtype=np.float32)
    tone = colours(spread[..., 0])
    dark = DIM * grey[..., None]
    seen = dark + np.sqrt(spread) * (pixels - dark)
    tinted = np.where(framed, tone, (1 - TINT) * seen + TINT * tone)
    painted = np.where(spread > 0, tinted, dark)
    return Image.fromarray(painted.round().astype(np.uint8))


def _cells(pixels: int, cells: int) -> tuple[np.ndarray, np.ndarray]:
    """Along one side of a picture: each pixel's cell, and whether it belongs to the cell's frame."""
    number = np.arange(pixels) * cells // pixels
    starts = -(-np.arange(cells + 1) * pixels // cells)  # of each cell, and the end
    thick = pixels // cells // FRAME
    at = np.arange(pixels)
    return number, (at - starts[number] < thick) | (starts[number + 1] - at <= thick)
