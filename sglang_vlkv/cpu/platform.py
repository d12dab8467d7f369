"""The platform class that :func:`sglang_vlkv.cpu.activate` names."""

from __future__ import annotations

import torch
from sglang.srt.platforms.cpu import CpuDeviceMixin
from sglang.srt.platforms.device_mixin import PlatformEnum
from sglang.srt.platforms.interface import SRTPlatform


class TorchCpuPlatform(CpuDeviceMixin, SRTPlatform):
    """A CPU that runs every operator's ``forward_native``: no compiled SGLang kernels needed.

    It is out-of-tree (``_enum = OOT``) because SGLang's in-tree CPU platform imports sgl-kernel's
    CPU build, which its wheels do not carry.
    """

    _enum = PlatformEnum.OOT

    def __init__(self) -> None:
        super().__init__()
        # SGLang pins decoded video frames without asking the platform. Pinned memory serves copies
        # to an accelerator; where there is none, torch raises.
        torch.Tensor.pin_memory = lambda tensor, device=None: tensor

    def apply_server_args_defaults(self, server_args) -> None:
        """Run eagerly, on torch, unless the operator said otherwise."""
        if server_args.attention_backend is None:
            server_args.attention_backend = "torch_native"
        if server_args.sampling_backend is None:
            server_args.sampling_backend = "pytorch"
        # An idle scheduler polls without a pause, on a core that the rest of the server needs.
        server_args.sleep_on_idle = True

    def get_device(self, device_id: int = 0) -> str:
        """A string: argument resolution splits it at the colon."""
        return "cpu"

    def get_default_attention_backend(self) -> str:
        return "torch_native"

    def get_dispatch_key_name(self) -> str:
        return "native"
