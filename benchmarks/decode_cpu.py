"""Time per output token behind long image prompts, on a CPU.

``python -m benchmarks.decode_cpu`` serves the attention of a 7B model in four layers: 32 query
heads and 8 KV heads of 128, but a hidden size of 512, so that attention is what is measured, and
dummy weights. It is served three ways: stock SGLang, our attention over the full cache, and
VL-Cache. Every round starts them in turn and asks each once per prompt, cold.

TTFT ends when the first token arrives; SGLang's overlap scheduling has launched the first decode
step by then, so it holds the prefill, the compaction and one step. Scoring, selection and
compaction are also timed alone, outside SGLang, on random tensors of the same shapes.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from argparse import RawDescriptionHelpFormatter
from collections import defaultdict
from pathlib import Path
from statistics import median

import torch

from benchmarks import common, narrow
from benchmarks.common import Row, Streamed
from sglang_vlkv.commands import values
from sglang_vlkv.commands.door import Parser, command
from sglang_vlkv.kernels.compaction import gather_rows, scatter_rows
from sglang_vlkv.options.config import build_policy
from sglang_vlkv.stages.layer import Layer, Rows
from sglang_vlkv.stages.prompt import Modality, Prompt
from sglang_vlkv.stages.select import select
from sglang_vlkv.tinyvlm.build import build
from tests.serving import Server

SHAPE = dict(
    num_layers=4, num_heads=32, num_kv_heads=8, head_dim=128, hidden_size=512, intermediate_size=512
)
BUDGET = 0.1
QUESTION = "What stands to the left of the largest object, and which colour does it have?"

STOCK, FULL, VLCACHE = "stock torch_native", "ours, full cache", f"ours, vlcache {BUDGET}"
ROWS = {
    STOCK: Row(env={"SGLANG_PLUGINS": f"vlkv_cpu,{narrow.NAME}"}),  # the platform only: nothing of ours attends
    FULL: Row(("--kv-policy", "vlcache", "--kv-policy-config", json.dumps({"min_prompt_tokens": 10**9}))),
    VLCACHE: Row(("--kv-policy", "vlcache", "--kv-budget", str(BUDGET))),
}

# A prompt's pictures and the visual tokens of each. The first is where there is little to gain.
PROMPTS = {"0.3K": (1, 256), "4K": (4, 1024), "16K": (16, 1024)}
QUICK_PROMPTS = {"0.3K": (1, 256), "2K": (2, 1024)}


def request(prompt: tuple[int, int], max_new_tokens: int, seed: int = 0) -> dict:
    return common.body(QUESTION, common.pictures(*prompt, seed), max_new_tokens)


def ask(server: Server, prompts: dict, max_new_tokens: int, seed: int) -> dict[str, Streamed]:
    """One answer per prompt, none of which the server has seen."""
    common.stream(server, request((1, 256), 8, seed=10**6))  # warm
    answers = {}
    for name, prompt in prompts.items():
        server.flush()
        answer = answers[name] = common.stream(server, request(prompt, max_new_tokens, seed))
        step = 1e3 * median(answer.steps)
        common.note(f"  {answer.meta['prompt_tokens']} tokens: TTFT {answer.ttft:.2f} s, {step:.1f} ms/token")
    return answers


def summary(answers: list[Streamed]) -> dict:
    """What was kept, and percentiles of TTFT over rounds and of the steps of all rounds."""
    return common.measured(answers[0].meta, SHAPE["num_layers"]) | {
        "ttft_s": common.percentiles([answer.ttft for answer in answers]),
        "ms_per_token": common.percentiles([1e3 * step for answer in answers for step in answer.steps]),
    }


def time_stages(num_prompt: int, num_voting: int, repeats: int = 5) -> dict[str, float]:
    """Median seconds of what a prompt's compaction adds, over all layers; the first repeat is not counted."""
    policy = build_policy("vlcache", BUDGET)
    layers, heads, dim = SHAPE["num_layers"], SHAPE["num_kv_heads"], SHAPE["head_dim"]
    tags = torch.full((num_prompt,), Modality.IMAGE, dtype=torch.uint8)
    tags[num_prompt - num_voting :] = Modality.TEXT
    q = torch.randn(num_voting, SHAPE["num_heads"], dim)
    k = torch.randn(num_prompt, heads, dim)
    storage = torch.randn(layers, 2, num_prompt, heads, dim)
    slots = torch.randperm(num_prompt)
    cells = storage.view(-1, heads, dim)
    cells = cells[: len(cells) - num_prompt], cells[num_prompt:]
    flat = torch.zeros(2, layers * num_prompt, heads, dim)
    layer = Layer(Prompt(tags), q, Rows(k), Rows(k), dim**-0.5)

    times = defaultdict(list)
    for _ in range(repeats + 1):
        start = time.perf_counter()
        scored = [policy.score(layer) for _ in range(layers)]
        scored_at = time.perf_counter()
        sparsity = [scores.zeros / scores.entries for scores in scored]
        selection = select(policy, layer.prompt, scored, sparsity)
        selected_at = time.perf_counter()
        kept = torch.cat(selection.kept, dim=1)
        rows = gather_rows(*cells, slots, kept, selection.num_kept, 2 * num_prompt)
        scatter_rows(*flat, torch.arange(kept.shape[1], dtype=torch.int32), rows)
        end = time.perf_counter()
        times["scoring_s"].append(scored_at - start)
        times["selection_s"].append(selected_at - scored_at)
        times["compaction_s"].append(end - selected_at)
    return {name: median(values[1:]) for name, values in times.items()}


def table(results: dict) -> str:
    lines = []
    for rows in results.values():
        stock = rows[STOCK]["ms_per_token"]["p50"]
        for name in ROWS:
            row = rows[name]
            step, kept, freed = row["ms_per_token"], row["kept_tokens"], row["freed_bytes"]
            lines.append(
                [name, str(row["prompt_tokens"])]
                + ["all" if kept in (None, row["prompt_tokens"]) else f"{kept:.0f}", f"{(freed or 0) / 2**20:.1f}"]
                + [f"{row['ttft_s']['p50']:.2f}"]
                + [f"{step[p]:.1f}" for p in ("p20", "p50", "p80")]
                + [f"{stock / step['p50']:.2f}x"]
            )
    header = ["row", "prompt tokens", "kept per layer", "freed MiB", "TTFT s p50"]
    return common.table(header + ["ms/token p20", "p50", "p80", "vs stock"], lines)


def stage_table(stages: dict) -> str:
    lines = []
    for name, stage in stages.items():
        parts = [1e3 * stage[part] for part in ("scoring_s", "selection_s", "compaction_s")]
        lines.append(
            [name, str(stage["prompt_tokens"]), str(stage["voting_rows"])]
            + [f"{part:.1f}" for part in parts]
            + [f"{stage['ttft_full_s']:.2f}", f"{100 * stage['share_of_ttft']:.1f} %"]
            + [f"{100 * stage['ttft_ratio'] - 100:+.1f} %"]
        )
    header = ["prompt", "tokens", "voting rows", "scoring ms", "selection ms", "compaction ms"]
    return common.table(header + ["TTFT full cache s", "their share", "TTFT, measured"], lines)


def run(prompts: dict, rounds: int, max_new_tokens: int, dtype: str) -> dict:
    longest = max(count * tokens for count, tokens in prompts.values())
    # Room for the prompt, its kept rows and the answer; one chunk, because stock's prefill behind
    # a prefix computes the prefix's attention once more.
    pool = longest + longest // 4 + 1024
    flags = ["--load-format", "dummy", "--dtype", dtype, "--max-total-tokens", str(pool)]
    flags += ["--chunked-prefill-size", "-1", "--max-prefill-tokens", str(pool)]
    record = common.context(ROWS, *flags) | {"shape": SHAPE, "rounds": rounds}
    answers = {prompt: {name: [] for name in ROWS} for prompt in prompts}
    with tempfile.TemporaryDirectory(prefix="decode-cpu-") as checkpoint:
        build(Path(checkpoint), **SHAPE, write_weights=False)
        narrow_env = narrow.install(Path(checkpoint))
        for seed in range(rounds):
            for name, row in ROWS.items():
                common.note(f"round {seed + 1} of {rounds}: {name}")
                with common.serve(row._replace(env=narrow_env | row.env), *flags, model=checkpoint, gib=8) as server:
                    record["rows"][name]["policy"] = common.policy_of(server)
                    for prompt, answer in ask(server, prompts, max_new_tokens, seed).items():
                        answers[prompt][name].append(answer)
    record["results"] = {
        prompt: {name: summary(rounds_of) for name, rounds_of in rows.items()}
        for prompt, rows in answers.items()
    }
    record["stages"] = {}
    for name, rows in record["results"].items():
        report, full = rows[VLCACHE]["report"], rows[FULL]["ttft_s"]["p50"]
        stage = common.in_own_process(time_stages, report["prompt_tokens"], report["voting_rows"])
        record["stages"][name] = stage | {
            "prompt_tokens": report["prompt_tokens"],
            "voting_rows": report["voting_rows"],
            "ttft_full_s": full,
            "share_of_ttft": sum(stage.values()) / full,
            "ttft_ratio": rows[VLCACHE]["ttft_s"]["p50"] / full,
        }
    return record


@command
def main(arguments: list[str] | None = None) -> None:
    layout = RawDescriptionHelpFormatter
    parser = Parser("python -m benchmarks.decode_cpu", description=__doc__, formatter_class=layout)
    parser.add_argument("--quick", action="store_true", help="two short prompts, one round: a smoke test")
    parser.add_argument("--rounds", type=values.whole(), default=3, help="cold requests per row and prompt")
    parser.add_argument("--max-new-tokens", type=values.whole(2), default=32)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    args = parser.parse_args(arguments)
    if args.quick:
        record = run(QUICK_PROMPTS, rounds=1, max_new_tokens=16, dtype=args.dtype)
    else:
        record = run(PROMPTS, args.rounds, args.max_new_tokens, args.dtype)
    path = common.save("decode_cpu_quick" if args.quick else "decode_cpu", record)
    print(f"\n{table(record['results'])}\n")
    print(
        "Scoring, selection and compaction timed alone, as a share of the full cache's TTFT; at the "
        f"right the served TTFT against it.\n\n{stage_table(record['stages'])}\n\n{path}"
    )


if __name__ == "__main__":
    sys.exit(main())
