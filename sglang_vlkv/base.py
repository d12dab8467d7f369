"""The contract of a policy, for policies of other packages; ``stages`` is where it is written."""

from sglang_vlkv.stages.budgets import cumulative, proportional
from sglang_vlkv.stages.layer import Layer, LayerScores, Selection
from sglang_vlkv.stages.options import choice, require, text_stays
from sglang_vlkv.stages.policy import Policy
from sglang_vlkv.stages.prompt import VISUAL, Modality, Prompt

__all__ = [
    "VISUAL", "Layer", "LayerScores", "Modality", "Policy", "Prompt", "Selection", "choice", "cumulative",
    "proportional", "require", "text_stays",
]  # fmt: skip
