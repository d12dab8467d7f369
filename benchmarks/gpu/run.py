"""Everything that has to be measured on a GPU, in one call: ``python -m benchmarks.gpu.run``.

Needs Python, torch and Triton; FlashInfer and SGLang are used where they are importable. Results are
written as they come, so a run that is cut off or loses its device leaves what it had, and says so.
``--rehearse`` runs the same code at toy sizes on a CPU, in Triton's interpreter, and writes nothing.
"""

from __future__ import annotations

import argparse
import importlib
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
    "correctness": 0.19,
    "decode": 0.31,
    "compression": 0.12,
    "paper": 0.28,
    "serving": 0.0,  # servers take minutes to start: it gets what is left, or a call of its own
    "resources": 0.05,
}
ALWAYS = ("ceilings", "correctness")
SPARE_SECONDS = 25  # parts are to be done that long before the run is cut off
CUT_OFF, WHOLE, DEVICE_LOST = "cut off", "whole", "device lost"  # how a run ended


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
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--seconds", type=float, default=480, help="for the whole run, 480 unless told")
    parser.add_argument("--rehearse", action="store_true", help="toy sizes on the CPU, times mean nothing")
    parser.add_argument("--write-commit", action="store_true", help="note the commit in a file, and end")
    return parser.parse_args(argv)


class Run:
    """One run: its parts, one after another, and the files that they end up in."""

    def __init__(self, args: argparse.Namespace, clock, out: Path, began: float) -> None:
        """
        Args:
            began: when the run began, on the monotonic clock.
        """
        from benchmarks.gpu.record import Deadline, context

        self.clock, self.out = clock, out
        self.wanted = [name for name in PARTS if name in (*ALWAYS, *args.parts)]
        self.deadline = Deadline(began + args.seconds - SPARE_SECONDS - time.monotonic())
        self.record = {
            "arguments": {name: str(value) for name, value in vars(args).items()},
            "context": context(clock),
            "ended": CUT_OFF,  # what a file says that nobody finished
            "parts": {},
        }

    def save(self) -> None:
        from benchmarks.gpu.record import write_json
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
                self._run(part)
            part.seconds = time.monotonic() - start
            self._update(part)
            self.save()
            if not self._clean_up(part):
                self.record["ended"] = DEVICE_LOST
                break
        else:
            self.record["ended"] = WHOLE
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

    def _run(self, part) -> None:
        module = importlib.import_module(f"benchmarks.gpu.{part.name}")
        part.attempt(part.name, module.run, self.clock)  # the other parts are still worth their time

    _saved = 0.0

    def _update(self, part) -> None:
        self.record["parts"][part.name] = part.as_json()
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
            os._exit(3)


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

    from benchmarks.gpu.report import brief, broken, failed, failed_optional, markdown
    from benchmarks.gpu.timing import Clock, Rehearsal

    if not args.rehearse and not torch.cuda.is_available():
        print("No CUDA device. `--rehearse` runs the same code at toy sizes on a CPU.", file=sys.stderr)
        return 2
    with torch.inference_mode(), tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) if args.rehearse else args.out or ROOT / "benchmarks" / "results"
        run = Run(args, Rehearsal() if args.rehearse else Clock(), out, began)
        watchdog = threading.Timer(began + args.seconds - time.monotonic(), run.cut_off)
        watchdog.daemon = True
        watchdog.start()
        try:
            run.go()
        finally:
            watchdog.cancel()
    if args.rehearse:
        print(markdown(run.record))
    else:
        print(brief(run.record))
        print(f"{out / 'gpu.json'}\n{out / 'gpu.md'}")
    if run.record["ended"] == DEVICE_LOST:
        print(f"{DEVICE_LOST}: what was measured before is written", file=sys.stderr)
        return 4
    wrong, ended = failed(run.record) + failed_optional(run.record), broken(run.record)
    if wrong or ended:
        print(f"{len(wrong)} checks failed, {len(ended)} things broke off", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
