"""What one answer is worth, beside the reference and beside the full cache's answer."""

from __future__ import annotations

import math
import re
from typing import NamedTuple, Sequence

TOP = 20  # logprobs per position
LEAST = 1e-9  # a probability that is not in sight counts as this much


class Answer(NamedTuple):
    """What the server wrote.

    Attributes:
        text: without the end of the turn.
        tokens: ids, the end-of-turn token included.
        top: per token, the probabilities of the ``TOP`` likeliest, by id.
        report: ``meta_info["kv_policy"]``.
    """

    text: str
    tokens: list[int]
    top: list[dict[int, float]]
    report: dict


def exact(text: str, answers: Sequence[str], drawn: bool = True) -> bool:
    """Whether ``text`` is one of the answers; outside the drawn tasks case and punctuation are free."""
    return any(_normal(text, drawn) == _normal(answer, drawn) for answer in answers)


def _normal(text: str, drawn: bool) -> str:
    return text.strip() if drawn else " ".join(re.findall(r"\w+", text.lower()))


def items(text: str, answer: str) -> float:
    """The fraction of the answer's digits that stand in ``text`` at the same place in the order.

    The number of the picture or frame is no digit that was looked up.
    """
    found, wanted = (re.findall(r"\d", re.sub(r"(picture|frame) \d", "", t)) for t in (text, answer))
    return sum(a == b for a, b in zip(found, wanted)) / len(wanted)


def first_difference(full: Sequence[int], other: Sequence[int]) -> int | None:
    """The first position at which the tokens differ or one has ended; None if they are equal."""
    for position, (a, b) in enumerate(zip(full, other)):
        if a != b:
            return position
    return None if len(full) == len(other) else min(len(full), len(other))


def agreement(full: Sequence[int], other: Sequence[int]) -> float:
    """The fraction of positions with equal tokens, up to the shorter length."""
    shorter = min(len(full), len(other))
    return sum(a == b for a, b in zip(full, other)) / shorter if shorter else 1.0


def divergence(full: dict[int, float], other: dict[int, float]) -> float:
    """KL(full || other) of next-token distributions in nats, as much of it as both lists show.

    Tokens that both list are compared one by one. Those that only ``full`` lists are one bucket: each is
    at most as likely under ``other`` as the least likely one in its list. All the rest is another. So
    this is a lower bound, but for probabilities below ``LEAST``.
    """
    shared = full.keys() & other.keys()
    rest, other_rest = (1 - sum(p[t] for t in shared) for p in (full, other))
    missing = [p for t, p in full.items() if t not in shared]
    most = min(1 - sum(other.values()), len(missing) * min(other.values()))
    other_missing = min(most, other_rest * sum(missing) / rest) if missing else 0.0
    total = sum(_term(full[t], other[t]) for t in shared) + _term(sum(missing), other_missing)
    return max(0.0, total + _term(rest - sum(missing), other_rest - other_missing))


def _term(p: float, q: float) -> float:
    return p * math.log(p / max(q, LEAST)) if p > LEAST else 0.0


def mean_divergence(full: Answer, other: Answer) -> float:
    """The mean ``divergence`` over the positions up to and including the first different token."""
    end = first_difference(full.tokens, other.tokens)
    positions = list(zip(full.top, other.top))[: None if end is None else end + 1]
    return sum(divergence(a, b) for a, b in positions) / len(positions) if positions else 0.0


def kept_fraction(report: dict) -> float:
    """The fraction of the prompt's KV rows that stayed, over all layers; 1 where it was left alone."""
    if "kept_per_layer" not in report:
        return 1.0
    layers = report["kept_per_layer"]
    return sum(layers) / (report["prompt_tokens"] * len(layers))


def measure(prompt, answer: Answer, full: Answer) -> dict:
    """The record of one request, as short JSON values.

    Args:
        prompt: :class:`benchmarks.fidelity.questions.Prompt`.
    """
    report = answer.report
    record = {
        "answer": answer.text,
        "exact": int(exact(answer.text, prompt.answers, prompt.drawn)),
        "agreement": round(agreement(full.tokens, answer.tokens), 4),
        "first_difference": first_difference(full.tokens, answer.tokens),
        "kl": float(f"{mean_divergence(full, answer):.4g}"),
        "kept": round(kept_fraction(report), 5),
        "prompt_tokens": report["prompt_tokens"],
    }
    if prompt.drawn:
        record["items"] = round(items(answer.text, prompt.answers[0]), 4)
    if "kept_per_layer" in report:
        sparsity = report["sparsity_per_layer"]
        record["kept_per_layer"] = report["kept_per_layer"]
        record["sparsity_per_layer"] = sparsity and [round(s, 4) for s in sparsity]
        record["kept_per_modality"] = report["kept_per_modality"]
    return record
