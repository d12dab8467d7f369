"""What one training step asks, what the model answers, and how wrong that is."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from sglang_vlkv.tinyvlm import tasks
from sglang_vlkv.tinyvlm.model import TinyVLM
from sglang_vlkv.tinyvlm.packing import DIGIT, TOLD, Batch, Packer, Turns

WATCHED = (2, 3)  # layer and head
BLIND = 1 / 8  # of the questions, after the small grids


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
    rows, columns, kind = _shape(training, step, small)
    size = int(np.clip(16 * 200 / (rows * columns * (2 if kind else 1)), 3, 16))
    size = -(-size // training.workers)
    rng = np.random.default_rng((1_000_000 + training.seed, step, worker))
    scenes, packed = [], []
    for _ in range(size):
        if kind:
            scene, kinds = tasks.compose_pair(rng, rows, columns), [kind]
        else:
            most = 8 if small else 12
            count = 12 if not small and rng.random() < 0.25 else int(rng.integers(5, most + 1))
            decoys = 20 if not small and rng.random() < 0.4 else 0
            scene = tasks.compose(rng, rows, columns, count, decoys)
            kinds = ["single", "multi", "multi", "path", "turns"]
            kinds += ["list", "list"] if count <= 8 else ["long"] if count == 12 else []
            kinds += ["reading"] if scene.line else []
        scenes.append(np.stack(scene.grids))
        packed.append(_questions(rng, packer, scene, kinds))
    batch = packer.pack(np.stack(scenes), packed, video=kind == "video")
    if small:
        return batch, without(batch, torch.zeros_like(batch.needed)), torch.zeros_like(batch.last)
    hidden, blind = _hidden(rng, batch, training)
    return batch, without(batch, hidden), blind


def _shape(training: Training, step: int, small: bool) -> tuple[int, int, str | None]:
    """Rows and columns of a step's pictures, and "images" or "video" where they come in pairs."""
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
    if training.multiple > 1:
        multiple = training.multiple
        rows, columns = (multiple * max(1, round(n / multiple)) for n in (rows, columns))
    return rows, columns, ("images", "video")[int(rng.integers(2))] if pair else None


def _questions(rng: np.random.Generator, packer: Packer, scene: tasks.Scene, kinds: list[str]) -> list[Turns]:
    """As many about one scene as find room."""
    room, questions, asked = 210, [], set()
    while True:
        which = kinds[rng.integers(len(kinds))]
        if which in asked and which in ("list", "long", "path", "reading"):
            continue  # the same question again
        asked.add(which)
        turns = packer.turns(tasks.ask(which, scene, rng))
        room -= len(turns.ids)
        if room < 0:
            return questions
        questions.append(turns)


def _hidden(
    rng: np.random.Generator, batch: Batch, training: Training
) -> tuple[torch.Tensor, torch.Tensor]:
    """What is hidden from the last answers, bool [B, T, P], and which of their rows are blind, [B, T]."""
    size = len(batch.owner)
    draws = torch.from_numpy(rng.random((3, size, int(batch.owner.max()) + 2))).float()
    who = batch.owner % draws.shape[-1]  # padding takes the last column
    chance, keep, everything = (draws[i].gather(1, who) for i in range(3))
    blind = (chance < BLIND) & batch.last
    all_of_it = everything[:, :, None] < (1.0 if training.multiple > 1 else 0.5)
    hidden = blind[:, :, None] & (batch.needed | all_of_it)
    if training.drop_keys:
        # Half of the questions lose a share, uniform in [0, 1], of the keys they do not need.
        dropped = ~blind & (chance > 0.5)
        noise = torch.from_numpy(rng.random((size, draws.shape[-1], len(batch.prefix)))).float()
        noise = noise.gather(1, who[:, :, None].expand_as(hidden))
        hidden |= dropped[:, :, None] & (noise > keep[:, :, None]) & ~batch.needed
    return hidden, blind


def loss_of(logits: torch.Tensor, batch: Batch, blind: torch.Tensor, digits: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy; where blind rows would need the picture, all digits should be equally likely."""
    seen = (batch.labels >= 0) & (~blind | (batch.shown == TOLD))
    loss = F.cross_entropy(logits[seen], batch.labels[seen], reduction="sum")
    rows = blind & (batch.shown == DIGIT)
    loss = loss - F.log_softmax(logits[rows], dim=-1)[:, digits].mean(-1).sum()
    return loss / (seen.sum() + rows.sum())
