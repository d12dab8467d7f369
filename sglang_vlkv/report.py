"""What happened to a request's KV, for whoever asked: the report in every response."""

from __future__ import annotations

import time
from collections import OrderedDict
from typing import TYPE_CHECKING

import torch
from sglang.srt.managers.scheduler_components.output_streamer import SchedulerOutputStreamer

from sglang_vlkv.config import NONE
from sglang_vlkv.radix import TwinRadixCache
from sglang_vlkv.requests import RequestState

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req

KEY = "kv_policy"  # in meta_info
OPTION = "kv_report"  # in custom_params
POSITIONS = "positions"  # the one value of OPTION


def build_report(req: Req, state: RequestState, tree: TwinRadixCache) -> dict:
    """The report of a request that ended, as JSON values.

    Returns:
        ``policy`` is "none" with a ``reason`` where the prompt was left alone. Heads and bytes are those
        of all tensor-parallel ranks, which build the report together: a collective.

    Raises:
        RuntimeError: the ranks hold different rows.
    """
    prompt, ranks = state.asked.prompt, tree.ranks
    report = {
        "policy": NONE,
        "prompt_tokens": prompt.num_tokens,
        "visual_tokens": prompt.num_visual,
        "prefix": {"kind": state.prefix_kind, "tokens": state.prefix_tokens},
        "retractions": req.retraction_count,
    }
    if state.twin is None:
        return report | {"reason": str(state.why_left_alone(req.retraction_count))}
    policy = state.asked.policy
    kept, slot_bytes = state.rows_of_prompt(), tree.pool.slot_bytes * ranks.size
    own = prompt.per_modality(kept)
    *rows, rows_lost = ranks.sum(torch.tensor([*own.values(), state.rows_lost])).tolist()
    if rows_lost:
        report["prefix"]["rows_lost"] = rows_lost
    report |= {
        "policy": policy.name,
        "budget": policy.budget,
        "config": repr(policy),
        "voting_rows": state.plan.num_computed if policy.votes else 0,
        "draft_rows": state.draft_rows,
        "sparsity_per_layer": state.twin.sparsity,
        "kept_per_layer": [layer.shape[1] for layer in kept],
        "kept_per_modality": dict(zip(own, rows, strict=True)),
        "kept_bytes": state.kept_slots * slot_bytes,
        "full_bytes": prompt.num_tokens * slot_bytes,
        "last_bytes": state.last_slots * slot_bytes,
    } | ranks.describe()
    if (req.sampling_params.custom_params or {}).get(OPTION) == POSITIONS:
        report[POSITIONS] = [torch.cat(heads).tolist() for heads in zip(*ranks.gather(kept), strict=True)]
    return report


class ReportingOutputStreamer(SchedulerOutputStreamer):
    """Sends the report with a request's last output. It runs on every rank; rank 0's is sent."""

    has_additional_customized_info = True

    def build_additional_customized_info(self, reqs: list[Req]) -> dict[str, list]:
        return {KEY: [self._reports(req) for req in reqs]}

    def _reports(self, req: Req) -> list[dict]:
        state = self.tree_cache.requests.get(req)
        if state is None or not req.finished():
            return []
        return [build_report(req, state, self.tree_cache)]


class ReportStore:
    """Reports by response id, for clients that see no ``meta_info``.

    Args:
        max_age: seconds that a report is kept.
        max_reports: most reports kept; the oldest go first. Every thousand positions in a report,
            or 8 KB of options, count as one more.
    """

    def __init__(self, max_age: float = 600.0, max_reports: int = 10_000) -> None:
        self._max_age, self._max_reports = max_age, max_reports
        self._reports: OrderedDict[str, tuple[float, int, dict]] = OrderedDict()
        self._weight = 0

    def put(self, response_id: str, report: dict) -> None:
        self._drop(response_id)
        numbers = sum(len(head) for layer in report.get(POSITIONS, ()) for head in layer)
        weight = 1 + (numbers + len(report.get("config", "")) // 8) // 1000
        self._reports[response_id] = (time.monotonic(), weight, report)
        self._weight += weight
        self._expire()

    def get(self, response_id: str) -> dict | None:
        self._expire()
        *_, report = self._reports.get(response_id, (None,))
        return report

    def _expire(self) -> None:
        oldest = time.monotonic() - self._max_age
        while self._reports:
            response_id, (written, _, _) = next(iter(self._reports.items()))
            if written >= oldest and self._weight <= self._max_reports:
                break
            self._drop(response_id)

    def _drop(self, response_id: str) -> None:
        _, weight, _ = self._reports.pop(response_id, (0.0, 0, {}))
        self._weight -= weight
