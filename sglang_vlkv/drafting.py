"""Draft, then rescore: what the first output tokens look at votes too.

A request whose policy drafts is preceded by a request of our own with the same prompt. That one is
compacted, decodes ``draft_tokens`` tokens, and leaves their queries with the scheduler; its output
goes nowhere. The real request then finds the prompt's exact KV in the radix tree, where it stays
evictable, computes its voting rows again and selects with the drafted queries among the voters.
"""

from __future__ import annotations

import copy
import uuid
from typing import NamedTuple

from sglang_vlkv import config

WRITES, READS = "_vlkv_writes_draft", "_vlkv_reads_draft"  # custom_params that only we set
ATTEMPTS = 3  # of a draft that keeps being retracted


class Draft(NamedTuple):
    """What a request has to do with a draft: the id it leaves queries under, or finds them under."""

    writes: str = ""
    reads: str = ""


def draft_of(custom_params: dict | None) -> Draft:
    custom = custom_params or {}
    return Draft(*(str(custom.get(key, "")) for key in (WRITES, READS)))


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
    for _ in range(ATTEMPTS):
        draft = copy.copy(obj)
        draft.stream, draft.return_logprob = False, False
        draft.sampling_params = params | {
            "max_new_tokens": length, "min_new_tokens": 0, "temperature": 0.0, "n": 1,
            "custom_params": {key: value for key, value in custom.items() if key != "kv_report"} | {WRITES: name},
        }  # fmt: skip
        async for response in original(manager, draft, request):
            if (response["meta_info"].get("finish_reason") or {}).get("type") == "abort":
                yield response | {"text": "", "output_ids": []}
                return
        if not response["meta_info"].get("num_retractions"):
            break  # else it has left nothing
    replica = response["meta_info"].get("dp_rank")
    if replica is not None:  # what the draft has left is there
        obj.routed_dp_rank = replica
    obj.sampling_params = params | {"custom_params": custom | {READS: name}}
    async for response in original(manager, obj, request):
        yield response


def _draft_tokens(settings: config.Settings, obj, params: dict, custom: dict) -> int:
    """Output tokens of the draft that goes before this request; 0 for none."""
    if not (getattr(obj, "image_data", None) or getattr(obj, "video_data", None)):
        return 0
    wanted = settings.for_request(custom).draft_tokens
    most = (params or {}).get("max_new_tokens")
    most = 128 if most is None else most  # SGLang's default
    # The first output token comes from the prefill, so one more is needed for that many queries,
    # and an answer of one token never looks at the rows that are kept.
    return min(wanted + 1, most) if wanted and most > 1 else 0
