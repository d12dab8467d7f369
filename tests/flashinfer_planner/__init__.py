"""FlashInfer's own host planner, compiled from its installed headers; no GPU."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch

from flashinfer_ext.layout import Grid, Heads

HERE = Path(__file__).parent
SENTINEL = 0xA5
LEAST_SHARED = 99 * 1024  # bytes of a block, of the GPUs of compute capability 8.0 and later
SLACK = 1 << 20  # behind the int workspaces: CUDA-core plans of empty requests may run over them


def _root(package: str) -> Path | None:
    spec = find_spec(package)
    return Path(list(spec.submodule_search_locations)[0]) if spec else None


def why_not() -> str | None:
    """What is missing here to compile the planner, None if nothing is."""
    if _root("flashinfer") is None:
        return "FlashInfer's headers are not installed"
    return None if _nvcc() and shutil.which("g++") else "no nvcc or no g++ is installed"


def _nvcc() -> str | None:
    nvidia = _root("nvidia")
    installed = sorted(nvidia.glob("cu*/bin/nvcc")) if nvidia else []
    return str(installed[-1]) if installed else shutil.which("nvcc")


@dataclass
class Upstream:
    """What FlashInfer planned.

    Attributes:
        plan_info: as its ``plan`` returns it.
        ints: the int workspace, uint8, ``SENTINEL`` where nothing was written.
    """

    plan_info: list[int]
    ints: torch.Tensor

    def ints_at(self, offset: int, count: int) -> list[int]:
        return self.ints[offset : offset + 4 * count].view(torch.int32).tolist()


class Planner:
    """FlashInfer's planner on a machine with a given GPU."""

    def __init__(self, folder: Path) -> None:
        library = folder / "libplanner.so"
        headers = _root("flashinfer") / "data" / "include"
        # The check is of nvcc's version against the headers of the toolkit; only types are used of these.
        flags = ["-DCCCL_DISABLE_CTK_COMPATIBILITY_CHECK", "-std=c++17", "-arch=sm_80", f"-I{headers}"]
        # Bound to its own runtime, although torch may have loaded the real one.
        sources = [HERE / "planner.cu", HERE / "runtime.cpp"]
        command = [
            _nvcc(),
            *flags,
            "-shared",
            "-cudart",
            "none",
            "-Xcompiler",
            "-fPIC",
            "-Xlinker",
            "-Bsymbolic",
            *sources,
            "-o",
            library,
        ]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-4000:]
        self._library = ctypes.CDLL(str(library))

    def plan(
        self,
        tensor_cores: bool,
        lengths: list[int],
        heads: Heads,
        grid: Grid,
        int_bytes: int,
        float_bytes: int,
    ) -> Upstream | None:
        """Plan one batch with that much workspace; None where FlashInfer raises."""
        offsets = torch.zeros(len(lengths) + 1, dtype=torch.int32)
        offsets[1:] = torch.tensor(lengths).cumsum(0)
        ints, pinned = (torch.full((int_bytes + SLACK,), SENTINEL, dtype=torch.uint8) for _ in range(2))
        info = torch.zeros(16, dtype=torch.int64)
        self._library.set_device(grid.num_sms, grid.num_blocks_per_sm, LEAST_SHARED)
        numbers = [len(lengths), heads.num_q_heads, heads.num_kv_heads, heads.head_dim]
        plan = self._library.cuda_core_plan
        if tensor_cores:
            plan = self._library.tensor_core_plan
            numbers.append(2)  # bytes of an element of the cache: 1 asks for less shared memory
        plan.restype = ctypes.c_int64
        workspaces = [
            4096,
            float_bytes,
            ints.data_ptr(),
            pinned.data_ptr(),
            int_bytes,
        ]  # floats: never touched
        pointers = [ctypes.c_void_p(offsets.data_ptr()), *map(ctypes.c_int64, numbers + workspaces)]
        count = plan(*pointers, ctypes.c_void_p(info.data_ptr()))
        return Upstream(info[:count].tolist(), ints) if count >= 0 else None
