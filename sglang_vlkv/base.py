"""The contract of a policy, for policies of other packages; ``stages`` is where it is written."""

from sglang_vlkv.stages.base import (
    VISUAL,
    Layer,
    LayerScores,
    Modality,
    Policy,
    Prompt,
    Selection,
    choice,
    require,
    text_stays,
)
from sglang_vlkv.stages.budgets import cumulative, proportional

__all__ = [
    "VISUAL", "Layer", "LayerScores", "Modality", "Policy", "Prompt", "Selection", "choice", "cumulative",
    "proportional", "require", "text_stays",
]  # fmt: skip
