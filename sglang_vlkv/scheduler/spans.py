"""Where a request's images and videos stand in its prompt, and how their tokens lie in the picture."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from sglang.srt.multimodal.modality import Modality as SglangModality

from sglang_vlkv.stages.prompt import VISUAL, Modality

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import MultimodalDataItem, Req

MODALITIES = {
    SglangModality.IMAGE: Modality.IMAGE,
    SglangModality.VIDEO: Modality.VIDEO,
    SglangModality.AUDIO: Modality.AUDIO,
}
# Names by which SGLang's processors state a grid (time, height, width) of patches, before merging.
_GRIDS = ("image_grid_thw", "video_grid_thw")


def items_of(req: Req) -> list[MultimodalDataItem]:
    """The request's multimodal items."""
    return req.multimodal_inputs.mm_items if req.multimodal_inputs else []


def prompt_ids(req: Req) -> torch.Tensor:
    """Token ids with placeholders expanded and replaced by ids of each item's own, ``[n]`` int64.

    These say where an item is also where its spans are not stated (LLaVA) or no longer true (a
    session that cut its history). Only the models that SGLang serves with Transformers' code keep
    the placeholders.
    """
    return torch.frombuffer(req.origin_input_ids, dtype=torch.int64)


def holds(req: Req, item: MultimodalDataItem, ids: torch.Tensor) -> torch.Tensor:
    """Which of ``ids`` are the item's own, or else placeholders inside its spans, ``[n]`` bool."""
    own = [value for value in item.padding_values() if value is not None]
    here = torch.isin(ids, torch.tensor(own, dtype=torch.int64))
    inputs = req.multimodal_inputs
    tokens = {SglangModality.IMAGE: inputs.im_token_id, SglangModality.VIDEO: inputs.video_token_id}
    token = tokens.get(item.modality)
    if token is not None and not here.any():
        for first, last in item.offsets or ():
            here[first : last + 1] = ids[first : last + 1] == token
    return here


class Picture(NamedTuple):
    """An image or a video of a prompt.

    Attributes:
        modality: image or video.
        positions: of its tokens, ascending, ``[tokens]`` int64.
        grid: how these lie: (time, height, width) in tokens, row by row; None where the model does not
            state it.
        content: equal for equal pictures.
    """

    modality: Modality
    positions: torch.Tensor
    grid: list[int] | None
    content: tuple[int, int]


def pictures_of(req: Req, ids: torch.Tensor) -> list[Picture]:
    """The images and videos among ``ids``, the prompt's, in its order; equal ones as often as they come."""
    alike: dict[tuple, list[MultimodalDataItem]] = {}  # equal pictures have equal ids
    for item in items_of(req):
        if MODALITIES[item.modality] in VISUAL:
            alike.setdefault(item.padding_values(), []).append(item)
    found = []
    for kind, items in enumerate(alike.values()):
        positions = torch.stack([holds(req, item, ids) for item in items]).any(0).nonzero().flatten()
        for item, own in zip(items, positions.tensor_split(len(items))):
            grids = _grids(item, len(own))
            sizes = [math.prod(grid) for grid in grids] or [len(own)]
            for number, (grid, part) in enumerate(zip(grids or [None], own.split(sizes), strict=True)):
                if len(part):
                    found.append(Picture(MODALITIES[item.modality], part, grid, (kind, number)))
    return sorted(found, key=lambda picture: int(picture.positions[0]))


def visual_spans(req: Req) -> list[dict]:
    """The images and videos of a prompt in its order, as JSON values.

    Returns:
        ``modality``; ``spans``, pairs of prompt positions ``[start, end)`` of its visual tokens
        (several where text stands between a video's frames); ``grid``, as in :class:`Picture`.
    """
    return [
        {"modality": modality.name.lower(), "spans": _runs(positions), "grid": grid}
        for modality, positions, grid, _ in pictures_of(req, prompt_ids(req))
    ]


def _runs(positions: torch.Tensor) -> list[list[int]]:
    """Ascending positions as ``[start, end)`` pairs."""
    breaks = (positions.diff() != 1).nonzero().flatten() + 1
    return [[int(run[0]), int(run[-1]) + 1] for run in positions.tensor_split(breaks)]


def _grids(item: MultimodalDataItem, num_tokens: int) -> list[list[int]]:
    """How the ``num_tokens`` of each picture in an item lie; several pictures may come as one, embedded
    already. Empty where the model does not state it."""
    stated = next((data for name in _GRIDS if (data := item.model_specific_data.get(name)) is not None), ())
    patches = torch.as_tensor(stated)
    if not num_tokens or not patches.numel() or patches.shape[-1] != 3:
        return []
    patches = patches.view(-1, 3).tolist()
    if any(side < 1 for picture in patches for side in picture):
        return []
    merge = math.isqrt(sum(map(math.prod, patches)) // num_tokens)
    if not merge or any(height % merge or width % merge for _, height, width in patches):
        return []
    grids = [[time, height // merge, width // merge] for time, height, width in patches]
    return grids if sum(map(math.prod, grids)) == num_tokens else []
