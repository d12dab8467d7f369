"""How many requests run at once in a small KV pool, and what that is worth.

``python -m benchmarks.capacity`` gives a server a pool that holds about three full requests and
sends it a burst of requests, each with a picture of its own: first under ``--kv-policy none``,
then under VL-Cache, in every round. How many ran at once is read from the log line that the server writes every decode
step. The second workload shows where nothing is gained: prompts too short to be compacted.
"""

from __future__ import annotations

import re
import sys
import time
from argparse import RawDescriptionHelpFormatter
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from benchmarks import common
from benchmarks.common import Row
from sglang_vlkv.commands import values
from sglang_vlkv.commands.door import Parser, command
from tests.serving import CHECKPOINT, Server

BUDGET = 0.1
NONE, VLCACHE = "none", f"vlcache {BUDGET}"
ROWS = {
    NONE: Row(("--kv-policy", "none")),
    VLCACHE: Row(("--kv-policy", "vlcache", "--kv-budget", str(BUDGET))),
}
QUESTION = "What stands to the left of the largest object, and which colour does it have?"
LAYERS = 4  # of examples/tinyvlm
# A request's pictures and the visual tokens of each.
WORKLOADS = {"1K prompts": (4, 256), "short prompts": (1, 64)}
TEXT_TOKENS = len(QUESTION) + 40  # one per byte, and the chat template's
FULL_REQUESTS = 3.3


class Burst(NamedTuple):
    """One burst of concurrent requests.

    Attributes:
        seconds: from the first request to the last answer.
        latencies: seconds, per request.
        running: requests per decode step.
        meta: ``meta_info`` per request.
    """

    seconds: float
    latencies: list[float]
    running: list[int]
    meta: list[dict]


def send(server: Server, bodies: list[dict]) -> Burst:
    """Sends all ``bodies`` at once to a server whose radix cache is empty."""
    server.flush()
    seen = len(server.log())

    def one(body: dict) -> tuple[float, dict]:
        start = time.perf_counter()
        response = server.post("/generate", body, timeout=1800)
        response.raise_for_status()
        return time.perf_counter() - start, response.json()["meta_info"]

    start = time.perf_counter()
    with ThreadPoolExecutor(len(bodies)) as pool:
        answers = list(pool.map(one, bodies))
    seconds = time.perf_counter() - start
    server.flush()  # waits until idle: the log is complete
    running = re.findall(r"Decode batch.*?#running-req: (\d+)", server.log()[seen:])
    if not running:
        raise RuntimeError(f"the server logged no decode step; see {server.log_path}")
    latencies, meta = zip(*answers)
    return Burst(seconds, list(latencies), [int(count) for count in running], list(meta))


def summary(bursts: list[Burst], pool: int) -> dict:
    meta = [m for burst in bursts for m in burst.meta]
    tokens = [sum(m["completion_tokens"] for m in burst.meta) for burst in bursts]
    full = max(m["prompt_tokens"] + m["completion_tokens"] for m in meta)
    return common.measured(meta[0], LAYERS) | {
        "full_requests_in_pool": pool / full,
        "peak_running": max(max(burst.running) for burst in bursts),
        "running": common.percentiles([count for burst in bursts for count in burst.running]),
        "seconds": common.percentiles([burst.seconds for burst in bursts]),
        "tokens_per_s": common.percentiles(
            [count / burst.seconds for count, burst in zip(tokens, bursts, strict=True)]
        ),
        "latency_s": common.percentiles([latency for burst in bursts for latency in burst.latencies]),
        "retractions": sum(m.get("num_retractions", 0) for m in meta),
    }


def bursts(server: Server, workloads: dict, clients: int, max_new_tokens: int, seed: int) -> dict[str, Burst]:
    """One burst per workload, of pictures that the server has not seen."""
    common.stream(server, common.body(QUESTION, [common.picture(256, seed=10**6)], 16))  # warm
    sent = {}
    for name, prompt in workloads.items():
        seeds = range(1000 * seed, 1000 * seed + clients)
        bodies = [common.body(QUESTION, common.pictures(*prompt, seed=s), max_new_tokens) for s in seeds]
        burst = sent[name] = send(server, bodies)
        common.note(f"  {name}: {clients} in {burst.seconds:.1f} s, at most {max(burst.running)} at once")
    return sent


def table(results: dict) -> str:
    lines = []
    for workload, rows in results.items():
        base = rows[NONE]["tokens_per_s"]["p50"]
        for name, row in rows.items():
            kept = row["kept_tokens"]
            lines.append(
                [f"{workload}, {name}", str(row["prompt_tokens"])]
                + ["all" if kept in (None, row["prompt_tokens"]) else f"{kept:.0f}"]
                + [f"{(row['freed_bytes'] or 0) / 2**20:.2f}", f"{row['full_requests_in_pool']:.1f}"]
                + [str(row["peak_running"]), f"{row['running']['p50']:.0f}", str(row["retractions"])]
                + [f"{row['seconds'][p]:.1f}" for p in ("p20", "p50", "p80")]
                + [f"{row['latency_s']['p50']:.1f}", f"{row['tokens_per_s']['p50']:.0f}"]
                + [f"{row['tokens_per_s']['p50'] / base:.2f}x"]
            )
    header = ["workload", "prompt tokens", "kept per layer", "freed MiB each", "full requests in pool"]
    header += ["peak running", "running p50", "retractions", "total s p20", "p50", "p80"]
    return common.table(header + ["latency s p50", "tokens/s p50", "vs none"], lines)


def run(workloads: dict, clients: int, max_new_tokens: int, rounds: int) -> dict:
    pool = round(FULL_REQUESTS * (1024 + TEXT_TOKENS + max_new_tokens))
    flags = ["--max-total-tokens", str(pool), "--decode-log-interval", "1", "--max-running-requests", "64"]
    record = common.context(ROWS, *flags)
    record |= {"clients": clients, "max_new_tokens": max_new_tokens, "rounds": rounds}
    sent = {workload: {name: [] for name in ROWS} for workload in workloads}
    for seed in range(rounds):
        for name, row in ROWS.items():
            common.note(f"round {seed + 1} of {rounds}: {name}")
            with common.serve(row, *flags, model=CHECKPOINT, gib=5) as server:
                record["rows"][name]["policy"] = common.policy_of(server)
                for workload, burst in bursts(server, workloads, clients, max_new_tokens, seed).items():
                    sent[workload][name].append(burst)
    record["results"] = {
        workload: {name: summary(rounds_of, pool) for name, rounds_of in rows.items()}
        for workload, rows in sent.items()
    }
    return record


@command
def main(arguments: list[str] | None = None) -> None:
    layout = RawDescriptionHelpFormatter
    parser = Parser("python -m benchmarks.capacity", description=__doc__, formatter_class=layout)
    parser.add_argument("--quick", action="store_true", help="few requests, short answers: a smoke test")
    parser.add_argument("--clients", type=values.whole(), default=24)
    parser.add_argument("--max-new-tokens", type=values.whole(2), default=128)
    parser.add_argument("--rounds", type=values.whole(), default=3, help="bursts per row and workload")
    args = parser.parse_args(arguments)
    if args.quick:
        record = run(WORKLOADS, clients=12, max_new_tokens=48, rounds=1)
    else:
        record = run(WORKLOADS, args.clients, args.max_new_tokens, args.rounds)
    path = common.save("capacity_quick" if args.quick else "capacity", record)
    print(f"\n{table(record['results'])}\n\n{path}")


if __name__ == "__main__":
    sys.exit(main())
