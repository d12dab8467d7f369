"""A message as one line for a log."""

from __future__ import annotations

import time

from sglang_vlkv.monitor.words import percent, size_of
from sglang_vlkv.observe.publisher import SCHEMA
from sglang_vlkv.printable import printable


def line(message: dict) -> str | None:
    """One message as one line for a log; None where there is nothing to say."""
    words = _LINES.get(message.get("kind"))
    if words is None or message.get("schema") != SCHEMA:
        return None
    at = time.strftime("%H:%M:%S", time.localtime(message["time"]))
    return f"{at} {printable(words(message))}"


def _compacted_line(m: dict) -> str:
    share, freed = percent(m["kept_bytes"] / m["full_bytes"]), size_of(m["full_bytes"] - m["kept_bytes"])
    shared = ", shared with another" if m["shared"] else ""
    return f"{m['rid']} {m['policy']} keeps {share} of {m['prompt_tokens']:,} tokens, {freed} freed{shared}"


def _released_line(m: dict) -> str:
    left = f", left alone: {m['reason']}" if m["reason"] else ""
    tokens = f"{m['prompt_tokens']:,} + {m['output_tokens']:,} tokens"
    return f"{m['rid']} {m['outcome']}, {tokens}, prefix {m['prefix']}{left}"


_LINES = {
    "compacted": _compacted_line,
    "released": _released_line,
    "twin_created": lambda m: f"{m['rid']} leaves twin {m['twin']}, {size_of(m['bytes'])}",
    "twin_hit": lambda m: (
        f"{m['rid']} goes on from twin {m['twin']}, {m['covered']:,} of {m['prompt_tokens']:,} tokens"
    ),
    "twin_evicted": lambda m: f"twin {m['twin']} made room, {size_of(m['bytes'])}",
    "flushed": lambda m: f"flushed, {m['twins']:,} twins are gone",
    "deferred": lambda m: f"{m['rid']} waits for room for kept rows",
    "no_room": lambda m: f"{m['rid']} put back, no room for its kept rows",
}
