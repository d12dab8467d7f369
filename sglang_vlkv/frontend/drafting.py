"""Draft, then rescore: what the first output tokens look at votes too.

A request whose policy drafts is preceded by a request of our own with the same prompt. That one is
compacted, decodes ``draft_tokens`` tokens, and leaves their queries with the scheduler; its output
is thrown away. The real request then finds the prompt's exact KV in the radix tree, where it stays
evictable, computes its voting rows again and selects with the drafted queries among the voters.
"""

from __future__ import annotations

import copy
import uuid
from dataclasses import dataclass

from sglang_vlkv.options import config
from sglang_vlkv.scheduler.planning import READS, WRITES
from sglang_vlkv.scheduler.report import KEY

ATTEMPTS = 3  # of a draft that keeps being retracted
ABORTED = {"type": "abort", "message": "Aborted", "status_code": None, "err_type": None}


@dataclass(eq=False)
class Drafting:
    """A request whose draft runs, and whether it has been aborted since."""

    rid: str
    aborted: bool = False


_drafting: set[Drafting] = set()


async def generate(original, manager, obj, request, settings):
    """``TokenizerManager.generate_request``, behind a draft where the request's policy wants one."""
    # SGLang asks this when a stream ends, also where it ended before SGLang has set it.
    obj.is_single = not isinstance(getattr(obj, "rid", None), list)
    params = getattr(obj, "sampling_params", None) or {}
    batch = params if isinstance(params, list) else [params]
    customs = [(one or {}).get("custom_params") or {} for one in batch]
    customs = [custom if isinstance(custom, dict) else {} for custom in customs]  # refused later
    for custom in customs:
        if WRITES in custom or READS in custom:
            raise ValueError(f"custom_params.{WRITES} and {READS} are not for clients; leave them out")
    length = max((_draft_tokens(settings, obj, *both) for both in zip(batch, customs)), default=0)
    if not length:
        async for response in original(manager, obj, request):
            yield response
        return
    text, ids = getattr(obj, "text", None), getattr(obj, "input_ids", None)
    single = isinstance(text, str) or bool(ids and isinstance(ids[0], int))
    if len(batch) > 1 or not single or (batch[0].get("n") or 1) > 1:
        raise ValueError(
            "a policy with draft_tokens serves one prompt and one choice per request; send them one "
            "by one, with n = 1, or set draft_tokens to 0 in custom_params.kv_policy_config"
        )
    name, custom = uuid.uuid4().hex, customs[0]
    # One id for both, so that aborting the request aborts whichever of them runs.
    obj.rid = obj.rid or name
    drafting = Drafting(obj.rid)
    _drafting.add(drafting)
    try:
        for _ in range(ATTEMPTS):
            async for response in original(manager, _draft(obj, params, custom, length, name), request):
                pass
            info = response["meta_info"]
            reason = info.get("finish_reason") or {}
            if drafting.aborted or reason.get("type") == "abort":
                yield _aborted(response)
                return
            if not info.get("num_retractions"):
                break  # else it has left nothing
    finally:
        _drafting.discard(drafting)
    if info.get("dp_rank") is not None:  # what the draft has left is there
        obj.routed_dp_rank = info["dp_rank"]
    obj.sampling_params = params | {"custom_params": custom | {READS: name}}
    async for response in original(manager, obj, request):
        yield response


def abort(manager, rid: str = "", abort_all: bool = False) -> None:
    """Before ``TokenizerManager.abort_request``, which may find that the scheduler has ended a draft
    and knows of no request yet."""
    for drafting in _drafting:
        drafting.aborted |= abort_all or drafting.rid == rid


def _draft(obj, params: dict, custom: dict, length: int, name: str):
    draft = copy.copy(obj)
    draft.logprob_start_len = -1
    custom = {key: value for key, value in custom.items() if key != "kv_report"} | {WRITES: name}
    draft.sampling_params = params | {
        "max_new_tokens": length, "min_new_tokens": 0, "temperature": 0.0, "n": 1, "custom_params": custom,
    }  # fmt: skip
    return draft


def _aborted(response: dict) -> dict:
    """What is told of a request that was aborted while its draft ran: nothing has been generated."""
    info = {key: value for key, value in response["meta_info"].items() if key != KEY}
    info |= {key: type(value)() for key, value in info.items() if "logprobs" in key and value}
    info["completion_tokens"] = 0
    if (info.get("finish_reason") or {}).get("type") != "abort":
        info["finish_reason"] = ABORTED
    return response | {"text": "", "output_ids": [], "meta_info": info}


def _draft_tokens(settings: config.Settings, obj, params: dict, custom: dict) -> int:
    """Output tokens of the draft that goes before this request; 0 for none."""
    if not (getattr(obj, "image_data", None) or getattr(obj, "video_data", None)):
        return 0
    # A session's turns are a tree of ids, in which a draft would be one; beams are left alone.
    if getattr(obj, "session_params", None) or (params or {}).get("beam_width") not in (None, 1):
        return 0
    wanted = settings.for_request(custom).draft_tokens
    most = (params or {}).get("max_new_tokens")
    most = 128 if most is None else most  # SGLang's default
    # The first output token comes from the prefill, so one more is needed for that many queries,
    # and an answer of one token never looks at the rows that are kept.
    return min(wanted + 1, most) if wanted and most > 1 else 0
