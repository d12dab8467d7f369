"""A vision tower that reads rendered pages, constructed from the renderer: not trained, exact on its pages.

Qwen2.5-VL's tower normalises every patch to one length and then puts a cell's sixteen patches through an
MLP. So a hidden unit whose weights are the normalised pixels of one cell answers most to that cell, by
Cauchy-Schwarz, and its bias lets it answer to nothing that is nearer to another one. The output layer says,
for each unit, the embedding of the piece that its cell shows; for cells that no unit knows, of a blank one.
"""

from __future__ import annotations

import re
from typing import NamedTuple

import numpy as np
import torch

from benchmarks.reader.pages import pieces
from benchmarks.reader.pages.page import BLANK, DECORATIONS, LINE_END
from benchmarks.reader.prompt import Prompter
from benchmarks.reader.render import STYLES, draw_cell

PATCH, MERGE, FRAMES = 14, 4, 2
PATCHES = MERGE**2  # of a cell
PIXELS = PATCH**2
HIDDEN = 384  # of the patches, PIXELS of it in use; HIDDEN * PATCHES units know a cell each
HEADS, DEPTH = 12, 0  # patches need not see each other
PIECES = HIDDEN * PATCHES // len(STYLES)
ANSWER = 10.0  # of a unit to its own cell, minus that of one at the least distance


class Vocabulary(NamedTuple):
    """Attributes: ``ids[i]`` is the token whose embedding ``cells[i]`` gets."""

    cells: list[str]
    ids: list[int]


def vocabulary(prompter: Prompter) -> Vocabulary:
    """What the tower knows: marks, decorations, what pages say, characters; frequent pieces fill it up."""
    listed = [*pieces.vocabulary(prompter.pieces), *map(chr, range(33, 127))]
    frequent = (prompter.tokenizer.decode([i]) for i in range(prompter.tokenizer.get_vocab_size()))
    ids = {prompter.cell(cell): cell for cell in (BLANK, LINE_END, " ", *DECORATIONS)}
    for piece in (*listed, *(piece for piece in frequent if re.fullmatch(" ?[!-~]{1,12}", piece))):
        if len(ids) < PIECES:
            ids.setdefault(prompter.cell(piece), piece)
    return Vocabulary([*ids.values()], [*ids])


def weights(known: Vocabulary, embeddings: torch.Tensor) -> dict[str, torch.Tensor]:
    """The tower's weights, named as in Qwen's checkpoints; float32, and to be served in it.

    Args:
        known: its first cell is what unknown cells are taken for.
        embeddings: of the language model, [vocabulary, width].
    """
    ids, seen = _templates(known)
    units = full = HIDDEN * PATCHES  # and the squared length of a cell: HIDDEN for each normalised patch
    # Vectors of one length: what their product lacks of it is half of their squared distance.
    apart = (full - seen @ seen.T).fill_diagonal_(torch.inf).amin(1)
    gain = 2 * ANSWER / apart
    first, bias = torch.zeros(units, PATCHES, HIDDEN), torch.full((units,), -ANSWER)
    first[: len(ids), :, :PIXELS] = (gain[:, None] * seen).unflatten(1, (PATCHES, PIXELS))
    bias[: len(ids)] = gain * (apart / 2 - full)
    unknown = embeddings[known.ids[0]]
    second = torch.zeros(embeddings.shape[1], units)
    second[:, : len(ids)] = ((embeddings[ids] - unknown) / ANSWER).T
    copy = torch.eye(HIDDEN, PIXELS) / (3 * FRAMES)  # the mean of the colours, pixel by pixel
    return {
        "visual.patch_embed.proj.weight": copy.view(HIDDEN, 1, 1, PATCH, PATCH).expand(-1, 3, FRAMES, -1, -1),
        "visual.merger.ln_q.weight": torch.ones(HIDDEN),
        "visual.merger.mlp.0.weight": first.flatten(1),
        "visual.merger.mlp.0.bias": bias,
        "visual.merger.mlp.2.weight": second,
        "visual.merger.mlp.2.bias": unknown.clone(),
    }


def _templates(known: Vocabulary) -> tuple[torch.Tensor, torch.Tensor]:
    """Of every picture of a cell, in any style: its token [N], and its normalised pixels [N, 3136]."""
    found: dict[bytes, tuple[int, np.ndarray]] = {}
    for cell, i in zip(*known):
        for style in STYLES:
            pixels = np.asarray(draw_cell(cell, style))
            if (same := found.setdefault(pixels.tobytes(), (i, pixels)))[0] != i:
                raise ValueError(f"{cell!r} looks like token {same[0]} in the style {style!r}")
    ids, cells = zip(*found.values())
    patches = torch.from_numpy(np.stack(cells)).float().div(127.5).sub(1)
    patches = patches.unflatten(1, (MERGE, PATCH)).unflatten(3, (MERGE, PATCH)).transpose(2, 3).flatten(3)
    patches = patches.flatten(1, 2)  # [N, PATCHES, PIXELS]
    return torch.tensor(ids), (patches * HIDDEN**0.5 / patches.norm(dim=2, keepdim=True)).flatten(1)
