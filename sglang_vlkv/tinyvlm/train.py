"""Train the tiny model from random weights, in minutes on a CPU.

``python -m sglang_vlkv.tinyvlm.train OUT_DIR --seed 1`` writes a complete checkpoint in Hugging Face
layout and ``training.jsonl``: first the arguments and versions, then the loss and the share of exact
answers while training, then the evaluation of the stored weights.

What makes it learn:

* An auxiliary loss, faded out over the first steps, aligns the embedding of a cell with the word
  embeddings of its colour and its digit. Without it there is no progress for thousands of steps.
* Grids of 5x8 cells first.
* Where an answer goes on to the next cell of a path or line, a loss that fades out as well asks one
  head of the third layer to attend to that cell.
* One head starts out attending to recent positions, which in a picture means the neighbour to the left.
* In one question of eight the answer's rows are blind, to all of the picture or to the cells that
  they need, and should then give each digit the same probability. Otherwise the model may learn to
  look the digits up while it reads the question and keep them in the text's KV.

The pictures and questions of a training run come from ``numpy.random.default_rng((1_000_000 + seed,
step, worker))``, those of its evaluation from ``tasks.draw`` with seeds from 2,000,000 on. No seed of
``tasks.draw`` below 1,000,000 is used here; those are for benchmarks.
"""

from __future__ import annotations

import json
import math
import os
import platform
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from tokenizers import Tokenizer

from sglang_vlkv.commands import Problem, values
from sglang_vlkv.commands.door import Parser, command
from sglang_vlkv.tinyvlm.checkpoint import write_checkpoint
from sglang_vlkv.tinyvlm.evaluation import ABLATIONS, EVALUATION_SEEDS, evaluate
from sglang_vlkv.tinyvlm.lessons import (
    Training,
    alignment_loss,
    loss_of,
    pixels,
    predict,
    training_batch,
)
from sglang_vlkv.tinyvlm.model import TinyVLM
from sglang_vlkv.tinyvlm.packing import Packer
from sglang_vlkv.tinyvlm.start import WORDS, initial_model, tiny_config

SMALL_GRIDS = 300  # first steps, with 5x8 cells only
ALIGNMENT = 500  # first steps, over which the alignment loss fades out
WATCHING = 900  # first steps, over which the loss on attention fades out


def train(
    out_dir: Path,
    *,
    seed: int,
    vision: str = "local",
    drop_keys: bool = False,
    steps: int = 1600,
    start: Path | None = None,
    learning_rate: float = 1e-3,
    threads: int = 1,
) -> None:
    """Train and write the checkpoint; see the module and the command line.

    Raises:
        Problem: ``start`` holds no such model.
    """
    # Operators this small gain little from threads of their own; shares of the batch do.
    torch.set_num_threads(1)
    began = time.monotonic()
    config = tiny_config(vision)
    model = initial_model(config, seed)
    if start is not None:
        _load(model, start)
    out_dir.mkdir(parents=True, exist_ok=True)
    write_checkpoint(out_dir, config, None, WORDS)
    packer = Packer(Tokenizer.from_file(str(out_dir / "tokenizer.json")))
    training = Training(seed, 1 if model.visual.local else model.visual.window, drop_keys, threads)
    with (out_dir / "training.jsonl").open("w") as log:

        def note(**record) -> None:
            print(json.dumps(record), flush=True)
            print(json.dumps(record), file=log, flush=True)

        note(
            seed=seed, vision=vision, drop_keys=drop_keys, steps=steps, start=start and start.name,
            learning_rate=learning_rate, parameters=sum(p.numel() for p in model.parameters()),
            torch=torch.__version__, numpy=np.__version__, python=platform.python_version(),
            threads=threads,
        )  # fmt: skip
        _learn(_Run(model, packer, training, start is None), steps, learning_rate, began, note)
        weights = {name: tensor.detach() for name, tensor in model.state_dict().items()}
        write_checkpoint(out_dir, config, weights, WORDS)
        trained = time.monotonic() - began
        model.load_state_dict({name: tensor.bfloat16().float() for name, tensor in weights.items()})
        for task, scores in evaluate(model, packer, threads=threads).items():
            note(task=task, visual_tokens=256, samples=100, exact=scores)
        for task, scores in evaluate(model, packer, samples=12, side=32, threads=threads).items():
            note(task=task, visual_tokens=1024, samples=12, exact=scores)
        note(training_seconds=round(trained, 1))


def _load(model: TinyVLM, start: Path) -> None:
    try:
        stored = load_file(start / "model.safetensors")
        model.load_state_dict({name: tensor.float() for name, tensor in stored.items()})
    except (OSError, SafetensorError, RuntimeError) as error:
        raise Problem(f"{start} holds no model of this shape to start from: {error}") from error


class _Run(NamedTuple):
    """What does not change while it learns; ``fresh``: from random weights."""

    model: TinyVLM
    packer: Packer
    training: Training
    fresh: bool


def _learn(
    run: _Run, steps: int, learning_rate: float, began: float, note: Callable[..., None]
) -> None:
    """The steps, with a note after every hundred; it began at ``began`` of the monotonic clock."""
    model, threads, cells = run.model, run.training.workers, pixels()
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.01)

    def rate(step: int) -> float:
        return min(1.0, (step + 1) / 60) * (0.02 + 0.98 * (1 + math.cos(math.pi * step / steps)) / 2)

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    losses = []
    with ThreadPoolExecutor(threads) as pool:
        for step in range(steps):
            optimizer.zero_grad()
            losses.append(sum(pool.map(lambda worker: _share(run, cells, step, worker), range(threads))))
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            if step % 100 == 99 or step + 1 == steps:
                exact = {}
                if step % 200 == 199:
                    exact = evaluate(
                        model, run.packer, 20, seed=EVALUATION_SEEDS + 100_000, ablations=ABLATIONS[:2],
                        threads=threads,
                    )  # fmt: skip
                note(
                    step=step + 1, loss=round(float(np.mean(losses)), 4), exact=exact,
                    seconds=round(time.monotonic() - began, 1),
                )  # fmt: skip
                losses.clear()


def _share(run: _Run, cells: torch.Tensor, step: int, worker: int) -> float:
    """Adds a worker's share of a step to the gradients; its part of the loss."""
    model, threads = run.model, run.training.workers
    small = run.fresh and step < SMALL_GRIDS
    watching = max(0.0, 1 - step / WATCHING) if run.fresh else 0.0
    fade = max(0.0, 1 - step / ALIGNMENT) if run.fresh else 0.0
    batch, mask, blind = training_batch(run.training, step, run.packer, small, worker)
    with torch.autocast("cpu", torch.bfloat16):
        logits, watched = predict(model, cells, batch, mask)
        align = fade and worker == 0
        aligned = fade * alignment_loss(model, cells, run.packer) if align else 0.0
    loss = loss_of(logits, batch, blind, run.packer.digits) / threads
    rows = (batch.next >= 0) & ~blind
    if watching and rows.any():
        missed = -watched[rows].gather(1, batch.next[rows][:, None]).mean()
        aligned = aligned + 0.3 * watching / threads * missed
    (loss + aligned).backward()
    return loss.item()


@command
def main(arguments: list[str] | None = None) -> None:
    words = "Train the tiny Qwen2.5-VL from random weights."
    parser = Parser("python -m sglang_vlkv.tinyvlm.train", description=words)
    add = parser.add_argument
    add("out_dir", type=values.new_folder)
    add("--seed", type=values.whole(0), default=1)
    add(
        "--vision", choices=("local", "global"), default="local",
        help="local: a visual token depends on its own cell only; global: windows and full attention",
    )  # fmt: skip
    add("--drop-keys", action="store_true", help="train with random unneeded visual keys dropped")
    add("--steps", type=values.whole(), default=1600)
    add("--start", type=values.folder, help="checkpoint directory to start from")
    add("--learning-rate", type=values.positive, default=1e-3)
    add("--threads", type=values.whole(1, 256), default=min(3, os.cpu_count() or 1))
    train(**vars(parser.parse_args(arguments)))


if __name__ == "__main__":
    sys.exit(main())
