"""What a run writes down: rows of numbers, checks, what was skipped, and where it ran."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import platform
import subprocess
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.gpu.subjects import EVERYTHING
from benchmarks.gpu.timing import Clock, Timing

ROOT = Path(__file__).resolve().parents[2]
COMMIT_FILE = "benchmarks/gpu/commit.txt"  # what `git rev-parse HEAD` said where .git does not travel
SOURCES = ("sglang_vlkv", "flashinfer_ext", "benchmarks/gpu")


class Deadline:
    """When a part has to be done; its work asks before it begins anything long."""

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds

    def left(self) -> float:
        return self.end - time.monotonic()


class Ratio(NamedTuple):
    """The time of another row over this one's.

    Attributes:
        case: of the other row.
        of: its candidates; the fastest that is there and right counts.
        needs: one of these candidates has to be there; without it there is no figure.
        rests_on: what has to be right beside what both rows rest on.
    """

    case: str
    of: list[str]
    needs: list[str] = []
    rests_on: list[str] = []


class Part:
    """One part's results, saved whenever something is added.

    Attributes:
        rows: dictionaries of ``case``, ``row``, ``seconds``, what it moved, what it is held against and
            what it rests on.
        checks: dictionaries of ``name``, ``ok``, what they are ``about`` and the errors behind it.
        expected: for each goal, the case and row of everything that it is to be judged by.
        broken: what broke off, with its traceback.
        skipped: sentences.
        ended: the part came to its end.
    """

    ended = False
    _about: tuple[str, ...] | None = None

    def __init__(self, name: str, deadline: Deadline, save=lambda: None) -> None:
        self.name, self.deadline, self._save = name, deadline, save
        self.rows: list[dict] = []
        self.checks: list[dict] = []
        self.expected: dict[str, list[list[str]]] = {}
        self.broken: list[dict] = []
        self.skipped: list[str] = []
        self.notes: list[str] = []
        self.extra: dict = {}
        self.seconds = 0.0

    @contextmanager
    def about(self, *subjects: str) -> Iterator[None]:
        """What the checks that are added meanwhile speak for, and the rows rest on.

        Outside, a check speaks for everything and a row rests on nothing of ours.
        """
        before, self._about = self._about, subjects
        try:
            yield
        finally:
            self._about = before

    def expect(self, goal: str, case: str, row: str) -> None:
        """A row that the goal is to be judged by: while it has no figure, the goal is not met."""
        self.expected.setdefault(goal, []).append([case, row])

    def add(
        self,
        case: str,
        row: str,
        timing: Timing,
        moved: int | None = None,
        flops: float | None = None,
        versus: str | None = None,
        share_of: str | None = None,
        **extra,
    ) -> None:
        """
        Args:
            moved: bytes that had to be moved, for the share of the bandwidth ceiling.
            flops: operations that had to be done.
            versus: the row of the same case that this one's speedup is against.
            share_of: the row of the same case of whose time this one's is given as a share.
        """
        named = dict(moved=moved, flops=flops, versus=versus, share_of=share_of)
        self.rows.append(
            {"case": case, "row": row, "seconds": timing._asdict()}
            | {key: value for key, value in named.items() if value is not None}
            | {"rests_on": list(self._about or ())}
            | extra
        )
        self._save()

    def check(self, name: str, ok: bool, about: tuple[str, ...] | None = None, **evidence) -> bool:
        """
        Args:
            about: what is wrong where ``ok`` is not; see :meth:`about` if None.
        """
        about = self._about if about is None else about
        about = [EVERYTHING] if about is None else list(about)
        self.checks.append({"name": name, "ok": bool(ok), "about": about} | evidence)
        if not ok:
            print(f"  WRONG: {name} {evidence}", flush=True)
        self._save()
        return bool(ok)

    def skip(self, what: str, why: str) -> None:
        self.skipped.append(f"{what}: {why}")
        print(f"  skipped {what}: {why}", flush=True)
        self._save()

    def attempt(self, what: str, work, *arguments) -> bool:
        """Runs ``work(self, *arguments)``; what breaks off, for want of memory say, costs nobody else's time.

        It is reported, and the run ends with 1, but it says nothing about any kernel's results.

        Returns:
            Whether it came to its end.
        """
        try:
            work(self, *arguments)
            return True
        except Exception:
            self.broken.append({"what": what, "traceback": traceback.format_exc()[-3000:]})
            print(f"  BROKE OFF: {what}: {self.broken[-1]['traceback']}", flush=True)
            self._save()
            return False

    def attempt_optional(self, engine: str, what: str, work, *arguments) -> bool:
        """Runs ``work`` of an engine that need not be there; whether it came to its end.

        What breaks off is skipped, with the reason. Checks that are added meanwhile speak for this engine.
        """
        try:
            with self.about(engine):
                work(self, *arguments)
            return True
        except Exception as error:
            self.skip(what, f"{type(error).__name__}: {' '.join(str(error).split())[-300:]}")
            return False

    def has(self, seconds: float, what: str) -> bool:
        """Whether ``seconds`` are left for ``what``; says so where they are not."""
        if (left := self.deadline.left()) >= seconds:
            return True
        self.skip(what, f"{max(left, 0):.0f} s of the part's time were left and it takes about {seconds:.0f}")
        return False

    def as_json(self) -> dict:
        return {
            "seconds": round(self.seconds, 1),
            "ended": self.ended,
            "rows": self.rows,
            "checks": self.checks,
            "expected": self.expected,
            "broken": self.broken,
            "skipped": self.skipped,
            "notes": self.notes,
        } | self.extra


def importable(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # of a parent package
        return False


def versions() -> dict[str, str | None]:
    found = {"python": platform.python_version(), "cuda of torch": torch.version.cuda}
    for name in ("torch", "triton", "flashinfer-python", "sglang", "sglang-kernel", "sglang-vlkv", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def commit() -> str:
    """The commit that runs: from git, else from a file or the environment, else unknown."""
    try:
        head = _output("git", "-C", str(ROOT), "rev-parse", "HEAD")
        changed = _output("git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no")
        return head + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        pass
    if (file := ROOT / COMMIT_FILE).exists():
        return file.read_text().strip()
    return os.environ.get("VLKV_COMMIT", "unknown")


def sources_sha256() -> str:
    """Of all Python files that matter, so that a result without a commit can still be matched to one."""
    digest = hashlib.sha256()
    for folder in SOURCES:
        for file in sorted((ROOT / folder).rglob("*.py")):
            digest.update(str(file.relative_to(ROOT)).encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


def context(clock: Clock) -> dict:
    """Everything that a number needs beside it."""
    found = {
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "commit": commit(),
        "sources_sha256": sources_sha256(),
        "versions": versions(),
        "host_cores": len(os.sched_getaffinity(0)),
        "rehearsal": clock.rehearsal,
        "dtype": str(clock.dtype),
    }
    if clock.device.type == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found["device"] = {
            "name": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "l2_bytes": properties.L2_cache_size,
        } | _nvidia_smi()
    return found


def _nvidia_smi() -> dict[str, str]:
    fields = "driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.limit", "temperature.gpu"
    try:
        line = _output("nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader").splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return {"driver_version": "unknown: nvidia-smi did not answer"}
    return dict(zip(fields, (value.strip() for value in line.split(",")), strict=False))


def _output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=30).stdout.strip()
