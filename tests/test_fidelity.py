"""The fidelity benchmark: its arithmetic on hand-made data, its tables' format, and a small real run."""

from __future__ import annotations

import itertools
import json
import math
import subprocess
import sys

import numpy as np
import pytest

from benchmarks.fidelity import leaderboard, metrics, questions, rows, run, statistics
from benchmarks.fidelity.__main__ import parse
from benchmarks.fidelity.metrics import Answer
from sglang_vlkv.commands import Problem
from sglang_vlkv.options.config import build_settings
from sglang_vlkv.policies import policies
from sglang_vlkv.stages.prompt import num_tokens
from sglang_vlkv.tinyvlm.evaluation import EVALUATION_SEEDS
from tests.serving import ROOT

LAYERS = 4


def test_seed_ranges_are_disjoint_and_below_those_of_training():
    ranges = [questions.TUNING_SEEDS, questions.REPORT_SEEDS]
    assert ranges[0].stop <= ranges[1].start and ranges[1].stop <= 1_000_000 <= EVALUATION_SEEDS
    assert parse([]).out != parse(["--quick"]).out


@pytest.mark.parametrize(
    "text, answer, expected",
    [
        (" digits red 7 blue 3", " digits red 7 blue 3", 1.0),
        (" digits red 7 blue 4", " digits red 7 blue 3", 0.5),
        (" digits red 3 blue 7", " digits red 7 blue 3", 0.0),
        (" digits red 7", " digits red 7 blue 3", 0.5),
        (" picture 2 red 5", " picture 2 red 7", 0.0),
        (" frame 1 red 7", " frame 2 red 7", 1.0),
        ("", " the digit is red 7", 0.0),
    ],
)
def test_digits_in_order(text, answer, expected):
    assert metrics.items(text, answer) == expected


def test_exact():
    assert metrics.exact("the digit is red 7 ", [" the digit is red 7"])
    assert not metrics.exact("the digit is Red 7", [" the digit is red 7"])
    assert metrics.exact("It is 12.40.", ["twelve", "it is 12.40"], drawn=False)


@pytest.mark.parametrize(
    "full, other, share, first",
    [
        ([1, 2, 3], [1, 2, 3], 1.0, None),
        ([1, 2, 3], [1, 5, 3], 2 / 3, 1),
        ([1, 2, 3], [1, 2], 1.0, 2),
        ([1, 2], [1, 2, 3, 4], 1.0, 2),
        ([1, 2], [3], 0.0, 0),
    ],
)
def test_agreement(full, other, share, first):
    assert metrics.agreement(full, other) == share
    assert metrics.first_difference(full, other) == first


def test_divergence():
    p, q = {0: 0.5, 1: 0.25, 2: 0.25}, {0: 0.25, 1: 0.25, 2: 0.5}
    by_hand = 0.5 * math.log(2) + 0.25 * math.log(0.5)
    assert metrics.divergence(p, q) == pytest.approx(by_hand)
    assert metrics.divergence(p, p) == 0.0
    # Only one lists token 1, and the other's unlisted half may hold as much of it.
    assert metrics.divergence({0: 0.5, 1: 0.25}, {0: 0.5}) == pytest.approx(0.0)
    # Here it may hold 0.1 at most, of the half that is not token 0.
    by_hand = 0.4 * math.log(0.4 / 0.1) + 0.1 * math.log(0.1 / 0.4)
    assert metrics.divergence({0: 0.5, 1: 0.4}, {0: 0.5, 2: 0.1}) == pytest.approx(by_hand)
    assert metrics.divergence({0: 1.0}, {1: 1.0}) > 10


def test_divergence_never_exceeds_the_whole_distributions():
    rng = np.random.default_rng(0)
    for _ in range(50):
        p, q = rng.dirichlet(np.ones(60), 2)
        whole = float((p * np.log(p / q)).sum())
        top = [{int(t): float(x[t]) for t in np.argsort(-x)[:20]} for x in (p, q)]
        assert 0 <= metrics.divergence(*top) <= whole


def test_mean_divergence_stops_at_the_first_difference():
    p, q = {0: 0.5, 1: 0.5}, {0: 0.9, 1: 0.1}
    full = Answer("", [0, 0, 0], [p, p, p], {})
    one = metrics.divergence(p, q)
    assert metrics.mean_divergence(full, Answer("", [0, 1, 0], [p, q, q], {})) == pytest.approx(one / 2)
    assert metrics.mean_divergence(full, Answer("", [0, 0, 0], [q, q, q], {})) == pytest.approx(one)
    assert metrics.mean_divergence(full, full) == 0.0


def test_wilson():
    # Altman et al., Statistics with Confidence: 81 of 263.
    low, high = statistics.wilson(81, 263)[1:]
    assert (round(low, 4), round(high, 4)) == (0.2553, 0.3662)
    assert statistics.wilson(0, 10).low == 0.0 and statistics.wilson(10, 10).high == pytest.approx(1.0)


def test_bootstrap_covers_the_mean():
    rng = np.random.default_rng(1)
    inside = 0
    for i in range(200):
        estimate = statistics.bootstrap(rng.normal(3.0, 1.0, 40), str(i))
        assert estimate.low <= estimate.mean <= estimate.high
        inside += estimate.low <= 3.0 <= estimate.high
    assert 175 <= inside <= 199


def test_paired_intervals_see_what_unpaired_ones_do_not():
    """Questions differ much, rows by a little on each: only the pairing shows it."""
    rng = np.random.default_rng(2)
    easy = rng.normal(0, 10, 50)
    a = {("a", "multi"): dict(enumerate(easy + 1 + rng.normal(0, 0.1, 50)))}
    b = {("a", "multi"): dict(enumerate(easy))}
    groups = statistics.grouped(statistics.difference(a, b), ["a"], ["multi"])
    paired = statistics.mean_of_means(groups)
    alone = statistics.mean_of_means(statistics.grouped(a, ["a"], ["multi"]))
    assert 0.9 < paired.low < paired.mean < paired.high < 1.1
    assert alone.high - alone.low > 3


def test_groups_weigh_columns_and_checkpoints_alike():
    groups = {
        ("a", "multi"): np.array([[1.0]] * 100),
        ("a", "turns"): np.array([[0.0, 0.5]] * 2),
        ("b", "multi"): np.array([[0.0]] * 3),
    }
    assert statistics.mean_of_means(groups).mean == pytest.approx((0.5 + 0.0) / 2)


def test_only_questions_that_both_answered_are_compared():
    a = {("a", "multi"): {0: 1.0, 1: 1.0}}
    b = {("a", "multi"): {1: 0.0, 2: 0.0}, ("a", "list"): {0: 1.0}}
    assert statistics.difference(a, b) == {("a", "multi"): {1: 1.0}}


def test_rows_are_valid_policies_at_every_budget():
    settings = build_settings("none", None, {"allow_override": True})
    for name, row in rows.ROWS.items():
        for budget in rows.GRID:
            policy = settings.for_request(rows.custom_params(row, budget))
            assert (policy.name, policy.budget) == (row.policy, budget), name
            assert policy.min_prompt_tokens <= 1 / budget + 1
    assert {row.policy for row in rows.ROWS.values()} == set(policies()) - {"none", "given"}
    named = [name for pairs in rows.COMPARISONS.values() for pair in pairs for name in pair]
    assert {*named, *(name for a, b, _ in rows.PAPERS for name in (a, b)), rows.OURS} <= set(rows.ROWS)
    assert all(rows.ROWS[name] == rows.ROWS[exact] for name, exact in rows.FROM_TWINS.items())


def test_rows_from_twins_answer_turns_only():
    names = ["vlkv", *rows.FROM_TWINS]
    [single], turns = (questions.drawn(task, 100_000) for task in ("single", "turns"))
    assert {job.row for job in run.jobs(single, names, (0.1,), True)} == {"vlkv"}
    for turn in turns:
        jobs = list(run.jobs(turn, names, None, False))
        assert {job.row for job in jobs} == set(names)
        assert {job.budget for job in jobs if job.row in rows.FROM_TWINS} == set(rows.CORE)


@pytest.mark.parametrize(
    "kind, tokens, earlier, counts",
    [
        ("cold", 0, None, True),
        ("twin", 271, run.Asked(271, None), True),
        ("twin", 270, run.Asked(271, None), False),
        ("exact", 290, run.Asked(271, None), False),
        ("twin", 290, run.Asked(271, "no twin"), False),
    ],
)
def test_what_counts_as_answered_from_a_twin(kind, tokens, earlier, counts):
    answer = Answer("", [], [], {"prefix": {"kind": kind, "tokens": tokens}})
    assert (run.not_from_twin(answer, earlier) is None) == counts


class FakeClient:
    """Answers at once; ``kinds`` says from what, by salt."""

    def __init__(self, kinds: dict[bool, str]) -> None:
        self.kinds, self.asked = kinds, []

    def ask(self, prompt, params, salt=None) -> Answer:
        self.asked.append((salt, prompt.task))
        kind = "exact" if prompt.task == "turn 1" else self.kinds[salt is not None]
        report = {"policy": params["kv_policy"], "prompt_tokens": 271, "visual_tokens": 256}
        return Answer("", [], [], report | {"prefix": {"kind": kind, "tokens": 271}})


def ask_turns(client: FakeClient, records: run.Records) -> None:
    names = ["vlkv", "vlkv, from twins"]
    prompts = questions.drawn("turns", 100_000)
    run.ask_all(client, "a", prompts, lambda p: run.jobs(p, names, (0.1,), True), records, workers=4)


def test_turns_from_twins_are_asked_in_order_and_all_if_one_is_lacking(tmp_path):
    client, records = FakeClient({True: "twin", False: "exact"}), run.Records(tmp_path, False, "c0ffee")
    ask_turns(client, records)
    own = [turn for salt, turn in client.asked if salt]
    assert own == list(questions.TURNS) and len(client.asked) == 9
    assert {r["commit"] for r in records.all} == {"c0ffee"} and len(records.all) == 9
    assert {r["prefix"]["kind"] for r in records.all if r["row"] == "vlkv"} == {"exact"}
    lacking = next(r for r in records.all if r["row"] in rows.FROM_TWINS and r["task"] == "turn 3")
    records.done.remove(run.Records.key(lacking))
    client.asked.clear()
    ask_turns(client, records)
    assert [turn for salt, turn in client.asked if salt] == list(questions.TURNS)
    assert len(client.asked) == 6 and len(records.all) == 10


def test_turns_that_no_twin_answered_do_not_count(tmp_path):
    records = run.Records(tmp_path, resume=False)
    ask_turns(FakeClient({True: "exact", False: "exact"}), records)
    assert [r["task"] for r in records.all if "not_applicable" in r] == ["turn 2", "turn 3"]


def test_an_exact_row_that_a_twin_answered_stops_the_run(tmp_path):
    with pytest.raises(RuntimeError, match="from a twin"):
        ask_turns(FakeClient({True: "twin", False: "twin"}), run.Records(tmp_path, resume=False))


@pytest.mark.parametrize("name, kept", [("oracle", 30 + 3), ("all-but-asked", 286 - 3), ("text-only", 30)])
def test_references_keep_exactly_what_they_name(name, kept):
    settings = build_settings("none", None, {"allow_override": True})
    params = rows.reference_params(name, (5, 9, 9, 200), num_prompt=286, num_visual=256)
    policy = settings.for_request(params)
    assert num_tokens(policy.budget, 286, LAYERS) == kept * LAYERS
    assert policy.budget * policy.min_prompt_tokens >= 1 and policy.min_prompt_tokens <= 286


def test_drawn_prompts():
    [prompt] = questions.drawn("multi@64", 100_000)
    assert (prompt.task, prompt.seed) == ("multi@64", 100_000)
    assert max(prompt.cells) < 64
    assert [p.task for p in questions.drawn("turns", 100_000)] == list(questions.TURNS)
    last = questions.drawn("turns", 100_000)[2]
    assert [m["role"] for m in last.messages] == ["user", "assistant"] * 2 + ["user"]
    first = last.messages[0]["content"]
    assert first[0]["image_url"]["url"].startswith("data:image/png") and len(first) == 2


def test_a_video_holds_every_frame_twice_and_every_pixel():
    import base64

    import torch
    from torchcodec.decoders import VideoDecoder

    from sglang_vlkv.tinyvlm import tasks

    frames = tasks.draw("video", 100_000).frames
    data = base64.b64decode(questions.video_url(frames).split(",")[1])
    decoder = VideoDecoder(torch.frombuffer(bytearray(data), dtype=torch.uint8), dimension_order="NHWC")
    assert (len(decoder), decoder.metadata.average_fps) == (4, questions.VIDEO_FPS)
    for number in range(4):
        assert np.array_equal(decoder[number].numpy(), np.asarray(frames[number // 2]))


def test_own_questions(tmp_path):
    (tmp_path / "x.png").write_bytes(b"png")
    line = {"image": "x.png", "question": "Total?", "answer": ["12", "twelve"]}
    path = tmp_path / "mine.jsonl"
    path.write_text(json.dumps(line) + "\n\n" + json.dumps(line | {"task": "bills", "cells": [3]}) + "\n")
    one, two = questions.own(path)
    assert (one.task, one.answers, one.cells, one.drawn) == ("questions", ("12", "twelve"), None, False)
    assert (two.task, two.seed, two.cells) == ("bills", 2, (3,))
    jobs = {job.row for job in run.jobs(one, ["vlkv", "oracle", "text-only"], (0.1,), True)}
    assert jobs == {"vlkv", "text-only"}
    path.write_text('{"question": "Total?", "answer": "12"}\n')
    with pytest.raises(Problem, match="neither image"):
        questions.own(path)


def fabricated() -> list[dict]:
    """Records of two checkpoints; vlkv right everywhere, vlcache on even seeds, random nowhere."""
    records = []
    right = {"full": 1, "oracle": 1, "all-but-asked": 0, "vlkv": 1, "random": 0}
    for checkpoint in ("a", "b"):
        for task in (*questions.HEADLINE, "turn 1", "decoys"):
            for seed in range(100_000, 100_006):
                for row, budget in [(r, None) for r in ("full", "oracle", "all-but-asked")] + [
                    (r, b) for r in ("vlkv", "vlcache", "random", "h2o") for b in (0.05, 0.1)
                ]:
                    exact = right.get(row, int(seed % 2 == 0))
                    if row == "vlkv" and task == "decoys":
                        exact = 0
                    record = dict(checkpoint=checkpoint, task=task, seed=seed, row=row, budget=budget)
                    record |= dict(answer="", exact=exact, items=float(exact), agreement=float(exact), kl=0.5)
                    record |= dict(first_difference=None if exact else 3, prompt_tokens=300)
                    record["kept"] = budget or 1.0
                    if budget:
                        record["kept_per_layer"] = [round(300 * budget)] * LAYERS
                        record["sparsity_per_layer"] = [0.5, 0.6, 0.7, 0.8]
                        record["kept_per_modality"] = {"text": 40, "image": 80}
                    records.append(record)
    for turn, seed in itertools.product(questions.TURNS, range(100_000, 100_009)):
        # Seeds that no other task has, and no question on which all twins are right.
        for row, budget in [("full", None), ("vlkv", 0.1), ("vlkv, from twins", 0.1)]:
            if row in rows.FROM_TWINS or seed >= 100_006:
                exact = int(row not in rows.FROM_TWINS or seed % 3 == 0)
                record = dict(checkpoint="a", task=turn, seed=seed, row=row, budget=budget, exact=exact)
                record |= dict(agreement=float(exact), kl=0.5, items=float(exact), first_difference=None)
                records.append(record | dict(kept=0.15 if row in rows.FROM_TWINS else 0.1, prompt_tokens=300))
    left = dict(checkpoint="a", task="multi@64", seed=100_000, row="h2o", budget=0.01)
    return [*records, left | {"not_applicable": "94 prompt tokens, fewer than min_prompt_tokens 100"}]


@pytest.fixture(scope="module")
def record() -> dict:
    context = dict(
        command="python -m benchmarks.fidelity", commit="0" * 40, versions={"sglang": "0.5.23"}, cores=4,
        cpu="a CPU", date="2026-01-01", samples=6, seeds=[100_000, 100_005], tuning=False,
        rates={"a": {"requests": 10, "seconds": 1.0, "per_second": 10.0}},
    )  # fmt: skip
    return context | {"summary": statistics.summary(fabricated())}


def test_summary(record):
    entries = {(e["row"], e["budget"], e["checkpoint"]): e for e in record["summary"]["headline"]}
    assert entries["vlkv", 0.1, "all"]["exact"] == [1.0, 1.0, 1.0]
    assert entries["vlcache", 0.1, "all"]["exact"][0] == 0.5
    assert entries["vlcache", 0.1, "a"]["kept_per_layer"] == [0.1] * LAYERS
    assert entries["vlcache", 0.1, "a"]["kept_rows_per_modality"] == {"text": 10.0, "image": 20.0}
    differences = {
        (e["a"], e["b"], e["budget"], e["scope"], e["checkpoint"]): e["difference"]
        for e in record["summary"]["paired"]
    }
    assert differences["vlkv", "random", 0.1, "headline", "all"] == [1.0, 1.0, 1.0]
    assert differences["vlkv", "full", 0.05, "headline", "b"] == [0.0, 0.0, 0.0]
    mean, low, high = differences["vlkv", "vlcache", 0.1, "headline", "all"]
    assert 0 < low < mean == 0.5 < high < 1
    assert record["summary"]["not_applicable"][0]["n"] == 1


def test_later_turns_count_seeds_that_other_tasks_lack_and_nothing_else_does(record):
    summary = record["summary"]
    assert summary["samples"] == 6
    assert {e["n"] for e in summary["cells"] if e["row"] == "vlkv"} == {6}
    assert not [e for e in summary["headline"] if e["row"] in rows.FROM_TWINS]
    assert not [e for e in summary["paired"] if rows.FROM_TWINS.keys() & {e["a"], e["b"]}]
    two, three = summary["later_turns"]
    assert (two["row"], two["turn"], three["turn"], two["n"]) == ("vlkv, from twins", "turn 2", "turn 3", 9)
    assert two["full"] == two["exact"] == [1.0, 1.0, 1.0]
    assert (two["twins"][0], two["kept_twins"][0]) == (pytest.approx(1 / 3, abs=1e-4), 0.15)
    mean, low, high = two["difference"]
    assert mean == pytest.approx(-2 / 3, abs=1e-4) and low < mean < high < 0


def test_questions_that_all_answered():
    a, b = {("a", "turn 2"): {1: 0.0, 2: 1.0}, ("b", "turn 2"): {1: 1.0}}, {("a", "turn 2"): {2: 0.5, 3: 0.0}}
    assert statistics.shared([a, b]) == [{("a", "turn 2"): {2: 1.0}}, {("a", "turn 2"): {2: 0.5}}]


def test_leaderboard_format(record):
    text = leaderboard.render(record, {"A plot": "plot.png"})
    headings = [line[3:] for line in text.splitlines() if line.startswith("## ")]
    assert headings[0] == "How it was measured" and headings[-1] == "Plots"
    widths = [
        [line.count("|") for line in block.splitlines()]
        for block in text.split("\n\n")
        if block.startswith("| ")
    ]
    assert widths and all(len(set(width)) == 1 for width in widths)
    assert "| vlkv | 100 [100, 100] | 100 [100, 100] | 100.0 | 0.500 | 10.00 | 67 |" in text
    assert "| vlcache | decoys | all | 10% |" in text  # where vlkv loses
    assert "| vlcache : h2o |" in text and "no difference shown" in text
    assert "**+100.0 [+100.0, +100.0]**" in text
    assert "| vlkv | 10% | 9 | 100 [100, 100] | 100 [100, 100] | 10.0 | 33 [" in text
    assert "94 prompt tokens" in text and "![A plot](plot.png)" in text


def test_json_is_complete_and_has_a_line_per_entry(record):
    text = leaderboard.compact(record)
    assert json.loads(text) == json.loads(json.dumps(record))
    assert len(text.splitlines()) > len(record["summary"]["cells"])


def test_records_resume_after_an_interruption(tmp_path):
    records = run.Records(tmp_path, resume=False)
    first, second = fabricated()[:2]
    records.add(first)
    (tmp_path / "records.jsonl").open("a").write('{"checkpoint": "a", "ta')
    records = run.Records(tmp_path, resume=True)
    assert records.done == {run.Records.key(first)}
    records.add(second)
    records.pack()
    assert run.Records(tmp_path, resume=True).all == [first, second]
    assert run.Records(tmp_path, resume=False).all == []


def test_quick(tmp_path):
    """A real server and the trained checkpoint: accuracy, references, and exact budgets."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "benchmarks.fidelity", "--quick", "--out", str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    result = json.loads((tmp_path / "fidelity.json").read_text())
    assert {"command", "commit", "versions", "cpu", "seeds", "policies", "summary"} <= set(result)
    assert str(tmp_path) not in (tmp_path / "fidelity.json").read_text()
    assert (tmp_path / "LEADERBOARD.md").read_text().startswith("# Fidelity")
    records = run.Records.read(tmp_path)
    assert not [r for r in records if "not_applicable" in r]
    by_row = {name: [r for r in records if r["row"] == name] for name in {r["row"] for r in records}}
    twins = by_row.pop("vlkv, from twins")
    assert len(twins) == 3 * result["samples"]
    assert {r["prefix"]["kind"] for r in twins if r["task"] != "turn 1"} == {"twin"}
    first = {r["seed"]: r["answer"] for r in by_row["vlkv"] if r["task"] == "turn 1"}
    assert {r["seed"]: r["answer"] for r in twins if r["task"] == "turn 1"} == first
    assert {len(own) for own in by_row.values()} == {5 * result["samples"]}

    def mean(row: str, measure: str) -> float:  # a later turn may read digits off earlier answers
        return float(np.mean([r[measure] for r in by_row[row] if r["task"] in ("single", "multi")]))

    assert mean("full", "exact") >= 0.9
    assert mean("all-but-asked", "exact") <= 0.2 and mean("all-but-asked", "items") <= 0.3
    assert mean("oracle", "exact") >= mean("random", "exact")
    for name in ("vlcache", "vlkv", "h2o", "random"):
        for r in by_row[name]:
            n = r["prompt_tokens"]
            assert sum(r["kept_per_layer"]) == num_tokens(r["budget"], n, LAYERS), name
            assert abs(r["kept"] - r["budget"]) <= 1 / (n * LAYERS)
