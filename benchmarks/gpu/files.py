"""Files that are whole or not there. Imports nothing that is slow, or that needs a device."""

from __future__ import annotations

import json
from pathlib import Path


def write_json(path: Path, record: dict) -> None:
    """Replaces the file at once, so that a run that is cut off leaves the last whole one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(record, indent=1) + "\n")
    unfinished.replace(path)
