"""Pages as pictures: one cell of 56 x 56 pixels, one word piece in it, one visual token.

The font is the one inside Pillow, so that the same pages look the same on every machine.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

from benchmarks.reader.pages.page import BLANK, DECORATIONS, LINE_END, Page

CELL = 56
WHITE, BLACK = 255, 0
BASELINE = 37
MARGIN, SPACE = 2, 11  # left of a piece, and more before one with a leading space
SMALLEST = 5  # size of the smallest type


class Style(NamedTuple):
    """Attributes: ``size`` in pixels, smaller where a piece is too wide; ``stroke`` makes it bold."""

    size: int
    stroke: float = 0


STYLES = {"large": Style(21), "small": Style(15), "bold": Style(18, 0.5)}


def draw(page: Page, style: str = "large") -> Image.Image:
    """The page, ``CELL`` pixels per cell, in grey levels of an RGB picture."""
    picture = Image.new("L", (page.width * CELL, page.height * CELL), WHITE)
    for y, row in enumerate(page.rows):
        for x, cell in enumerate(row):
            picture.paste(draw_cell(cell, style), (x * CELL, y * CELL))
    return picture.convert("RGB")


@lru_cache(maxsize=None)
def draw_cell(cell: str, style: str) -> Image.Image:
    """One cell in grey levels; marks and decorations are the same in every style."""
    picture = Image.new("L", (CELL, CELL), WHITE)
    pen = ImageDraw.Draw(picture)
    if cell in DECORATIONS:
        _DRAWN[cell](pen)
    elif cell == LINE_END:
        pen.line([(44, 18), (44, 30), (16, 30)], BLACK, 3)
        pen.polygon([(8, 30), (18, 24), (18, 36)], BLACK)
    elif not cell.strip(" ") and cell != BLANK:
        pen.line([(12, 28), (12, 38), (44, 38), (44, 28)], BLACK, 2)
    elif cell != BLANK:
        _write(pen, cell, STYLES[style])
    return picture


def _write(pen: ImageDraw.ImageDraw, piece: str, style: Style) -> None:
    text = piece.lstrip(" ")
    left = MARGIN + SPACE * (len(piece) - len(text))
    for size in range(style.size, SMALLEST - 1, -1):
        font = _font(size)
        if left + font.getlength(text) + 2 * style.stroke <= CELL - MARGIN:
            break
    pen.text((left, BASELINE), text, BLACK, font, anchor="ls", stroke_width=style.stroke)


@lru_cache(maxsize=None)
def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)


def _stripes(pen: ImageDraw.ImageDraw) -> None:
    for x in range(-CELL, CELL, 14):
        pen.line([(x, CELL), (x + CELL, 0)], 96, 5)


def _dots(pen: ImageDraw.ImageDraw) -> None:
    for y in range(7, CELL, 14):
        for x in range(7, CELL, 14):
            pen.ellipse((x - 3, y - 3, x + 3, y + 3), 64)


def _box(pen: ImageDraw.ImageDraw) -> None:
    pen.rectangle((6, 6, 49, 49), 200, 32, 4)


def _cross(pen: ImageDraw.ImageDraw) -> None:
    pen.line([(8, 8), (48, 48)], 32, 6)
    pen.line([(8, 48), (48, 8)], 32, 6)


def _shade(pen: ImageDraw.ImageDraw) -> None:
    for y in range(CELL):
        pen.line([(0, y), (CELL, y)], 60 + 3 * y)


def _wave(pen: ImageDraw.ImageDraw) -> None:
    for y in (8, 24, 40):
        for x in (0, 28):
            pen.arc((x, y, x + 14, y + 12), 180, 360, 48, 3)
            pen.arc((x + 14, y, x + 28, y + 12), 0, 180, 48, 3)


def _rule(pen: ImageDraw.ImageDraw) -> None:
    pen.rectangle((0, 25, CELL, 30), 16)


_DRAWN = dict(zip(DECORATIONS, (_stripes, _dots, _box, _cross, _shade, _wave, _rule)))
