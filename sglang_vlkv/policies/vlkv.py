"""This project's own policy."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sglang_vlkv.policies.votes import votes
from sglang_vlkv.stages.layer import Layer, LayerScores
from sglang_vlkv.stages.options import choice, require
from sglang_vlkv.stages.policy import Policy
from sglang_vlkv.stages.prompt import Prompt


@dataclass(frozen=True)
class VLKV(Policy):
    """What any word of the newest question looks at, its own words first, and what stands out.

    Departures from VL-Cache (arXiv 2410.23317), each an option:

    - Only the newest turn votes: earlier questions asked about other things.
    - A key is worth the largest attention that any voting row of any head of its group pays it, not
      the sum: a word that looks at one patch outweighs many that glance at another.
    - That attention counts times the norm of the key's value: a patch that writes nothing into the
      answer may be looked at in vain.
    - The question's own words count ``question_weight`` times, so that they do not lose to the
      picture what decoding will need of them. A weight, unlike a floor, takes nothing from heads
      that look at the picture only.
    - A visual key gets a prior on top: how much it stands out, whatever the question is, as the
      squared Mahalanobis distance of its key before RoPE among the prompt's visual keys, per KV head.
      Where attention is sharp the prior decides nothing; where it is flat, it picks objects rather
      than background.
    - A question that stands before the picture cannot look at it. Then only the chat template's tokens behind
      the picture vote, none of the picture's own, and the question's words keep their weight.
    - A picture that comes again, as chat clients send it with every turn, is one picture: its newest copy
      is worth what any of them is. The others' rows come last, least wanted first: a place that stays in
      several copies weighs as often, and answers stop or stray at the place that does not.

    Every layer keeps equally many.

    Attributes:
        reduce: ``max`` or ``sum`` of the attention over voting rows and group heads.
        value_norm: exponent of the value's norm; 0 ignores it.
        question_weight: at least 1; higher keeps more of the question and less of the picture.
        prior: the prior's mean, as a fraction of the visual keys' mean score; higher trusts the
            question less. With ``quota`` set, that part of the budget goes by the prior alone.
        ridge: added to the covariance, relative to its mean variance; higher trusts directions in
            which keys hardly vary less.
        repeats: ``newest`` ranks a repeated picture's older copies behind everything else, ``each`` lets
            all of them compete.
    """

    name = "vlkv"
    can_draft = True
    needs_rope = True

    voting: str = choice("last_turn", "post_vision")
    reduce: str = choice("max", "sum")
    value_norm: float = 1.0
    question_weight: float = 2.0
    prior: float = 0.15
    ridge: float = 0.01
    repeats: str = choice("newest", "each")

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.value_norm <= 4, "value_norm", self.value_norm, "in [0, 4]")
        weight = self.question_weight
        require(1 <= weight <= 1e6, "question_weight", weight, "in [1, 1e6]")
        require(0 <= self.prior <= 1e6, "prior", self.prior, "in [0, 1e6]")
        require(1e-6 <= self.ridge <= 1e6, "ridge", self.ridge, "in [1e-6, 1e6]")

    def num_voting(self, prompt: Prompt) -> int:
        rows = super().num_voting(prompt)
        behind = prompt.num_tokens - prompt.vision_end
        return min(rows, behind) if prompt.asked_before and behind else rows

    def score(self, layer: Layer) -> LayerScores:
        attention = votes(layer, reduce=self.reduce)
        scores = attention.scores * layer.v.float().norm(dim=-1).T.pow(self.value_norm)
        prompt = layer.prompt
        question = prompt.question_positions(scores.device)
        scores[:, question] *= self.question_weight
        old, new = prompt.repeats_on(scores.device)
        folds = self.repeats == "newest" and len(old) > 0
        if folds:
            scores.scatter_reduce_(1, new.expand(len(scores), -1), scores[:, old], "amax")
        quota_scores = None
        if self.prior or self.quota:
            positions = prompt.distinct_positions if folds else prompt.visual_positions
            visual = positions(scores.device)
            outlying = self.outlyingness(layer, visual)
            level = self.prior * scores[:, visual].mean(1, keepdim=True)
            scores[:, visual] += level * outlying / outlying.mean(1, keepdim=True).clamp_min(1e-12)
            quota_scores = torch.full_like(scores, -torch.inf)
            quota_scores[:, visual] = outlying
        if folds:  # behind all others, which are not negative
            scores[:, old] = -scores[:, old]
        return attention._replace(scores=scores, quota_scores=quota_scores)

    def outlyingness(self, layer: Layer, visual: torch.Tensor) -> torch.Tensor:
        """Squared Mahalanobis distances among the keys at ``visual`` ``[m]``, ``[Hkv, m]``."""
        positions = layer.positions(0, layer.num_keys)[:, visual]
        keys = layer.rope.unrotate(layer.k[visual], positions).transpose(0, 1)  # [Hkv, m, D]
        keys = keys - keys.mean(1, keepdim=True)
        covariance = keys.mT @ keys / keys.shape[1]
        variance = covariance.diagonal(dim1=-2, dim2=-1).mean(-1).clamp_min(1e-12)
        eye = torch.eye(keys.shape[2], device=keys.device)
        covariance += self.ridge * variance[:, None, None] * eye
        solved, _ = torch.linalg.solve_ex(covariance, keys.mT)  # linalg.solve waits for a GPU's verdict
        return (keys * solved.mT).sum(-1)
