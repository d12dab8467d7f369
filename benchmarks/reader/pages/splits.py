"""Which seeds and families serve training, tuning and reporting. They never meet."""

from __future__ import annotations

from typing import Literal, get_args

from benchmarks.reader.pages.draw import draw
from benchmarks.reader.pages.families import FAMILIES, SEEN
from benchmarks.reader.pages.page import Encode, Sample

Split = Literal["training", "tuning", "report"]
"""Training fits weights, tuning chooses everything else (defaults, head budgets), report only measures."""

SEEDS: dict[Split, range] = {
    "training": range(0, 10_000_000),
    "tuning": range(10_000_000, 11_000_000),
    "report": range(11_000_000, 12_000_000),
}


def families(split: Split) -> tuple[str, ...]:
    """What may be drawn for it: the held-out families only in reports.

    Raises:
        ValueError: there is no such split.
    """
    if split not in SEEDS:
        raise ValueError(f"there is no split {split!r}; choose one of {', '.join(get_args(Split))}")
    return tuple(FAMILIES if split == "report" else SEEN)


def draw_for(split: Split, family: str, index: int, size: int, blank_share: float, encode: Encode) -> Sample:
    """Sample ``index`` of a split; the other arguments are those of ``draw``.

    Raises:
        ValueError: the family or the index does not belong to the split.
    """
    if family not in families(split):
        raise ValueError(f"{family!r} is no family of {split}; choose one of {', '.join(families(split))}")
    if not 0 <= index < len(SEEDS[split]):
        raise ValueError(f"index is {index}; {split} has {len(SEEDS[split])} samples of a family")
    return draw(family, SEEDS[split][index], size, blank_share, encode)
