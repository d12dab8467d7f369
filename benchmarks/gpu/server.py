"""A server as a user would start it: no flag and no variable of the tests' own."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from tests.serving import LAUNCH, Server

NOT_PASSED_ON = ("TORCHDYNAMO_DISABLE", "TRITON_INTERPRET", "SGLANG_PLUGINS")
RECORDED = ("CUDA_", "FLASHINFER_", "NCCL_", "OMP_", "PYTORCH_", "SGLANG_", "TORCH", "TRITON_", "VLKV_")


def environment(more: dict[str, str]) -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name not in NOT_PASSED_ON} | more


def recorded(environment: dict[str, str]) -> dict[str, str]:
    """Every variable that SGLang, torch or a kernel reads; the rest is the machine's own business."""
    return {name: value for name, value in sorted(environment.items()) if name.startswith(RECORDED)}


class UsersServer(Server):
    """For a ``with`` statement.

    Attributes:
        flags: the command line behind the model's, in full.
        env: the process's variables, in full.
    """

    def __init__(self, model: Path, *flags: str, env: dict[str, str], start_timeout: float) -> None:
        self._take_port()
        self.flags = ["--host", "127.0.0.1", "--port", str(self.port), *flags]
        self.env = environment(env)
        self._run([sys.executable, *LAUNCH, "--model-path", str(model), *self.flags], self.env)
        self._await(start_timeout)
