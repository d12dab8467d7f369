"""What each policy costs before the first token, and what its cache holds afterwards, on a CPU.

``python -m benchmarks.policies_cpu`` serves the attention of a 7B model in four narrow layers with
dummy weights (see ``decode_cpu``): once by stock SGLang, once with every policy chosen per request.
A prompt of its own per row and round, cold; rows take turns. TTFT holds the prefill, scoring,
selection, merging and compaction, and a draft where there is one. ``slots held`` counts tokens of
every layer after the last output token.
"""

from __future__ import annotations

import sys
import tempfile
from argparse import RawDescriptionHelpFormatter
from pathlib import Path

from benchmarks import common, narrow
from benchmarks.common import Row
from benchmarks.decode_cpu import QUESTION, ROWS, SHAPE, STOCK
from sglang_vlkv.commands import values
from sglang_vlkv.commands.door import Parser, command
from sglang_vlkv.policies import policies
from sglang_vlkv.tinyvlm.build import build
from tests.serving import Server

FULL = "none"
CHOICES: dict[str, dict] = {name: {"kv_policy": name} for name in policies() if name != "given"} | {
    "vlcache, bucket_mean": {"kv_policy": "vlcache", "kv_policy_config": {"merge": "bucket_mean"}},
    "vlcache, similar": {"kv_policy": "vlcache", "kv_policy_config": {"merge": "similar"}},
    "elastic, append": {"kv_policy": "elastic", "kv_policy_config": {"decode": "append"}},
    "elastic, window": {"kv_policy": "elastic", "kv_policy_config": {"importance": "window"}},
    "vlkv, draft 8": {"kv_policy": "vlkv", "kv_policy_config": {"draft_tokens": 8}},
    "vlkv, draft 16": {"kv_policy": "vlkv", "kv_policy_config": {"draft_tokens": 16}},
}
SERVERS = {
    STOCK: ROWS[STOCK],
    "ours": Row(("--kv-policy", "none", "--kv-policy-config", '{"allow_override": true}')),
}
PROMPTS = {"0.3K": (1, 256), "2K": (2, 1024)}  # pictures, visual tokens of each


def ask(server: Server, custom: dict, prompt: tuple[int, int], num_tokens: int, seed: int):
    request = common.body(QUESTION, common.pictures(*prompt, seed), num_tokens)
    if custom:
        request["sampling_params"]["custom_params"] = custom
    server.flush()
    return common.stream(server, request)


def summary(answers: list, num_tokens: int) -> dict:
    meta = answers[0].meta
    report = meta.get("kv_policy", {})
    held = meta["prompt_tokens"] + num_tokens - 1
    if report.get("last_bytes"):
        held = report["last_bytes"] * report["prompt_tokens"] // report["full_bytes"]
    return {
        "prompt_tokens": meta["prompt_tokens"],
        "slots_held": held,
        "ttft_s": common.percentiles([answer.ttft for answer in answers]),
        "ms_per_token": common.percentiles([1e3 * step for a in answers for step in a.steps]),
        "config": report.get("config"),
    }


def run(rounds: int, num_tokens: int) -> dict:
    longest = max(count * tokens for count, tokens in PROMPTS.values())
    pool = 2 * (longest + 1024)
    flags = ["--load-format", "dummy", "--max-total-tokens", str(pool)]
    flags += ["--chunked-prefill-size", "-1", "--max-prefill-tokens", str(pool)]
    record = common.context(SERVERS, *flags) | {"shape": SHAPE, "rounds": rounds, "num_tokens": num_tokens}
    results = record["results"] = {prompt: {} for prompt in PROMPTS}
    with tempfile.TemporaryDirectory(prefix="policies-cpu-") as checkpoint:
        build(Path(checkpoint), **SHAPE, write_weights=False)
        narrow_env = narrow.install(Path(checkpoint))
        for name, row in SERVERS.items():
            choices = {STOCK: {}} if name == STOCK else CHOICES
            with common.serve(row._replace(env=narrow_env | row.env), *flags, model=checkpoint, gib=8) as server:
                record["rows"][name]["policy"] = common.policy_of(server)
                ask(server, {}, (1, 256), 8, seed=10**6)  # warm
                for prompt, pictures in PROMPTS.items():
                    answers = {choice: [] for choice in choices}
                    for seed in range(rounds):
                        for index, (choice, custom) in enumerate(choices.items()):
                            own = 1000 * seed + index
                            answers[choice].append(ask(server, custom, pictures, num_tokens, own))
                    for choice, own in answers.items():
                        results[prompt][choice] = summary(own, num_tokens)
                    common.note(f"{name}, {prompt}: {len(choices)} rows of {rounds}")
    return record


def table(rows: dict) -> str:
    full = rows[FULL]
    lines = [
        [name, str(row["slots_held"])]
        + [f"{1e3 * row['ttft_s'][p]:.0f}" for p in ("p20", "p50", "p80")]
        + [f"{row['ttft_s']['p50'] / full['ttft_s']['p50']:.2f}x", f"{row['ms_per_token']['p50']:.1f}"]
        + [f"{full['ms_per_token']['p50'] / row['ms_per_token']['p50']:.2f}x"]
        for name, row in rows.items()
    ]
    header = ["row", "slots held", "TTFT ms p20", "p50", "p80", "vs none", "ms/token p50", "faster than none"]
    return common.table(header, lines)


@command
def main(arguments: list[str] | None = None) -> None:
    layout = RawDescriptionHelpFormatter
    parser = Parser("python -m benchmarks.policies_cpu", description=__doc__, formatter_class=layout)
    parser.add_argument("--quick", action="store_true", help="one round: a smoke test")
    parser.add_argument("--rounds", type=values.whole(), default=5, help="cold requests per row and prompt")
    parser.add_argument("--max-new-tokens", type=values.whole(2), default=64)
    args = parser.parse_args(arguments)
    record = run(1 if args.quick else args.rounds, args.max_new_tokens)
    path = common.save("policies_cpu_quick" if args.quick else "policies_cpu", record)
    for prompt, rows in record["results"].items():
        print(f"\n{prompt}: {rows[FULL]['prompt_tokens']} prompt tokens\n\n{table(rows)}")
    print(f"\n{path}")


if __name__ == "__main__":
    sys.exit(main())
