"""Everything that has to be measured on a GPU, in one call: ``python -m benchmarks.gpu.run``.

Needs Python, torch and Triton; FlashInfer and SGLang are used where they are importable. Results are
written as they come, so a run that is cut off or loses its device leaves what it had, and says so;
``--after`` goes on with such a record. ``--rehearse`` runs the same code at toy sizes on a CPU, in
Triton's interpreter, and writes nothing unless it is told where. :mod:`benchmarks.gpu.session` calls
this and whatever else a GPU should run once.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path

# Part, and its share of the run's seconds. What a part leaves goes to those after it; correctness
# always runs, because without it no ratio is shown.
PARTS = {
    "ceilings": 0.05,
    "correctness": 0.15,
    "storm": 0.06,
    "flashinfer": 0.1,
    "decode": 0.29,
    "compression": 0.1,
    "paper": 0.2,
    "serving": 0.0,  # servers take minutes to start: it gets what is left, or a call of its own
    "resources": 0.05,
}
ALWAYS = ("ceilings", "correctness")
NEEDS = {"serving": "storm"}
# How a process ends.
WELL, FAILED, NO_DEVICE, CUT, LOST, GOALS_OPEN = range(6)
SPARE_SECONDS = 25  # parts are to be done that long before the run is cut off
# How a run ended.
CUT_OFF, WHOLE, UNFINISHED, DEVICE_LOST = "cut off", "whole", "with unfinished parts", "device lost"


def end_children() -> None:
    """Kills what this process started and all of its group: a server is a group of its own."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            _, parent, group = stat.read_text().rpartition(")")[2].split()[:3]
            if int(parent) == os.getpid():
                pid = int(stat.parent.name)
                os.kill(pid, signal.SIGKILL) if int(group) == os.getpgid(0) else os.killpg(int(group), signal.SIGKILL)
        except OSError:
            pass  # it has ended by itself


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder of gpu.json and gpu.md (default benchmarks/results)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--after", type=Path, metavar="JSON", help="the record to go on with: its parts are kept")
    parser.add_argument("--small", action="store_true", help="correctness on few rows, for compute-sanitizer")
    parser.add_argument("--seconds", type=float, default=480, help="for the whole run, 480 unless told")
    parser.add_argument("--rehearse", action="store_true", help="toy sizes on the CPU, times mean nothing")
    parser.add_argument("--write-commit", action="store_true", help="note the commit in a file, and end")
    return parser.parse_args(argv)


def _lasting(value):
    """A device without what changes from minute to minute."""
    if not isinstance(value, dict):
        return value
    return {name: value.get(name) for name in ("name", "capability", "memory_bytes", "driver_version")}


class Run:
    """One run: its parts, one after another, and the files that they end up in."""

    def __init__(self, args: argparse.Namespace, clock, out: Path, began: float) -> None:
        """
        Args:
            began: when the run began, on the monotonic clock.

        Raises:
            ValueError: the record to go on with is not one of this code on this device.
        """
        from benchmarks.gpu.record import Deadline, context

        self.clock, self.out = clock, out
        self.deadline = Deadline(began + args.seconds - SPARE_SECONDS - time.monotonic())
        self.record = {
            "arguments": {name: str(value) for name, value in vars(args).items()},
            "context": context(clock),
            "ended": CUT_OFF,  # what a file says that nobody finished
            "parts": self._before(args.after, context(clock)) if args.after else {},
        }
        done = {name for name, part in self.record["parts"].items() if part["ended"]}
        asked = args.parts or [name for name in PARTS if name not in done]
        needed = {NEEDS[name] for name in asked if name in NEEDS}
        self.wanted = [name for name in PARTS if name in asked or (name in {*ALWAYS, *needed} and name not in done)]
        if args.small:
            self.wanted = ["correctness"]

    def _before(self, file: Path, here: dict) -> dict:
        """The parts of an earlier record, which has to be of the same sources and the same device."""
        if not file.exists():
            raise ValueError(f"{file} is not there; run without --after")
        record = json.loads(file.read_text())
        for what in ("sources_sha256", "device", "rehearsal"):
            was, now = (_lasting(context.get(what)) for context in (record["context"], here))
            if was != now:
                raise ValueError(f"{file} is a record of other {what}: {was}, not {now}; run without --after")
        parts = record["parts"]
        self.clock.flashinfer_is_compiled = parts.get("flashinfer", {}).get("compiled", False)
        return parts

    def save(self) -> None:
        from benchmarks.gpu.files import write_json
        from benchmarks.gpu.report import markdown

        text = markdown(self.record)
        write_json(self.out / "gpu.json", self.record)
        (self.out / "gpu.md").write_text(text)

    def go(self) -> None:
        from benchmarks.gpu.record import Deadline, Part

        for name in self.wanted:
            shares = sum(PARTS[later] for later in self.wanted[self.wanted.index(name) :]) or 1.0
            share = PARTS[name] / shares if PARTS[name] else 1.0
            left = max(self.deadline.left(), 0.0)
            part = Part(name, Deadline(left * share), lambda: self._update(part))
            print(f"[{time.strftime('%H:%M:%S')}] {name}: at most {left * share:.0f} s", flush=True)
            start = time.monotonic()
            if left < 1:
                part.skip(name, "no time was left")
            else:
                part.ended = self._run(part)
            part.seconds = time.monotonic() - start
            self._update(part)
            self.save()
            if not self._clean_up(part):
                self.record["ended"] = DEVICE_LOST
                break
        else:
            ended = all(part["ended"] for part in self.record["parts"].values())
            self.record["ended"] = WHOLE if ended else UNFINISHED
        self.save()

    def _clean_up(self, part) -> bool:
        """Whether the device still answers: after some errors it never does again in this process."""
        try:
            self.clock.sync()
            part.extra["peak_bytes"] = self.clock.peak_bytes()
            self.clock.free_bytes()
            return True
        except Exception:
            part.broken.append({"what": f"{DEVICE_LOST} in {part.name}", "traceback": traceback.format_exc()[-3000:]})
            return False
        finally:
            self._update(part)

    def _run(self, part) -> bool:
        module = importlib.import_module(f"benchmarks.gpu.{part.name}")
        return part.attempt(part.name, module.run, self.clock)  # the other parts are still worth their time

    _saved = 0.0

    def _update(self, part) -> None:
        parts = self.record["parts"] | {part.name: part.as_json()}
        self.record["parts"] = {name: parts[name] for name in PARTS if name in parts}
        if time.monotonic() - self._saved > 3:
            self._saved = time.monotonic()
            self.save()

    def cut_off(self) -> None:
        """Ends the process: something hangs, and what was measured is on disk."""
        print("the run is past its time: cut off", file=sys.stderr, flush=True)
        end_children()
        try:
            self.save()
        finally:  # whatever the other thread was about to write
            os._exit(CUT)


def main(argv: list[str] | None = None) -> int:
    began = time.monotonic()
    args = arguments(argv)
    if args.rehearse:  # Triton decides when a kernel is decorated
        os.environ["TRITON_INTERPRET"] = "1"
    from benchmarks.gpu.record import COMMIT_FILE, ROOT, commit

    if args.write_commit:
        (ROOT / COMMIT_FILE).write_text(commit() + "\n")
        return 0
    import torch

    from benchmarks.gpu.report import brief, markdown
    from benchmarks.gpu.timing import Clock, Rehearsal, Small

    if not args.rehearse and not torch.cuda.is_available():
        print("No CUDA device. `--rehearse` runs the same code at toy sizes on a CPU.", file=sys.stderr)
        return NO_DEVICE
    clock = Rehearsal() if args.rehearse else Small() if args.small else Clock()
    with torch.inference_mode(), tempfile.TemporaryDirectory() as scratch:
        out = args.out or (Path(scratch) if args.rehearse or args.small else ROOT / "benchmarks" / "results")
        try:
            run = Run(args, clock, out, began)
        except ValueError as error:
            print(error, file=sys.stderr)
            return NO_DEVICE
        watchdog = threading.Timer(began + args.seconds - time.monotonic(), run.cut_off)
        watchdog.daemon = True
        watchdog.start()
        try:
            run.go()
        finally:
            watchdog.cancel()
    print(markdown(run.record) if args.rehearse else brief(run.record))
    if not args.rehearse and not args.small:
        print(f"{out / 'gpu.json'}\n{out / 'gpu.md'}")
    return ending(run.record, goals=not (args.rehearse or args.small))


def ending(record: dict, goals: bool) -> int:
    """The exit status of a run that came to its end, said in a sentence where it is not 0.

    Args:
        goals: whether they were to be measured.
    """
    from benchmarks.gpu.goals import all_met
    from benchmarks.gpu.report import broken, failed

    if record["ended"] == DEVICE_LOST:
        print(f"{DEVICE_LOST}: what was measured before is written", file=sys.stderr)
        return LOST
    wrong, ended = failed(record), broken(record)
    if wrong or ended:
        print(f"{len(wrong)} checks failed, {len(ended)} things broke off", file=sys.stderr)
        return FAILED
    if goals and not all_met(record):
        print("every check passed; a goal was missed or not measured", file=sys.stderr)
        return GOALS_OPEN
    return WELL


if __name__ == "__main__":
    sys.exit(main())
