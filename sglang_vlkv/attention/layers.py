"""What a model's attention layers do, as far as the ragged kernels must do it too."""

from __future__ import annotations

from typing import Iterator

from sglang.srt.layers.radix_attention import AttentionType, RadixAttention
from torch import nn


def unserved(model: nn.Module) -> str:
    """What the first layer does that is more than softmax attention over all rows before it; "" for none.

    SGLang's model configuration does not tell of these, so this is seen once the model is there.
    """
    for name, layer in model.named_modules():
        if isinstance(layer, RadixAttention):
            for what in _beyond_softmax(layer):
                return f"{what} ({name})"
    return ""


def _beyond_softmax(layer: RadixAttention) -> Iterator[str]:
    if layer.logit_cap > 0:
        yield f"caps attention logits at {layer.logit_cap}"
    if layer.xai_temperature_len > 0:
        yield "changes the temperature of attention with the position"
    if layer.sliding_window_size > 0:
        yield f"attends within a window of {layer.sliding_window_size} rows"
    if layer.v_head_dim != layer.qk_head_dim:
        yield f"has keys of {layer.qk_head_dim} and values of {layer.v_head_dim} dimensions"
    if layer.is_cross_attention or layer.attn_type != AttentionType.DECODER:
        yield "attends to more than the rows before it"
