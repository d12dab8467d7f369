"""What is compared: policies with their options, reference rows, and the pairs that answer a question."""

from __future__ import annotations

import math
from typing import NamedTuple

from sglang_vlkv.policies import policies

GRID = (0.01, 0.02, 0.05, 0.1, 0.2, 0.4, 1.0)
CORE = (0.05, 0.1, 0.2)
FULL = "full"
OURS = "vlkv"
# Know which cells the question needs, and run at a budget that follows from them.
REFERENCES = ("oracle", "all-but-asked", "text-only")
FILLED = "oracle filled"  # the oracle's cells and text, and the latest positions up to the budget


class Row(NamedTuple):
    """One row of the tables.

    Attributes:
        policy: its name.
        config: options beside the budget.
    """

    policy: str
    config: dict = {}

    @property
    def is_variant(self) -> bool:
        """Whether it differs from a policy's defaults: measured at fewer budgets."""
        return bool(self.config)


ROWS: dict[str, Row] = {name: Row(name) for name in policies() if name not in ("none", "given")} | {
    "vlcache+bucket_mean": Row("vlcache", {"merge": "bucket_mean"}),
    "vlcache+similar": Row("vlcache", {"merge": "similar"}),
    "vlcache text floor": Row("vlcache", {"modality_floors": {"text": 1.0}}),
    "vlcache last turn": Row("vlcache", {"voting": "last_turn"}),
    "vlcache draft 8": Row("vlcache", {"draft_tokens": 8}),
    "vlkv all turns": Row("vlkv", {"voting": "post_vision"}),
    "vlkv sum": Row("vlkv", {"reduce": "sum"}),
    "vlkv no value norm": Row("vlkv", {"value_norm": 0.0}),
    "vlkv question 1": Row("vlkv", {"question_weight": 1.0}),
    "vlkv no prior": Row("vlkv", {"prior": 0.0}),
    "vlkv quota": Row("vlkv", {"prior": 0.0, "quota": 0.4}),
    "vlkv draft 8": Row("vlkv", {"draft_tokens": 8}),
    "elastic no merge": Row("elastic", {"merge": "none"}),
    "elastic mean": Row("elastic", {"importance": "mean"}),
    "elastic append": Row("elastic", {"decode": "append"}),
    "lookm no merge": Row("lookm", {"merge": "none"}),
    # At their default of 32 the window is all that stays of 10% of 270 tokens.
    "snapkv window 8": Row("snapkv", {"window_size": 8}),
    "pyramidkv window 8": Row("pyramidkv", {"window_size": 8}),
    "mixkv window 8": Row("mixkv", {"window_size": 8}),
    "h2o mean": Row("h2o", {"importance": "mean"}),
}

# Rows that answer later turns from the twins of the turns before -> what they are without.
FROM_TWINS: dict[str, str] = {
    f"{name}, from twins": name
    for name in (
        "vlkv", "vlkv draft 8", "vlcache", "vlcache last turn", "h2o", "snapkv", "elastic", "random",
    )
}  # fmt: skip
ROWS |= {name: ROWS[exact] for name, exact in FROM_TWINS.items()}

# topic -> pairs (a, b) that differ in nothing else.
COMPARISONS: dict[str, tuple[tuple[str, str], ...]] = {
    "Merging what loses, or discarding it": (
        ("vlcache+bucket_mean", "vlcache"),
        ("vlcache+similar", "vlcache"),
        ("elastic", "elastic no merge"),
        ("lookm", "lookm no merge"),
    ),
    "Layer-wise budgets, or the same for all layers": (
        ("vlcache", "uniform"),
        ("prefixkv", "uniform"),
        ("pyramidkv", "snapkv"),
        ("pyramidkv window 8", "snapkv window 8"),
    ),
    "Sum over the rows of the prompt, or mean": (("h2o", "h2o mean"), ("elastic", "elastic mean")),
    "Largest attention over voting rows and heads, or sum": (("vlkv", "vlkv sum"),),
    "Evicting a row per output token, or appending": (("elastic", "elastic append"),),
    "Drafted tokens vote too, or not": (("vlkv draft 8", "vlkv"), ("vlcache draft 8", "vlcache")),
    "Keeping the text, or letting it compete": (
        ("vlcache text floor", "vlcache"),
        ("vlkv", "vlkv question 1"),
    ),
    "Votes of the newest turn, or of all": (
        ("vlcache last turn", "vlcache"),
        ("vlkv", "vlkv all turns"),
    ),
    "Attention times the value's norm, or alone": (("vlkv", "vlkv no value norm"),),
    "A prior for what stands out, or none, or a quota": (
        ("vlkv", "vlkv no prior"),
        ("vlkv", "vlkv quota"),
        ("mixkv", "snapkv"),
        ("mixkv window 8", "snapkv window 8"),
    ),
    "A short observation window, or a long one": (
        ("snapkv window 8", "snapkv"),
        ("pyramidkv window 8", "pyramidkv"),
        ("mixkv window 8", "mixkv"),
    ),
}

# (a, b, what papers report for a : b). The figures were read in third-party summaries, not in the PDFs.
PAPERS: tuple[tuple[str, str, str], ...] = (
    ("vlcache", "h2o", "COCO CIDEr 100.36 : 90.36, DocVQA 62 : 56 (7B, 10%; VL-Cache)"),
    ("vlcache", "snapkv", "no figure at hand"),
    ("vlcache", "snapkv window 8", "no figure at hand"),
    ("vlcache", "pyramidkv", "COCO CIDEr 100.36 : 66.41, DocVQA 62 : 60 (7B, 10%; VL-Cache)"),
    ("vlcache", "streamingllm", "COCO CIDEr 100.36 : 33.98, DocVQA 62 : 47 (7B, 10%; VL-Cache)"),
    ("vlcache", "pyramidkv window 8", "as pyramidkv, window unknown"),
    ("h2o", "pyramidkv", "COCO CIDEr 90.36 : 66.41, DocVQA 56 : 60 (7B, 10%; VL-Cache)"),
    ("h2o", "streamingllm", "COCO CIDEr 90.36 : 33.98, DocVQA 56 : 47 (7B, 10%; VL-Cache)"),
    ("pyramidkv", "streamingllm", "COCO CIDEr 66.41 : 33.98, DocVQA 60 : 47 (7B, 10%; VL-Cache)"),
    ("elastic", "h2o", "perplexity 3.60 : 7.94, lower is better (13B, 50%; Elastic Cache)"),
)


def custom_params(row: Row, budget: float) -> dict:
    """The ``custom_params`` of a request under ``row``.

    ``min_prompt_tokens`` is as low as its rule allows, 1 / budget: a shorter prompt could not keep a
    row per layer and is left alone. A budget of 1 is compacted too, so that it is a measurement.
    """
    config = {"min_prompt_tokens": least_prompt(budget)} | row.config
    if budget == 1:
        config["compact_always"] = True
    return {"kv_policy": row.policy, "kv_budget": budget, "kv_policy_config": config}


def least_prompt(budget: float) -> int:
    """The least integer whose product with ``budget`` is at least 1."""
    tokens = math.floor(1 / budget)
    while budget * tokens < 1:
        tokens += 1
    return tokens


def filled_params(cells: tuple[int, ...], budget: float) -> dict:
    """The ``custom_params`` of ``FILLED``."""
    return custom_params(Row("given", {"visual": sorted(set(cells))}), budget)


def reference_params(name: str, cells: tuple[int, ...], num_prompt: int, num_visual: int) -> dict:
    """The ``custom_params`` of a reference row; nothing stays or goes beside what it names.

    Args:
        cells: numbers of the visual tokens that the answer needs.
    """
    asked = len(set(cells))
    kept, visual, keep = {
        "oracle": (num_prompt - num_visual + asked, cells, True),
        "all-but-asked": (num_prompt - asked, cells, False),
        "text-only": (num_prompt - num_visual, (), True),
    }[name]
    return custom_params(Row("given", {"visual": sorted(set(visual)), "keep": keep}), kept / num_prompt)
