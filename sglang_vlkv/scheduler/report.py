"""What happened to a request's KV, for whoever asked: the report in every response."""

from __future__ import annotations

from typing import TYPE_CHECKING

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
    own, pictures = prompt.per_modality(kept), prompt.per_picture(kept)
    of_pictures = [picture.rows for picture in pictures]
    rows_lost, *rows = ranks.sum(torch.tensor([state.rows_lost, *own.values(), *of_pictures])).tolist()
    rows, of_pictures = rows[: len(own)], rows[len(own) :]
    least = ranks.least([picture.least for picture in pictures])
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
        "pictures": [
            {"modality": seen.modality.name.lower(), "tokens": seen.tokens, "rows": total, "least": fewest}
            for seen, total, fewest in zip(pictures, of_pictures, least, strict=True)
        ],
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
