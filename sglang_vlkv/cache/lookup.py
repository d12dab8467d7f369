"""Which twin a request goes on from, by the operator's ``twins``."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from sglang.srt.mem_cache.radix_cache import RadixKey

from sglang_vlkv.cache.requests import Plan, Reason, RequestState
from sglang_vlkv.cache.twins import Hit
from sglang_vlkv.options.config import OFF, PREFER, RESUME

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req

    from sglang_vlkv.cache.radix import TwinRadixCache


class Lookup:
    """Looks for twins in a tree.

    Args:
        tree: whose twins and exact KV they are.
    """

    def __init__(self, tree: TwinRadixCache) -> None:
        self._tree = tree

    def find(self, req: Req, state: RequestState, key: RadixKey) -> Hit | None:
        """The twin that ``req`` goes on from, by the operator's ``twins``."""
        tokens, mode = key.token_ids, self._tree.settings.twins
        asks = state.asked.compacts and state.row is None and tokens
        if mode == OFF or not asks or not len(self._tree.twins):
            return None
        # Input logprobs want their tokens computed; SGLang's own limit also counts outputs as such.
        wanted = req.logprob_start_len if req.return_logprob else -1
        limit = min(len(tokens) - 1, wanted if 0 <= wanted < len(req.origin_input_ids) else len(tokens))
        if state.left is not None:
            if not req.output_ids:
                return None  # retracted before its first token, which only exact KV gives again
            if (own := self._own_hit(state.left, limit)) is not None:
                return own
        if mode == RESUME and state.asked.writes_draft:
            return None  # how it votes must not depend on whether an earlier answer's rows are still there
        whole = RadixKey(tokens, req.extra_key, cache_salt=req.cache_salt)
        exact = self._tree.tree_core.match_full_device_prefix(whole)[0]
        for hit in self._tree.twins.find(state.space, tokens, limit, beyond=exact + 1):
            reaches = hit.covered if mode == PREFER else hit.lossy_end
            if reaches > exact and (mode != RESUME or self._is_same_selection(req, state, hit)):
                return hit
        return None

    def _own_hit(self, hit: Hit, limit: int) -> Hit | None:
        """What is left of a retracted request's rows; what it computed behind them it can compute again."""
        while hit.covered > limit or not (hit.twin in self._tree.twins and hit.twin.lasting):
            if not hit.twin.is_run or hit.twin.parent is None:
                return None
            hit = Hit(hit.twin.parent, hit.twin.start, hit.twin.parent_rows)
        return hit

    def _is_same_selection(self, req: Req, state: RequestState, hit: Hit) -> bool:
        """``req`` would keep the rows that the twin holds."""
        return is_whole_prompt(req, hit) and hit.twin.voted == self._tree.requests.draft_for(state).tokens

    def plan_behind(self, req: Req, state: RequestState, hit: Hit) -> Plan:
        if hit.rows is None and hit.twin.end >= len(req.origin_input_ids):
            reason = Reason(words="a twin stands for it")
            return replace(state.asked, left_alone=reason, num_voting=0, max_slots=0)
        return self._tree.planner.for_turn(state.asked, hit.covered)


def is_whole_prompt(req: Req, hit: Hit) -> bool:
    """The twin was selected for this very prompt, and nothing of the prompt is left to score."""
    n = len(req.origin_input_ids)
    return hit.rows is None and hit.twin.num_prompt == n <= hit.twin.end
