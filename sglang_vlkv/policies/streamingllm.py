"""StreamingLLM (arXiv 2309.17453)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sglang_vlkv.stages.layer import Layer, LayerScores
from sglang_vlkv.stages.policy import Policy


@dataclass(frozen=True)
class StreamingLLM(Policy):
    """The first tokens (attention sinks) and the most recent ones; attention is not looked at.

    StreamingLLM (arXiv 2309.17453), applied once to the prompt.
    """

    name = "streamingllm"
    votes = False

    sink_tokens: int = 4

    def score(self, layer: Layer) -> LayerScores:
        num_keys, num_heads = layer.num_keys, layer.num_kv_heads
        position = torch.arange(num_keys, dtype=torch.float32, device=layer.device)
        return LayerScores(position.expand(num_heads, -1))
