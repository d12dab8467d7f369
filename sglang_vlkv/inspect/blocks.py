"""Pieces of a drawing with Pillow: text, bars, scales, and how they are put together."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from sglang_vlkv.inspect.heat import DARK, colours
from sglang_vlkv.printable import printable

WIDTH, GAP = 1504, 24  # pixels: of the whole drawing, and between its blocks
LARGE, NORMAL, SMALL = 36, 26, 22  # font sizes
CAPTION = round(SMALL * 1.5)
PAPER, INK, SOFT, LINE, TRACK, BAR = "#ffffff", "#1b1e24", "#5c6470", "#dde1e7", "#f1f3f6", "#3f6fb5"

Font = Callable[[int], ImageFont.FreeTypeFont]  # of a size


def blank(width: int, height: int) -> Image.Image:
    return Image.new("RGB", (width, height), PAPER)


def paragraph(text: str, font: ImageFont.FreeTypeFont, colour: str = INK) -> Image.Image:
    """Wrapped at white space, and within words that are longer than a line."""
    lines, line = [], ""
    for word in printable(text, keep="\n\t").split():
        while font.getlength(word) > WIDTH:
            fits = next(end for end in range(len(word), 0, -1) if font.getlength(word[:end]) <= WIDTH)
            lines += [line] * bool(line) + [word[:fits]]
            line, word = "", word[fits:]
        if font.getlength(f"{line} {word}") > WIDTH:
            lines.append(line)
            line = word
        else:
            line = f"{line} {word}".strip()
    lines.append(line)
    step = round(font.size * 1.35)
    image = blank(WIDTH, step * len(lines))
    for number, line in enumerate(lines):
        ImageDraw.Draw(image).text((0, step * number), line, colour, font)
    return image


def heading(text: str, font: Font) -> Image.Image:
    image = blank(WIDTH, round(NORMAL * 1.9))
    draw = ImageDraw.Draw(image)
    draw.line((0, 0, WIDTH, 0), LINE, 2)
    draw.text((0, image.height), text, INK, font(NORMAL), anchor="lb")
    return image


def captioned(image: Image.Image, text: str, font: Font) -> Image.Image:
    framed = blank(image.width, image.height + CAPTION)
    framed.paste(image)
    ImageDraw.Draw(framed).text((0, image.height + 4), text, SOFT, font(SMALL))
    return framed


def scale(text: str, font: Font) -> Image.Image:
    """What the colours mean."""
    ramp, middle, face = 360, CAPTION // 2, font(SMALL)
    image = blank(WIDTH, CAPTION)
    draw = ImageDraw.Draw(image)
    least, most = "0%, dropped", f"100%   {text}"
    draw.text((0, middle), least, INK, face, anchor="lm")
    x = round(face.getlength(least)) + 10
    tones = colours(np.tile(np.linspace(0, 1, ramp), (CAPTION - 8, 1)))
    image.paste(Image.fromarray(tones), (x, 4))
    draw.text((x + ramp + 10, middle), most, INK, face, anchor="lm")
    return image


def bars(title: str, shares: Sequence[float], labels: Sequence[str], font: Font) -> Image.Image:
    """A horizontal bar for each layer with its label behind it; half as wide as the drawing."""
    width, step, top, face = (WIDTH - GAP) // 2, round(SMALL * 1.4), round(NORMAL * 1.9), font(SMALL)
    left = round(face.getlength("layer 999"))
    room = width - left - 24 - round(max(map(face.getlength, labels)))
    image = blank(width, top + step * len(shares))
    draw = ImageDraw.Draw(image)
    draw.text((0, top - 12), title, INK, font(NORMAL), anchor="lb")
    for layer, (share, label) in enumerate(zip(shares, labels, strict=True)):
        y, right = top + step * layer, left + max(1, round(room * share))
        draw.text((0, y + step // 2), f"layer {layer}", SOFT, face, anchor="lm")
        draw.rectangle((left, y + 4, right, y + step - 5), BAR)
        draw.text((right + 10, y + step // 2), label, INK, face, anchor="lm")
    return image


def columns(shares: np.ndarray, width: int, height: int) -> Image.Image:
    """A vertical bar for each share."""
    image = Image.new("RGB", (width, height), TRACK)
    draw = ImageDraw.Draw(image)
    edges = np.arange(len(shares) + 1) * width // len(shares)
    for share, left, right in zip(shares, edges, edges[1:]):
        gap = min(3, (right - left) // 4)
        if share > 0:
            draw.rectangle((left + gap, height - round(share * height), right - 1 - gap, height), BAR)
    return image


def chips(pieces: Sequence[tuple[str, float | None]], font: Font) -> Image.Image:
    """Words in lines, each on the colour of its heat; None is what has no heat."""
    face, step, pad = font(SMALL), round(SMALL * 1.7), 8
    placed, x, y = [], 0, 0
    for text, heat in pieces:
        width = round(face.getlength(text)) + 2 * pad
        if x and x + width > WIDTH:
            x, y = 0, y + step
        placed.append((x, y, width, text, heat))
        x += width + 4
    image = blank(WIDTH, y + step)
    draw = ImageDraw.Draw(image)
    for x, y, width, text, heat in placed:
        colour = SOFT
        if heat is not None:
            tone = tuple(colours(np.array(heat)).tolist())
            colour = "#ffffff" if tone[1] < DARK else "#000000"
            draw.rounded_rectangle((x, y + 2, x + width, y + step - 4), 5, tone)
        draw.text((x + pad, y + step // 2), text, colour, face, anchor="lm")
    return image


def strip(heat: np.ndarray) -> Image.Image:
    """``[n]`` from left to right; where several share a column of pixels, the hottest is seen."""
    edges = np.arange(WIDTH + 1) * len(heat) / WIDTH
    ends = np.maximum(np.ceil(edges[1:]), np.floor(edges[:-1]) + 1)
    most = np.array([heat[int(start) : int(end)].max() for start, end in zip(edges, ends)])
    return Image.fromarray(np.tile(colours(most), (40, 1, 1)))


def band(heat: np.ndarray, spans: Sequence[tuple[str, int, int]], font: Font) -> Image.Image:
    """:func:`strip` with a line under each of ``spans`` (name, start, end)."""
    colour, face = strip(heat), font(SMALL)
    image = blank(WIDTH, colour.height + round(SMALL * 1.9))
    image.paste(colour)
    draw, free = ImageDraw.Draw(image), 0.0
    for name, start, end in spans:
        left, right = WIDTH * start // len(heat), WIDTH * end // len(heat)
        draw.line((left, colour.height + 4, right, colour.height + 4), SOFT, 3)
        if left >= free:
            draw.text((left, colour.height + 10), name, SOFT, face)
            free = left + face.getlength(name) + 10
    return image


def fitting(shape: tuple[int, int], width: int, height: int) -> int:
    """How wide a picture of this shape (width, height) is that fits."""
    return max(1, int(min(width, height * shape[0] / shape[1])))


def fitting_grid(shape: tuple[int, int], count: int, width: int, height: int) -> int:
    """How wide each of ``count`` captioned pictures of this shape is in a grid that fits."""
    best = 0
    for across in range(1, count + 1):
        down = -(-count // across)
        room = (height - GAP // 2 * (down - 1)) // down - CAPTION
        if room > 0:
            best = max(best, fitting(shape, (width - GAP * (across - 1)) // across, room))
    return best


def stack(blocks: Sequence[Image.Image]) -> Image.Image:
    image = blank(max(block.width for block in blocks), sum(block.height + GAP for block in blocks) - GAP)
    y = 0
    for block in blocks:
        image.paste(block, (0, y))
        y += block.height + GAP
    return image


def beside(blocks: Sequence[Image.Image]) -> Image.Image:
    image = blank(WIDTH, max(block.height for block in blocks))
    x = 0
    for block in blocks:
        image.paste(block, (x, 0))
        x += block.width + GAP
    return image


def grid(blocks: Sequence[Image.Image], width: int = WIDTH) -> Image.Image:
    """Blocks of one size, as many beside each other as ``width`` holds."""
    across = max(1, min(len(blocks), (width + GAP) // (blocks[0].width + GAP)))
    right, down = blocks[0].width + GAP, blocks[0].height + GAP // 2
    image = blank(width, down * -(-len(blocks) // across))
    for number, block in enumerate(blocks):
        image.paste(block, (right * (number % across), down * (number // across)))
    return image


def framed(image: Image.Image, margin: int) -> Image.Image:
    larger = blank(image.width + 2 * margin, image.height + 2 * margin)
    larger.paste(image, (margin, margin))
    return larger
