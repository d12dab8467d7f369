"""What the monitor reads of a message, and whether it is there."""

from __future__ import annotations

from typing import get_type_hints

from sglang_vlkv.commands.shapes import fits, lacks
from sglang_vlkv.observe.publisher import KINDS, SCHEMA

LATEST = 10**11  # of times, unix seconds; a clock can show it
MOST_REPLICAS = 4096
_HEAD = {"kind": str, "seq": int, "time": float, "dp_rank": int, "dropped": int}
_READ = {
    "compacted": "rid policy prompt_tokens kept_per_layer sparsity_per_layer kept_bytes full_bytes shared",
    "pass": "seconds",
    "twin_created": "twin rid bytes",
    "twin_hit": "twin rid prefix covered prompt_tokens",
    "twin_evicted": "twin bytes",
    "flushed": "twins",
    "released": "rid policy reason outcome prefix prompt_tokens output_tokens",
    "deferred": "rid",
    "no_room": "rid",
    "pool": "size free evictable twins twins_read slot_bytes running waiting",
}
_SERVER = {
    "model": str, "policy": str, "budget": float, "options": dict, "replicas": int, "started": float,
    "twins": dict[str, int],
}  # fmt: skip
_POSITIVE = ("prompt_tokens", "full_bytes", "kept_per_layer")  # of what is compacted: they divide


def _fields() -> dict[str, dict]:
    hints = {name: get_type_hints(event) for event, name in KINDS.items()}
    return {kind: {name: hints[kind][name] for name in names.split()} for kind, names in _READ.items()}


FIELDS = _fields() | {"server": _SERVER}


def known(message: dict) -> dict:
    """``message``, or what stands for one that says it is of our schema and is not."""
    if message.get("schema") != SCHEMA or is_ours(message):
        return message
    return {"schema": f"{SCHEMA}, but not as it is documented"}


def is_ours(message: dict) -> bool:
    """Whether all is there that is read. Kinds that this version does not know may hold anything."""
    if lacks(message, _HEAD) is not None or lacks(message, FIELDS.get(message["kind"], {})) is not None:
        return False
    if not 0 <= message["time"] < LATEST:
        return False
    if message["kind"] == "compacted":
        return all(message[name] for name in _POSITIVE) and message["sparsity_per_layer"] != []
    if message["kind"] == "server":
        options = message["options"]
        listed = fits(options.get("twins"), str) and "allow_override" in options
        return listed and 0 < message["replicas"] <= MOST_REPLICAS
    return True
