"""Whole servers, stock against ours: a burst of image prompts in a small and in an ample KV pool."""

from __future__ import annotations

import json
import re
import signal
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from benchmarks.gpu.record import Part, importable
from benchmarks.gpu.shapes import ALPHA, QWEN, TOY_QWEN, Model
from benchmarks.gpu.subjects import ATTENTION, COMPRESSION, EXTEND, STORM
from benchmarks.gpu.timing import Clock, Timing

WITHOUT_SGLANG = (
    "SGLang is not importable; it needs torch 2.14.1 and sglang-kernel 0.4.10, which "
    "`python -m benchmarks.gpu.wheelhouse sglang` bundles"
)
STOCK, OURS = "stock", f"ours, vlcache {ALPHA}"
QUESTION = "What stands to the left of the largest object, and which colour does it have?"
SECONDS_PER_SERVER = 150  # to start one, with its CUDA graphs, and to serve the burst twice
REQUESTS, PICTURES, VISUAL_TOKENS, OUTPUTS = 24, 16, 1024, 128
PROMPT_TOKENS = PICTURES * VISUAL_TOKENS
# Tokens of KV: about three prompts, more than all of them, and what SGLang picks by itself.
POOLS = {
    "memory-bound pool": 3 * (PROMPT_TOKENS + 1024),
    "ample pool": (REQUESTS + 2) * (PROMPT_TOKENS + 1024),
    "default pool": None,
}
# In the order of their worth; a call of ten minutes has time for about three.
SERVERS = [
    ("memory-bound pool", STOCK), ("memory-bound pool", OURS), ("default pool", STOCK),
    ("ample pool", STOCK), ("ample pool", OURS), ("default pool", OURS),
]  # fmt: skip


class Burst(NamedTuple):
    """``answers`` are :class:`benchmarks.common.Streamed`; ``running`` is from the server's log."""

    seconds: float
    answers: list
    running: list[int]


def checkpoint(folder: Path, model: Model) -> None:
    """Configuration, tokenizer and processors of a Qwen2.5-VL of ``model``'s sizes; no weights.

    The tokenizer is bytes and the vision tower tiny, so the time to the first token is the language
    model's. The vocabulary is the tokenizer's: the output head is smaller than the real one.
    """
    from sglang_vlkv.tinyvlm.build import build

    build(
        folder,
        num_layers=model.layers,
        num_heads=model.q_heads,
        num_kv_heads=model.kv_heads,
        head_dim=model.head_dim,
        hidden_size=model.hidden,
        intermediate_size=model.intermediate,
        max_position_embeddings=131072,
        write_weights=False,
    )


def run(part: Part, clock: Clock) -> None:
    if not importable("sglang.launch_server"):
        part.skip("serving", WITHOUT_SGLANG)
        return
    with tempfile.TemporaryDirectory(prefix="gpu-serving-") as folder:
        model = TOY_QWEN if clock.rehearsal else QWEN
        checkpoint(Path(folder), model._replace(hidden=model.q_heads * model.head_dim))
        if clock.rehearsal:
            part.skip("serving", "no servers are started in a rehearsal")
            return
        part.notes.append(
            f"{REQUESTS} requests at once, {PICTURES} different pictures of {VISUAL_TOKENS} visual tokens each, "
            f"{OUTPUTS} output tokens, dummy weights; the flags and variables that a row names and no others, so radix "
            "cache, overlap scheduling, CUDA graphs and compilation are as SGLang has them; "
            "byte tokenizer and tiny vision tower, so TTFT is the language model's"
        )
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the server is stopped
        for pool_name, row in SERVERS:
            what = f"{pool_name}, {row}"
            if part.has(SECONDS_PER_SERVER, what):
                part.attempt(what, _serve, Path(folder), pool_name, POOLS[pool_name], row)


def _serve(part: Part, folder: Path, pool_name: str, tokens: int | None, name: str) -> None:
    """One server: started, warmed, and given the burst twice."""
    from benchmarks import common
    from benchmarks.gpu.server import UsersServer, recorded

    policy = ("--kv-policy", "vlcache", "--kv-budget", str(ALPHA)) if name == OURS else ()
    environment = {} if name == OURS else {"SGLANG_PLUGINS": "none"}  # nothing of ours is loaded
    pool = () if tokens is None else ("--max-total-tokens", str(tokens))
    flags = ("--load-format", "dummy", *pool, *policy)
    timeout = max(part.deadline.left(), 1.0)
    with UsersServer(folder, *flags, env=environment, start_timeout=timeout) as server:
        bodies = [common.body(QUESTION, different_pictures(request), OUTPUTS) for request in range(REQUESTS)]
        common.stream(server, common.body(QUESTION, common.pictures(1, 256, 10**6), 8))
        bursts = []
        for _ in range(2):
            bursts.append(_burst(server, bodies))
        what = common.policy_of(server)
        extra = {"pool_tokens": tokens, "flags": server.flags, "environment": recorded(server.env)}
    subject = f"{pool_name}, {name}"
    rests_on = (ATTENTION, EXTEND, *COMPRESSION, STORM) if name == OURS else ()
    check_server(part, subject, name, bursts)
    with part.about(*rests_on, subject):
        summarise(part, pool_name, name, bursts, extra | {"policy": json.dumps(what)})


def check_server(part: Part, subject: str, name: str, bursts: list[Burst]) -> None:
    """That every answer was served as its row says, and is as long as was asked for."""
    answers = [answer.meta for burst in bursts for answer in burst.answers]
    served = {meta["kv_policy"]["policy"] if "kv_policy" in meta else STOCK for meta in answers}
    wanted = {"vlcache" if name == OURS else STOCK}
    part.check(f"{subject}: its policy served", served == wanted, about=(subject,), served=sorted(served))
    lengths = {meta["completion_tokens"] for meta in answers}
    part.check(f"{subject}: answers are whole", lengths == {OUTPUTS}, about=(subject,), lengths=sorted(lengths))


def different_pictures(request: int) -> list:
    """No two alike, in a request or between requests: each is encoded."""
    from benchmarks import common

    return [common.picture(VISUAL_TOKENS, request * PICTURES + number) for number in range(PICTURES)]


def _burst(server, bodies: list[dict]) -> Burst:
    from benchmarks import common

    server.flush()
    seen = len(server.log())
    start = time.perf_counter()
    with ThreadPoolExecutor(len(bodies)) as threads:
        answers = list(threads.map(lambda body: common.stream(server, body), bodies))
    seconds = time.perf_counter() - start
    return Burst(seconds, answers, running_in(server.log()[seen:]))


def running_in(log: str) -> list[int]:
    """Requests that ran at each decode step that the server logged."""
    return [int(count) for count in re.findall(r"Decode batch.*?#running-req: (\d+)", log)]


def summarise(part: Part, case: str, row: str, bursts: list[Burst], about: dict) -> None:
    """Time to serve the burst, to the first token and per token, and how many ran at once."""
    tokens = [sum(answer.meta["completion_tokens"] for answer in burst.answers) for burst in bursts]
    extra = about | {
        "output_tokens_per_s": [count / burst.seconds for count, burst in zip(tokens, bursts, strict=True)],
        "peak_running": max((max(burst.running, default=0) for burst in bursts), default=0),
    }

    def add(what: str, first: list[float], second: list[float] = (), **more) -> None:
        against = {} if row == STOCK else {"versus": f"{STOCK}: {what}"}
        part.add(case, f"{row}: {what}", Timing.of(first, second), **against, **more)

    add(f"burst of {len(bursts[0].answers)}", [b.seconds for b in bursts[:1]], [b.seconds for b in bursts[1:]], **extra)
    add("time to first token", *([answer.ttft for answer in burst.answers] for burst in bursts))
    add("time per output token", *([step for answer in burst.answers for step in answer.steps] for burst in bursts))
    part.notes.append(
        f"{case}, {row}: at most {extra['peak_running']} ran at once, "
        + " and ".join(f"{rate:.0f}" for rate in extra["output_tokens_per_s"])
        + " output tokens/s"
    )
