"""What the plugin costs those who need none of it: short text prompts, which no policy touches.

``python -m benchmarks.overhead`` keeps four servers up at once, stock SGLang twice among them, and sends
each the same requests in turn, in another order every round, so that what the machine does meanwhile
falls on all alike. The second stock server shows what two equal servers differ by.

On a CPU a policy also brings our decode attention, which is faster than stock's. The model of one layer
has next to no attention: what is left there is the scheduler, the tokenizer process and our hooks in both.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import tempfile
import time
from argparse import RawDescriptionHelpFormatter
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import aiohttp
import numpy as np

from benchmarks import common
from benchmarks.common import Row
from sglang_vlkv.commands import values
from sglang_vlkv.commands.door import Parser, command
from sglang_vlkv.tinyvlm import build
from tests.serving import SMALL_SERVER, Server

STOCK, AGAIN, NONE, VLCACHE = "stock", "stock again", "none", "vlcache"
_STOCK = Row(env={"SGLANG_PLUGINS": "vlkv_cpu"} | SMALL_SERVER)
ROWS = {
    STOCK: _STOCK,
    AGAIN: _STOCK,
    NONE: Row(("--kv-policy", "none"), SMALL_SERVER),
    VLCACHE: Row(("--kv-policy", "vlcache"), SMALL_SERVER),
}
GOAL = 0.98
LAYERS = (1, 4)
PROMPT_TOKENS = range(16, 65)
POOL = 32_768


class Workload(NamedTuple):
    """``requests`` requests, ``at_once`` of them at a time, of ``max_new_tokens`` output tokens each."""

    requests: int
    at_once: int
    max_new_tokens: int


WORKLOADS = {"one at a time": Workload(16, 1, 32), "32 at once": Workload(128, 32, 32)}


class Timed(NamedTuple):
    """One streamed answer, in seconds: to its first token, per further token, and altogether."""

    ttft: float
    step: float
    total: float


def prompts(count: int, seed: int) -> list[str]:
    """Lower-case letters, one token each, so that no two prompts share a prefix of any length."""
    rng = random.Random(seed)
    return ["".join(rng.choices("bcdfghjklmnpqrstvwxz", k=rng.choice(PROMPT_TOKENS))) for _ in range(count)]


async def _ask(session: aiohttp.ClientSession, url: str, text: str, max_new_tokens: int) -> Timed:
    params = {"temperature": 0.0, "max_new_tokens": max_new_tokens, "ignore_eos": True}
    body = {"text": text, "sampling_params": params, "stream": True}
    arrivals, last, start = [], b"", time.perf_counter()
    async with session.post(f"{url}/generate", json=body) as response:
        response.raise_for_status()
        async for line in response.content:
            if line.startswith(b"data: {"):
                arrivals.append(time.perf_counter())
                last = line
    meta = json.loads(last[6:])["meta_info"]
    if meta["completion_tokens"] != max_new_tokens:
        raise RuntimeError(f"asked for {max_new_tokens} tokens and got {meta}")
    step = (arrivals[-1] - arrivals[0]) / (max_new_tokens - 1)
    return Timed(arrivals[0] - start, step, arrivals[-1] - start)


async def _send(url: str, texts: list[str], workload: Workload) -> tuple[float, list[Timed]]:
    limit = asyncio.Semaphore(workload.at_once)

    async def one(session: aiohttp.ClientSession, text: str) -> Timed:
        async with limit:
            return await _ask(session, url, text, workload.max_new_tokens)

    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector) as session:
        start = time.perf_counter()
        answers = await asyncio.gather(*(one(session, text) for text in texts))
        return time.perf_counter() - start, list(answers)


def measure(server: Server, workload: Workload, seed: int) -> dict[str, float]:
    """Of one burst; more is better."""
    seconds, answers = asyncio.run(_send(server.url, prompts(workload.requests, seed), workload))
    ttft, step, total = (np.array(values) for values in zip(*answers))
    return {
        "requests/s": workload.requests / seconds,
        "1 / TTFT p50": 1 / np.median(ttft),
        "1 / step p50": 1 / np.median(step),
        "1 / latency p50": 1 / np.median(total),
        "1 / latency p99": 1 / np.percentile(total, 99),
    }


def ratio(rows: list[float], base: list[float]) -> dict[str, float]:
    """Geometric mean over the rounds, with a 95% interval by resampling them."""
    logs = np.log(np.array(rows) / np.array(base))
    draws = np.random.default_rng(0).choice(logs, (10_000, len(logs))).mean(1)
    low, high = np.percentile(draws, [2.5, 97.5])
    return {"ratio": float(np.exp(logs.mean())), "low": float(np.exp(low)), "high": float(np.exp(high))}


def summary(measured: dict[str, list[dict]]) -> dict:
    """Per row and measure: the median over the rounds, and the ratio to stock."""
    return {
        row: {
            name: {"p50": float(np.median([one[name] for one in rounds]))}
            | ratio([one[name] for one in rounds], [one[name] for one in measured[STOCK]])
            for name in rounds[0]
        }
        for row, rounds in measured.items()
    }


def run(rounds: int, workloads: dict[str, Workload]) -> dict:
    flags = ["--max-total-tokens", str(POOL), "--decode-log-interval", "1000"]
    record = common.context(ROWS, *flags)
    record |= {"rounds": rounds, "workloads": {k: w._asdict() for k, w in workloads.items()}, "results": {}}
    for layers in LAYERS:
        with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
            build.build(Path(folder), num_layers=layers)
            servers = {}
            for name, row in ROWS.items():
                common.note(f"{layers} layers: {name}")
                server = stack.enter_context(common.serve(row, *flags, model=folder, gib=4))
                servers[name] = server
                record["rows"][name]["policy"] = common.policy_of(server)
            record["results"][f"layers {layers}"] = _rounds(servers, rounds, workloads)
    return record


def _rounds(servers: dict[str, Server], rounds: int, workloads: dict[str, Workload]) -> dict:
    measured = {workload: {name: [] for name in servers} for workload in workloads}
    for seed in range(-1, rounds):  # the first round warms up
        order = list(servers)
        random.Random(seed).shuffle(order)
        for workload, shape in workloads.items():
            for name in order:
                values = measure(servers[name], shape, seed)
                if seed >= 0:
                    measured[workload][name].append(values)
        common.note(f"round {seed + 1} of {rounds}")
    return {workload: summary(rows) for workload, rows in measured.items()}


def table(results: dict) -> str:
    lines = []
    for model, by_workload in results.items():
        for workload, rows in by_workload.items():
            for row, values in rows.items():
                if row == STOCK:
                    continue
                found = [f"{v['ratio']:.3f} [{v['low']:.3f}, {v['high']:.3f}]" for v in values.values()]
                lines.append([f"{model}, {workload}, {row}", *found])
    return common.table(["against stock; more is better", *values], lines)


@command
def main(arguments: list[str] | None = None) -> None:
    layout = RawDescriptionHelpFormatter
    parser = Parser("python -m benchmarks.overhead", description=__doc__, formatter_class=layout)
    parser.add_argument("--quick", action="store_true", help="two rounds of few requests: a smoke test")
    parser.add_argument("--rounds", type=values.whole(), default=10)
    args = parser.parse_args(arguments)
    workloads = WORKLOADS
    if args.quick:
        workloads = {name: w._replace(requests=w.requests // 4) for name, w in WORKLOADS.items()}
    record = run(2 if args.quick else args.rounds, workloads)
    path = common.save("overhead_quick" if args.quick else "overhead", record)
    print(f"\n{table(record['results'])}\n\nGoal: {GOAL} everywhere.\n{path}")


if __name__ == "__main__":
    sys.exit(main())
