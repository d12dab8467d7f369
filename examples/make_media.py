"""Draw the example media, ``digits.png`` and ``clip.mp4``, next to this file.

The result is the same on every run. The clip needs PyAV (``pip install av==16.1.0``), which
SGLang itself does not install on x86.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from sglang_vlkv.commands import Problem
from sglang_vlkv.commands.door import Parser, command
from sglang_vlkv.tinyvlm import tasks

CLIP_SIDE = 224  # pixels
CLIP_FRAMES = 16
CLIP_FPS = 4
COLOURS = ("crimson", "royalblue", "seagreen", "darkorange")


def draw_shape(draw: ImageDraw.ImageDraw, kind: int, x: float, y: float, r: float, colour: str) -> None:
    """A circle (``kind`` 0) or a regular polygon of ``kind + 2`` sides, of radius ``r`` pixels."""
    if kind == 0:
        draw.ellipse((x - r, y - r, x + r, y + r), fill=colour)
    else:
        draw.regular_polygon((x, y, r), kind + 2, rotation=15 * kind, fill=colour)


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


@command
def main(arguments: list[str] | None = None) -> None:
    Parser("python -m examples.make_media", description=__doc__).parse_args(arguments)
    here = Path(__file__).parent
    [picture] = tasks.draw("multi", seed=5).images
    picture.save(here / "digits.png", optimize=True)
    try:
        write_mp4(here / "clip.mp4", clip(), CLIP_FPS)
    except ImportError as error:
        raise Problem("The clip needs PyAV: pip install av==16.1.0") from error


if __name__ == "__main__":
    sys.exit(main())
