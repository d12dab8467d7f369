"""Low-rank additions to the attention projections of the language model."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


def attach(layers: nn.ModuleList, rank: int) -> dict[str, nn.Parameter]:
    """Add ``up @ down`` to every projection of ``layers``, where it computes; ``up`` starts at zero.

    Returns:
        Float32 parameters by ``LAYER.PROJECTION.down`` [rank, in] and ``.up`` [out, rank].
    """
    parameters = {}
    for index, layer in enumerate(layers):
        for name in PROJECTIONS:
            linear = getattr(layer.self_attn, name)
            down = nn.Parameter(torch.randn(rank, linear.in_features) * linear.in_features**-0.5)
            up = nn.Parameter(torch.zeros(linear.out_features, rank))
            parameters |= {f"{index}.{name}.down": down, f"{index}.{name}.up": up}
            linear.register_forward_hook(_adding(down, up))
    return parameters


def _adding(down: nn.Parameter, up: nn.Parameter):
    def hook(_module, inputs, output):
        [x] = inputs
        return output + F.linear(F.linear(x, down.to(x.dtype)), up.to(x.dtype))

    return hook


def save(path: Path, parameters: dict[str, torch.Tensor], **about: object) -> None:
    """Write bfloat16; ``about`` is kept as the file's metadata."""
    tensors = {name: p.detach().to(torch.bfloat16).contiguous() for name, p in parameters.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".part")
    save_file(tensors, unfinished, metadata={key: str(value) for key, value in about.items()})
    unfinished.replace(path)


def load(path: Path) -> dict[str, torch.Tensor]:
    """The float32 parameters of a file that :func:`save` wrote."""
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name).float() for name in file.keys()}


def merge(weights: dict[str, torch.Tensor], parameters: dict[str, torch.Tensor]) -> None:
    """Add the products to a language model's weights, in place."""
    for name, up in parameters.items():
        key, _, part = name.rpartition(".")
        if part == "up":
            layer, projection = key.split(".")
            weights[f"model.layers.{layer}.self_attn.{projection}.weight"] += up @ parameters[f"{key}.down"]
