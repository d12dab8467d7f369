"""Obvious loops, for tests."""

from __future__ import annotations

from typing import Sequence

import torch


def select_rows(scores: torch.Tensor, tier: torch.Tensor, num_kept: Sequence[int]) -> torch.Tensor:
    """See the CPU version."""
    heads = []
    for head in range(scores.shape[1]):
        heads.append([])
        for layer, count in enumerate(num_kept):
            tiers, values = tier[layer, head].tolist(), scores[layer, head].tolist()
            ranking = sorted(range(len(values)), key=lambda j: (tiers[j], -values[j], j))
            heads[-1] += sorted(ranking[:count])
    return torch.tensor(heads)
