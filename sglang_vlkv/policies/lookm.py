"""LOOK-M (arXiv 2406.18139)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Mapping

from sglang_vlkv.policies.h2o import ColumnSums
from sglang_vlkv.stages.options import choice, text_stays


@dataclass(frozen=True)
class LookM(ColumnSums):
    """Text first: visual rows go before any text does, each into the kept row most like it.

    LOOK-M (arXiv 2406.18139): accumulated attention ranks the keys, all text ranks above all
    visual tokens, and evicted keys and values are averaged into the kept row with the most similar
    key. Where the text alone exceeds the budget, its best-scored tokens stay.
    """

    name = "lookm"

    modality_floors: Mapping[str, float] = text_stays()
    merge: str = choice("similar", "none", "bucket_mean")
