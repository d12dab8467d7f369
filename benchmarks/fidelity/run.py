"""Sends every question under every row and budget, and writes down what comes back."""

from __future__ import annotations

import gzip
import json
import os
import threading
import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Callable, Iterable, Iterator, NamedTuple

from benchmarks.common import note
from benchmarks.fidelity.client import NONE, Client
from benchmarks.fidelity.metrics import Answer, measure
from benchmarks.fidelity.questions import TURNS, VIDEO_FPS, VIDEO_FRAMES, Prompt, drawn
from benchmarks.fidelity.rows import (
    CORE,
    FILLED,
    FROM_TWINS,
    FULL,
    GRID,
    REFERENCES,
    ROWS,
    custom_params,
    filled_params,
    reference_params,
)
from sglang_vlkv.commands import Problem
from tests.serving import LEAK_CHECKS, Server

CHECKPOINTS = Path(__file__).parent / "checkpoints"
# SGLang 0.5.23 hands a Qwen2.5-VL processor no metadata of a video, which then takes it for one of 24
# frames per second, and its temporal positions are truncated to 0 where frames are a second apart.
VIDEO = {"video": {"video_metadata": [{"fps": VIDEO_FPS, "total_num_frames": VIDEO_FRAMES}]}}
FLAGS = (
    "--kv-policy", "none", "--kv-policy-config", '{"allow_override": true, "twins": "prefer"}',
    "--max-total-tokens", "65536", "--mm-preprocess-cache-size-mb", "256",
    "--mm-process-config", json.dumps(VIDEO),
)  # fmt: skip
ENVIRONMENT = {
    "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
    "OMP_WAIT_POLICY": "PASSIVE",
} | dict.fromkeys(LEAK_CHECKS, "0")
AHEAD = 2  # prompts whose full answer is asked for before their rows
SIZED = (0.01, 0.1)  # budgets of pictures that are not of the usual size
VARIANT = (0.1,)

Key = tuple[str, str, int, str, float | None]


class Job(NamedTuple):
    """One request. ``budget`` is None for rows without one."""

    row: str
    budget: float | None


def jobs(
    prompt: Prompt, rows: Iterable[str], budgets: tuple[float, ...] | None, first: bool
) -> Iterator[Job]:
    """What ``prompt`` is asked under.

    Args:
        budgets: None chooses: on the first checkpoint ``GRID`` for the policies at their defaults and
            ``CORE`` for variants, on others ``CORE`` and ``VARIANT``.
        first: whether this is the first checkpoint.
    """
    for name in rows:
        if name == FULL:
            continue  # sent before all others
        if prompt.cells is None and name in (FILLED, "oracle", "all-but-asked"):
            continue
        if name in REFERENCES:
            yield Job(name, None)
            continue
        if name in FROM_TWINS:
            yield from (Job(name, budget) for budget in budgets or CORE if prompt.task in TURNS)
            continue
        variant = name == FILLED or ROWS[name].is_variant
        own = (GRID, CORE, VARIANT)[variant + (not first)]
        if "@" in prompt.task:
            own = () if variant else SIZED
        for budget in budgets or own:
            yield Job(name, budget)


def params_of(job: Job, prompt: Prompt, full: Answer) -> dict:
    if job.row in REFERENCES:
        report = full.report
        return reference_params(
            job.row, prompt.cells or (), report["prompt_tokens"], report["visual_tokens"]
        )
    if job.row == FILLED:
        return filled_params(prompt.cells, job.budget)
    return custom_params(ROWS[job.row], job.budget)


def not_applicable(answer: Answer) -> str | None:
    """Why ``answer`` says nothing about its row: it was left alone, or over at its first token."""
    return answer.report.get("reason") if answer.report["policy"] == "none" else None


def not_from_twin(answer: Answer, earlier: Asked | None) -> str | None:
    """Why ``answer`` does not stand on what turn 1 left; None where it is turn 1.

    Args:
        earlier: the turn before.
    """
    if earlier is None:
        return None
    prefix = answer.report["prefix"]
    if prefix["kind"] != "twin" or prefix["tokens"] < earlier.first_prompt:
        return "no twin fits the reference's answers"
    return earlier.reason and "the turn before was not answered from a twin"


class Asked(NamedTuple):
    """What the next turn must know of one: tokens of the first turn's prompt, and why it is not
    applicable, if it is not."""

    first_prompt: int
    reason: str | None


class Records:
    """The raw records, one JSON line each, appended as they come.

    Args:
        folder: holds ``records.jsonl`` while the run lasts, ``records.jsonl.gz`` afterwards.
        resume: keep what an earlier run left there.
        commit: of the code that new records are from.
    """

    def __init__(self, folder: Path, resume: bool, commit: str = "") -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._path, self._packed = folder / "records.jsonl", folder / "records.jsonl.gz"
        self._lock, self._commit = threading.Lock(), commit
        self.all: list[dict] = self.read(folder) if resume else []
        self.done: set[Key] = {self.key(record) for record in self.all}
        self.configs: dict[str, str] = {}
        with self._path.open("w") as file:  # a line that an interruption cut off goes
            file.writelines(json.dumps(record) + "\n" for record in self.all)
        self._file = self._path.open("a", buffering=1)

    @staticmethod
    def read(folder: Path) -> list[dict]:
        path, packed = folder / "records.jsonl", folder / "records.jsonl.gz"
        text = path.read_text() if path.exists() else ""
        if not text and packed.exists():
            text = gzip.decompress(packed.read_bytes()).decode()
        lines = text.split("\n")[:-1]  # what follows the last newline is incomplete
        return [json.loads(line) for line in lines]

    @staticmethod
    def key(record: dict) -> Key:
        return tuple(record[name] for name in ("checkpoint", "task", "seed", "row", "budget"))

    def add(self, record: dict) -> None:
        if self._commit:
            record = record | {"commit": self._commit}
        with self._lock:
            self.done.add(self.key(record))
            self.all.append(record)
            self._file.write(json.dumps(record) + "\n")

    def pack(self) -> None:
        """Compresses the file once the run is complete."""
        self._file.close()
        lines = "".join(json.dumps(record, separators=(",", ":")) + "\n" for record in self.all)
        self._packed.write_bytes(gzip.compress(lines.encode(), mtime=0))
        self._path.unlink()


class Progress:
    """Prints the request rate every few seconds."""

    def __init__(self, label: str, total: int, every: float = 15.0) -> None:
        self._label, self.total, self._every = label, total, every
        self._start = self._last = time.monotonic()
        self._lock = threading.Lock()
        self.count = 0

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._start

    def step(self) -> None:
        with self._lock:
            self.count += 1
            if time.monotonic() - self._last > self._every:
                self._last = time.monotonic()
                rate = self.count / self.seconds
                left = (self.total - self.count) / rate
                note(f"{self._label}: {self.count} of {self.total}, {rate:.1f} requests/s, {left:.0f} s left")


def ask_all(
    client: Client,
    checkpoint: str,
    prompts: list[Prompt],
    jobs_of: Callable[[Prompt], Iterable[Job]],
    records: Records,
    workers: int,
) -> Progress:
    """Sends what ``records`` lacks, all rows of a prompt together so that its prefix is hot.

    Rows from twins have a cache of their own, so that no other row's exact KV reaches further than
    their twins, and their turns are asked one after another, all if one is lacking.

    Raises:
        Problem: the server refused or failed a request.
        RuntimeError: it answered another row from a twin.
    """

    def key(prompt: Prompt, job: Job) -> Key:
        return (checkpoint, prompt.task, prompt.seed, *job)

    def lacks(prompt: Prompt, job: Job) -> bool:
        tasks = TURNS if job.row in FROM_TWINS else (prompt.task,)
        return any(key(prompt._replace(task=task), job) not in records.done for task in tasks)

    todo = [(p, [j for j in jobs_of(p) if lacks(p, j)]) for p in prompts]
    todo = [(p, js) for p, js in todo if js or lacks(p, Job(FULL, None))]
    progress = Progress(checkpoint, sum(1 + len(js) for _, js in todo))
    latest: dict[tuple[int, Job], Future[Asked]] = {}  # by seed; of rows from twins

    def add(prompt: Prompt, job: Job, answer: Answer, full: Answer, earlier: Asked | None = None) -> Asked:
        record = dict(zip(("checkpoint", "task", "seed", "row", "budget"), key(prompt, job)))
        record["prefix"] = answer.report["prefix"]
        reason = not_applicable(answer) if job.row != FULL else None
        if job.row in FROM_TWINS:
            reason = reason or not_from_twin(answer, earlier)
        elif record["prefix"]["kind"] == "twin":
            raise RuntimeError(f"{key(prompt, job)} was answered from a twin: its exact KV was evicted")
        if reason:
            record["not_applicable"] = reason
        else:
            record |= measure(prompt, answer, full)
            label = job.row if job.budget is None else f"{job.row} {job.budget}"
            if job.row in ROWS and "config" in answer.report:
                records.configs.setdefault(label, answer.report["config"])
        if key(prompt, job) not in records.done:
            records.add(record)
        progress.step()
        return Asked(earlier.first_prompt if earlier else answer.report["prompt_tokens"], reason)

    def ask_full(prompt: Prompt) -> Answer:
        full = client.ask(prompt, NONE)
        add(prompt, Job(FULL, None), full, full)
        return full

    def ask(prompt: Prompt, job: Job, full: Answer, before: Future[Asked] | None) -> Asked:
        earlier = before and before.result()  # it was submitted earlier, so some worker has it
        salt = f"{job.row} {job.budget}" if job.row in FROM_TWINS else None
        answer = client.ask(prompt, params_of(job, prompt, full), salt)
        return add(prompt, job, answer, full, earlier)

    with ThreadPoolExecutor(workers) as pool:
        source, ahead, sent = iter(todo), deque(), deque()
        while True:
            for prompt, own in islice(source, AHEAD - len(ahead)):
                ahead.append((prompt, own, pool.submit(ask_full, prompt)))
            if not ahead:
                break
            prompt, own, full = ahead.popleft()
            for job in own:
                before = latest.get((prompt.seed, job))
                sent.append(pool.submit(ask, prompt, job, full.result(), before))
                if job.row in FROM_TWINS:
                    latest[prompt.seed, job] = sent[-1]
                if len(sent) > 4 * workers:  # what fails is not found much later
                    sent.popleft().result()
        for answer in sent:
            answer.result()
    return progress


def draw_all(tasks: Iterable[str], seeds: Iterable[int]) -> list[Prompt]:
    """The prompts of all samples; seeds outermost, so that an interrupted run has all tasks."""
    tasks = list(tasks)
    return [prompt for seed in seeds for task in tasks for prompt in drawn(task, seed)]


def folder_of(checkpoint: str) -> Path:
    """Of a name in ``checkpoints/``, or a directory.

    Raises:
        Problem: there is none.
    """
    path = CHECKPOINTS / checkpoint if (CHECKPOINTS / checkpoint).is_dir() else Path(checkpoint)
    if not (path / "config.json").exists():
        known = ", ".join(sorted(p.name for p in CHECKPOINTS.glob("*") if p.is_dir())) or "none"
        raise Problem(
            f"checkpoint {checkpoint!r} is no directory with a config.json; by name there are: {known}."
        )
    return path


def serve(checkpoint: str) -> Server:
    """A server of :func:`folder_of` whose requests choose their policy, for a ``with`` statement."""
    return Server(*FLAGS, model=folder_of(checkpoint), env=ENVIRONMENT)
