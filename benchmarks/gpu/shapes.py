"""The models' sizes, the batches, and how unevenly layers keep rows."""

from __future__ import annotations

import random
from typing import NamedTuple

from sglang_vlkv.stages.budgets import proportional

ALPHA = 0.1
UNEVEN = 0.8  # every layer of an uneven split keeps 0.8 of what the one before it keeps


class Model(NamedTuple):
    """A decoder's sizes.

    Attributes:
        layers, q_heads, kv_heads, head_dim: L, Hq, Hkv, D.
    """

    name: str
    layers: int
    q_heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    intermediate: int
    vocabulary: int
    rope_theta: float

    @property
    def row_bytes(self) -> int:
        """K and V of one token in one layer, in 16 bits."""
        return 2 * 2 * self.kv_heads * self.head_dim

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5


MISTRAL = Model("LLaVA-v1.6-Mistral-7B", 32, 32, 8, 128, 4096, 14336, 32064, 1e6)
QWEN = Model("Qwen2.5-VL-7B", 28, 28, 4, 128, 3584, 18944, 152064, 1e6)
# For the rehearsal: the same groups of query heads per KV head, 4 and 7.
TOY_MISTRAL = Model("toy of G=4", 2, 8, 2, 32, 64, 96, 50, 1e4)
TOY_QWEN = Model("toy of G=7", 2, 7, 1, 32, 64, 96, 50, 1e4)


class Batch(NamedTuple):
    """Prompt lengths of the requests that decode together."""

    name: str
    lengths: tuple[int, ...]

    @property
    def tokens(self) -> int:
        return sum(self.lengths)


def batches(rehearsal: bool) -> list[Batch]:
    if rehearsal:
        return [Batch("2x40", (40,) * 2), Batch("1x48 + 1x24", (48, 24))]
    k = 1024
    return [
        Batch("1x32K", (32 * k,)),
        Batch("1x128K", (128 * k,)),
        Batch("4x32K", (32 * k,) * 4),
        Batch("64x2K", (2 * k,) * 64),
        Batch("12x32K + 1x16K (400K)", (32 * k,) * 12 + (16 * k,)),
    ]


def models(rehearsal: bool) -> list[Model]:
    return [TOY_MISTRAL, TOY_QWEN] if rehearsal else [MISTRAL, QWEN]


def kept_rows(num_layers: int, length: int, alpha: float, uneven: bool, seed: int = 0) -> list[int]:
    """Rows per layer of a prompt; uneven layers are a geometric series in random order, same total."""
    weights = [UNEVEN**layer if uneven else 1.0 for layer in range(num_layers)]
    random.Random(seed).shuffle(weights)
    return proportional(weights, round(alpha * length * num_layers), length)
