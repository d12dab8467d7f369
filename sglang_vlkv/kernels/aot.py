"""Compiles the Triton kernels ahead of time for any NVIDIA architecture; needs no GPU.

``python -m sglang_vlkv.kernels.aot`` prints what each kernel takes on sm_80, sm_90 and sm_100. The
launchers themselves run, with tensors in host memory, so what is compiled is what a server would
launch: their tile sizes, their specialisations. Only the driver under them is replaced, by one that
measures each binary instead of loading it and drops every launch.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from itertools import count
from pkgutil import walk_packages
from types import SimpleNamespace
from typing import Any, Callable, Iterator, NamedTuple

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from sglang_vlkv.commands import Problem, values
from sglang_vlkv.commands.door import Parser, command

# Shared memory that one block may have, in bytes (CUDA C++ Programming Guide, compute capabilities).
MAX_SHARED = {80: 166_912, 90: 232_448, 100: 232_448}
PACKAGES = "sglang_vlkv.kernels", "flashinfer_ext"


class Resources(NamedTuple):
    """What one compiled kernel takes.

    Attributes:
        arch: 90 for sm_90.
        registers: per thread.
        shared: bytes per block.
        spills: bytes of local memory per thread: the stack, where registers are spilled to.
    """

    kernel: str
    arch: int
    registers: int
    shared: int
    spills: int
    num_warps: int
    num_stages: int


@contextmanager
def compiled_for(arch: int) -> Iterator[list[Resources]]:
    """Launchers called inside compile their kernels for ``arch`` and launch nothing.

    Tensors are on the CPU, uninitialised and of production shapes: Triton specialises integers that
    are 1 or divisible by 16, and addresses divisible by 16. Their pages are never touched, so shapes
    larger than the machine's memory work. Binaries come from Triton's cache where it has them.

    Args:
        arch: 80, 90 or 100.

    Returns:
        The list of what was compiled so far, one entry per kernel and specialisation, in the order
        of their first launch.

    Raises:
        RuntimeError: Triton interprets kernels in this process (``TRITON_INTERPRET``).
        triton.OutOfResources: from the launcher, where a block needs more shared memory than there is.
    """
    if os.environ.get("TRITON_INTERPRET", "0") != "0" or not isinstance(tl.sum, triton.JITFunction):
        raise RuntimeError(
            "TRITON_INTERPRET is set or was set when Triton was imported; compile in a process without it"
        )
    if arch not in MAX_SHARED:
        raise ValueError(f"arch is one of {', '.join(map(str, MAX_SHARED))}, not {arch}")
    compiled: list[Resources] = []
    before = driver._active  # None without a GPU; the public property would raise
    driver.set_active(_MeasuringDriver(arch, compiled))
    try:
        yield compiled
    finally:
        driver.set_active(before)


_ids = count()


class _MeasuringDriver:
    """Stands where Triton expects the driver of a GPU: ``triton.backends.driver.DriverBase``."""

    def __init__(self, arch: int, compiled: list[Resources]) -> None:
        self._arch, self._compiled = arch, compiled
        self._usage: dict[str, tuple[int, int]] = {}  # by the hash of source, specialisation and options
        # Triton keeps what it compiled per device: a device that never was has nothing yet.
        self._device = f"sm_{arch}, context {next(_ids)}"
        self.utils = SimpleNamespace(
            load_binary=self._load_binary,
            unload_module=lambda module: None,
            get_device_properties=lambda device: {"max_shared_mem": MAX_SHARED[arch]},
        )

    def get_current_device(self) -> str:
        return self._device

    def get_current_stream(self, device: str) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self._arch, 32)

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        self._metadata = metadata  # of the binary that is loaded next
        return lambda *args, **kwargs: None

    def _load_binary(self, name: str, cubin: bytes, shared: int, device: str) -> tuple:
        metadata = self._metadata
        if metadata.hash not in self._usage:
            self._usage[metadata.hash] = _usage(cubin)
            registers, spills = self._usage[metadata.hash]
            self._compiled.append(
                Resources(
                    name, self._arch, registers, shared, spills, metadata.num_warps, metadata.num_stages
                )
            )
        # Without a module Triton has nothing to unload, and asks again at each launch.
        registers, spills = self._usage[metadata.hash]
        max_threads = min(1024, 65_536 // max(registers, 1) // 32 * 32)
        return None, None, registers, spills // 4, max_threads


def _usage(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of local memory per thread."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", report))
    return int(usage["REG"]), int(usage["STACK"]) + int(usage["LOCAL"])


def cases() -> dict[str, Callable[[], None]]:
    """Every kernel module's ``aot_cases()``, by ``<package or module>: <case>``."""
    found = {}
    for package in PACKAGES:
        if not find_spec(package):
            continue
        for info in walk_packages(import_module(package).__path__, f"{package}."):
            module = import_module(info.name)
            if hasattr(module, "aot_cases"):
                op = info.name.removeprefix(f"{PACKAGES[0]}.").removesuffix(".triton")
                found |= {f"{op}: {case}": call for case, call in module.aot_cases().items()}
    return found


@command
def main(arguments: list[str] | None = None) -> None:
    words = "Registers, shared memory and spills of every kernel."
    parser = Parser("python -m sglang_vlkv.kernels.aot", description=words)
    parser.add_argument("--json", type=values.new_file, metavar="FILE", help="write the table there, too")
    parser.add_argument("--only", default="", help="only cases whose name contains this")
    parser.add_argument("--arch", type=int, nargs="+", choices=MAX_SHARED, default=list(MAX_SHARED))
    options = parser.parse_args(arguments)
    chosen = {case: call for case, call in cases().items() if options.only in case}
    if not chosen:
        raise Problem(f"No case has {options.only!r} in its name; there are {', '.join(cases())}.")
    records = []
    print("| case | kernel | arch | registers | shared, bytes | spills, bytes | warps | stages |")
    print("|---|---|---|---|---|---|---|---|")
    for case, call in chosen.items():
        for arch in options.arch:
            with compiled_for(arch) as compiled:
                call()
            if not compiled:
                raise Problem(f"Case {case!r} launched nothing.")
            for r in compiled:
                print(
                    f"| {case} | {r.kernel} | sm_{arch} | {r.registers} | {r.shared} | {r.spills} "
                    f"| {r.num_warps} | {r.num_stages} |",
                    flush=True,
                )
                records.append({"case": case, **r._asdict()})
    if options.json:
        options.json.write_text(json.dumps(records, indent=1))


if __name__ == "__main__":
    sys.exit(main())
