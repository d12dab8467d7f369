"""What is drawn, for both drawings, and its title in words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from sglang_vlkv.inspect.ask import Answer
from sglang_vlkv.inspect.heat import ALL, Choice, Kept
from sglang_vlkv.printable import printable


@dataclass(frozen=True)
class Subject:
    """
    Attributes:
        answer: what was asked and answered.
        kept: what was kept of its prompt.
        pictures: per visual of ``kept``, what each temporal group shows; empty where that is unknown.
        choice: what is drawn large.
    """

    answer: Answer
    kept: Kept
    pictures: Sequence[Sequence[Image.Image]]
    choice: Choice = ALL

    @property
    def facts(self) -> list[str]:
        """Policy, budget, tokens and bytes."""
        report = self.kept.report
        tokens = report["prompt_tokens"]
        if self.kept.left_alone is not None:
            return [f"left alone: {printable(self.kept.left_alone)}", f"kept all {tokens:,} tokens"]
        rows = report["kept_per_layer"]
        mean = sum(rows) / len(rows)
        return [
            f"policy {printable(report['policy'])}",
            f"budget {report['budget']:g}",
            f"kept {mean:,.1f} of {tokens:,} tokens per layer ({mean / tokens:.1%})",
            f"{size(report['kept_bytes'])} of {size(report['full_bytes'])}",
        ]

    @property
    def chosen(self) -> str:
        """Which layers and heads are drawn large."""
        (layer, head), kept = self.choice, self.kept
        if kept.left_alone is not None:
            return "all layers and KV heads"
        layers = f"all {kept.num_layers} layers" if layer is None else f"layer {layer}"
        heads = f"all {kept.num_heads} KV heads" if head is None else f"KV head {head}"
        return f"{layers} and {heads}"


def size(count: int) -> str:
    """Bytes as people write them."""
    for unit, power in (("GB", 9), ("MB", 6), ("kB", 3)):
        if count >= 10**power:
            return f"{count / 10**power:.1f} {unit}"
    return f"{count} bytes"


def shown(token: str) -> str:
    """A token's text such that white space can be seen."""
    return printable(token).strip(" ") or "_" * max(1, len(token))
