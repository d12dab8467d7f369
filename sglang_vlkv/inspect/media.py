"""Pictures and videos: as a message sends them, and to draw on."""

from __future__ import annotations

import base64
import io
import mimetypes
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from sglang_vlkv.inspect import Problem

ORIENTATION = 0x0112  # EXIF tag


class Medium(NamedTuple):
    """A file of the question.

    Attributes:
        kind: "image" or "video".
        path: where it is.
        url: the data URL that is sent.
        picture: what an image shows, upright RGB; None for a video.
    """

    kind: str
    path: Path
    url: str
    picture: Image.Image | None = None

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
        Problem: the file is missing or holds no picture.
    """
    data = _read(path)
    try:
        opened = Image.open(io.BytesIO(data))
        kind, turned = Image.MIME.get(opened.format), opened.getexif().get(ORIENTATION, 1) != 1
        picture = ImageOps.exif_transpose(opened).convert("RGB")
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise Problem(f"{path} cannot be read as a picture: {error}.") from error
    if turned or not kind:  # sent as it is drawn, whatever the server makes of the tag
        data, kind = _png(picture), "image/png"
    return Medium("image", path, _data_url(data, kind), picture)


def video(path: Path) -> Medium:
    """
    Raises:
        Problem: the file is missing or holds no video.
    """
    kind = mimetypes.guess_type(path.name, strict=False)[0] or "video/mp4"
    data = _read(path)
    _decoder(path)
    return Medium("video", path, _data_url(data, kind))


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
        raise Problem(f"{path} cannot be read as a video: {str(error).splitlines()[0]}.") from error


def _png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return buffer.getvalue()


def _data_url(data: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
