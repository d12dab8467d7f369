"""What the benchmarks share: servers, streamed requests, records and tables."""

from __future__ import annotations

import json
import math
import os
import platform
import signal
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
import psutil
import requests
from PIL import Image

from sglang_vlkv.commands import Problem
from tests.serving import LEAK_CHECKS, ROOT, Server

RESULTS = ROOT / "benchmarks" / "results"
TOKEN_PIXELS = 28  # one visual token covers 28x28 pixels

CORES = len(os.sched_getaffinity(0))

# For all servers alike. libgomp's threads spin at a barrier by default: when anything else wants a
# core, a region of microseconds then takes milliseconds. The leak checks walk the whole pool.
ENVIRONMENT = {
    "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(CORES)),
    "OMP_WAIT_POLICY": "PASSIVE",
} | dict.fromkeys(LEAK_CHECKS, "0")


class Row(NamedTuple):
    """One way to serve, a row of the table.

    Attributes:
        flags: added to the server's command line.
        env: added to its environment.
    """

    flags: tuple[str, ...] = ()
    env: dict[str, str] = {}


class Streamed(NamedTuple):
    """One streamed answer.

    Attributes:
        ttft: seconds from the request to the first token.
        steps: seconds between consecutive tokens; tokens that arrive together share their time.
        meta: the last chunk's ``meta_info``.
        text: all of it.
    """

    ttft: float
    steps: list[float]
    meta: dict
    text: str


def serve(row: Row, *flags: str, model: Path | str, gib: float) -> Server:
    """The row's server, for a ``with`` statement; one at a time, so that it has the machine.

    Args:
        gib: memory that it will need at its peak.

    Raises:
        Problem: less is available; without swap a machine stalls for minutes before it kills.
    """
    available = psutil.virtual_memory().available / 2**30
    if available < gib:
        raise Problem(f"{available:.1f} GiB of memory are available; this benchmark needs {gib:.0f}.")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the server is stopped
    # What is free when SGLang measures it is not what this needs; --max-total-tokens sizes the pool.
    shared = (*flags, "--mem-fraction-static", "0.9")
    return Server(*shared, *row.flags, model=model, env=ENVIRONMENT | row.env)


def in_own_process(function: Callable, *arguments):
    """``function(*arguments)`` in a new process with the servers' environment.

    libgomp reads it when torch is imported, which here was before this could run.
    """
    os.environ.update(ENVIRONMENT)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        return process.submit(function, *arguments).result()


def body(text: str, images: list[Image.Image], max_new_tokens: int) -> dict:
    """The JSON of ``/generate``, without the logprobs that tests ask for."""
    full = Server.body(text, images, max_new_tokens=max_new_tokens)
    return {key: value for key, value in full.items() if "logprob" not in key}


def stream(server: Server, request: dict, timeout: float = 1800) -> Streamed:
    """Sends ``request`` and notes when every token arrives."""
    arrivals: list[tuple[float, int]] = []
    start = time.perf_counter()
    with requests.post(
        f"{server.url}/generate", json=request | {"stream": True}, stream=True, timeout=timeout
    ) as response:
        response.raise_for_status()
        for line in response.iter_lines():
            if not line.startswith(b"data:") or line.endswith(b"[DONE]"):
                continue
            now, chunk = time.perf_counter(), json.loads(line[5:])
            if "error" in chunk:
                raise RuntimeError(chunk["error"])
            arrivals.append((now, chunk["meta_info"]["completion_tokens"]))
    steps = []
    for (before, first), (after, last) in zip(arrivals, arrivals[1:]):
        if last > first:
            steps += [(after - before) / (last - first)] * (last - first)
    return Streamed(arrivals[0][0] - start, steps, chunk["meta_info"], chunk["text"])


def picture(visual_tokens: int, seed: int) -> Image.Image:
    """A square picture of exactly ``visual_tokens``, a square number; seeds give different ones."""
    side = math.isqrt(visual_tokens)
    if side * side != visual_tokens:
        raise ValueError(f"visual_tokens is {visual_tokens}; it must be a square number")
    blocks = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    return Image.fromarray(blocks).resize((side * TOKEN_PIXELS,) * 2, Image.Resampling.NEAREST)


def pictures(count: int, visual_tokens: int, seed: int) -> list[Image.Image]:
    """The same picture ``count`` times.

    SGLang encodes it once. Different ones go through the vision tower in one pass whose dense mask
    is quadratic in all their patches: gigabytes and minutes on a CPU at 16K visual tokens.
    """
    return [picture(visual_tokens, seed)] * count


def percentiles(values: list[float]) -> dict[str, float]:
    p20, p50, p80 = np.percentile(values, [20, 50, 80])
    return {"p20": float(p20), "p50": float(p50), "p80": float(p80), "samples": len(values)}


def measured(meta: dict, layers: int) -> dict:
    """What a request kept and freed, as its report says; None where stock SGLang has no report."""
    report = meta.get("kv_policy")
    if report is None:
        return {"prompt_tokens": meta["prompt_tokens"], "kept_tokens": None, "freed_bytes": None}
    compacted = "kept_per_layer" in report
    return {
        "prompt_tokens": report["prompt_tokens"],
        "kept_tokens": sum(report["kept_per_layer"]) / layers if compacted else report["prompt_tokens"],
        "freed_bytes": report["full_bytes"] - report["kept_bytes"] if compacted else 0,
        "report": report,
    }


def policy_of(server: Server) -> dict | str:
    """What the server says it runs; stock SGLang says nothing."""
    info = server.info()
    for part in (info, *info.get("internal_states", ())):
        if "kv_policy" in part and isinstance(part["kv_policy"], dict):
            return part["kv_policy"]
    return "sglang_vlkv's general plugin is not loaded"


def context(rows: dict[str, Row], *flags: str) -> dict:
    """Everything a number needs beside it; the rows' policies are added as their servers start."""
    return {
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "commit": _git("rev-parse", "HEAD") + ("-dirty" if _git("status", "--porcelain") else ""),
        "versions": {name: version(name) for name in ("sglang", "torch", "sglang_vlkv")},
        "python": platform.python_version(),
        "cpu": _cpu_model(),
        "cores": CORES,
        "load_average_at_start": os.getloadavg()[0],
        "environment": ENVIRONMENT,
        "flags": list(flags),
        "rows": {name: {"flags": row.flags, "env": row.env} for name, row in rows.items()},
    }


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def _git(*arguments: str) -> str:
    return subprocess.run(
        ["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.strip()


def save(name: str, record: dict) -> Path:
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(record, indent=2) + "\n")
    return path


def table(header: list[str], lines: list[list[str]]) -> str:
    """A Markdown table, numbers to the right; the first column is text."""
    rule = [":---"] + ["---:"] * (len(header) - 1)
    return "\n".join("| " + " | ".join(line) + " |" for line in [header, rule, *lines])


def note(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)
