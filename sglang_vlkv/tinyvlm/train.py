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

import argparse
import json
import math
import os
import platform
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tokenizers import Tokenizer

from sglang_vlkv.tinyvlm import build, tasks
from sglang_vlkv.tinyvlm.model import TinyVLM

WORDS = (
    *(f" {colour}" for colour in tasks.NAMES),
    *(f" {digit}" for digit in range(10)),
    *(word for word in tasks.WORDS if word.startswith(" ")),
    *(word for word in tasks.WORDS if not word.startswith(" ")),
    "user",
    "assistant",
)
EVALUATION_SEEDS = 2_000_000
ABLATIONS = ("full", "text-only", "all-but-asked", "oracle")
SMALL_GRIDS = 300  # first steps, with 5x8 cells only
ALIGNMENT = 500  # first steps, over which the alignment loss fades out
WATCHING = 900  # first steps, over which the loss on attention fades out
WATCHED = (2, 3)  # layer and head
TOLD, DIGIT, COLOUR = range(3)
BLIND = 1 / 8  # of the questions, after the small grids


def tiny_config(vision: str = "local") -> dict:
    """``config.json`` of the trained model: 2.2 million parameters."""
    local = vision == "local"
    return build.model_config(
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
        vocab_size=build.vocab_size(WORDS),
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


class Turns(NamedTuple):
    """One conversation as token ids, without the picture's prefix.

    Attributes:
        ids: From after the last ``<|vision_end|>`` to before the last ``<|im_end|>``.
        labels: The token to predict from each of ``ids``, -1 for those that are not trained.
        last: Whether the token belongs to the last answer.
        shown: What the label is: TOLD if the text determines it, else DIGIT or COLOUR of the picture.
        next: The visual token that follows on the path or line, where it decides the label; else -1.
        cells: What the last answer needs.
    """

    ids: list[int]
    labels: list[int]
    last: list[bool]
    shown: list[int]
    next: list[int]
    cells: tuple[int, ...]


class Batch(NamedTuple):
    """Pictures of one shape with packed questions; B pictures, P prefix and T question tokens.

    Attributes:
        grids: Sprite numbers [B, pictures, rows, columns].
        prefix: Token ids [P]; positions: M-RoPE [3, 1, P].
        visual: Where the prefix holds visual tokens, bool [P].
        tail, labels: [B, T]
        tail_positions: [3, B, T]
        mask: bool [B, T, P + T], as the model takes it.
        owner: Which question a token belongs to, [B, T], -1 for padding.
        last: bool [B, T], tokens of the last answer: decoded after the cache was compressed.
        shown: As in ``Turns``, [B, T].
        next: What of the prefix follows on the path or line, [B, T], -1 where nothing does.
        needed: bool [B, T, P], the visual tokens that the row's question needs.
    """

    grids: torch.Tensor
    prefix: torch.Tensor
    positions: torch.Tensor
    visual: torch.Tensor
    tail: torch.Tensor
    labels: torch.Tensor
    tail_positions: torch.Tensor
    mask: torch.Tensor
    owner: torch.Tensor
    last: torch.Tensor
    shown: torch.Tensor
    next: torch.Tensor
    needed: torch.Tensor


class Packer:
    """Turns scenes and questions into batches."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._known: dict[str, list[int]] = {}
        self.digits = torch.tensor([self._ids(f" {digit}")[0] for digit in range(10)])
        self.colours = torch.tensor([self._ids(f" {name}")[0] for name in tasks.NAMES])
        self._digits, self._colours = set(self.digits.tolist()), set(self.colours.tolist())
        self._end = build.TOKEN_ID["<|im_end|>"]

    def _ids(self, text: str) -> list[int]:
        if text not in self._known:
            self._known[text] = self._tokenizer.encode(text).ids
        return self._known[text]

    def turns(self, questions: tuple[tasks.Question, ...]) -> Turns:
        ids, labels, last, shown, following = [], [], [], [], []
        for turn, question in enumerate(questions):
            asked = [] if turn == 0 else self._ids("<|im_end|>\n<|im_start|>user\n")
            asked = asked + self._words(question.text) + self._ids("<|im_end|>\n<|im_start|>assistant\n")
            answer = self._words(question.answer)
            ids += asked + answer
            labels += [-1] * (len(asked) - 1) + answer + [self._end]
            cells = list(question.cells)
            if question.text.startswith("path"):  # " path", colour, digit, colour, digit, ...
                steps = [cells[i // 2] if i % 2 and i > 2 else -1 for i in range(len(answer))]
            elif question.text.startswith("read"):  # " line", digit, digit, ...
                steps = [-1, *cells[1:]]
            else:
                steps = [-1] * len(answer)
            following += [-1] * (len(asked) - 1) + steps + [-1]
            shown += [TOLD] * (len(asked) - 1) + self._shown(question, answer) + [TOLD]
            last += [False] * len(asked) + [turn + 1 == len(questions)] * len(answer)
        return Turns(ids, labels, last, shown, following, questions[-1].cells)

    def _shown(self, question: tasks.Question, answer: list[int]) -> list[int]:
        numbered = question.text.startswith(("picture", "frame"))
        told = {"list": 0, "path": 2}.get(question.text.split()[0], len(answer))
        shown = []
        for i, token in enumerate(answer):
            if token in self._digits and not (numbered and i == 1):
                shown.append(DIGIT)
            else:
                shown.append(COLOUR if token in self._colours and i >= told else TOLD)
        return shown

    def _words(self, text: str) -> list[int]:
        """As ``_ids``; a word with its leading space is a token or a few, so words are known."""
        head, *rest = text.split(" ")
        return [*(self._ids(head) if head else []), *(i for word in rest for i in self._ids(" " + word))]

    def pack(self, grids: np.ndarray, packed: list[list[Turns]], video: bool = False) -> Batch:
        """grids: [B, pictures, rows, columns]; packed: per picture or pair of pictures, its questions."""
        prefix, positions = prefix_of(self._ids("<|im_start|>user\n"), grids.shape[1:], video)
        visual = prefix == build.TOKEN_ID["<|video_pad|>" if video else "<|image_pad|>"]
        size, length = len(packed), max(sum(len(t.ids) for t in row) for row in packed)
        tail = torch.zeros(size, length, dtype=torch.long)
        labels, owner, following = torch.full((3, size, length), -1)
        shown = torch.full((size, length), TOLD)
        start = torch.zeros(size, length, dtype=torch.long)
        last = torch.zeros(size, length, dtype=torch.bool)
        needed = torch.zeros(size, length, len(prefix), dtype=torch.bool)
        cells = visual.nonzero().squeeze(1)
        for row, questions in enumerate(packed):
            at = 0
            for number, turns in enumerate(questions):
                here = slice(at, at + len(turns.ids))
                tail[row, here] = torch.tensor(turns.ids)
                labels[row, here] = torch.tensor(turns.labels)
                last[row, here] = torch.tensor(turns.last)
                shown[row, here] = torch.tensor(turns.shown)
                after = torch.tensor(turns.next)
                following[row, here] = torch.where(after < 0, -1, cells[after])
                owner[row, here], start[row, here] = number, at
                needed[row, here, cells[list(turns.cells)]] = True
                at += len(turns.ids)
        column = torch.arange(length)
        own = (owner[:, :, None] == owner[:, None, :]) & (column[:, None] >= column)
        mask = torch.cat([torch.ones_like(needed), own], dim=-1)
        tail_positions = (positions.max() + 1 + column - start).expand(3, -1, -1)
        return Batch(
            torch.from_numpy(grids), prefix, positions, visual, tail, labels, tail_positions, mask,
            owner, last, shown, following, needed,
        )  # fmt: skip


def prefix_of(
    head: list[int], shape: tuple[int, int, int], video: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids [P] and M-RoPE positions [3, 1, P] up to the last ``<|vision_end|>``.

    Args:
        head: Ids before the first ``<|vision_start|>``.
        shape: Pictures, rows and columns in visual tokens; a video's pictures are its temporal patches.
        video: One video in place of the pictures, at two frames per second.
    """
    pictures, rows, columns = shape
    ids, positions = list(head), [torch.arange(len(head)).expand(3, -1)]

    def text(token: str) -> None:
        ids.append(build.TOKEN_ID[token])
        positions.append((positions[-1].max() + 1).expand(3, 1))

    y, x = torch.arange(rows).repeat_interleave(columns), torch.arange(columns).repeat(rows)
    for media in range(1 if video else pictures):
        text("<|vision_start|>")
        first = positions[-1].max() + 1
        patches = pictures if video else 1
        ids += [build.TOKEN_ID["<|video_pad|>" if video else "<|image_pad|>"]] * (patches * rows * columns)
        for patch in range(patches):
            # A temporal patch of two frames lasts one second, which is two positions.
            positions.append(first + torch.stack([torch.full_like(y, 2 * patch), y, x]))
        if video:
            positions = [torch.cat(positions, dim=1)]
        text("<|vision_end|>")
    return torch.tensor(ids), torch.cat(positions, dim=1)[:, None]


def pixels() -> torch.Tensor:
    """Every sprite as the processor normalises it, [S, 3, 28, 28]."""
    bank = torch.from_numpy(tasks.sprites()).permute(0, 3, 1, 2).float() / 255
    return (bank - 0.5) / 0.25


def predict(
    model: TinyVLM, cells: torch.Tensor, batch: Batch, mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [B, T, vocabulary] and the log attention [B, T, P + T] of the watched head, float32."""
    embed = model.model.embed_tokens
    size, pictures = batch.grids.shape[:2]
    visual = model.visual(cells, batch.grids.flatten(0, 1)).view(size, -1, embed.embedding_dim)
    prefix = embed(batch.prefix).to(visual.dtype).expand(size, -1, -1).clone()
    prefix[:, batch.visual] = visual
    tail = embed(batch.tail)
    logits, watched = model.model(
        prefix.float(), batch.positions, tail, batch.tail_positions, mask, WATCHED
    )
    return logits.float(), watched


def without(batch: Batch, hidden: torch.Tensor) -> torch.Tensor:
    """The mask [B, T, P + T] with ``hidden`` [B, T, P] taken from the last answers' sight."""
    mask = batch.mask.clone()
    mask[:, :, : len(batch.visual)] &= ~(hidden & batch.visual & batch.last[:, :, None])
    return mask


def alignment_loss(model: TinyVLM, cells: torch.Tensor, packer: Packer) -> torch.Tensor:
    """Cross entropy of the digit sprites' embeddings against their colours' and digits' words."""
    count = 10 * len(tasks.NAMES)
    alone = torch.arange(count + 10).view(-1, 1, 1).expand(-1, model.visual.window, model.visual.window)
    x = model.visual(cells[: count + 10], alone).mean(1).float()
    words = model.model.embed_tokens.weight
    logits = F.log_softmax(F.rms_norm(x, x.shape[-1:]) @ words.T, dim=-1)
    digit = logits.gather(1, packer.digits.repeat(len(tasks.NAMES) + 1)[:, None]).mean()
    colour = logits[:count].gather(1, packer.colours.repeat_interleave(10)[:, None]).mean()
    return -digit - colour


class Training(NamedTuple):
    """What a training step takes from the run's arguments.

    Attributes:
        seed: Of the run.
        multiple: What rows and columns of a picture must be multiples of.
        drop_keys: Hide random unneeded visual keys.
        workers: Threads that share a step's pictures; they see equal shapes.
    """

    seed: int
    multiple: int = 1
    drop_keys: bool = False
    workers: int = 1


def training_batch(
    training: Training, step: int, packer: Packer, small: bool, worker: int = 0
) -> tuple[Batch, torch.Tensor, torch.Tensor]:
    """One worker's share of a batch, its mask, and which rows [B, T] are blind to what they need."""
    multiple, drop_keys = training.multiple, training.drop_keys
    rng = np.random.default_rng((1_000_000 + training.seed, step))
    pair = not small and step % 5 == 0
    if small:
        rows, columns = 5, 8
    elif pair:
        wide = rng.random() < 0.15
        rows, columns = (16, 32) if wide else (int(rng.integers(4, 9)), int(rng.integers(8, 17)))
    elif rng.random() < 0.15:
        rows, columns = ((8, 32), (32, 8), (20, 20), (32, 32))[rng.integers(4)]
    else:
        rows = columns = int(rng.integers(6, 17))
    if multiple > 1:
        rows, columns = (multiple * max(1, round(n / multiple)) for n in (rows, columns))
    kind = ("images", "video")[int(rng.integers(2))] if pair else None
    size = int(np.clip(16 * 200 / (rows * columns * (2 if pair else 1)), 3, 16))
    size = -(-size // training.workers)
    rng = np.random.default_rng((1_000_000 + training.seed, step, worker))
    scenes, packed = [], []
    for _ in range(size):
        if pair:
            scene, kinds = tasks.compose_pair(rng, rows, columns), [kind]
        else:
            most = 8 if small else 12
            count = 12 if not small and rng.random() < 0.25 else int(rng.integers(5, most + 1))
            decoys = 20 if not small and rng.random() < 0.4 else 0
            scene = tasks.compose(rng, rows, columns, count, decoys)
            kinds = ["single", "multi", "multi", "path", "turns"]
            kinds += ["list", "list"] if count <= 8 else ["long"] if count == 12 else []
            kinds += ["reading"] if scene.line else []
        room, questions = 210, []
        asked = set()
        while True:
            which = kinds[rng.integers(len(kinds))]
            if which in asked and which in ("list", "long", "path", "reading"):
                continue  # the same question again
            asked.add(which)
            turns = packer.turns(tasks.ask(which, scene, rng))
            room -= len(turns.ids)
            if room < 0:
                break
            questions.append(turns)
        scenes.append(np.stack(scene.grids))
        packed.append(questions)
    batch = packer.pack(np.stack(scenes), packed, video=kind == "video")

    hidden = torch.zeros_like(batch.needed)
    blind = torch.zeros_like(batch.last)
    if not small:
        draws = torch.from_numpy(rng.random((3, size, int(batch.owner.max()) + 2))).float()
        who = batch.owner % draws.shape[-1]  # padding takes the last column
        chance, keep, everything = (draws[i].gather(1, who) for i in range(3))
        blind = (chance < BLIND) & batch.last
        all_of_it = everything[:, :, None] < (1.0 if multiple > 1 else 0.5)
        hidden = blind[:, :, None] & (batch.needed | all_of_it)
        if drop_keys:
            # Half of the questions lose a share, uniform in [0, 1], of the keys they do not need.
            dropped = ~blind & (chance > 0.5)
            noise = torch.from_numpy(rng.random((size, draws.shape[-1], len(batch.prefix)))).float()
            noise = noise.gather(1, who[:, :, None].expand_as(hidden))
            hidden |= dropped[:, :, None] & (noise > keep[:, :, None]) & ~batch.needed
    return batch, without(batch, hidden), blind


def loss_of(logits: torch.Tensor, batch: Batch, blind: torch.Tensor, digits: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy; where blind rows would need the picture, all digits should be equally likely."""
    seen = (batch.labels >= 0) & (~blind | (batch.shown == TOLD))
    loss = F.cross_entropy(logits[seen], batch.labels[seen], reduction="sum")
    rows = blind & (batch.shown == DIGIT)
    loss = loss - F.log_softmax(logits[rows], dim=-1)[:, digits].mean(-1).sum()
    return loss / (seen.sum() + rows.sum())


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
    """Train and write the checkpoint; see the module and the command line."""
    # Operators this small gain little from threads of their own; shares of the batch do.
    torch.set_num_threads(1)
    began = time.monotonic()
    out_dir.mkdir(parents=True, exist_ok=True)
    config = tiny_config(vision)
    build.write_checkpoint(out_dir, config, None, WORDS)
    packer = Packer(Tokenizer.from_file(str(out_dir / "tokenizer.json")))
    model = initial_model(config, seed)
    if start is not None:
        stored = load_file(start / "model.safetensors")
        model.load_state_dict({name: tensor.float() for name, tensor in stored.items()})
    training = Training(seed, 1 if model.visual.local else model.visual.window, drop_keys, threads)
    cells = pixels()
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.01)

    def rate(step: int) -> float:
        return min(1.0, (step + 1) / 60) * (0.02 + 0.98 * (1 + math.cos(math.pi * step / steps)) / 2)

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    with (out_dir / "training.jsonl").open("w") as log, ThreadPoolExecutor(threads) as pool:

        def note(**record) -> None:
            print(json.dumps(record), flush=True)
            print(json.dumps(record), file=log, flush=True)

        note(
            seed=seed, vision=vision, drop_keys=drop_keys, steps=steps, start=start and start.name,
            learning_rate=learning_rate, parameters=sum(p.numel() for p in model.parameters()),
            torch=torch.__version__, numpy=np.__version__, python=platform.python_version(),
            threads=threads,
        )  # fmt: skip
        losses = []
        for step in range(steps):
            small = start is None and step < SMALL_GRIDS
            watching = 0.0 if start is not None else max(0.0, 1 - step / WATCHING)
            fade = 0.0 if start is not None else max(0.0, 1 - step / ALIGNMENT)

            def share(worker: int) -> float:
                batch, mask, blind = training_batch(training, step, packer, small, worker)
                with torch.autocast("cpu", torch.bfloat16):
                    logits, watched = predict(model, cells, batch, mask)
                    align = fade and worker == 0
                    aligned = fade * alignment_loss(model, cells, packer) if align else 0.0
                loss = loss_of(logits, batch, blind, packer.digits) / threads
                rows = (batch.next >= 0) & ~blind
                if watching and rows.any():
                    missed = -watched[rows].gather(1, batch.next[rows][:, None]).mean()
                    aligned = aligned + 0.3 * watching / threads * missed
                (loss + aligned).backward()
                return loss.item()

            optimizer.zero_grad()
            losses.append(sum(pool.map(share, range(threads))))
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            if step % 100 == 99 or step + 1 == steps:
                exact = {}
                if step % 200 == 199:
                    exact = evaluate(
                        model, packer, 20, seed=EVALUATION_SEEDS + 100_000, ablations=ABLATIONS[:2],
                        threads=threads,
                    )  # fmt: skip
                note(
                    step=step + 1, loss=round(float(np.mean(losses)), 4), exact=exact,
                    seconds=round(time.monotonic() - began, 1),
                )  # fmt: skip
                losses.clear()
        weights = {name: tensor.detach() for name, tensor in model.state_dict().items()}
        build.write_checkpoint(out_dir, config, weights, WORDS)
        trained = time.monotonic() - began
        model.load_state_dict({name: tensor.bfloat16().float() for name, tensor in weights.items()})
        for task, scores in evaluate(model, packer, threads=threads).items():
            note(task=task, visual_tokens=256, samples=100, exact=scores)
        for task, scores in evaluate(model, packer, samples=12, side=32, threads=threads).items():
            note(task=task, visual_tokens=1024, samples=12, exact=scores)
        note(training_seconds=round(trained, 1))


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the tiny Qwen2.5-VL from random weights.")
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--vision", choices=("local", "global"), default="local",
        help="local: a visual token depends on its own cell only; global: windows and full attention",
    )  # fmt: skip
    parser.add_argument(
        "--drop-keys", action="store_true", help="train with random unneeded visual keys dropped"
    )
    parser.add_argument("--steps", type=int, default=1600)
    parser.add_argument("--start", type=Path, help="checkpoint directory to start from")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--threads", type=int, default=min(3, os.cpu_count() or 1))
    train(**vars(parser.parse_args()))


if __name__ == "__main__":
    main()
