"""LoRA on a CPU: adapters of random weights for the random checkpoint, and SGLang's backend for them."""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from safetensors.torch import save_file

from tests.serving import install_entry_point

FLAGS = ("--enable-lora", "--lora-backend", "torch_native")
# That backend pins its tables without asking the platform, and torch raises where there is no accelerator
# to copy them to.
UNPINNED = """
import torch
from sglang.srt.lora import layers
from sglang.srt.lora.backend import torch_backend

class Torch:
    def __getattr__(self, name):
        return getattr(torch, name)

    def tensor(self, *args, pin_memory=False, **options):
        return torch.tensor(*args, **options)

    def zeros(self, *args, pin_memory=False, **options):
        return torch.zeros(*args, **options)

def register():
    layers.torch = torch_backend.torch = Torch()
"""
RANK, HIDDEN, KV_WIDTH, LAYERS = 4, 128, 64, 4
OUTPUTS = {"q_proj": HIDDEN, "k_proj": KV_WIDTH, "v_proj": KV_WIDTH, "o_proj": HIDDEN}


def install_unpinned(folder: Path) -> dict[str, str]:
    """A plugin, and the environment of a server that loads it."""
    (folder / "unpinned.py").write_text(UNPINNED)
    install_entry_point(folder, "sglang.srt.plugins", "unpinned", "unpinned:register")
    return {"PYTHONPATH": str(folder)}


def write_adapter(path: Path, seed: int) -> Path:
    """In PEFT's layout: all attention projections of all layers, strong enough to change every answer."""
    path.mkdir()
    generator, weights = torch.Generator().manual_seed(seed), {}
    for layer in range(LAYERS):
        for name, width in OUTPUTS.items():
            prefix = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            lora_a = torch.randn(RANK, HIDDEN, generator=generator) / math.sqrt(HIDDEN)
            weights[f"{prefix}.lora_A.weight"] = lora_a
            weights[f"{prefix}.lora_B.weight"] = 0.3 * torch.randn(width, RANK, generator=generator)
    save_file(weights, path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 2 * RANK, "target_modules": list(OUTPUTS)}
    (path / "adapter_config.json").write_text(json.dumps(config))
    return path
