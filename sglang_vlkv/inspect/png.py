"""The drawing as one picture, with Pillow alone."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageFont

from sglang_vlkv.commands import Problem
from sglang_vlkv.inspect import blocks
from sglang_vlkv.inspect.blocks import GAP, LARGE, NORMAL, SMALL, SOFT, WIDTH, Font
from sglang_vlkv.inspect.heat import Choice, Visual, paint
from sglang_vlkv.inspect.subject import Subject, shown

MARGIN = 48  # pixels
TALL, THUMB, LEAST = 900, 228, 110  # pixels: the highest picture; a small one's width, and its least
CELL = 16  # pixels of a token where no picture is known
MAX_TEXT = 400  # text tokens drawn; the page has them all


def load_font(path: Path | None) -> Font:
    """The font by its size; Pillow's own without a path."""
    if path is None:
        return ImageFont.load_default
    try:
        ImageFont.truetype(path, NORMAL)
    except OSError as error:
        raise Problem(f"{path} cannot be read as a font: {error}.") from error
    return partial(ImageFont.truetype, path)


def encode(drawing: Image.Image) -> bytes:
    buffer = io.BytesIO()
    drawing.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def draw(subject: Subject, font: Font) -> Image.Image:
    return _Sheet(subject, font).draw()


@dataclass(frozen=True)
class _Sheet:
    """The parts of the drawing, in its order."""

    subject: Subject
    font: Font

    def draw(self) -> Image.Image:
        subject, font = self.subject, self.font
        heat = subject.kept.heat(subject.choice)
        spans = [(v.name, int(v.positions[0]), int(v.positions[-1]) + 1) for v in subject.kept.visuals]
        parts = [
            blocks.paragraph(subject.answer.question, font(LARGE)),
            blocks.paragraph(f"Answer: {subject.answer.text}", font(NORMAL)),
            blocks.paragraph("  ·  ".join(subject.facts), font(NORMAL), SOFT),
            blocks.scale(f"share of {subject.chosen} that kept a token", font),
        ]
        for visual, shows in zip(subject.kept.visuals, subject.pictures, strict=True):
            parts += self._visual(visual, shows, heat)
        if subject.kept.left_alone is None:
            parts.append(blocks.beside([self._rows(), self._sparsity()]))
        parts += [
            blocks.heading("Text of the prompt", font),
            blocks.chips(self._text(heat), font),
            blocks.heading("All positions of the prompt", font),
            blocks.band(heat, spans, font),
        ]
        return blocks.framed(blocks.stack(parts), MARGIN)

    def _visual(self, visual: Visual, shows: Sequence[Image.Image], heat: np.ndarray) -> list[Image.Image]:
        own = heat[visual.positions]
        title = f"{visual.name}: keeps {own.sum():,.1f} of {len(own):,} tokens"
        parts = [blocks.heading(title, self.font)]
        if visual.grid is None:
            note = "The model does not state how these tokens lie in the picture."
            parts += [blocks.paragraph(note, self.font(SMALL), SOFT), blocks.strip(own)]
        elif visual.grid[0] == 1:
            parts += self._image(visual, shows)
        else:
            parts += self._video(visual, shows)
        return parts

    def _image(self, visual: Visual, shows: Sequence[Image.Image]) -> list[Image.Image]:
        """The image large, and once for each layer."""
        kept, choice, shape = self.subject.kept, self.subject.choice, _shape(visual, shows)
        width = blocks.fitting(shape, WIDTH // 2, TALL)
        large = _heat_picture(kept.map_of(visual, choice)[0], shows, 0, width)
        if kept.left_alone is not None:
            return [large]
        rest = WIDTH - GAP - large.width
        thumb = blocks.fitting_grid(shape, kept.num_layers, rest, large.height)
        below = thumb < min(LEAST, width)
        if below:
            thumb = blocks.fitting(shape, THUMB, THUMB)
        thumbs = []
        for layer in range(kept.num_layers):
            heat = kept.map_of(visual, Choice(layer, choice.head))[0]
            thumbs.append(
                blocks.captioned(_heat_picture(heat, shows, 0, thumb), f"layer {layer}", self.font)
            )
        if below:
            return [large, blocks.grid(thumbs)]
        return [blocks.beside([large, blocks.grid(thumbs, rest)])]

    def _video(self, visual: Visual, shows: Sequence[Image.Image]) -> list[Image.Image]:
        """A contact sheet of the frames, then the tokens kept of every frame, by layer."""
        kept, choice = self.subject.kept, self.subject.choice
        maps, counts = kept.map_of(visual, choice), kept.per_frame(visual, choice)
        across = len(maps) if len(maps) <= 4 else min(8, round(1.5 * len(maps) ** 0.5))
        width = blocks.fitting(_shape(visual, shows), (WIDTH - GAP * (across - 1)) // across, TALL // 2)
        frames = [
            blocks.captioned(
                _heat_picture(heat, shows, time, width), f"frame {time}: {counts[time]:,.1f}", self.font
            )
            for time, heat in enumerate(maps)
        ]
        by_layer = {"all layers": kept.per_frame(visual, Choice(None, choice.head))}
        for layer in range(kept.num_layers):
            by_layer[f"layer {layer}"] = kept.per_frame(visual, Choice(layer, choice.head))
        most = max(float(count.max()) for count in by_layer.values()) or 1.0
        note = f"Tokens kept of each frame; a full bar is {most:,.1f} tokens"
        panels = [
            blocks.captioned(blocks.columns(count / most, THUMB, 96), name, self.font)
            for name, count in by_layer.items()
        ]
        if kept.left_alone is not None:
            return [blocks.grid(frames)]
        return [blocks.grid(frames), blocks.paragraph(note, self.font(SMALL), SOFT), blocks.grid(panels)]

    def _rows(self) -> Image.Image:
        report = self.subject.kept.report
        tokens, rows = report["prompt_tokens"], report["kept_per_layer"]
        labels = [f"{count:,} ({count / tokens:.1%})" for count in rows]
        return blocks.bars(
            "Rows kept by each KV head", [count / (max(rows) or 1) for count in rows], labels, self.font
        )

    def _sparsity(self) -> Image.Image:
        title, shares = "Sparsity of the attention", self.subject.kept.report["sparsity_per_layer"]
        if shares is None:
            layers = self.subject.kept.num_layers
            return blocks.bars(title, [0.0] * layers, ["not measured"] * layers, self.font)
        return blocks.bars(title, shares, [f"{share:.1%}" for share in shares], self.font)

    def _text(self, heat: np.ndarray) -> list[tuple[str, float | None]]:
        """The text tokens and their heat, and every visual where it stands."""
        kept, tokens = self.subject.kept, self.subject.answer.tokens
        first = {int(visual.positions[0]): f"[ {visual.name} ]" for visual in kept.visuals}
        positions = kept.text_positions.tolist()
        cut = set(positions[MAX_TEXT // 2 : -MAX_TEXT // 2]) if len(positions) > MAX_TEXT else set()
        first_cut, pieces = min(cut, default=-1), []
        for position in sorted({*positions, *first}):
            if position in first:
                pieces.append((first[position], None))
            elif position not in cut:
                pieces.append((shown(tokens[position]), float(heat[position])))
            elif position == first_cut:
                pieces.append((f"... {len(cut):,} more tokens ...", None))
        return pieces


def _shape(visual: Visual, shows: Sequence[Image.Image]) -> tuple[int, int]:
    """Width and height of the visual's pictures, in proportion."""
    return shows[0].size if shows else (visual.grid[2], visual.grid[1])


def _heat_picture(heat: np.ndarray, shows: Sequence[Image.Image], time: int, width: int) -> Image.Image:
    """``heat`` ``[height, width]`` over its picture, which becomes ``width`` pixels wide."""
    if shows:
        picture = shows[time]
    else:
        picture = Image.new("RGB", (heat.shape[1] * CELL, heat.shape[0] * CELL), "#b0b0b0")
    height = max(1, round(width * picture.height / picture.width))
    return paint(picture.resize((width, height), Image.Resampling.LANCZOS), heat)
