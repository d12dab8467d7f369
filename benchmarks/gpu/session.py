"""Everything that a GPU should run once, in one call: ``python -m benchmarks.gpu.session --out DIR``.

Steps are processes of their own, in the order in which a cut at the end costs least: whether the kernels are
right, alone and under a second stream, then what they are measured against, then the measurements. A step
that crashes, hangs or takes longer than its share is ended with all that it started, is recorded as such, and
the next one runs. ``session.json`` and ``session.md`` are written after every step; steps of :mod:`.run` go on
with one ``gpu.json``. ``--steps`` runs those again, beside what is there.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import IO, NamedTuple

from benchmarks.gpu.files import write_json
from benchmarks.gpu.goals import GOALS, MEASURED, PASS
from benchmarks.gpu.run import CUT, FAILED, GOALS_OPEN, LOST, NO_DEVICE, WELL

ROOT = Path(__file__).resolve().parents[2]
KIT = ROOT / "build" / "gpu-kit"  # what `wheelhouse kernels` made
RESERVED = 3  # seconds between a step's own end and the session's
LEAST = 15  # seconds without which no step begins: importing torch takes some of them
SANITIZER = "compute-sanitizer"
MEMORY_ERRORS = 9  # the sanitizer's exit status where it found one
NOT_RUN, RUNNING, KILLED, CRASHED = "not run", "running", "killed", "crashed"
# How a step ended, by its exit status, and whether it is well; None where something is open.
ENDINGS: dict[int, tuple[str, bool | None]] = {
    WELL: ("whole", True),
    FAILED: ("a check failed, or something broke off", False),
    NO_DEVICE: ("could not start", False),
    CUT: ("cut off by its own watchdog", False),
    LOST: ("the device was lost", False),
    GOALS_OPEN: ("whole", True),  # a part does not measure all goals
    MEMORY_ERRORS: ("memory errors", False),
}


class Step(NamedTuple):
    """One process.

    Attributes:
        seconds: it has at most.
        parts: of :mod:`benchmarks.gpu.run`; else ``command`` says what runs.
        after: whether it goes on with the record that is there.
        gpu: a rehearsal leaves it out.
    """

    seconds: float
    parts: tuple[str, ...] = ()
    command: tuple[str, ...] = ()
    after: bool = True
    gpu: bool = False


PYTHON = sys.executable
STEPS = {
    "install": Step(45, command=(PYTHON, "{kit}/install.py", "{site}")),
    "correctness": Step(130, ("ceilings", "correctness"), after=False),
    "storm": Step(90, ("storm",)),
    "flashinfer": Step(110, ("flashinfer",), gpu=True),
    "decode": Step(250, ("decode", "compression")),
    "memcheck": Step(
        90, gpu=True,
        command=(SANITIZER, "--tool", "memcheck", "--error-exitcode", str(MEMORY_ERRORS), "--print-limit", "20",
                 PYTHON, "-m", "benchmarks.gpu.run", "--small", "--seconds", "{seconds}"),
    ),
    "paper": Step(160, ("paper",)),
    "flashinfer check": Step(
        60, gpu=True,
        command=(PYTHON, "-m", "flashinfer_ext.check", "--json", "{out}/flashinfer.json", "--seconds", "{ending}"),
    ),
    "resources": Step(45, ("resources",), gpu=True),
}  # fmt: skip
COMPILE = (PYTHON, "-m", "flashinfer_ext.check", "--compile")  # beside the first steps: needs no GPU


class Session:
    """The steps, one after another, and the files that they end up in."""

    def __init__(self, out: Path, seconds: float, kit: Path, rehearse: bool = False, steps: dict = STEPS) -> None:
        self.out, self.kit, self.rehearse, self.steps = out, kit, rehearse, steps
        self.end = time.monotonic() + seconds
        self.flashinfer = find_spec("flashinfer") is not None
        out.mkdir(parents=True, exist_ok=True)
        file = out / "session.json"
        self.record = json.loads(file.read_text()) if file.exists() else {"steps": {}}

    def go(self, names: list[str]) -> int:
        """Runs these steps; returns the exit status."""
        with tempfile.TemporaryDirectory(prefix="gpu-session-") as site, (self.out / "session.log").open("a") as log:
            self.environment = dict(os.environ, PYTHONUNBUFFERED="1")
            self.environment["PYTHONPATH"] = os.pathsep.join([site, str(ROOT), os.environ.get("PYTHONPATH", "")])
            background: list[subprocess.Popen] = []
            try:
                for name in names:
                    self._note(name, state=RUNNING, ok=None)
                    found = self._one(name, site, log)
                    self._note(name, **found)
                    if name == "install" and found["ok"]:
                        self.flashinfer = True
                        background.append(self._start(COMPILE, log))
                    if name == "correctness" and found.get("code") == NO_DEVICE:
                        break
            finally:
                for process in background:
                    end_group(process)
        return self.status()

    def _one(self, name: str, site: str, log: IO[str]) -> dict:
        """Runs a step to its end, or ends it."""
        step, left = self.steps[name], self.end - time.monotonic()
        seconds = min(step.seconds, left)
        if why := self._why_not(name, step, left):
            return {"state": f"{NOT_RUN}: {why}", "ok": None}
        command = self._command(step, seconds, site)
        print(f"[{time.strftime('%H:%M:%S')}] {name}: at most {seconds:.0f} s", file=log, flush=True)
        start, before = time.monotonic(), os.fstat(log.fileno()).st_size
        process = self._start(command, log, environment=self._environment(name))
        try:
            code, killed = process.wait(timeout=seconds), False
        except subprocess.TimeoutExpired:
            code, killed = None, True
        finally:
            end_group(process)
        output = Path(log.name).read_bytes()[before:].decode(errors="replace")
        if code == FAILED and step.parts and not wrong_parts(self.out, step.parts):
            code = GOALS_OPEN  # what is wrong in the record was so before
        state, ok = (f"{KILLED}: it took more than {seconds:.0f} s", False) if killed else ending(name, code, output)
        took = round(time.monotonic() - start, 1)
        return {"state": state, "ok": ok, "code": code, "seconds": took, "output": output[-3000:]}

    def _why_not(self, name: str, step: Step, left: float) -> str | None:
        if left < min(LEAST, step.seconds):
            return f"{max(left, 0):.0f} s were left"
        if self.rehearse and step.gpu:
            return "it needs a GPU"
        if name == "install" and not (self.kit / "install.py").exists():
            return f"{self.kit} is not there; python -m benchmarks.gpu.wheelhouse kernels makes it"
        if name == "memcheck" and sanitizer() is None:
            return f"{SANITIZER} is not there"
        if name.startswith("flashinfer") and not self.flashinfer:
            return "FlashInfer is not there"
        return None

    def _command(self, step: Step, seconds: float, site: str) -> list[str]:
        own = seconds - RESERVED
        if step.parts:
            more = ["--after", f"{self.out}/gpu.json"] if step.after else []
            more += ["--rehearse"] if self.rehearse else []
            command = [PYTHON, "-m", "benchmarks.gpu.run", "--out", str(self.out), "--seconds", f"{own:.0f}", *more]
            return [*command, "--parts", *step.parts]
        named = dict(kit=self.kit, site=site, out=self.out, seconds=f"{own:.0f}", ending=f"{own - LEAST:.0f}")
        command = [word.format(**named) for word in step.command]
        return [sanitizer() if command[0] == SANITIZER else command[0], *command[1:]]

    def _environment(self, name: str) -> dict[str, str]:
        """An allocator that keeps nothing lets the sanitizer see where each tensor ends."""
        return self.environment | ({"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if name == "memcheck" else {})

    def _start(self, command: list[str], log: IO[str], environment: dict[str, str] | None = None) -> subprocess.Popen:
        """A process in a group of its own, so that it ends with all that it started."""
        return subprocess.Popen(
            command, cwd=ROOT, env=environment or self.environment, stdin=subprocess.DEVNULL, stdout=log,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip

    def _note(self, name: str, **found) -> None:
        self.record["steps"][name] = {"at_most": self.steps[name].seconds} | found
        self.record["goals"] = goals(self.out)
        write_json(self.out / "session.json", self.record)
        (self.out / "session.md").write_text("\n".join(self.lines()) + "\n")
        if found["state"] != RUNNING:
            print(f"{name}: {found['state']} ({found.get('seconds', 0)} s)", flush=True)

    def lines(self) -> Iterator[str]:
        yield from ("# GPU session", "", "| step | how it ended | seconds | at most |", "| :--- | :--- | ---: | ---: |")
        for name, found in self.record["steps"].items():
            yield f"| {name} | {found['state']} | {found.get('seconds', '')} | {found['at_most']:.0f} |"
        yield ""
        for tag, (verdict, seen) in self.record["goals"].items():
            yield f"- {verdict}: {GOALS[tag].text} ({seen})"
        if not self.record["goals"]:
            yield "Nothing was measured."

    def status(self) -> int:
        """1 where anything failed, else 5 while a step or a goal is open, else 0."""
        steps = self.record["steps"]
        if steps.get("correctness", {}).get("code") == NO_DEVICE:
            return NO_DEVICE
        if any(found["ok"] is False for found in steps.values()):
            return FAILED
        verdicts = [verdict for verdict, _ in self.record["goals"].values()]
        met = bool(verdicts) and all(verdict in (PASS, MEASURED) for verdict in verdicts)
        return WELL if met and all(found["ok"] for found in steps.values()) else GOALS_OPEN


def ending(name: str, code: int, output: str) -> tuple[str, bool | None]:
    """How a step ended that was not killed, and whether it is well; see :data:`ENDINGS`."""
    if code < 0:
        return f"{CRASHED}: {signal.Signals(-code).name}", False
    if name == "memcheck" and code in (WELL, GOALS_OPEN) and "ERROR SUMMARY: 0 errors" not in output:
        return f"{SANITIZER} gave no summary", False
    if name == "flashinfer check" and code == GOALS_OPEN:
        return "its time was over before all was checked", None
    return ENDINGS.get(code, (f"{CRASHED}: exit status {code}", False))


def end_group(process: subprocess.Popen) -> None:
    """Kills a process and whatever else is in its group."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass  # all of it has ended
    try:
        process.wait(timeout=10)
    except subprocess.TimeoutExpired:
        print(f"process {process.pid} does not end", file=sys.stderr)


def sanitizer() -> str | None:
    beside = Path("/usr/local/cuda/bin") / SANITIZER
    return shutil.which(SANITIZER) or (str(beside) if beside.exists() else None)


def wrong_parts(out: Path, names: tuple[str, ...]) -> list[str]:
    """Those of the parts of the record of which a check failed or something broke off."""
    parts = _record(out).get("parts", {})
    wrong = [name for name, part in parts.items() if part["broken"] or not all(c["ok"] for c in part["checks"])]
    return [name for name in names if name in wrong or name not in parts]


def _record(out: Path) -> dict:
    file = out / "gpu.json"
    return json.loads(file.read_text()) if file.exists() else {}


def goals(out: Path) -> dict[str, list[str]]:
    """Each goal's verdict and figure, from the record of the measurements."""
    return _record(out).get("goals", {})


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu", help="folder of the results (build/gpu)")
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=list(STEPS), metavar="STEP", help=", ".join(STEPS))
    parser.add_argument("--seconds", type=float, default=780, help="for all steps, 780 unless told")
    parser.add_argument("--kit", type=Path, default=KIT, help="FlashInfer's and SGLang's kernels (build/gpu-kit)")
    parser.add_argument("--rehearse", action="store_true", help="toy sizes on the CPU, times mean nothing")
    args = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the step in progress is ended
    session = Session(args.out.absolute(), args.seconds, args.kit.absolute(), args.rehearse)
    status = session.go(args.steps)
    print("\n".join(session.lines()))
    return status


if __name__ == "__main__":
    sys.exit(main())
