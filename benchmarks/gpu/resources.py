"""Registers, shared memory and spills of the Triton kernels, as ``sglang_vlkv.kernels.aot`` finds them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.gpu.record import ROOT, Part
from benchmarks.gpu.timing import Clock


def run(part: Part, clock: Clock) -> None:
    if clock.rehearsal:
        part.skip("resources", "compiling takes minutes on one core; `python -m sglang_vlkv.kernels.aot` does it")
        return
    if not part.has(10, "resources"):
        return
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "aot.json"
        command = [sys.executable, "-m", "sglang_vlkv.kernels.aot", "--json", str(path)]
        try:
            ran = subprocess.run(
                command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=part.deadline.left()
            )
        except subprocess.TimeoutExpired:
            part.skip("resources", "compiling did not end in the part's time")
            return
        if not path.exists():
            part.skip("resources", f"no table came: {ran.stderr[-500:]}")
            return
        part.extra["kernels"] = json.loads(path.read_text())
