"""Reading a model's rotary embedding."""

from __future__ import annotations

from sglang.srt.layers.rotary_embedding.base import RotaryEmbedding
from torch import nn

from sglang_vlkv.stages.rope import Rope


def find_rope(model: nn.Module) -> Rope | None:
    """The rotary embedding of the language model's layers; None where it has none we know."""
    for name, module in model.named_modules():
        if name.endswith(".rotary_emb") and isinstance(module, RotaryEmbedding):
            axes = getattr(module, "axis_map", None)
            if axes is None and getattr(module, "mrope_section", None):
                return None  # it lays its axes out in a way of its own
            return Rope(module.cos_sin_cache, axes, module.is_neox_style)
    return None
