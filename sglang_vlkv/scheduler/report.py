"""What happened to a request's KV, for whoever asked: the report in every response."""

from __future__ import annotations

import time
from collections import OrderedDict
from typing import TYPE_CHECKING, NamedTuple

import torch
from sglang.srt.managers.scheduler_components.output_streamer import SchedulerOutputStreamer

from sglang_vlkv.cache.radix import TwinRadixCache
from sglang_vlkv.cache.requests import RequestState
from sglang_vlkv.options.config import NONE
from sglang_vlkv.scheduler.spans import visual_spans

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
    lists = (req.sampling_params.custom_params or {}).get(OPTION) == POSITIONS
    if lists:
        report["visual"] = visual_spans(req)
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
        "draft_rows": len(state.voted),
        "sparsity_per_layer": state.twin.sparsity,
        "kept_per_layer": [layer.shape[1] for layer in kept],
        "kept_per_modality": dict(zip(own, rows, strict=True)),
        "kept_bytes": state.kept_slots * slot_bytes,
        "full_bytes": prompt.num_tokens * slot_bytes,
        "last_bytes": state.last_slots * slot_bytes,
    } | ranks.describe()
    if lists:
        gathered = zip(*ranks.gather(kept), strict=True)
        report[POSITIONS] = [torch.cat(heads).tolist() for heads in gathered]
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


class _Entry(NamedTuple):
    """What is kept of one request: when it was written, reports and what they count for by choice,
    and the ids that lead here."""

    written: float
    reports: dict[int, tuple[int, dict]]
    ids: set[str]

    @property
    def weight(self) -> int:
        return sum(weight for weight, _ in self.reports.values())


class ReportStore:
    """Reports for clients that see no ``meta_info``, by the ids of requests and of responses.

    Args:
        max_age: seconds that a request's reports are kept after the last of them.
        max_reports: most reports kept; the oldest go first. Every thousand positions in a report, or
            8 KB of options and ids, count as one more.
    """

    def __init__(self, max_age: float = 600.0, max_reports: int = 10_000) -> None:
        self._max_age, self._max_reports = max_age, max_reports
        self._entries: OrderedDict[str, _Entry] = OrderedDict()
        self._found: dict[str, tuple[str, int]] = {}  # id -> key of its entry, choice
        self._weight = 0

    def put(self, response_id: str, report: dict, request_ids: tuple[str, ...] = (), choice: int = 0) -> None:
        """Keeps the report of a request's ``choice`` under the id of its response.

        Args:
            request_ids: lead to all choices of the request. The first is no other request's; without
                any the response has a request of its own.
        """
        key = request_ids[0] if request_ids else response_id
        earlier = self._entries.pop(key, None)
        self._weight -= earlier.weight if earlier else 0
        reports, ids = (earlier.reports, earlier.ids) if earlier and request_ids else ({}, set())
        numbers = sum(len(head) for layer in report.get(POSITIONS, ()) for head in layer)
        letters = len(report.get("config", "")) + len(response_id) + sum(map(len, request_ids))
        reports[choice] = (1 + (numbers + letters // 8) // 1000, report)
        ids |= {response_id, *request_ids}
        self._found |= {name: (key, 0) for name in request_ids} | {response_id: (key, choice)}
        self._entries[key] = kept = _Entry(time.monotonic(), reports, ids)
        self._weight += kept.weight
        self._expire()

    def get(self, name: str) -> dict | None:
        """The report of the response with this id, or of the first choice of the request."""
        self._expire()
        key, choice = self._found.get(name, (None, 0))
        return None if key is None else self._entries[key].reports.get(choice, (0, None))[1]

    def choices(self, name: str) -> list[dict | None] | None:
        """The reports of all choices of the request; None for those that have not finished."""
        self._expire()
        if name not in self._found:
            return None
        reports = self._entries[self._found[name][0]].reports
        return [reports.get(choice, (0, None))[1] for choice in range(max(reports) + 1)]

    def _expire(self) -> None:
        oldest = time.monotonic() - self._max_age
        while self._entries:
            key, entry = next(iter(self._entries.items()))
            if entry.written >= oldest and self._weight <= self._max_reports:
                break
            del self._entries[key]
            self._weight -= entry.weight
            for name in entry.ids:
                if self._found.get(name, ("", 0))[0] == key:  # else another request took the id
                    del self._found[name]

