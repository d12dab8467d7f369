"""The GPU benchmark: rehearsed on the CPU, honest when a kernel is wrong, right in its arithmetic."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
import zipfile
from contextlib import contextmanager, nullcontext
from importlib import metadata
from inspect import getsource, signature
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

with pytest.MonkeyPatch.context() as patch:
    patch.setenv("TRITON_INTERPRET", "1")  # Triton decides when a kernel is decorated
    from benchmarks.gpu import ceilings
from benchmarks.gpu import (
    compression,
    correctness,
    decode,
    engines,
    goals,
    paper,
    record,
    replay,
    report,
    run,
    serving,
    session,
    storm,
    wheelhouse,
)
from benchmarks.gpu import flashinfer as flashinfer_part
from benchmarks.gpu.pool import Pool, Residents, sets_for
from benchmarks.gpu.record import Deadline, Part, Ratio
from benchmarks.gpu.shapes import MISTRAL, QWEN, TOY_QWEN, UNEVEN, Batch, batches, kept_rows
from benchmarks.gpu.subjects import (
    ATTENTION,
    COMPRESSION,
    COPYING,
    EVERYTHING,
    EXTEND,
    MOVING,
    SCORING,
    SELECTION,
)
from benchmarks.gpu.timing import Clock, Rehearsal, Timing

CLOCK = Rehearsal()


@pytest.fixture(autouse=True)
def inference():
    with torch.inference_mode():
        yield


def rehearsed(*parts: str) -> dict:
    """A record of these parts, run as :mod:`benchmarks.gpu.run` would."""
    found = {"context": record.context(CLOCK), "parts": {}}
    for name in parts:
        part = Part(name, Deadline(60))
        {"ceilings": ceilings, "correctness": correctness}[name].run(part, CLOCK)
        part.ended = True
        found["parts"][name] = part.as_json()
    return found


@pytest.fixture(scope="module")
def checked() -> dict:
    with torch.inference_mode():
        return rehearsed("ceilings", "correctness")


def test_all_kernels_are_right(checked):
    assert report.failed(checked) == []
    names = " ".join(check["name"] for check in checked["parts"]["correctness"]["checks"])
    for kernel in ("index lists", "decode", "extend", "scores by sum", "by max", "zeros", "selection"):
        assert kernel in names
    for kernel in ("gather", "scatter", "merging"):
        assert f"{kernel}" in names
    assert "G=4" in names and "G=7" in names


def two_rows(checked: dict, *rests_on: str, **changes) -> dict:
    """A record with one speedup, one share and a rate: 2x, 50 % and 100 bytes/s of a ceiling of 400.

    Args:
        rests_on: of the row that has them.
    """
    rests_on = list(rests_on or (ATTENTION,))
    timing = Timing(2.0, 2.0, 2.0, 1, None)._asdict()
    rows = [
        {"case": "c", "row": "base", "seconds": timing | {"p50": 2.0}},
        {"case": "c", "row": "ours", "seconds": timing | {"p50": 1.0}, "versus": "base", "share_of": "base"}
        | {"moved": 100, "rests_on": rests_on},
    ]
    peak = [{"case": "device", "row": "copy", "seconds": timing | {"p50": 1.0}, "moved": 400}]
    peak += [{"case": "device", "row": "mm", "seconds": timing | {"p50": 1.0}, "flops": 10}]

    def part(rows: list, checks: list) -> dict:
        lists = dict.fromkeys(("skipped", "notes", "broken"), [])
        return {"seconds": 1, "ended": True, "rows": rows, "checks": checks} | {k: list(v) for k, v in lists.items()}

    parts = {
        "ceilings": part(peak, []),
        "correctness": part([], checked["parts"]["correctness"]["checks"]),
        "decode": part(rows, []),
    }
    return {"context": checked["context"] | {"rehearsal": False}, "parts": parts | changes}


def test_ratios_and_roofline(checked):
    found = two_rows(checked)
    text = report.markdown(found)
    derived = found["parts"]["decode"]["rows"][1]["derived"]
    assert derived["speedup"] == 2.0 and derived["share"] == 0.5
    assert derived["of_ceiling"] == 0.25 and derived["moved_per_s"] == 100
    assert "2.00x vs base" in report.brief(found)
    assert "2.00x vs base" in text and "50.0 % of base" in text and "25 %" in text


def ratios(found: dict) -> list:
    """Of the decode part's rows."""
    report.derive(found)
    names = {"speedup", "share", "of_ceiling", "versus"}
    return [n for row in found["parts"]["decode"]["rows"] for n in names & set(row["derived"])]


def test_no_ratio_without_a_check_of_what_it_rests_on(checked):
    for rests_on in (ATTENTION, "something new"):
        found = two_rows(checked, rests_on)
        checks = found["parts"]["correctness"]["checks"]
        found["parts"]["correctness"]["checks"] = [check for check in checks if check["about"] != [ATTENTION]]
        text = report.markdown(found)
        assert f"{report.HIDDEN}: not checked: {rests_on}" in text and "2.00x" not in text
        assert ratios(found) == []
    cut_off = two_rows(checked)
    cut_off["parts"]["correctness"]["ended"] = False  # there may have been more to check
    assert ratios(cut_off) == []


@pytest.mark.parametrize("name, shown", [("correctness", False), ("decode", True)])
def test_no_ratio_when_correctness_broke_off(checked, name, shown):
    """Another part that breaks off is reported, but says nothing about a kernel's results."""
    found = two_rows(checked)
    found["parts"][name]["broken"] = [{"what": "a case", "traceback": "Traceback\nMemoryError: full"}]
    text = report.markdown(found)
    assert "BROKE OFF: a case: MemoryError: full" in text
    assert (f"{report.HIDDEN}: wrong: {EVERYTHING}" not in text) == bool(ratios(found)) == shown


def test_a_failed_check_hides_what_rests_on_it_and_nothing_else(checked):
    """And says what: a soft one that is about nothing hides nothing, one about a base the ratio alone."""

    def text_with(about: tuple[str, ...] | None, *rests_on: str, base: list[str] = []) -> str:
        found = two_rows(checked, *rests_on)
        part = Part("decode", Deadline(60))
        part.check("a check", False, about=about)
        found["parts"]["decode"]["checks"] = part.checks
        found["parts"]["decode"]["rows"][0]["rests_on"] = base
        return report.markdown(found)

    assert "2.00x vs base" in text_with((), ATTENTION) and "a check** (hides no ratio)" in text_with((), ATTENTION)
    assert "2.00x vs base" in text_with((SCORING,), ATTENTION, MOVING)
    hidden = text_with((SCORING,), ATTENTION, SCORING)
    assert "2.00x" not in hidden and "25 %" not in hidden and f"wrong: {SCORING}" in hidden
    assert f"a check** (hides what rests on {SCORING})" in hidden
    assert f"wrong: {EVERYTHING}" in text_with(None, ATTENTION)  # a check that says nothing else
    held_against = text_with((COPYING,), ATTENTION, base=[COPYING])
    assert "2.00x" not in held_against and f"wrong: {COPYING}" in held_against and "25 %" in held_against


def wrong_decode(monkeypatch) -> None:
    from sglang_vlkv.kernels.ragged_attention.triton import RaggedDecode

    right = RaggedDecode.run
    monkeypatch.setattr(RaggedDecode, "run", lambda *a, **k: right(*a, **k).mul_(1.01))


def wrong_extend(monkeypatch) -> None:
    from sglang_vlkv.kernels.ragged_attention import triton

    right = triton.ragged_extend
    monkeypatch.setattr(triton, "ragged_extend", lambda *a, out, **k: right(*a, **k))  # out is not written


def wrong_indices(monkeypatch) -> None:
    from sglang_vlkv.kernels.ragged_attention.triton import RaggedIndices

    right = RaggedIndices.build

    def build(*arguments):
        indptr, indices = right(*arguments)
        indices[1] = indices[0]
        return indptr, indices

    monkeypatch.setattr(RaggedIndices, "build", build)


def wrong_scores(monkeypatch) -> None:
    from sglang_vlkv.kernels.post_vision import triton

    right = triton.post_vision_scores

    def scores(*a, **k):
        found = right(*a, **k)
        return found._replace(zeros=found.zeros + 1000)

    monkeypatch.setattr(triton, "post_vision_scores", scores)


def wrong_selection(monkeypatch) -> None:
    from sglang_vlkv.kernels.selection import triton

    right = triton.select_rows
    monkeypatch.setattr(triton, "select_rows", lambda *a: right(*a).flip(1))


def wrong_scatter(monkeypatch) -> None:
    from sglang_vlkv.kernels.compaction import triton

    monkeypatch.setattr(triton, "scatter_rows", lambda *a: None)


def broken_gather(monkeypatch) -> None:
    from sglang_vlkv.kernels.compaction import triton

    monkeypatch.delattr(triton, "gather_rows")


def padding_not_zero(monkeypatch) -> None:
    from sglang_vlkv.kernels.ragged_attention.triton import RaggedDecode

    right = RaggedDecode.run

    def run(*arguments, **named):
        right(*arguments, **named)[-1] = 1.0

    monkeypatch.setattr(RaggedDecode, "run", run)


def wrong_mixed_scores(monkeypatch) -> None:
    from sglang_vlkv.kernels.post_vision import triton

    right = triton.post_vision_scores_ragged
    monkeypatch.setattr(triton, "post_vision_scores_ragged", lambda *a: tuple(x.flip(-1) for x in right(*a)))


WRONG = {  # the checks that have to see it, and what they are about
    wrong_decode: ("decode", ATTENTION), wrong_indices: ("decode", ATTENTION),
    padding_not_zero: ("decode", ATTENTION), wrong_extend: ("extend", EXTEND),
    wrong_scores: ("scores", SCORING), wrong_mixed_scores: ("scores", SCORING),
    wrong_selection: ("selection", SELECTION), wrong_scatter: ("moving", MOVING), broken_gather: ("moving", MOVING),
}  # fmt: skip


@pytest.mark.parametrize("make_wrong", WRONG)
def test_a_wrong_kernel_hides_the_ratios_that_rest_on_it(make_wrong, monkeypatch, checked):
    make_wrong(monkeypatch)
    attempt = correctness.attempt
    seen_by, subject = WRONG[make_wrong]
    monkeypatch.setattr(
        correctness, "attempt", lambda part, about, name, *a: attempt(part, about, name, *a) if name.startswith(seen_by)
        else part.check("right", True, about=(about,)),
    )  # fmt: skip
    monkeypatch.setattr(correctness, "models", lambda rehearsal: [TOY_QWEN])
    part = rehearsed("correctness")["parts"]["correctness"]
    found = two_rows(checked, subject, correctness=part)
    text = report.markdown(found)
    assert f"{report.HIDDEN}: wrong: {subject}" in text and "2.00x" not in text and "50.0 %" not in text
    assert ratios(found) == []
    other = ATTENTION if subject == MOVING else MOVING
    assert "speedup" in ratios(two_rows(checked, other, correctness=part))


def test_a_graph_that_ignores_new_lengths_is_found(monkeypatch):
    """The rehearsal replays by running again: a build that sticks to the first lengths stands in for it."""
    from sglang_vlkv.kernels.ragged_attention.triton import RaggedIndices

    right = RaggedIndices.build

    def build(self, table, rows, seq_lens, *others):
        self.first = getattr(self, "first", seq_lens.clone())
        return right(self, table, rows, self.first, *others)

    part = Part("correctness", Deadline(60))
    replay.replaying(part, CLOCK, TOY_QWEN, False)
    assert part.checks and all(check["ok"] for check in part.checks)
    monkeypatch.setattr(RaggedIndices, "build", build)
    part = Part("correctness", Deadline(60))
    replay.replaying(part, CLOCK, TOY_QWEN, False)
    wrong = " ".join(check["name"] for check in part.checks if not check["ok"])
    assert "layer 1, request 1" in wrong and "as the eager step" in wrong and "lengths matter" in wrong


def test_a_storm_is_right_and_sees_a_planted_fault():
    part = Part("storm", Deadline(60))
    storm.storming(part, CLOCK, TOY_QWEN)
    assert len(part.checks) == 4 and all(check["ok"] for check in part.checks), part.checks
    events = part.checks[0]["events"]
    assert set(storm.EVENTS) <= set(events) and all(events.values())


def stale_row(monkeypatch) -> None:
    """Whoever is given the row of a request that is gone still sees its cells."""
    monkeypatch.setattr(storm.DeviceRows, "clear", lambda self, row: None)


def unfenced(monkeypatch) -> None:
    """The schedule stream does not wait until the step has built its lists."""

    def step(self, batch):
        following = self.change()
        self.begin(batch)
        self.end(batch)
        return following

    monkeypatch.setattr(storm.Storm, "step", step)


def scattered_elsewhere(monkeypatch) -> None:
    from sglang_vlkv.kernels.compaction import triton

    right = triton.scatter_rows
    monkeypatch.setattr(triton, "scatter_rows", lambda k, v, cells, rows: right(k, v, cells.roll(1), rows))


def forgotten_move(monkeypatch) -> None:
    """Rows move, and the device goes on reading where they were."""
    move = storm.Storm._move

    def without_telling(self, request):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(storm.Storm, "_set", lambda *arguments: None)
            move(self, request)

    monkeypatch.setattr(storm.Storm, "_move", without_telling)


@pytest.mark.parametrize("fault", [stale_row, unfenced, scattered_elsewhere, forgotten_move])
def test_a_storm_finds_a_fault(fault, monkeypatch):
    fault(monkeypatch)
    found = storm.Storm(TOY_QWEN, CLOCK)
    found.run()
    outputs, wrong = found.wrong()
    assert outputs > 40 and 0 < len(wrong) < outputs


def test_a_storm_of_padding_alone_proves_nothing(monkeypatch):
    monkeypatch.setattr(storm.Storm, "_admit", lambda self, kind: None)
    monkeypatch.setattr(storm, "sizes", lambda clock: storm.Sizes(2, 3, 3, 20, 1))
    part = Part("storm", Deadline(60))
    storm.storming(part, CLOCK, TOY_QWEN)
    assert [check["ok"] for check in part.checks] == [False, True, False, False]


def test_the_streams_of_a_storm_wait_for_each_other(monkeypatch):
    """In SGLang's order: a step for the change before it, the next change for the step's lists alone."""
    order = []

    class Stream(nullcontext):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.name = name

        def wait_stream(self, other) -> None:
            order.append(f"{self.name} waits for {other.name}")

        def wait_event(self, event) -> None:
            order.append(f"{self.name} waits for {event}")

    found = storm.Storm(TOY_QWEN, CLOCK)
    found.streams, found.built = (Stream("forward"), Stream("schedule")), "the lists"
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: order.append(f"on {stream.name}") or stream)
    found._replay = lambda: order.append("replay")
    change = found.change
    monkeypatch.setattr(found, "change", lambda: order.append("change") or change())
    found.run(2)
    step = ["forward waits for schedule", "on forward", "replay", "schedule waits for the lists"]
    step += ["on schedule", "change", "on forward"]
    assert order == ["on schedule", "change", *step, *step]


def test_waiting_for_the_device_is_found(monkeypatch):
    @contextmanager
    def never_waiting():
        yield
        raise RuntimeError("called a synchronizing CUDA operation")

    monkeypatch.setattr(CLOCK, "never_waiting", never_waiting, raising=False)
    part = Part("correctness", Deadline(60))
    replay.without_waiting(part, CLOCK, TOY_QWEN, False)
    assert [check["ok"] for check in part.checks] == [False] and "synchronizing" in part.checks[0]["error"]
    assert part.checks[0]["about"] == []  # slow, and not wrong


def test_a_wrong_compacted_row_refuses_the_papers_ratios(monkeypatch):
    from sglang_vlkv.kernels.compaction import triton

    right = triton.scatter_rows
    monkeypatch.setattr(triton, "scatter_rows", lambda k, v, cells, rows: right(k, v, cells, rows.roll(1, 1)))
    part = Part("paper", Deadline(60))
    decoder = paper.Decoder(paper.TOY_MISTRAL, CLOCK)
    engine = paper.Engine(decoder, CLOCK, paper.Baseline(decoder, CLOCK, Batch("1x2K", (60,)), 1))
    engine.prefill()
    engine.compress()
    with part.about(MOVING):
        paper._check(part, engine, "1x2K", paper.ENGINE_COMPACTED)
    assert [check["ok"] for check in part.checks] == [False, False]
    assert "rows of the prompt and 1 own ones" in part.checks[0]["name"]


def test_an_optional_engine_that_does_not_load_is_skipped_and_a_wrong_one_refuses_its_own_ratios(checked):
    part = Part("decode", Deadline(60))

    def load(part):
        raise ImportError("no such\nlibrary")

    assert not part.attempt_optional("other", "a case", load)
    assert part.skipped == ["a case: ImportError: no such library"] and part.broken == []

    def wrong(part):
        part.add("c", "other", Timing(1.0, 1.0, 1.0, 1, None), moved=100, versus="base")
        part.check("other is right", False)

    assert part.attempt_optional("other", "a case", wrong)
    found = two_rows(checked)
    found["parts"]["decode"]["rows"] += part.rows
    found["parts"]["decode"]["rows"][0]["versus"] = "other"  # nothing is held against it either
    found["parts"]["decode"]["checks"] = part.checks
    text = report.markdown(found)
    rows = found["parts"]["decode"]["rows"]
    assert "speedup" not in rows[0]["derived"] and rows[1]["derived"]["speedup"] == 2.0
    assert rows[2]["derived"] == {"moved_per_s": 100.0, "refused": f"{report.HIDDEN}: wrong: other"}
    assert "other is right" in text and "2.00x" in text and ATTENTION not in text


def test_flashinfer_counts_as_compiled_only_once_it_ran(monkeypatch):
    clock = Rehearsal()
    monkeypatch.setattr(flashinfer_part, "models", lambda rehearsal: [TOY_QWEN])
    monkeypatch.setattr(flashinfer_part, "have_flashinfer_ext", lambda clock: None)

    def broken(*arguments):
        raise RuntimeError("nvcc is not there")

    for engine, compiled in ((broken, False), (lambda *arguments: None, True)):
        monkeypatch.setattr(flashinfer_part, "_engine", engine)
        part = Part("flashinfer", Deadline(60))
        flashinfer_part.run(part, clock)
        assert clock.flashinfer_is_compiled == part.extra["compiled"] == compiled == (part.skipped == [])
        assert part.checks == []


def goal_record(checked: dict, seconds: float) -> dict:
    """A row per goal: 1x and 100 bytes/s of a copy's 400 at one second, all proportional."""
    found, timing = two_rows(checked), Timing(seconds, seconds, seconds, 2, 0.0)
    part = Part("decode", Deadline(60))
    part.add("c", "stock", Timing(1.0, 1.0, 1.0, 2, 0.0))
    for tag, goal in goals.GOALS.items():
        ratios = {goal.metric: Ratio("c", ["stock", "not there"])}
        with part.about(ATTENTION):
            part.expect(tag, "c", tag)
            part.add("c", tag, timing, moved=400, share_of="stock", versus="stock", ratios=ratios, goals=[tag])
    found["parts"]["decode"] = part.as_json()
    return found


def verdicts(found: dict) -> list[str]:
    report.derive(found)
    return [verdict for verdict, _ in goals.verdicts(found).values()]


def test_goals_pass_fail_or_are_not_measured(checked):
    bounds = [goal.bound for goal in goals.GOALS.values()]
    number = len(bounds)
    good = ["measured" if bound is None else "pass" for bound in bounds]
    found = goal_record(checked, 1e-6)
    assert verdicts(found) == good and goals.all_met(found)
    found = goal_record(checked, 100.0)
    assert verdicts(found) == ["measured" if bound is None else "FAIL" for bound in bounds]
    assert not goals.all_met(found)
    assert verdicts(two_rows(checked)) == ["not measured"] * number
    found = goal_record(checked, 1e-6)
    found["parts"]["correctness"]["checks"].append({"name": "x", "ok": False, "about": [ATTENTION]})
    assert verdicts(found) == ["not measured"] * number and f"wrong: {ATTENTION}" in goals.lines(found)[0]
    found["parts"]["correctness"]["checks"].pop()
    found["context"]["rehearsal"] = True
    assert verdicts(found) == ["not measured"] * number
    found = goal_record(checked, 1e-6)
    (row,) = (row for row in found["parts"]["decode"]["rows"] if goals.EQUAL_BYTES in row.get("goals", ()))
    worse = row | {"row": "worse", "seconds": Timing(1.0, 1.0, 1.0, 2, 0.0)._asdict()}
    found["parts"]["decode"]["rows"].append(worse)  # the worst counts: 1.0x for equal bytes is near enough
    text = report.markdown(found)
    assert "worst of 2: 1x, c, worse against stock)" in text and "- pass: uneven layers cost at most 3 %" in text
    assert f"- {good.count('pass')} pass, {good.count('measured')} measured" in text


def test_no_goal_passes_by_absence(checked):
    """A row that was expected and is missing leaves its goal open, unless another one misses it already."""
    tag = goals.EQUAL_BYTES
    at = list(goals.GOALS).index(tag)
    found = goal_record(checked, 1e-6)
    found["parts"]["decode"]["expected"][tag].append(["another case", "ours"])
    assert verdicts(found)[at] == "not measured" and not goals.all_met(found)
    assert "1 of 2 are missing, among them another case, ours: was not measured; worst of 1" in goals.lines(found)[at]
    assert verdicts(found)[at + 1] == "pass"
    found = goal_record(checked, 100.0)
    found["parts"]["decode"]["expected"][tag].append(["another case", "ours"])
    assert verdicts(found)[at] == "FAIL"
    found = goal_record(checked, 1e-6)
    (row,) = (row for row in found["parts"]["decode"]["rows"] if tag in row.get("goals", ()))
    row["ratios"] = {goals.STOCK_RATIO: Ratio("c", ["stock", "SGLang"], ["FlashInfer", "SGLang"])}
    assert verdicts(found)[at] == "not measured"
    assert "none of FlashInfer, SGLang ran and was right" in goals.lines(found)[at]
    found["parts"]["decode"]["rows"].append(found["parts"]["decode"]["rows"][0] | {"row": "SGLang"})
    assert verdicts(found)[at] == "pass"
    found["parts"]["decode"]["rows"][-1]["rests_on"] = ["SGLang"]  # which was not checked
    assert verdicts(found)[at] == "not measured"


def rehearsed_decode(monkeypatch, stock: dict) -> dict:
    """A record of one batch whose cases are those of the goals."""
    monkeypatch.setattr(decode, "GOAL_TOKENS", 64)
    monkeypatch.setattr(decode, "GOAL_LAYERS", TOY_QWEN.layers)
    monkeypatch.setattr(engines, "stock_engines", lambda clock: stock)
    part, pool = Part("decode", Deadline(60)), Pool(TOY_QWEN, 400, CLOCK)
    batch = Batch("b", (32, 32))
    decode.expect(part, TOY_QWEN, batch)
    for uneven in (False, True):
        decode._case(part, CLOCK, pool, batch, 0.1, uneven)
    assert part.broken == [] and all(check["ok"] for check in part.checks)
    copy = {"case": "device", "row": "copy", "seconds": Timing.of([1.0])._asdict(), "moved": 400}
    mm = {"case": "device", "row": "mm", "seconds": Timing.of([1.0])._asdict(), "flops": 10}
    peak = Part("ceilings", Deadline(60))
    peak.rows = [copy, mm]
    peak.check("x", True, about=(COPYING,))
    parts = {"decode": part.as_json(), "ceilings": peak.as_json()}
    return {"context": record.context(CLOCK) | {"rehearsal": False}, "parts": parts}


def test_every_goal_has_rows_in_a_rehearsed_case(monkeypatch):
    """Tags and bases are those that the parts write: a goal's row finds what it is held against."""
    whole = rehearsed_decode(monkeypatch, {engines.SDPA: engines.Sdpa, engines.SGLANG: engines.Sdpa})
    found = dict(zip(goals.GOALS, verdicts(whole), strict=True))
    measured = [found[t] for t in (goals.DECODE, goals.EQUAL_BYTES, goals.UNEVEN_COST, goals.INDEX)]
    assert "not measured" not in measured
    rows = whole["parts"]["decode"]["rows"]
    by_index = [row["derived"].get("of_copy_by_index") for row in rows if row["row"] == engines.OURS]
    assert len(by_index) == 2 and all(by_index)


def test_sdpa_alone_is_no_stock_engine(monkeypatch):
    whole = rehearsed_decode(monkeypatch, {engines.SDPA: engines.Sdpa})
    found = dict(zip(goals.GOALS, verdicts(whole), strict=True))
    assert found[goals.EQUAL_BYTES] == "not measured" and found[goals.DECODE] != "not measured"
    assert f"none of {engines.FLASHINFER}{decode.EQUAL}, {engines.SGLANG}{decode.EQUAL}" in report.markdown(whole)
    sdpa = [row for row in whole["parts"]["decode"]["rows"] if row["row"] == engines.SDPA + decode.EQUAL]
    assert len(sdpa) == 1 and "refused" not in sdpa[0]["derived"]  # it was checked, and is right


def test_a_slow_prefill_makes_no_small_share(monkeypatch):
    """The compression goal is judged beside cuDNN's or FlashAttention 3's attention, or not at all."""
    for timed in ({compression.CUDNN}, {compression.FA3, "x"}):
        assert compression._goals(Part("compression", Deadline(60)), "c", 32768, timed) == [goals.COMPRESSION]
    part = Part("compression", Deadline(60))
    assert compression._goals(part, "c", 8192, {"torch SDPA"}) == [] == part.skipped
    assert compression._goals(part, "c", 32768, {"torch SDPA, FlashAttention"}) == [] and part.skipped
    monkeypatch.setattr(compression, "GOAL_LENGTH", 24)
    part = Part("compression", Deadline(60))
    compression._case(part, CLOCK, TOY_QWEN, 24)
    assert [row for row in part.rows if row.get("goals")] == [] and "the goal" in part.skipped[-1]
    rests_on = {row["row"].split(",")[0]: row["rests_on"] for row in part.rows}
    assert rests_on["all of it with budgets"] == list(COMPRESSION) and rests_on["selection"] == [SELECTION]
    assert rests_on["scoring"] == [SCORING] and rests_on["gather and scatter"] == [MOVING]


def lost_device(part, clock) -> None:
    """A part after which the device answers no more."""
    part.add("c", "measured before", Timing.of([1.0]))

    def error():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    clock.sync = clock.free_bytes = error
    error()


def test_a_lost_device_keeps_what_was_measured(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(run, "PARTS", {"ceilings": 0.3, "decode": 0.4})
    monkeypatch.setattr(run, "ALWAYS", ("ceilings",))
    monkeypatch.setattr(ceilings, "run", lost_device)
    monkeypatch.setattr(decode, "run", lambda part, clock: pytest.fail("the device is lost"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("benchmarks.gpu.timing.Clock", Rehearsal)
    assert run.main(["--out", str(tmp_path), "--parts", "decode", "--seconds", "60"]) == 4
    saved = json.loads((tmp_path / "gpu.json").read_text())
    assert saved["ended"] == run.DEVICE_LOST and list(saved["parts"]) == ["ceilings"]
    assert saved["parts"]["ceilings"]["rows"][0]["row"] == "measured before"
    text = (tmp_path / "gpu.md").read_text()
    assert "The run: device lost." in text and "illegal memory access" in text
    assert "device lost" in capsys.readouterr().err


def test_the_record_says_cut_off_until_the_run_is_whole(monkeypatch, tmp_path):
    seen = []

    def part_of(part, clock):
        part.add("c", "r", Timing.of([1.0]))
        seen.append((json.loads((tmp_path / "gpu.json").read_text())["ended"], part.deadline.left()))

    monkeypatch.setattr(run, "PARTS", {"ceilings": 1.0})
    monkeypatch.setattr(run, "ALWAYS", ())
    monkeypatch.setattr(ceilings, "run", part_of)
    args = run.arguments(["--parts", "ceilings", "--seconds", "60"])
    whole = run.Run(args, CLOCK, tmp_path, time.monotonic())
    whole.go()
    assert seen[0][0] == run.CUT_OFF and 30 < seen[0][1] <= 60 - run.SPARE_SECONDS
    assert json.loads((tmp_path / "gpu.json").read_text())["ended"] == run.WHOLE
    assert "The run: whole." in (tmp_path / "gpu.md").read_text()


def test_a_run_that_is_cut_off_ends_its_server():
    """A server is a session of its own; its processes end with the run's."""
    code = """
import subprocess
from benchmarks.gpu.run import Run
server = subprocess.Popen(["sh", "-c", "sleep 60 & echo $!; wait"], start_new_session=True, stdout=subprocess.PIPE)
print(server.pid, server.stdout.readline().decode().strip(), flush=True)
Run.cut_off(None)
"""
    ended = subprocess.run([sys.executable, "-c", code], cwd=record.ROOT, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 3 and "cut off" in ended.stderr
    assert all(has_ended(pid) for pid in ended.stdout.split())


def test_a_run_with_a_wrong_kernel_exits_with_1_and_a_later_one_remembers(monkeypatch, tmp_path, capsys):
    """A rehearsal writes where it is told, and else nothing; ``--after`` goes on with what was written."""
    monkeypatch.setattr(run, "PARTS", {"ceilings": 0.5, "correctness": 0.5})
    monkeypatch.setattr(correctness, "models", lambda rehearsal: [TOY_QWEN])
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    results = set((record.ROOT / "benchmarks" / "results").iterdir())
    arguments = ["--rehearse", "--seconds", "120", "--parts"]
    assert run.main([*arguments, "correctness"]) == 0
    assert "its times mean nothing" in capsys.readouterr().out
    assert set((record.ROOT / "benchmarks" / "results").iterdir()) == results
    wrong_scatter(monkeypatch)
    file = tmp_path / "gpu.json"
    assert run.main([*arguments, "correctness", "--out", str(tmp_path)]) == 1
    assert f"hides what rests on {MOVING}" in capsys.readouterr().out
    before = json.loads(file.read_text())
    assert before["parts"]["correctness"]["ended"] and before["context"]["rehearsal"]

    again = ["--out", str(tmp_path), "--after", str(file)]
    assert run.main([*arguments, "ceilings", *again]) == 1
    after = json.loads(file.read_text())
    assert after["ended"] == run.WHOLE and list(after["parts"]) == ["ceilings", "correctness"]
    assert after["parts"]["correctness"] == before["parts"]["correctness"]
    assert after["parts"]["ceilings"]["seconds"] is not None and "FAILED" in (tmp_path / "gpu.md").read_text()
    capsys.readouterr()
    file.write_text(json.dumps(after | {"context": after["context"] | {"sources_sha256": "another"}}))
    assert run.main([*arguments, "ceilings", *again]) == 2
    assert "is a record of other sources_sha256: another, not" in capsys.readouterr().err
    file.unlink()
    assert run.main([*arguments, "ceilings", *again]) == 2 and "is not there" in capsys.readouterr().err


def test_the_exit_status_says_whether_every_goal_was_met(checked, capsys):
    def status(found: dict, **more) -> int:
        report.derive(found)
        return run.ending(found | {"ended": run.WHOLE} | more, goals=True)

    assert status(goal_record(checked, 1e-6)) == run.WELL == 0
    assert status(goal_record(checked, 100.0)) == run.GOALS_OPEN == 5
    assert status(two_rows(checked)) == run.GOALS_OPEN and "not measured" in capsys.readouterr().err
    assert run.ending(two_rows(checked) | {"ended": run.WHOLE}, goals=False) == 0
    found = goal_record(checked, 1e-6)
    found["parts"]["decode"]["checks"] = [{"name": "soft", "ok": False, "about": []}]
    assert status(found) == run.FAILED == 1 and goals.all_met(found)
    assert status(goal_record(checked, 1e-6), ended=run.DEVICE_LOST) == run.LOST == 4


def test_without_a_gpu_it_says_so(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert run.main([]) == 2
    assert "--rehearse" in capsys.readouterr().err


def test_parts_past_their_time_are_skipped_with_a_reason():
    part = Part("decode", Deadline(0.0))
    assert not part.has(5, "1x32K")
    assert "1x32K" in part.skipped[0] and "5" in part.skipped[0]


def test_percentiles_and_spread():
    timing = Timing.of([1.0, 2.0, 3.0], [4.0, 5.0, 6.0])
    assert (timing.p20, timing.p50, timing.p80) == pytest.approx((2.0, 3.5, 5.0))
    assert timing.samples == 6 and timing.spread == pytest.approx(1.5)
    assert Timing.of([1.0]).spread is None
    assert timing.scaled(2).p80 == pytest.approx(10.0)


def test_the_clock_on_a_stand_in_for_cuda(monkeypatch):
    """Each batch is queued behind a wait, works rotate, and a graph replays what it captured."""
    calls = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = len(calls)

        def elapsed_time(self, end) -> float:
            return float(end.at - self.at)

    class Stream(nullcontext):
        def wait_stream(self, other) -> None:
            pass

    class CUDAGraph:
        def replay(self) -> None:
            calls.append("replay")

    properties = SimpleNamespace(L2_cache_size=1 << 20, multi_processor_count=132)
    stand_ins = {
        "get_device_properties": lambda device: properties,
        "synchronize": lambda: None,
        "Event": Event,
        "_sleep": lambda cycles: calls.append("wait"),
        "Stream": Stream,
        "current_stream": Stream,
        "stream": lambda stream: stream,
        "CUDAGraph": CUDAGraph,
        "graph": lambda graph: nullcontext(),
        "empty_cache": lambda: None,
        "mem_get_info": lambda: (7, 8),
        "max_memory_allocated": lambda: 5,
        "reset_peak_memory_stats": lambda: calls.append("reset"),
    }
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    clock = Clock()
    assert (clock.l2_bytes, clock.num_sms, clock.free_bytes()) == (1 << 20, 132, 7)
    clock.capture(lambda: calls.append("work"), times=3)()
    assert calls == ["work"] * 5 + ["replay"]  # twice to warm up, three times captured
    assert clock.peak_bytes() == 5 and calls.pop() == "reset"
    calls.clear()
    timing = clock.measure(lambda: calls.append("a"), lambda: calls.append("b"), per=10, seconds=0.0)
    assert timing.p50 == pytest.approx(1e-4) and timing.spread == 0.0
    batch = ["wait", "a", "b", "a", "b", "a"]
    assert calls == ["a", "b", "a", *batch, *batch] and timing.samples == 10


def test_bytes_of_a_step():
    """128 KiB per token and layer sum for Mistral (ALGORITHMS, the byte model), 56 KiB for Qwen."""
    assert MISTRAL.row_bytes * MISTRAL.layers == 128 << 10
    assert QWEN.row_bytes * QWEN.layers == 56 << 10
    pool = Pool(TOY_QWEN, 400, CLOCK)
    residents = Residents(pool, Batch("b", (60, 40)), 0.1, True, 2)
    of_first_set = [len(residents.cells(row, layer)) for row in (0, 1) for layer in range(2)]
    assert residents.num_rows == sum(of_first_set) == 2 * 2 * 32 + round(0.1 * 60 * 2) + round(0.1 * 40 * 2)
    assert residents.moved == residents.num_rows * (TOY_QWEN.row_bytes + 4)
    cells = torch.cat([residents.cells(row, layer) for row in range(4) for layer in range(2)])
    assert len(cells.unique()) == len(cells)  # no two requests, layers or sets share a row


def test_uneven_layers_keep_the_same_total():
    even, uneven = (kept_rows(32, 32768, 0.1, u) for u in (False, True))
    assert sum(even) == sum(uneven) == round(0.1 * 32 * 32768)
    assert max(even) - min(even) <= 1
    steps = sorted(uneven, reverse=True)
    assert steps[1] / steps[0] == pytest.approx(UNEVEN, rel=0.01)


@pytest.mark.parametrize("model", [MISTRAL, QWEN])
def test_nothing_is_served_from_the_l2_cache(model):
    l2 = 60 << 20
    rows = 420_000
    for batch in batches(rehearsal=False):
        sets = sets_for(model, batch, 0.1, rows, l2)
        step = 0.1 * batch.tokens * model.layers * model.row_bytes
        assert sets * step >= 4 * l2
    most = max(batch.tokens for batch in batches(rehearsal=False))
    assert most >= 400_000 and most * model.layers * model.row_bytes < 70 * 2**30


def test_the_engine_path_and_the_baseline_agree():
    part = Part("paper", Deadline(60))
    decoder = paper.Decoder(paper.TOY_MISTRAL, CLOCK)
    done = {}
    paper._workload(part, CLOCK, decoder, "1x2K", Batch("1x2K", (60,)), 3, done)
    assert all(check["ok"] for check in part.checks) and len(done) == 4
    (close,) = (check for check in part.checks if "relative_difference" in check)
    assert close["relative_difference"] < 1e-4  # in float32
    for rows in ("HF-style, compacted, as many", "engine path, compacted, as many", "60 rows of the prompt and 4 own"):
        assert any(rows in check["name"] for check in part.checks)
    quoted = [row["paper_speedup"] for row in part.rows if "paper_speedup" in row]
    assert quoted == list(paper.PAPER["1x2K"])
    kernels = {"name": "x", "ok": True, "about": [ATTENTION, *COMPRESSION]}

    def shown() -> dict[str, tuple[bool, bool]]:
        """Of each decode row, whether it has a speedup against its own path, and one against the other."""
        parts = {"paper": part.as_json(), "decode": part.as_json() | {"rows": [], "checks": [kernels]}}
        report.derive({"context": {"rehearsal": False}, "parts": parts})
        rows = [row for row in part.rows if paper.DECODE in row["row"]]
        return {
            row["row"].split(":")[0]: ("speedup" in row["derived"], paper.TOGETHER in row["derived"].get("ratios", {}))
            for row in rows
        }

    everything = {paper.HF: (False, False), paper.HF_COMPACTED: (True, False)}
    everything |= {paper.ENGINE: (False, True), paper.ENGINE_COMPACTED: (True, True)}
    assert shown() == everything
    close["ok"] = False  # hides what compares the two paths, and nothing else
    assert shown() == everything | {paper.ENGINE: (False, False), paper.ENGINE_COMPACTED: (True, False)}
    close["ok"], kernels["ok"] = True, False  # Hugging Face-style rows use no kernel of ours
    assert shown() == everything | {paper.ENGINE: (False, False), paper.ENGINE_COMPACTED: (False, False)}
    kernels["ok"] = True
    paper._count(part, "1x2K", paper.HF_COMPACTED, Batch("1x2K", (60,)), 2, [[6, 5]])
    assert shown() == everything | {paper.HF_COMPACTED: (False, False)}


def test_the_papers_goals_compare_code_with_itself():
    rows = [row for of in paper.GOALS.values() for row in of]
    assert rows == [paper.HF_COMPACTED, paper.ENGINE_COMPACTED] * 2
    assert all(goals.GOALS[goal].metric == "speedup" for of in paper.GOALS.values() for goal in of.values())


def test_the_flashinfer_engines_are_called_as_they_are_declared(monkeypatch):
    """Without a GPU they cannot run: stand-ins with their signatures attend in plain torch."""
    flashinfer, ours = pytest.importorskip("flashinfer"), pytest.importorskip("flashinfer_ext")
    from sglang_vlkv.kernels.ragged_attention.triton import RaggedDecode

    def declared(function, *arguments, **named) -> dict:
        return signature(function).bind(*arguments, **named).arguments

    def our_engine(*arguments, **named):
        given = declared(ours_decode, *arguments, **named)
        assert given["q_dtype"] == given["kv_dtype"] == CLOCK.dtype
        names = "num_layers", "max_requests", "num_q_heads", "num_kv_heads", "head_dim", "device"
        return RaggedDecode(**{name: given[name] for name in names}, num_sms=2)

    class Stock:
        def __init__(self, *arguments, **named) -> None:
            declared(stock.__init__, self, *arguments, **named)

        def plan(self, *arguments, **named) -> None:
            self.given = declared(stock.plan, self, *arguments, **named)
            for name in ("q_data_type", "kv_data_type", "sm_scale"):
                assert f"        {name}: " in getsource(stock)  # plan() hands keywords on, unchecked
            self.scale = named["sm_scale"]

        def run(self, q, kv, out) -> None:
            declared(stock.run, self, q, kv, out=out)
            indptr, indices = self.given["indptr"].tolist(), self.given["indices"].long()
            for request, (start, end) in enumerate(zip(indptr, indptr[1:])):
                k, v = (x[indices[start:end], 0] for x in kv)
                out[request] = correctness.attend(q[request : request + 1], k, v, self.scale)[0]

    ours_decode, stock = ours.RaggedDecode, flashinfer.BatchDecodeWithPagedKVCacheWrapper
    monkeypatch.setattr(ours, "RaggedDecode", our_engine)
    monkeypatch.setattr(flashinfer, "BatchDecodeWithPagedKVCacheWrapper", Stock)
    monkeypatch.setattr(CLOCK, "flashinfer_is_compiled", True)
    for module in (engines, flashinfer_part):
        monkeypatch.setattr(module, "have_flashinfer_ext", lambda clock: None)
    monkeypatch.setattr(engines, "stock_engines", lambda clock: {engines.FLASHINFER: engines.StockFlashInfer})
    part = Part("decode", Deadline(60))
    correctness.decoding(part, CLOCK, TOY_QWEN, True)
    for alpha in (1.0, 0.1):
        decode._case(part, CLOCK, Pool(TOY_QWEN, 400, CLOCK), Batch("b", (40, 24)), alpha, False)
    assert part.broken == [] and all(check["ok"] for check in part.checks)
    rows = {(row["row"], row["alpha"]) for row in part.rows if "alpha" in row}
    assert {(engines.FLASHINFER, 1.0), (engines.OURS_FLASHINFER, 1.0), (engines.OURS_FLASHINFER, 0.1)} <= rows


def test_flashinfers_check_writes_as_it_goes_and_is_not_well_by_absence(monkeypatch, tmp_path, capsys):
    """On a stand-in for a GPU: what was checked when the seconds are over is written, and is not all."""
    from flashinfer_ext import check

    cases, file = list(check.cases()), tmp_path / "check.json"
    decodes = [case[1:] for case in cases if case[0] is check.check_decode]
    assert len(cases) == len(set(cases)) and {size for _, size in decodes} == set(check.BATCH_SIZES)
    assert len(decodes) == len(check.SHAPES) * len(check.BATCH_SIZES) and len(cases) == len(decodes) + 3
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(check.upstream, "check", lambda device: "0.7.2")
    monkeypatch.setattr(check, "plan_microseconds", lambda batch_size: 1.0)
    written, ok = [], [True]

    def attempt(*case) -> dict:
        written.append(json.loads(file.read_text())["unchecked"] if file.exists() else None)
        return {"ok": ok[0]}

    monkeypatch.setattr(check, "attempt", attempt)
    assert check.main(["--json", str(file)]) == 0
    assert written == [None, *range(len(cases) - 1, 0, -1)]
    whole = json.loads(file.read_text())
    assert whole["ok"] and whole["unchecked"] == 0 and len(whole["checks"]) == len(cases) and whole["plan_us"]
    assert check.main(["--json", str(file), "--seconds", "-1"]) == 5
    assert json.loads(file.read_text())["unchecked"] == len(cases) and not json.loads(file.read_text())["ok"]
    ok[0] = False
    assert check.main([]) == 1


def test_what_a_served_burst_says():
    from benchmarks.common import Streamed

    answers = [Streamed(0.5, [0.1, 0.1], {"completion_tokens": 3}, "") for _ in range(2)]
    part = Part("serving", Deadline(60))
    bursts = [serving.Burst(2.0, answers, [1, 2]), serving.Burst(4.0, answers, [2])]
    for row in (serving.STOCK, serving.OURS):
        serving.summarise(part, "small", row, bursts, {})
    first = part.rows[0]
    assert first["output_tokens_per_s"] == [3.0, 1.5] and first["peak_running"] == 2
    assert part.rows[3]["versus"] == part.rows[0]["row"]
    assert serving.running_in("Decode batch, #running-req: 7, x\nPrefill, #running-req: 9") == [7]


def test_a_server_that_ignores_its_policy_or_cuts_its_answers_short_is_found():
    from benchmarks.common import Streamed

    def found(row: str, tokens: int, **report) -> list[bool]:
        answers = [Streamed(0.5, [], {"completion_tokens": serving.OUTPUTS} | report, "")] * 2
        answers.append(Streamed(0.5, [], {"completion_tokens": tokens} | report, ""))
        part = Part("serving", Deadline(60))
        serving.check_server(part, "small", row, [serving.Burst(2.0, answers, [])])
        return [check["ok"] for check in part.checks]

    report = {"kv_policy": {"policy": "vlcache"}}
    assert found(serving.OURS, serving.OUTPUTS, **report) == [True, True] == found(serving.STOCK, serving.OUTPUTS)
    assert found(serving.OURS, 1, **report) == [True, False]
    assert found(serving.OURS, serving.OUTPUTS) == [False, True] == found(serving.STOCK, serving.OUTPUTS, **report)


def test_a_server_is_started_as_a_user_would(monkeypatch):
    from benchmarks.gpu import server

    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    monkeypatch.setenv("SOMETHING_SECRET", "x")
    environment = server.environment({"SGLANG_PLUGINS": "none"})
    assert "TORCHDYNAMO_DISABLE" not in environment and environment["SOMETHING_SECRET"] == "x"
    recorded = server.recorded(environment)
    assert recorded["SGLANG_PLUGINS"] == "none" and recorded["NCCL_DEBUG"] == "INFO"
    assert "SOMETHING_SECRET" not in recorded
    started = {}
    monkeypatch.setattr("subprocess.Popen", lambda command, **named: started.update(named, command=command))
    monkeypatch.setattr(server.UsersServer, "_wait_until_ready", lambda self, timeout: None)
    users = server.UsersServer(Path("m"), "--load-format", "dummy", env={}, start_timeout=1)
    assert started["start_new_session"] and started["command"][-2:] == ["--load-format", "dummy"]
    flags = {word for word in started["command"] if word.startswith("--")}
    assert flags == {"--model-path", "--host", "--port", "--load-format"}
    users.log_path.unlink()
    assert serving.POOLS["default pool"] is None


def test_a_requests_pictures_differ(monkeypatch):
    monkeypatch.setattr(serving, "VISUAL_TOKENS", 4)
    pictures = [p.tobytes() for request in range(2) for p in serving.different_pictures(request)]
    assert len(set(pictures)) == 2 * serving.PICTURES


def test_a_checkpoint_of_real_sizes_without_weights(tmp_path):
    serving.checkpoint(tmp_path, QWEN)
    text = json.loads((tmp_path / "config.json").read_text())
    text = text.get("text_config", text)
    assert (text["num_hidden_layers"], text["hidden_size"], text["intermediate_size"]) == (28, 3584, 18944)
    assert not list(tmp_path.glob("*.safetensors"))


def step(code: str, seconds: float = 20, **more) -> session.Step:
    return session.Step(seconds, command=(sys.executable, "-S", "-c", code), **more)


def test_a_session_goes_on_after_a_step_that_crashes_or_hangs(tmp_path):
    """Each is recorded as what it was, its children end with it, and the record is written after every step."""
    out, child = tmp_path / "out", tmp_path / "child"
    hanging = (
        "import subprocess, sys, time\n"
        f"child = subprocess.Popen(['sleep', '60']); open({str(child)!r}, 'w').write(str(child.pid))\n"
        "print('before it hung', flush=True); time.sleep(60)"
    )
    steps = {
        "good": step("print('all is well')"),
        "crashing": step("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"),
        "hanging": step(hanging, seconds=1.5),
        "failing": step("raise SystemExit(1)"),
        "lost": step("raise SystemExit(4)"),
        "strange": step("raise SystemExit(77)"),
        "last": step(f"import json; assert len(json.load(open({str(out / 'session.json')!r}))['steps']) == 7"),
    }
    ran = session.Session(out, 60, tmp_path / "no kit", steps=steps)
    assert ran.go(list(steps)) == 1
    saved = json.loads((out / "session.json").read_text())["steps"]
    states = {name: found["state"] for name, found in saved.items()}
    assert states == {
        "good": "whole",
        "crashing": "crashed: SIGSEGV",
        "hanging": "killed: it took more than 2 s",
        "failing": "a check failed, or something broke off",
        "lost": "the device was lost",
        "strange": "crashed: exit status 77",
        "last": "whole",
    }
    assert saved["good"]["output"] == "all is well\n" and "before it hung" in saved["hanging"]["output"]
    assert "all is well" in (out / "session.log").read_text()
    assert has_ended(child.read_text())
    text = (out / "session.md").read_text()
    assert "| crashing | crashed: SIGSEGV |" in text and "Nothing was measured." in text


def has_ended(pid: str, seconds: float = 10) -> bool:
    deadline = time.monotonic() + seconds
    stat = Path("/proc", pid, "stat")
    while stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z":
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def test_a_session_that_is_ended_ends_its_step(tmp_path):
    code = f"""
import sys
from pathlib import Path
from benchmarks.gpu import session
hanging = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
session.STEPS["storm"] = session.Step(50, command=(sys.executable, "-S", "-c", hanging))
session.main(["--out", {str(tmp_path)!r}, "--steps", "storm"])
"""
    process = subprocess.Popen([sys.executable, "-c", code], cwd=record.ROOT)
    log, deadline = tmp_path / "session.log", time.monotonic() + 30
    while not log.exists() or not log.read_text().split()[-1:] or not log.read_text().split()[-1].isdigit():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    process.terminate()
    assert process.wait(timeout=20) == 143 and has_ended(log.read_text().split()[-1])
    saved = json.loads((tmp_path / "session.json").read_text())["steps"]
    assert saved["storm"]["state"] == session.RUNNING and saved["storm"]["ok"] is None


def test_a_session_is_well_only_where_every_step_ran_and_every_goal_was_met(tmp_path):
    steps = {"first": step(""), "second": step("")}
    gpu = tmp_path / "gpu.json"

    def status(seconds: float, verdict: str | None, names: list[str]) -> int:
        if verdict is not None:
            gpu.write_text(json.dumps({"goals": {goals.DECODE: [verdict, "a row"]}}))
        return session.Session(tmp_path, seconds, tmp_path, steps=steps).go(names)

    assert status(60, None, ["first"]) == 5  # nothing was measured
    assert status(60, "pass", ["first"]) == 0
    assert status(60, "not measured", ["first"]) == status(60, "FAIL", ["first"]) == 5
    assert status(0, "pass", ["second"]) == 5
    saved = json.loads((tmp_path / "session.json").read_text())
    assert saved["steps"]["second"]["state"] == "not run: 0 s were left" and saved["steps"]["first"]["ok"]
    assert status(60, "pass", ["second"]) == 0  # a later call adds what an earlier one had no time for
    assert "- pass: ragged decode" in (tmp_path / "session.md").read_text()


def test_what_a_step_is_given(tmp_path, monkeypatch):
    """Seconds that end before the session's own, the record that is there, and an allocator that hides nothing."""
    made = session.Session(tmp_path, 700, tmp_path / "kit")
    made.environment = {}
    decode_step = made._command(session.STEPS["decode"], 100.0, "site")
    assert decode_step[decode_step.index("--seconds") + 1] == "97" and "--rehearse" not in decode_step
    assert decode_step[decode_step.index("--after") + 1] == f"{tmp_path}/gpu.json"
    assert "--after" not in made._command(session.STEPS["correctness"], 100.0, "site")
    monkeypatch.setattr(session, "sanitizer", lambda: "/cuda/compute-sanitizer")
    memcheck = made._command(session.STEPS["memcheck"], 50.0, "site")
    assert memcheck[0] == "/cuda/compute-sanitizer" and "--small" in memcheck
    assert made._environment("memcheck") == {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} and not made._environment("storm")
    for name, found in session.STEPS.items():
        words = made._command(found, found.seconds, "site")
        assert not any("{" in word for word in words), name
        if found.parts:
            args = run.arguments(words[words.index("benchmarks.gpu.run") + 1 :])
            assert args.parts == list(found.parts) and args.seconds < found.seconds
    assert "is not there" in made._why_not("install", session.STEPS["install"], 100)
    made.flashinfer = False
    assert made._why_not("flashinfer", session.STEPS["flashinfer"], 100) == "FlashInfer is not there"


def test_a_sanitizer_without_a_summary_found_nothing_out():
    clean = "========= ERROR SUMMARY: 0 errors"
    assert session.ending("memcheck", 0, clean) == ("whole", True)
    assert session.ending("memcheck", 0, "Device not supported")[1] is False
    assert session.ending("memcheck", session.MEMORY_ERRORS, "ERROR SUMMARY: 3 errors") == ("memory errors", False)
    assert session.ending("flashinfer check", 5, "")[1] is None and session.ending("decode", 5, "")[1] is True


def test_a_step_is_blamed_for_its_own_parts_only(tmp_path):
    wrong = {"checks": [{"ok": False}], "broken": []}
    right = {"checks": [{"ok": True}], "broken": []}
    record_of = {"parts": {"correctness": wrong, "decode": right}, "goals": {}}
    (tmp_path / "gpu.json").write_text(json.dumps(record_of))
    steps = {name: step("raise SystemExit(1)")._replace(parts=(name,)) for name in ("correctness", "decode", "paper")}
    made = session.Session(tmp_path, 60, tmp_path, steps=steps)
    made._command = lambda step, seconds, site: list(step.command)
    assert made.go(list(steps)) == 1
    assert [found["ok"] for found in made.record["steps"].values()] == [False, True, False]


def test_a_session_without_a_gpu_says_so(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert session.main(["--out", str(tmp_path), "--steps", "correctness", "storm"]) == 2
    saved = json.loads((tmp_path / "session.json").read_text())["steps"]
    assert list(saved) == ["correctness"] and "No CUDA device" in saved["correctness"]["output"]


def wheel(folder: Path, name: str, content: bytes) -> Path:
    """A wheel of one module that pip installs."""
    path = folder / f"{name}-1.0-py3-none-any.whl"
    info = f"{name}-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr(f"{name}.py", content)
        file.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        file.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        file.writestr(f"{info}/RECORD", f"{name}.py,,\n{info}/METADATA,,\n{info}/WHEEL,,\n{info}/RECORD,,\n")
    return path


def installed(out: Path, target: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, str(out / "install.py"), str(target)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_wheelhouse_round_trip(tmp_path):
    wheels = [wheel(tmp_path, name, f"x = {name!r}\n".encode() + b"#" * 3000) for name in ("first", "second")]
    out = tmp_path / "pieces"
    manifest = wheelhouse.bundle(wheels, out, piece_bytes=2000, profile="test")
    assert len(manifest["pieces"]) > 2 and all(piece["bytes"] <= 2000 for piece in manifest["pieces"])
    assert manifest["bytes"] == sum(piece["bytes"] for piece in manifest["pieces"])
    joined = b"".join((out / piece["name"]).read_bytes() for piece in manifest["pieces"])
    assert hashlib.sha256(joined).hexdigest() == manifest["sha256"]
    assert wheelhouse.bundle(wheels, tmp_path / "again", piece_bytes=2000, profile="test") == manifest

    ran = installed(out, tmp_path / "site")
    assert ran.returncode == 0, ran.stderr
    assert (tmp_path / "site" / "second.py").read_text().startswith("x = 'second'")

    piece = out / manifest["pieces"][1]["name"]
    whole = piece.read_bytes()
    piece.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    ran = installed(out, tmp_path / "other")
    assert ran.returncode != 0 and f"{piece.name} is damaged" in ran.stderr
    piece.unlink()
    ran = installed(out, tmp_path / "other")
    assert ran.returncode != 0 and f"{piece.name} is missing" in ran.stderr
    assert not (tmp_path / "other").exists()


def test_a_pruned_wheel_installs_and_says_so(tmp_path):
    path = wheel(tmp_path, "first", b"x = 1\n")
    with zipfile.ZipFile(path, "a") as file:
        file.writestr("first_data/large.bin", b"#" * 9000)
        file.writestr("first-1.0.dist-info/entry_points.txt", "[console_scripts]\nfirst = first:main\n")
    whole = path.read_bytes()
    pruned = [wheelhouse.prune(path, lambda name: "large" not in name, {"first/aot/k.so": b"kernel"})]
    assert not path.exists() and pruned[0].name == "first-1.0+pruned-py3-none-any.whl"
    once = pruned[0].read_bytes()
    path.write_bytes(whole)
    assert wheelhouse.prune(path, lambda name: "large" not in name, {"first/aot/k.so": b"kernel"}) == pruned[0]
    assert pruned[0].read_bytes() == once
    wheelhouse.bundle(pruned, tmp_path / "pieces", profile="test")
    ran = installed(tmp_path / "pieces", tmp_path / "site")
    assert ran.returncode == 0, ran.stderr
    files = {str(file.relative_to(tmp_path / "site")) for file in (tmp_path / "site").rglob("*") if file.is_file()}
    assert {"first.py", "first/aot/k.so"} <= files and not any("large" in file or "entry" in file for file in files)
    assert (tmp_path / "site" / "first-1.0+pruned.dist-info" / "METADATA").read_text().endswith("Version: 1.0+pruned\n")


def test_kernels_that_were_compiled_before_go_along(tmp_path):
    for name in ("flashinfer_python", "sglang"):
        wheel(tmp_path, name, b"")
    library = tmp_path / "cached_ops" / "a_kernel" / "a_kernel.so"
    library.parent.mkdir(parents=True)
    library.write_bytes(b"compiled")
    wheelhouse.prune_all(tmp_path, library.parents[1])
    flashinfer, sglang = (zipfile.ZipFile(next(tmp_path.glob(f"{n}-*.whl"))) for n in ("flashinfer_python", "sglang"))
    assert flashinfer.read("flashinfer/data/aot/a_kernel/a_kernel.so") == b"compiled"
    assert set(wheelhouse.SGLANG_STUBS) <= set(sglang.namelist()) and "sglang.py" not in sglang.namelist()


def test_a_piece_travels_beside_the_repository():
    """64 MiB in all may travel to a GPU host in one call."""
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=record.ROOT, capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("not a git checkout")
    files = [record.ROOT / name for name in tracked.stdout.split("\0") if name]
    assert sum(file.stat().st_size for file in files if file.is_file()) + wheelhouse.PIECE_BYTES <= 64 << 20


def pruned_tree(folder: Path, distribution: str) -> None:
    """What a pruned wheel of an installed distribution unpacks to."""
    kept, added = wheelhouse.PRUNINGS[distribution]
    for file in metadata.files(distribution):
        if kept(str(file)) and not str(file).endswith(".pyc"):
            target = folder / str(file)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file.locate(), target)
    for name, text in added.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


# Not on a bare GPU host: what FlashInfer can do without, and what the rest of SGLang brings.
NOT_THERE = "flashinfer", "sglang", "nvidia_cutlass", "cutlass", "cudnn", "cuda", "cutile", "quack", "__editable__"


def on_a_bare_host(folder: Path, code: str, **environment: str) -> str:
    """What ``code`` prints where there is ``folder`` but not the whole FlashInfer and SGLang."""
    packages, host = Path(torch.__file__).parents[1], folder.parent / "host"
    host.mkdir()
    for entry in packages.iterdir():
        if not entry.name.startswith(NOT_THERE) and entry.suffix != ".pth":
            (host / entry.name).symlink_to(entry)
    code = f"import sys; sys.path[:] = [{str(folder)!r}, {str(record.ROOT)!r}, *sys.path, {str(host)!r}]\n{code}"
    ran = subprocess.run(
        [sys.executable, "-S", "-c", code], capture_output=True, text=True, timeout=300,
        env=os.environ | {"PYTHONPATH": "", "FLASHINFER_WORKSPACE_BASE": str(folder.parent)} | environment,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-3000:]
    return ran.stdout


def test_a_pruned_flashinfer_imports_and_writes_its_sources(tmp_path):
    """For sm_90 without a GPU; the kernels that are built ahead are those that are loaded."""
    pytest.importorskip("flashinfer")
    pruned_tree(tmp_path / "site", "flashinfer_python")
    code = """
import json, re
from pathlib import Path
import torch
from flashinfer_ext import check, upstream
from flashinfer.jit import core, env

class Loading(Exception): pass
def load(spec): raise Loading(spec.name)
core.JitSpec.build_and_load = load
found = []
for *_, head_dim, kv_dtype, _ in check.SHAPES:
    for prefill, loads in ((True, upstream.prefill_module), (False, upstream.decode_module)):
        spec = upstream.kernel_spec(torch.bfloat16, kv_dtype, head_dim, prefill)
        spec.write_ninja()
        try:
            loads(torch.bfloat16, kv_dtype, head_dim)
        except Loading as loaded:
            found.append((spec.name, str(loaded), all(source.exists() for source in spec.sources)))
todo, seen, missing = [source for source in spec.sources], set(), []
while todo:
    file = todo.pop()
    for name in re.findall(r'#\\s*include\\s*["<]((?:flashinfer|\\.\\./|\\./)?[^">]*)[">]', file.read_text()):
        places = [file.parent, env.FLASHINFER_INCLUDE_DIR, env.FLASHINFER_CSRC_DIR]
        there = [(place / name).resolve() for place in places if (place / name).exists()]
        if there and there[0] not in seen:
            seen.add(there[0]); todo.append(there[0])
        elif not there and name.startswith(("flashinfer/", ".")):
            missing.append((file.name, name))
print(json.dumps([found, len(seen), missing]))
"""
    printed = on_a_bare_host(tmp_path / "site", code, FLASHINFER_CUDA_ARCH_LIST="9.0a", CUDA_HOME="/usr/local/cuda")
    found, headers, missing = json.loads(printed.splitlines()[-1])
    assert found and all(built == loaded and there for built, loaded, there in found)
    assert headers > 10 and missing == []


def test_sglangs_decode_kernel_runs_without_sglang(tmp_path):
    """Three of its files beside stubs, in the interpreter, against float64: what a bare host compares with."""
    pytest.importorskip("sglang")
    pruned_tree(tmp_path / "site", "sglang")
    code = """
import torch, sglang
from benchmarks.gpu import decode, engines, serving
from benchmarks.gpu.pool import Pool, Residents
from benchmarks.gpu.record import Deadline, Part, importable
from benchmarks.gpu.shapes import TOY_QWEN, Batch
from benchmarks.gpu.timing import Rehearsal
clock, part = Rehearsal(), Part("decode", Deadline(60))
with torch.inference_mode():
    pool = Pool(TOY_QWEN, 200, clock)
    residents = Residents(pool, Batch("b", (40, 24)), 1.0, False, 1)
    stock = engines.stock_engines(clock)[engines.SGLANG]
    arguments = clock, "c", engines.SGLANG, "", stock, residents, dict(sets=1, moved=1)
    assert part.attempt_optional(engines.SGLANG, "x", decode._stock, *arguments), part.skipped
    serving.run(part, clock)
print(len(part.checks), all(check["ok"] for check in part.checks), len(part.rows), "not importable" in part.skipped[-1])
"""
    printed = on_a_bare_host(tmp_path / "site", code, TRITON_INTERPRET="1")
    assert printed.splitlines()[-1] == "5 True 1 True"


def test_the_commit_is_known_without_git(monkeypatch, tmp_path):
    monkeypatch.setattr(record, "ROOT", tmp_path)
    monkeypatch.setenv("VLKV_COMMIT", "from the environment")
    assert record.commit() == "from the environment"
    file = tmp_path / record.COMMIT_FILE
    file.parent.mkdir(parents=True)
    file.write_text("abc\n")
    assert record.commit() == "abc"
