"""Reading a request: its modality spans, and what the policy will do to its prompt."""

from __future__ import annotations

from dataclasses import replace

import torch
from sglang.srt.managers.schedule_batch import Req

from sglang_vlkv.cache.requests import Plan, Reason
from sglang_vlkv.options.config import Settings
from sglang_vlkv.scheduler.spans import MODALITIES, holds, items_of, pictures_of, prompt_ids
from sglang_vlkv.stages.policy import Policy
from sglang_vlkv.stages.prompt import VISUAL, Modality, Prompt

# custom_params that only we set: the id that a draft leaves queries under, and a request finds them under.
WRITES, READS = "_vlkv_writes_draft", "_vlkv_reads_draft"


class Planner:
    """Plans requests for one server.

    Args:
        settings: the server's policy, and what requests may choose.
        num_layers: L of the whole model.
        has_rope: whether the model's rotary embedding is known.
        special_ids: token ids of the chat template and its delimiters.
        end_of_turn_ids: token ids that end a chat message.
        user_ids: tokens of the role that a user's message begins with.
        tool_ids: tokens that a tool's answer begins with where it has that role too.
    """

    def __init__(
        self,
        settings: Settings,
        num_layers: int,
        has_rope: bool,
        special_ids: set[int],
        end_of_turn_ids: set[int],
        user_ids: list[int],
        tool_ids: list[int],
    ) -> None:
        self._settings = settings
        self._num_layers = num_layers
        self._has_rope = has_rope
        # By token id; the last entry is that of all ids from there on.
        self._last = max(special_ids | end_of_turn_ids, default=-1) + 1
        self._tags = torch.full((self._last + 1,), int(Modality.TEXT), dtype=torch.uint8)
        self._tags[sorted(special_ids)] = Modality.SYSTEM
        self._ends_turn = torch.zeros(self._last + 1, dtype=torch.bool)
        self._ends_turn[sorted(end_of_turn_ids)] = True
        self._user, self._tool = user_ids, tool_ids

    def read_prompt(self, req: Req) -> Prompt:
        """Tags every prompt position of ``req``, placeholders expanded, outputs left out."""
        ids = prompt_ids(req)
        known = ids.clamp(0, self._last)
        tags = self._tags[known]
        for item in items_of(req):
            if MODALITIES[item.modality] not in VISUAL:
                tags[holds(req, item, ids)] = MODALITIES[item.modality]
        pictures, newest, shown = torch.full_like(ids, -1), torch.arange(len(ids)), pictures_of(req, ids)
        latest = {(picture.content, len(picture.positions)): picture.positions for picture in shown}
        for number, picture in enumerate(shown):
            tags[picture.positions] = picture.modality
            pictures[picture.positions] = number
            newest[picture.positions] = latest[picture.content, len(picture.positions)]
        ends = self._ends_turn[known].nonzero().flatten().tolist()
        positions = req.multimodal_inputs.mrope_positions if req.multimodal_inputs else None
        if positions is not None:
            positions = positions[:, : len(ids)]  # a retracted request's cover its outputs too
        end = ends[-1] if ends else len(ids)
        return Prompt(tags, self._last_turn(ids, ends), positions, pictures, newest, end)

    def _last_turn(self, ids: torch.Tensor, ends: list[int]) -> int:
        """Where the newest message of the user's begins, tools' answers and ours behind it; the newest
        message of all where the template names no user.

        Args:
            ends: where messages end; the last one of a chat is closed too.
        """
        starts = [0, *(end + 1 for end in ends[:-1])]
        for start in reversed(starts):
            # A line break may come first, and a token that begins a message.
            head = ids[start : start + 4 + len(self._user) + len(self._tool)].tolist()
            role = next((at for at in range(3) if self._user == head[at : at + len(self._user)]), None)
            if self._user and role is not None:
                after = head[role + len(self._user) :]
                if not any(self._tool and self._tool == after[at : at + len(self._tool)] for at in range(2)):
                    return start
        return starts[-1]

    def plan(self, req: Req) -> Plan:
        """Decides, before the prefill and from the request alone, what becomes of its prompt."""
        prompt, custom = self.read_prompt(req), req.sampling_params.custom_params
        try:
            policy, reason = self._settings.for_request(custom), Reason()
        except ValueError as error:  # the frontend has refused these, unless somebody went past it
            policy, reason = self._settings.policy, Reason("refused", str(error))
        if not any(MODALITIES[item.modality] in VISUAL for item in items_of(req)):
            reason = reason or Reason("no_visual", "no image or video")
        elif req.beam_group is not None:
            reason = reason or Reason("beam_search", "beam search")
        drafts = (str((custom or {}).get(key, "")) for key in (WRITES, READS))
        return self._planned(Plan(prompt, policy, reason, 0, 0, *drafts))

    def for_turn(self, plan: Plan, start: int) -> Plan:
        """The plan for what follows ``start`` of a prompt whose beginning a twin stands for.

        The new turn is a prompt of its own: it keeps its own share, and what came before it is
        not compacted again.
        """
        return self._planned(replace(plan, prompt=plan.prompt.since(start), start=start))

    def _planned(self, plan: Plan) -> Plan:
        reason = plan.left_alone or self._why_left_alone(plan.prompt, plan.policy)
        rows = 0 if reason else plan.policy.num_voting(plan.prompt)
        max_slots = plan.policy.max_slots(plan.prompt.num_tokens, self._num_layers)
        return replace(plan, left_alone=reason, num_voting=rows, max_slots=max_slots)

    def _why_left_alone(self, prompt: Prompt, policy: Policy) -> Reason:
        """Empty where the prompt is compacted."""
        n = prompt.num_tokens
        if not prompt.num_visual:
            return Reason("not_in_prompt", "its images or videos stand nowhere in the prompt")
        if n < policy.min_prompt_tokens:
            words = f"{n} prompt tokens, fewer than min_prompt_tokens {policy.min_prompt_tokens}"
            return Reason("short_prompt", words)
        keeps_all = policy.max_total(n, self._num_layers) >= n * self._num_layers
        if keeps_all and not policy.compact_always:
            return Reason("full_budget", "the budget keeps every row")
        if policy.needs_rope and not self._has_rope:
            words = f"{policy.name} needs a rotary position embedding, and the model has none"
            return Reason("no_rope", words)
        return Reason()
