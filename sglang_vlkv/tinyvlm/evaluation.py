"""The share of exact answers, with the whole cache and with less of it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from sglang_vlkv.tinyvlm import tasks
from sglang_vlkv.tinyvlm.lessons import pixels, predict, without
from sglang_vlkv.tinyvlm.model import TinyVLM
from sglang_vlkv.tinyvlm.packing import Packer

EVALUATION_SEEDS = 2_000_000
ABLATIONS = ("full", "text-only", "all-but-asked", "oracle")


def evaluate(
    model: TinyVLM,
    packer: Packer,
    samples: int = 100,
    side: int = 16,
    seed: int = EVALUATION_SEEDS,
    ablations: tuple[str, ...] = ABLATIONS,
    threads: int = 1,
) -> dict[str, dict[str, float]]:
    """Share of exact greedy answers, task -> ablation -> share.

    An answer is exact under greedy decoding if and only if every token is the likeliest one after the
    right ones before it, so one pass judges it. The ablations take visual KV away from what is
    decoded after the first token of the (last) answer; the prefill sees everything.
    """
    cells = pixels()

    @torch.no_grad()
    def shares(task: str) -> dict[str, float]:
        counts = dict.fromkeys(ablations, 0)
        for first in range(0, samples, 20):
            drawn = [tasks.lay_out(task, seed + i, side) for i in range(first, min(samples, first + 20))]
            grids = np.stack([np.stack(scene.grids) for scene, _ in drawn])
            packed = [[packer.turns(questions)] for _, questions in drawn]
            batch = packer.pack(grids, packed, video=task == "video")
            all_cells = torch.ones_like(batch.needed)
            hidden = dict(zip(ABLATIONS, (~all_cells, all_cells, batch.needed, ~batch.needed)))
            for name in ablations:
                logits, _ = predict(model, cells, batch, without(batch, hidden[name]))
                scored = batch.labels >= 0
                if name != "full" and task == "turns":
                    # The last answer, and its first token, which the prefill gives.
                    scored &= batch.last | batch.last.roll(-1, 1)
                right = (logits.argmax(-1) == batch.labels) | ~scored
                counts[name] += int(right.all(1).sum())
        return {name: round(count / samples, 4) for name, count in counts.items()}

    with ThreadPoolExecutor(threads) as pool:
        return dict(zip(tasks.TASKS, pool.map(shares, tasks.TASKS)))
