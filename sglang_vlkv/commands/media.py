"""Pictures and videos: as a message sends them, and as the server sees them."""

from __future__ import annotations

import base64
import io
import mimetypes
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

from sglang_vlkv.commands import Problem

ORIENTATION = 0x0112  # EXIF tag


class Medium(NamedTuple):
    """A file of the question.

    Attributes:
        kind: "image" or "video".
        path: where it is.
        url: the data URL that is sent: the bytes of the file.
        picture: what SGLang makes of an image, RGB; None for a video.
        notes: what a person who looks at the file sees otherwise, a sentence each.
    """

    kind: str
    path: Path
    url: str
    picture: Image.Image | None = None
    notes: tuple[str, ...] = ()

    @property
    def part(self) -> dict:
        """Its part of an OpenAI message."""
        return {"type": f"{self.kind}_url", f"{self.kind}_url": {"url": self.url}}

    def frames(self, count: int) -> list[Image.Image]:
        """The picture behind each of ``count`` temporal groups.

        SGLang takes frames evenly from a whole video and merges them in pairs; a pair's first is
        shown. Empty where nothing here decodes video.
        """
        if self.picture is not None:
            return [self.picture] * count
        decoder = _decoder(self.path)
        if decoder is None:
            return []
        numbers = np.linspace(0, len(decoder) - 1, num=2 * count, dtype=np.int64)[::2]
        frames = decoder.get_frames_at(numbers.tolist()).data.permute(0, 2, 3, 1).numpy()
        return [Image.fromarray(frame) for frame in frames]


def image(path: Path) -> Medium:
    """
    Raises:
        Problem: the file is missing or holds no whole picture.
    """
    data = _read(path)
    try:
        opened = Image.open(io.BytesIO(data))
        kind, picture = Image.MIME.get(opened.format, "image/png"), opened.convert("RGB")
    except UnidentifiedImageError as error:
        raise Problem(f"{path} cannot be read as a picture: it is of no known kind.") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise Problem(f"{path} cannot be read as a picture: {str(error).rstrip('.')}.") from error
    return Medium("image", path, data_url(data, kind), picture, tuple(_notes(path, opened)))


def _notes(path: Path, opened: Image.Image) -> list[str]:
    """SGLang opens pictures with Pillow and converts them to RGB, and does nothing else."""
    notes = []
    if opened.getexif().get(ORIENTATION, 1) != 1:
        notes.append("says that viewers should turn it, and the server does not: it sees the file as it lies")
    if (count := getattr(opened, "n_frames", 1)) > 1:
        notes.append(f"holds {count} pictures, of which the server sees the first")
    if opened.mode in ("I", "F") or opened.mode.startswith("I;16"):
        notes.append("has more than 8 bits for a shade, and to the server all above 255 is white")
    if opened.has_transparency_data and opened.convert("RGBA").getchannel("A").getextrema()[0] < 255:
        notes.append("is transparent in part, and the server sees the colours that lie there unseen")
    return [f"{path.name} {note}." for note in notes]


def video(path: Path) -> Medium:
    """
    Raises:
        Problem: the file is missing or holds no video.
    """
    kind = mimetypes.guess_type(path.name, strict=False)[0] or "video/mp4"
    data = _read(path)
    _decoder(path)
    return Medium("video", path, data_url(data, kind))


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise Problem(f"{path} cannot be read: {error.strerror}.") from error


def _decoder(path: Path):
    """A torchcodec decoder, as SGLang's; None where that or FFmpeg's libraries are missing."""
    try:
        from torchcodec.decoders import VideoDecoder
    except (ImportError, RuntimeError, OSError):
        return None
    try:
        return VideoDecoder(str(path))
    except (RuntimeError, ValueError) as error:
        words = str(error).splitlines()[0].rstrip(".")
        raise Problem(f"{path} cannot be read as a video: {words}.") from error


def data_url(data: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
