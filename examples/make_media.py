"""Draw the example media, ``shapes.png`` and ``clip.mp4``, next to this file.

The result is the same on every run. The clip needs PyAV (``pip install av==16.1.0``), which
SGLang itself does not install on x86.
"""

from __future__ import annotations

import math
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

SHAPES_SIDE = 448  # pixels: 16x16 visual tokens of 28x28 pixels
CLIP_SIDE = 224  # pixels
CLIP_FRAMES = 16
CLIP_FPS = 4
COLOURS = ("crimson", "royalblue", "seagreen", "darkorange", "purple", "teal", "gold", "black", "hotpink")


def draw_shape(draw: ImageDraw.ImageDraw, kind: int, x: float, y: float, r: float, colour: str) -> None:
    """A circle (``kind`` 0) or a regular polygon of ``kind + 2`` sides, of radius ``r`` pixels."""
    if kind == 0:
        draw.ellipse((x - r, y - r, x + r, y + r), fill=colour)
    else:
        draw.regular_polygon((x, y, r), kind + 2, rotation=15 * kind, fill=colour)


def shapes() -> Image.Image:
    """A 3x3 grid of numbered shapes on a shaded ground."""
    image = Image.linear_gradient("L").resize((SHAPES_SIDE, SHAPES_SIDE)).convert("RGB")
    image = Image.blend(image, Image.new("RGB", image.size, "white"), 0.6)
    draw = ImageDraw.Draw(image)
    cell = SHAPES_SIDE / 3
    for i, colour in enumerate(COLOURS):
        x, y = (i % 3 + 0.5) * cell, (i // 3 + 0.5) * cell
        draw_shape(draw, i % 5, x, y, (0.26 + 0.02 * i) * cell, colour)
        draw.text((x, y), str(i + 1), fill="white", font=ImageFont.load_default(40), anchor="mm")
    return image


def clip() -> list[Image.Image]:
    """A shape that circles a digit counting the frames."""
    frames = []
    for t in range(CLIP_FRAMES):
        frame = Image.new("RGB", (CLIP_SIDE, CLIP_SIDE), "lightsteelblue")
        draw = ImageDraw.Draw(frame)
        angle = 2 * math.pi * t / CLIP_FRAMES
        x, y = (CLIP_SIDE * (0.5 + 0.32 * f(angle)) for f in (math.cos, math.sin))
        draw_shape(draw, t // 4 % 5, x, y, 32, COLOURS[t // 4])
        draw.text(
            (CLIP_SIDE / 2, CLIP_SIDE / 2),
            str(t),
            fill="black",
            font=ImageFont.load_default(60),
            anchor="mm",
        )
        frames.append(frame)
    return frames


def write_mp4(path: Path, frames: list[Image.Image], fps: int) -> None:
    """Encode as H.264, yuv420p."""
    import av

    # Anything but bit-exact mode stamps library versions and the time of day into the file.
    with av.open(str(path), "w", options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream("libx264", rate=fps, options={"crf": "20", "threads": "1"})
        stream.width, stream.height = frames[0].size
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_image(frame)))
        container.mux(stream.encode())


def main() -> None:
    here = Path(__file__).parent
    shapes().save(here / "shapes.png", optimize=True)
    write_mp4(here / "clip.mp4", clip(), CLIP_FPS)


if __name__ == "__main__":
    main()
