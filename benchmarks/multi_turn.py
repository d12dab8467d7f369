"""Conversations about pictures and videos that come back: what their next turns cost.

``python -m benchmarks.multi_turn`` lets a dozen conversations run at once, each a client that sends
its whole history, with the model's own answers word for word, then reads, thinks and asks again.
Media, words, answer lengths, arrival and think times are drawn from a seed, alike for all rows. The
pool is too small first: stock SGLang finds about a fifth of the returning conversations in it. Then
it holds all of them.

The model is a random one with the attention of a 7B in four narrow layers (see ``decode_cpu``). Its
tokens are ASCII characters, so an answer's text gives its ids again; ``converse`` checks every prompt's
length. Some things favour a side, and are as they are in SGLang on a CPU:

- Its ``torch_native`` attention computes a cached prefix's attention once more. The row ``ours, full
  cache`` has our attention and compresses nothing: against it, a gain is the cache's alone.
- Embeddings of all media fit into SGLang's embedding cache here, so a row that prefills a picture
  again does not encode it again.
- All media of a history are decoded, resized and hashed for every turn, cached or not.
- With overlap scheduling a first token leaves once the batch behind its own has run too, which on a
  CPU takes all its time: long prefills make others late. ``--flag=--disable-overlap-schedule`` shows
  how much of a ratio that is.

TTFT holds the time in the queue. A column leaves that out, but not the wait for those prefilled in
the same batch, of which there are more where more fits.

A second workload asks many questions about the same pictures in the ample pool: how much of what
they share is found, where a policy lets prompt tokens vote, which are always computed.
"""

from __future__ import annotations

import json
import random
import re
import sys
import tempfile
import time
from argparse import RawDescriptionHelpFormatter
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import requests

from benchmarks import common, narrow
from benchmarks.common import ROOT, Row
from benchmarks.decode_cpu import SHAPE
from sglang_vlkv.commands import values
from sglang_vlkv.commands.door import Parser, command
from sglang_vlkv.tinyvlm.build import build
from tests.prompts import CLIP, words
from tests.serving import Server, data_url

BUDGET = 0.1


def ours(policy: str, **config) -> Row:
    return Row(("--kv-policy", policy, "--kv-budget", str(BUDGET), "--kv-policy-config", json.dumps(config)))


STOCK, FULL, NO_TWINS, RANDOM = "stock", "ours, full cache", "vlkv, no twins", "random, prefer"
ROWS = {
    STOCK: Row(env={"SGLANG_PLUGINS": f"vlkv_cpu,{narrow.NAME}"}),
    FULL: ours("vlkv", min_prompt_tokens=10**9),
    NO_TWINS: ours("vlkv", twins="off"),
    "vlkv, fallback": ours("vlkv", twins="fallback"),
    "vlkv, prefer": ours("vlkv", twins="prefer"),
    RANDOM: ours("random", twins="prefer"),
}
QUICK_ROWS = ("vlkv, prefer",)
ONLY_UNDER_PRESSURE = (NO_TWINS, RANDOM)

# Pool slots per token that the conversations hold at their ends. What is running takes its part of them.
PRESSURE, AMPLE = "pressure", "ample"
POOLS = {PRESSURE: 0.27, AMPLE: 1.6}

END = "<|im_end|>\n"
SYSTEM = "<|im_start|>system\nYou answer questions about pictures and videos.<|im_end|>\n"
PICTURE = "<|vision_start|><|image_pad|><|vision_end|>"
VIDEO = "<|vision_start|><|video_pad|><|vision_end|>"
CLIP_TOKENS = 576
# How a conversation may open: copies of a picture and the visual tokens of each, or the clip.
OPENINGS = ((1, 576), None, (2, 400), (1, 784), (3, 400))
MORE = 256  # visual tokens of a picture that a later turn adds
ADDS_PICTURE = 0.25  # of the later turns


class Workload(NamedTuple):
    """How much is asked.

    Attributes:
        turns: of every conversation.
        arrival: seconds in each of which a conversation begins.
        think: mean seconds before each of the others.
    """

    conversations: int
    turns: int
    arrival: float
    think: float


class Turn(NamedTuple):
    """What a user sends.

    Attributes:
        text: the message, with its placeholders.
        images, videos: what stands at them.
        visual_tokens: of all of them.
        answer_tokens: length of the answer.
        pause: seconds before it is sent, after the last answer.
    """

    text: str
    images: list[str]
    videos: list[str]
    visual_tokens: int
    answer_tokens: int
    pause: float


class Answer(NamedTuple):
    """How a turn went; times in seconds.

    Attributes:
        turn: 0 for the first.
        sent, finished: since the run began.
        queued: of ``ttft``, in the scheduler's queue.
        known: prompt tokens that the conversation has held before, outputs among them.
        cached: prompt tokens that were not prefilled.
        kind: where they came from, as the report says.
    """

    turn: int
    sent: float
    finished: float
    ttft: float
    queued: float
    prompt_tokens: int
    known: int
    cached: int
    kind: str
    output_tokens: int
    retractions: int


class Run(NamedTuple):
    """All conversations of one row in one pool.

    Attributes:
        twins: what the server says of its twins afterwards, warming up included; None for stock SGLang.
    """

    answers: list[Answer]
    twins: dict | None

    @property
    def seconds(self) -> float:
        return max(a.finished for a in self.answers) - min(a.sent for a in self.answers)


def draw(seed: int, workload: Workload) -> list[list[Turn]]:
    """Conversations, each a list of turns.

    Think times are exponential, so whose turn comes next does not depend on how long it has been
    away, and a cache of the most recent ones finds the share that it holds.
    """
    rng = random.Random(seed)
    drawn = []
    for index in range(workload.conversations):
        arrival = (index + rng.random()) * workload.arrival
        drawn.append([])
        for turn in range(workload.turns):
            copies, size, videos = 0, MORE, []
            if turn == 0:
                copies, size = OPENINGS[index % len(OPENINGS)] or (0, MORE)
                videos = [] if copies else [str(CLIP)]
            elif rng.random() < ADDS_PICTURE:
                copies = 1
            own = rng.randrange(10**9)
            images = [data_url(common.picture(size, own))] * copies
            # No two conversations share more than the system prompt, though they may share a clip.
            text = f"Guest {own} here. " if turn == 0 else ""
            text += PICTURE * len(images) + VIDEO * len(videos) + words(rng, rng.randint(6, 14)) + "?"
            visual = size * copies + CLIP_TOKENS * len(videos)
            think = min(rng.expovariate(1 / workload.think), 2 * workload.think)
            pause = think if turn else arrival
            drawn[-1].append(Turn(text, images, videos, visual, rng.randint(24, 48), pause))
    return drawn


def message(text: str) -> str:
    return f"<|im_start|>user\n{text}{END}<|im_start|>assistant\n"


def num_tokens(text: str) -> int:
    """Tokens of an ASCII prompt with its placeholders, for a tokenizer that knows bytes and specials."""
    return len(re.sub(r"<\|\w+\|>", "#", text))


def size_of(turn: Turn) -> int:
    """Prompt tokens that a turn adds, without the answer."""
    return num_tokens(message(turn.text)) - len(turn.images + turn.videos) + turn.visual_tokens


def final_size(conversation: list[Turn]) -> int:
    """Tokens of a conversation at its end."""
    per_turn = (size_of(turn) + turn.answer_tokens + num_tokens(END) for turn in conversation)
    return num_tokens(SYSTEM) + sum(per_turn)


def cached(meta: dict) -> tuple[int, str]:
    """Prompt tokens that were not prefilled, and where they came from."""
    prefix = meta.get("kv_policy", {}).get("prefix")
    if prefix is None:
        return meta["cached_tokens"], "exact" if meta["cached_tokens"] else "cold"
    return prefix["tokens"], prefix["kind"]


def converse(server: Server, conversation: list[Turn], start: float) -> list[Answer]:
    """Plays one conversation; ``start`` is when its run began, on ``time.perf_counter``."""
    history, images, videos, expected, known = SYSTEM, [], [], num_tokens(SYSTEM), 0
    answers = []
    for index, turn in enumerate(conversation):
        time.sleep(turn.pause)
        history += message(turn.text)
        images, videos = images + turn.images, videos + turn.videos
        expected += size_of(turn)
        params = {"temperature": 0.0, "max_new_tokens": turn.answer_tokens, "ignore_eos": True}
        body = {"text": history, "image_data": images, "video_data": videos, "sampling_params": params}
        sent = time.perf_counter()
        answer = common.stream(server, {key: value for key, value in body.items() if value})
        finished, meta = time.perf_counter(), answer.meta
        prompt, output = meta["prompt_tokens"], meta["completion_tokens"]
        if (prompt, len(answer.text)) != (expected, output):
            raise RuntimeError(
                f"{prompt} prompt tokens in place of {expected}, and {len(answer.text)} characters in "
                f"{output} tokens: the history does not tokenise to the ids that it had"
            )
        hit, kind = cached(meta)
        retractions = meta.get("num_retractions", 0)
        times = (sent - start, finished - start, answer.ttft, meta["queue_time"])
        answers.append(Answer(index, *times, prompt, known, hit, kind, output, retractions))
        history += answer.text + END
        expected += output + num_tokens(END)
        known = prompt + output - 1  # the last token's KV is never computed
    return answers


def play(server: Server, conversations: list[list[Turn]]) -> Run:
    """All conversations at once, on a server whose cache is empty."""
    server.flush()
    start = time.perf_counter()
    with ThreadPoolExecutor(len(conversations)) as pool:
        answers = pool.map(lambda conversation: converse(server, conversation, start), conversations)
        answers = [answer for answered in answers for answer in answered]
    response = requests.get(f"{server.url}/kv_policy/twins", timeout=60)
    return Run(answers, response.json() if response.status_code == 200 else None)


def of_answers(answers: list[Answer]) -> dict:
    """Percentiles of some turns' times, and the share of their prompts that was cached."""
    return {
        "ttft_s": common.percentiles([a.ttft for a in answers]),
        "unqueued_s": common.percentiles([a.ttft - a.queued for a in answers]),
        "prompt_tokens": common.percentiles([a.prompt_tokens for a in answers]),
        "prefilled_tokens": common.percentiles([a.prompt_tokens - a.cached for a in answers]),
        "hit_rate": sum(a.cached for a in answers) / sum(a.prompt_tokens for a in answers),
        "kinds": Counter(a.kind for a in answers),
    }


def summary(runs: list[Run], bases: dict[str, list[Run]]) -> dict:
    """One row in one pool, over its rounds, and its TTFT against that of ``bases``.

    ``warm`` of the later turns found nine tenths of what their conversation had computed,
    ``all_known`` found all of it.
    """
    answers = answers_of(runs)
    turns = [[a for a in answers if a.turn == turn] for turn in range(1 + max(a.turn for a in answers))]
    later = answers_of(runs, later=True)
    first_base = {name: faster(answers_of(base, later=False), turns[0]) for name, base in bases.items()}
    later_base = {name: faster(answers_of(base, later=True), later) for name, base in bases.items()}
    seconds = sum(run.seconds for run in runs)
    return {
        "turns": [of_answers(of_turn) for of_turn in turns],
        "first": of_answers(turns[0]) | {"faster_than": first_base},
        "later": of_answers(later) | {"faster_than": later_base},
        "warm": sum(a.cached >= 0.9 * a.known for a in later) / len(later),
        "all_known": sum(a.cached >= a.known for a in later) / len(later),
        "seconds": seconds,
        "output_tokens_per_s": sum(a.output_tokens for a in answers) / seconds,
        "requests_per_s": len(answers) / seconds,
        "in_flight": sum(a.finished - a.sent for a in answers) / seconds,
        "retractions": sum(a.retractions for a in answers),
        "twins": [run.twins for run in runs],
    }


def answers_of(runs: list[Run], later: bool | None = None) -> list[Answer]:
    """The answers of all rounds, in the same order for every row; of first or later turns only, if asked."""
    return [a for run in runs for a in run.answers if later in (None, a.turn > 0)]


def faster(base: list[Answer], row: list[Answer]) -> dict[str, float]:
    """Median TTFT of ``base`` over that of ``row``, the same turns in both; a bootstrap's 95% interval."""
    times = np.array([[a.ttft for a in answers] for answers in (base, row)])
    drawn = np.random.default_rng(0).integers(0, len(row), (4000, len(row)))
    medians = np.median(times[:, drawn], axis=2)
    low, high = np.percentile(medians[0] / medians[1], [2.5, 97.5])
    return {"p50": float(np.divide(*np.median(times, axis=1))), "low": float(low), "high": float(high)}


def questions(pictures: int, each: int) -> dict[str, list[tuple[str, str]]]:
    """Prompts that share exact prefixes, as text and picture: ``each`` about every picture, taking turns."""
    rng = random.Random(0)
    urls = [data_url(common.picture(576, 10**6 + seed)) for seed in range(pictures)]
    rules = "Answer in one word where that is enough. Name colours as a child would, and count aloud. " * 2
    asked = [(url, words(rng, 8) + "?") for _ in range(each) for url in urls]
    ready = SYSTEM + message(PICTURE + rules) + "I am ready." + END
    return {
        "own question behind the picture": [(SYSTEM + message(PICTURE + own), url) for url, own in asked],
        "rules behind the picture, in a turn before": [(ready + message(own), url) for url, own in asked],
        "rules behind the picture": [(SYSTEM + message(PICTURE + rules + own), url) for url, own in asked],
        "the same prompt again": [(SYSTEM + message(PICTURE + "what is here?"), url) for url, _ in asked],
    }


def ask(server: Server, prompts: list[tuple[str, str]]) -> dict:
    """The prompts, one after the other, on a server whose cache is empty."""
    server.flush()
    params = {"temperature": 0.0, "max_new_tokens": 8, "ignore_eos": True}
    bodies = [{"text": text, "image_data": [url], "sampling_params": params} for text, url in prompts]
    answers = [common.stream(server, body) for body in bodies]
    hits = [cached(answer.meta) for answer in answers]
    return {
        "hit_rate": sum(hit for hit, _ in hits) / sum(answer.meta["prompt_tokens"] for answer in answers),
        "kinds": Counter(kind for _, kind in hits),
        "ttft_s": common.percentiles([answer.ttft for answer in answers]),
    }


def ratio(row: dict, base: dict) -> str:
    return f"{base['ttft_s']['p50'] / row['ttft_s']['p50']:.2f}x"


def interval(value: dict) -> str:
    return f"{value['p50']:.2f} [{value['low']:.2f}, {value['high']:.2f}]"


def percents(parts: Counter) -> str:
    total = sum(parts.values())
    return ", ".join(f"{kind} {100 * count / total:.0f}%" for kind, count in sorted(parts.items()))


def table(rows: dict) -> str:
    """The later turns of every row."""
    bases = [base for base in (STOCK, FULL) if base in rows]
    lines = []
    for name, row in rows.items():
        later = row["later"]
        lines.append(
            [name, f"{100 * row['warm']:.0f} %"]
            + [f"{later['ttft_s'][p]:.2f}" for p in ("p20", "p50", "p80")]
            + [interval(later["faster_than"][base]) for base in bases]
            + [f"{later['unqueued_s']['p50']:.2f}", f"{later['prefilled_tokens']['p50']:.0f}"]
            + [f"{100 * later['hit_rate']:.1f} %", percents(later["kinds"]), str(row["retractions"])]
            + [f"{row['in_flight']:.1f}", f"{row['output_tokens_per_s']:.1f}", f"{row['requests_per_s']:.2f}"]
        )
    header = ["later turns", "warm", "TTFT s p20", "p50", "p80"]
    header += [f"times faster than {base}" for base in bases] + ["p50 without the queue", "prefilled p50"]
    header += ["hit rate", "prefixes", "retractions", "in flight", "tokens/s", "requests/s"]
    return common.table(header, lines)


def turn_table(rows: dict) -> str:
    lines = []
    for turn in range(len(rows[STOCK]["turns"])):
        for name, row in rows.items():
            of = row["turns"][turn]
            lines.append(
                [f"{turn + 1}, {name}", f"{of['prompt_tokens']['p50']:.0f}"]
                + [f"{of['prefilled_tokens']['p50']:.0f}", f"{100 * of['hit_rate']:.1f} %"]
                + [f"{of['ttft_s'][p]:.2f}" for p in ("p20", "p50", "p80")]
                + [ratio(of, rows[STOCK]["turns"][turn])]
            )
    header = ["turn", "prompt tokens p50", "prefilled p50", "hit rate", "TTFT s p20", "p50", "p80"]
    return common.table(header + [f"faster than {STOCK}"], lines)


def shared_table(shared: dict) -> str:
    lines = []
    for layout, rows in shared.items():
        for name, row in rows.items():
            more = 100 * (row["hit_rate"] - rows[STOCK]["hit_rate"])
            lines.append(
                [f"{layout}, {name}", f"{100 * row['hit_rate']:.1f} %", f"{more:+.1f}"]
                + [f"{row['ttft_s']['p50']:.2f}", ratio(row, rows[STOCK]), percents(row["kinds"])]
            )
    header = ["shared", "hit rate", "points to stock", "TTFT s p50", f"faster than {STOCK}", "prefixes"]
    return common.table(header, lines)


def goals(results: dict, shared: dict) -> list[dict]:
    """What was aimed at and what was measured, per row of ours that compresses; nothing is asserted."""
    found = []

    def judge(goal: str, row: str, measured: str, met: bool) -> None:
        found.append({"goal": goal, "row": row, "measured": measured, "met": met})

    for name, row in results[PRESSURE].items():
        if name in (STOCK, FULL):
            continue
        value = row["later"]["faster_than"][STOCK]
        goal = f"TTFT of later turns under pressure: 5 times faster than {STOCK}"
        judge(goal, name, interval(value), value["p50"] >= 5)
        if name not in results[AMPLE]:
            continue
        for part in ("first", "later"):
            for base, value in results[AMPLE][name][part]["faster_than"].items():
                slower = {"p50": 1 / value["p50"], "low": 1 / value["high"], "high": 1 / value["low"]}
                goal = f"TTFT of {part} turns in an ample pool: at most 1.02 times that of {base}"
                judge(goal, name, interval(slower), slower["p50"] <= 1.02)
        for layout, rows in shared.items():
            less = 100 * (rows[STOCK]["hit_rate"] - rows[name]["hit_rate"])
            judge(f"hit rate, {layout}: at most 1 point below {STOCK}", name, f"{less:.1f}", less <= 1)
    return found


def goal_table(found: list[dict]) -> str:
    lines = [[g["goal"], g["row"], g["measured"], "met" if g["met"] else "missed"] for g in found]
    return common.table(["goal", "row", "measured", ""], lines)


def run(rows: dict[str, Row], flags: list[str], rounds: int, workload: Workload) -> dict:
    flags = ["--enable-metrics", *flags]  # for the time in the queue
    record = common.context(rows, *flags) | {"shape": SHAPE, "rounds": rounds, "workload": workload._asdict()}
    record["pools"] = {pool: [] for pool in POOLS}
    runs = {PRESSURE: {name: [] for name in rows}}
    runs[AMPLE] = {name: [] for name in rows if name not in ONLY_UNDER_PRESSURE}
    layouts = questions(pictures=3, each=4)
    shared = record["shared"] = {layout: {} for layout in layouts}
    with tempfile.TemporaryDirectory(prefix="multi-turn-") as checkpoint:
        build(Path(checkpoint), **SHAPE)
        narrow.install(Path(checkpoint))
        for seed in range(rounds):
            drawn = draw(seed, workload)
            sizes = [final_size(conversation) for conversation in drawn]
            for pool, share in POOLS.items():
                slots = max(round(share * sum(sizes)), 2 * max(sizes))
                record["pools"][pool].append({"slots": slots, "conversations_hold": sum(sizes)})
                order, first = [*runs[pool]], seed % len(runs[pool])
                for name in order[first:] + order[:first]:
                    common.note(f"round {seed + 1} of {rounds}, {pool}, {slots} slots: {name}")
                    env = {"PYTHONPATH": f"{checkpoint}:{ROOT}"} | rows[name].env
                    row, size = rows[name]._replace(env=env), ("--max-total-tokens", str(slots))
                    with common.serve(row, *flags, *size, model=checkpoint, gib=5) as server:
                        record["rows"][name]["policy"] = common.policy_of(server)
                        play(server, draw(10**6, Workload(2, 2, 0.1, 0.1)))  # warm
                        runs[pool][name].append(play(server, drawn))
                        if pool == AMPLE and seed == 0:
                            for layout, prompts in layouts.items():
                                shared[layout][name] = ask(server, prompts)
                    of = summary(runs[pool][name][-1:], {})
                    common.note(
                        f"  {of['seconds']:.0f} s, later turns: TTFT {of['later']['ttft_s']['p50']:.2f} s, "
                        f"hit rate {100 * of['later']['hit_rate']:.0f}%, {100 * of['warm']:.0f}% warm, "
                        f"{of['in_flight']:.1f} in flight"
                    )
    record["results"] = results = {}
    for pool, of_rows in runs.items():
        bases = {name: of_rows[name] for name in (STOCK, FULL) if name in of_rows}
        results[pool] = {name: summary(of_row, bases) for name, of_row in of_rows.items()}
    return record | {"goals": goals(results, shared)}


@command
def main(arguments: list[str] | None = None) -> None:
    layout = RawDescriptionHelpFormatter
    parser = Parser("python -m benchmarks.multi_turn", description=__doc__, formatter_class=layout)
    parser.add_argument("--quick", action="store_true", help="two rows, few conversations: a smoke test")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=[*ROWS], help=f"in any case {STOCK}")
    parser.add_argument("--flag", action="append", default=[], help="for every server, as --flag=--NAME")
    parser.add_argument("--conversations", type=values.whole(), default=12)
    parser.add_argument("--turns", type=values.whole(2), default=4)
    parser.add_argument("--arrival", type=values.positive, default=2.0, help="seconds between first messages")
    parser.add_argument("--think", type=values.positive, default=15.0, help="mean seconds before the others")
    parser.add_argument("--rounds", type=values.whole(), default=1, help="other conversations in each")
    args = parser.parse_args(arguments)
    names = [STOCK, *(QUICK_ROWS if args.quick else args.rows)]
    rows = {name: row for name, row in ROWS.items() if name in names}
    if args.quick:
        record = run(rows, args.flag, rounds=1, workload=Workload(4, 2, 1.0, 1.0))
    else:
        workload = Workload(args.conversations, args.turns, args.arrival, args.think)
        record = run(rows, args.flag, args.rounds, workload)
    path = common.save("multi_turn_quick" if args.quick else "multi_turn", record)
    for pool, rows in record["results"].items():
        sizes = [f"{p['slots']} slots for {p['conversations_hold']} tokens" for p in record["pools"][pool]]
        found = f"{100 * rows[STOCK]['all_known']:.0f}% of stock's later turns found all that was known"
        print(f"\n{pool}: {', '.join(sizes)}; {found}\n\n{table(rows)}\n\n{turn_table(rows)}")
    print(f"\n{shared_table(record['shared'])}\n\n{goal_table(record['goals'])}\n\n{path}")


if __name__ == "__main__":
    sys.exit(main())
