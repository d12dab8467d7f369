"""Operations on tensors, each as obvious loops, as vectorised torch and as Triton kernels."""

from __future__ import annotations

from functools import wraps
from importlib import import_module
from typing import Callable, Sequence, TypeVar

import torch

Op = TypeVar("Op", bound=Callable)


def by_device(cpu_version: Op) -> Op:
    """``cpu_version``, or for CUDA tensors its namesake in the ``triton`` module beside it.

    The first argument decides. Triton is imported when it is first needed.
    """
    triton_module = f"{cpu_version.__module__.rpartition('.')[0]}.triton"

    @wraps(cpu_version)
    def run(tensor: torch.Tensor, *args, **kwargs):
        if not tensor.is_cuda:
            return cpu_version(tensor, *args, **kwargs)
        return getattr(import_module(triton_module), cpu_version.__name__)(tensor, *args, **kwargs)

    return run


def on_device(numbers: Sequence[int], device: torch.device) -> torch.Tensor:
    """``[len(numbers)]`` int64 on ``device``, without waiting for it."""
    pinned = torch.tensor(numbers, dtype=torch.int64, pin_memory=device.type == "cuda")
    return pinned.to(device, non_blocking=True)
