"""The model that training begins with: its words, its shape and its first weights."""

from __future__ import annotations

import math

import torch

from sglang_vlkv.tinyvlm import tasks
from sglang_vlkv.tinyvlm.checkpoint import model_config
from sglang_vlkv.tinyvlm.model import TinyVLM
from sglang_vlkv.tinyvlm.tokenizer import vocab_size

WORDS = (
    *(f" {colour}" for colour in tasks.NAMES),
    *(f" {digit}" for digit in range(10)),
    *(word for word in tasks.WORDS if word.startswith(" ")),
    *(word for word in tasks.WORDS if not word.startswith(" ")),
    "user",
    "assistant",
)


def tiny_config(vision: str = "local") -> dict:
    """``config.json`` of the trained model: 2.2 million parameters."""
    local = vision == "local"
    return model_config(
        num_layers=4,
        num_heads=6,
        num_kv_heads=2,
        head_dim=32,
        hidden_size=192,
        intermediate_size=512,
        max_position_embeddings=32768,
        # Neighbours in a row must differ in phase, and most pairs must turn so little over a
        # picture that content matches wherever it stands: width has the slow end of the spectrum.
        mrope_section=[2, 3, 11],
        rope_theta=300.0,
        vocab_size=vocab_size(WORDS),
        tie_word_embeddings=True,
        vision_hidden=96,
        vision_intermediate=192,
        window_size=28 if local else 112,
        full_attention_blocks=() if local else (1,),
    )


def initial_model(config: dict, seed: int) -> TinyVLM:
    """Random weights; the first layer's first head looks at recent positions."""
    torch.manual_seed(seed)
    model = TinyVLM(config)
    depth = len(model.model.layers)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            std = parameter[0].numel() ** -0.5
            if name.endswith(("o_proj.weight", "down_proj.weight")) and "visual" not in name:
                std /= math.sqrt(2 * depth)
            torch.nn.init.normal_(parameter, std=std)
        elif name.endswith("bias"):
            torch.nn.init.zeros_(parameter)
    text = config["text_config"]
    pairs = text["head_dim"] // 2
    time_pairs, height_pairs, _ = text["rope_scaling"]["mrope_section"]
    attention = model.model.layers[0].self_attn
    group = text["num_attention_heads"] // text["num_key_value_heads"]
    with torch.no_grad():
        attention.q_proj.weight[: 2 * pairs] = 0
        # A logit a^2 cos(frequency * distance + phase) per pair falls with the distance. Rows above
        # must weigh less than anything in the own row, hence the larger amplitude for height.
        for pair in range(time_pairs, time_pairs + height_pairs + 4):
            height = pair < time_pairs + height_pairs
            amplitude, phase = (12.0, math.pi / 4) if height else (5.0, math.pi / 2)
            attention.k_proj.bias[pair] = amplitude
            attention.q_proj.bias[pair] = amplitude * math.cos(phase)
            attention.q_proj.bias[pair + pairs] = amplitude * math.sin(phase)
            # These pairs know positions only, for all heads that share the keys.
            for half in (pair, pair + pairs):
                attention.k_proj.weight[half] = 0
                for head in range(group):
                    attention.q_proj.weight[2 * pairs * head + half] = 0
    return model
