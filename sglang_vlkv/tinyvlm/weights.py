"""Random weights whose answers vary, depend on all of the prompt, and whose attention is peaked."""

from __future__ import annotations

import math

import torch

from sglang_vlkv.tinyvlm.checkpoint import (
    MERGE_SIZE,
    PATCH_SIZE,
    TEMPORAL_PATCH_SIZE,
    VISION_DEPTH,
    VISION_HIDDEN,
    VISION_INTERMEDIATE,
)
from sglang_vlkv.tinyvlm.tokenizer import VOCAB_SIZE


class Sampler:
    """Random tensors, float32 on the CPU, in an order fixed by the calls."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int, std: float = 1.0) -> torch.Tensor:
        return torch.randn(*shape, generator=self._generator) * std

    def linear(self, out_features: int, in_features: int, gain: float = 1.0) -> torch.Tensor:
        """A weight [out, in] that turns unit-variance inputs into outputs of std ``gain``."""
        return self.normal(out_features, in_features, std=gain / math.sqrt(in_features))


def vision_weights(seed: int, out_hidden: int) -> dict[str, torch.Tensor]:
    """The vision tower, named as in Qwen's own checkpoints."""
    sample = Sampler(2 * seed)
    dim, mlp = VISION_HIDDEN, VISION_INTERMEDIATE
    merged = dim * MERGE_SIZE**2
    pixels = 3 * TEMPORAL_PATCH_SIZE * PATCH_SIZE**2
    patch_weight = sample.linear(dim, pixels, gain=3.0)
    # Zero-mean filters see edges and texture as well as the patch's mean colour, which would
    # otherwise drown them.
    per_channel = patch_weight.view(dim, 3, -1)
    per_channel -= 0.9 * per_channel.mean(-1, keepdim=True)
    weights = {
        "visual.patch_embed.proj.weight": patch_weight.view(
            dim, 3, TEMPORAL_PATCH_SIZE, PATCH_SIZE, PATCH_SIZE
        )
    }

    def dense(name: str, out_features: int, in_features: int, gain: float) -> None:
        weights[f"{name}.weight"] = sample.linear(out_features, in_features, gain)
        weights[f"{name}.bias"] = sample.normal(out_features, std=0.1)

    for layer in range(VISION_DEPTH):
        block = f"visual.blocks.{layer}"
        weights[f"{block}.norm1.weight"] = torch.ones(dim)
        weights[f"{block}.norm2.weight"] = torch.ones(dim)
        dense(f"{block}.attn.qkv", 3 * dim, dim, gain=1.4)
        dense(f"{block}.attn.proj", dim, dim, gain=1.0)
        dense(f"{block}.mlp.gate_proj", mlp, dim, gain=1.4)
        dense(f"{block}.mlp.up_proj", mlp, dim, gain=1.4)
        dense(f"{block}.mlp.down_proj", dim, mlp, gain=1.0)
    weights["visual.merger.ln_q.weight"] = torch.ones(dim)
    dense("visual.merger.mlp.0", merged, merged, gain=1.4)
    dense("visual.merger.mlp.2", out_hidden, merged, gain=1.2)
    return weights


def language_weights(
    seed: int,
    num_layers: int,
    hidden: int,
    q_dim: int,
    kv_dim: int,
    intermediate: int,
    attention_scale: float,
    *,
    vocab_size: int = VOCAB_SIZE,
    bias: bool = True,
    norm_dim: int = 0,
) -> dict[str, torch.Tensor]:
    """A decoder, named as Llama's and Qwen's own checkpoints name it.

    Args:
        q_dim, kv_dim: heads x head_dim of the queries, and of the keys and values.
        attention_scale: as in :func:`~sglang_vlkv.tinyvlm.build.build`.
        bias: whether queries, keys and values have one (Qwen2).
        norm_dim: head_dim where queries and keys are normalised head by head (Qwen3), else 0.
    """
    sample = Sampler(2 * seed + 1)
    # q.k / sqrt(head_dim) has standard deviation gain_q * gain_k.
    gain_qk = math.sqrt(attention_scale)
    lm_head = sample.linear(vocab_size, hidden, gain=3.0)
    # Logits of all but printable ASCII and newline are small: greedy output is readable, seldom
    # ends early and never holds a visual placeholder.
    printable = torch.zeros(vocab_size, dtype=torch.bool)
    printable[0x20:0x7F] = True
    printable[0x0A] = True
    lm_head[~printable] *= 0.1
    weights = {
        "model.embed_tokens.weight": sample.normal(vocab_size, hidden),
        "model.norm.weight": torch.ones(hidden),
        "lm_head.weight": lm_head,
    }
    for layer in range(num_layers):
        block = f"model.layers.{layer}"
        weights[f"{block}.input_layernorm.weight"] = torch.ones(hidden)
        weights[f"{block}.post_attention_layernorm.weight"] = torch.ones(hidden)
        for name, width, gain in (("q", q_dim, gain_qk), ("k", kv_dim, gain_qk), ("v", kv_dim, 1.0)):
            weights[f"{block}.self_attn.{name}_proj.weight"] = sample.linear(width, hidden, gain)
            if bias:
                weights[f"{block}.self_attn.{name}_proj.bias"] = sample.normal(width, std=0.2)
            if norm_dim and name != "v":
                weights[f"{block}.self_attn.{name}_norm.weight"] = torch.full((norm_dim,), gain_qk)
        # A larger gain lets the context's mean drown the rest, and greedy decoding cycles.
        weights[f"{block}.self_attn.o_proj.weight"] = sample.linear(hidden, q_dim)
        weights[f"{block}.mlp.gate_proj.weight"] = sample.linear(intermediate, hidden, gain=1.4)
        weights[f"{block}.mlp.up_proj.weight"] = sample.linear(intermediate, hidden, gain=1.4)
        weights[f"{block}.mlp.down_proj.weight"] = sample.linear(hidden, intermediate, gain=1.0)
    return weights
