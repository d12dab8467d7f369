"""SGLang on a machine without an accelerator, in pure torch."""

from __future__ import annotations

import os

from sglang_vlkv import compatibility


def activate() -> str | None:
    """Entry point of group ``sglang.srt.platforms``.

    Returns:
        The dotted name of the platform class, or None where any accelerator is present, where the
        operator asked for SGLang's own CPU engine (``SGLANG_USE_CPU_ENGINE=1``, which needs
        sgl-kernel's CPU build), or, with a warning, beside an SGLang that it does not fit.
    """
    import torch

    if os.environ.get("SGLANG_USE_CPU_ENGINE", "0") == "1":
        return None
    # Covers CUDA, ROCm, XPU, MPS, NPU and any other backend that torch itself knows.
    if torch.accelerator.is_available():
        return None
    if not compatibility.fits(compatibility.CPU):
        return None
    return "sglang_vlkv.cpu.platform.TorchCpuPlatform"
