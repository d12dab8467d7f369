"""Draw ``digits.mp4`` next to this file: two seconds, two pictures that share no colour.

SGLang looks at two frames per second. It takes every video for one of 24 (README, Limits), so both
pictures get the same place in time, and only colours tell them apart.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from sglang_vlkv.commands import Problem
from sglang_vlkv.commands.door import Parser, command
from sglang_vlkv.tinyvlm import tasks

CLIP = Path(__file__).parent / "digits.mp4"
ROWS, COLUMNS = 8, 16  # visual tokens
NUM_COLOURS = 5  # of each picture
FPS = 8


def scenes() -> list[tasks.Scene]:
    """What the first second shows, and what the other one does."""
    rng = np.random.default_rng(6)
    first, other = (tasks.compose(rng, ROWS, COLUMNS, NUM_COLOURS, decoys=0) for _ in range(2))
    while set(first.cells[0]) & set(other.cells[0]):
        other = tasks.compose(rng, ROWS, COLUMNS, NUM_COLOURS, decoys=0)
    return [first, other]


def digits(scene: tasks.Scene) -> dict[str, int]:
    """The coloured digits of ``scene``."""
    return {tasks.NAMES[colour]: digit for colour, digit in scene.digits[0].items()}


@command
def main(arguments: list[str] | None = None) -> None:
    Parser("python -m examples.video_chat.make_clip", description=__doc__).parse_args(arguments)
    try:
        import torch
        from torchcodec.encoders import VideoEncoder
    except (ImportError, RuntimeError, OSError) as error:
        raise Problem("The clip needs torchcodec, and the libraries of FFmpeg.") from error

    pictures = [tasks.paint(scene.grids[0]) for scene in scenes()]
    frames = np.stack([np.asarray(picture) for picture in pictures for _ in range(FPS)])
    encoder = VideoEncoder(torch.from_numpy(frames).permute(0, 3, 1, 2).contiguous(), frame_rate=FPS)
    encoder.to_file(CLIP, codec="libx264", pixel_format="yuv420p", crf=10)
    for second, scene in enumerate(scenes()):
        print(f"second {second}: {digits(scene)}")


if __name__ == "__main__":
    sys.exit(main())
