"""The process that answers requests: where they say what they want, and whether they may."""

from __future__ import annotations

from fastapi import HTTPException
from fastapi.responses import JSONResponse

from sglang_vlkv.frontend import drafting, routes
from sglang_vlkv.options import config
from sglang_vlkv.printable import printable
from sglang_vlkv.scheduler.report import KEY, OPTION, POSITIONS
from sglang_vlkv.stages.options import shortened

FIELD = "custom_params"
_KEYS = (*config.REQUEST_KEYS, OPTION)
_DEEPEST = 32  # SGLang pickles custom_params on their way to the scheduler, and pickle recurses
_TAKEN = "kv_policy_custom_params"  # in an HTTP request's state: what its endpoint's own model drops


def check(custom: object, server_args) -> None:
    """Raises ValueError, naming the field, unless a request may have these ``custom_params``."""
    custom = {} if custom is None else custom
    if not isinstance(custom, dict):
        raise ValueError(f"{FIELD} is {shortened(custom)}; it must be an object")
    unknown = [key for key in custom if str(key).startswith("kv_") and key not in _KEYS]
    if unknown:
        raise ValueError(f"{FIELD}.{printable(unknown[0])[:200]} is unknown; known are {', '.join(_KEYS)}")
    if OPTION in custom and custom[OPTION] != POSITIONS:
        words = f"{FIELD}.{OPTION} is {shortened(custom[OPTION])}"
        raise ValueError(f"{words}; the only value it takes is {POSITIONS!r}")
    settings = config.settings_of(server_args)
    if settings is not None:
        if _depth(custom) > _DEEPEST:
            raise ValueError(f"{FIELD} is nested deeper than {_DEEPEST} levels")
        settings.for_request(custom)
    elif asked := [key for key in custom if key in config.REQUEST_KEYS]:
        raise ValueError(
            f"{FIELD}.{asked[0]} is set, but this server runs without a KV policy. Leave it "
            "out, or start the server with --kv-policy and --kv-policy-config "
            '\'{"allow_override": true}\'.'
        )


def _depth(value: object) -> int:
    """Levels of objects and lists in a JSON value."""
    depth, level = 0, [value]
    while level := [one for one in level if isinstance(one, (dict, list))]:
        level = [child for one in level for child in (one.values() if isinstance(one, dict) else one)]
        depth += 1
    return depth


def validate_request(_result, manager, obj, _input_ids) -> None:
    """After ``TokenizerManager._validate_one_request``; a ValueError becomes an HTTP 400."""
    params = getattr(obj, "sampling_params", None) or {}
    check(params.get(FIELD), manager.server_args)


async def serve_generate(original, obj, request):
    """Around ``http_server.serve_generate_request``: /generate and Vertex AI's endpoint.

    Checks before a stream begins: afterwards a mistake can be no HTTP 400 any more.
    """
    from sglang.srt.entrypoints import http_server

    server_args = http_server.get_global_state().tokenizer_manager.server_args
    params = obj.sampling_params or {}
    try:
        await _refuse_top_level(request, "sampling_params")
        for one in params if isinstance(params, list) else [params]:
            check(one.get(FIELD), server_args)
    except ValueError as error:
        return JSONResponse({"error": {"message": str(error)}}, 400)
    routes.name(request, server_args)
    return await original(obj, request)


async def serve_openai(original, serving, request, raw_request):
    """Around the handlers of chat and completions, whose models know ``custom_params``."""
    routes.name(raw_request, serving.tokenizer_manager.server_args)
    return await original(serving, request, raw_request)


async def serve_responses(original, serving, request, raw_request):
    """Around the handler of responses, whose model drops ``custom_params``."""
    _take((await raw_request.json()).get(FIELD), raw_request, serving.tokenizer_manager)
    return await original(serving, request, raw_request)


async def serve_anthropic(original, serving, request, raw_request):
    """Around the handler of Anthropic's messages, whose model drops ``custom_params``."""
    manager = serving.openai_serving_chat.tokenizer_manager
    _take((await raw_request.json()).get(FIELD), raw_request, manager)
    return await original(serving, request, raw_request)


async def serve_ollama(original, serving, request, raw_request):
    """Around the handlers of Ollama's chat and generate, whose sampling parameters are ``options``."""
    try:
        await _refuse_top_level(raw_request, "options")
    except ValueError as error:
        raise HTTPException(400, str(error)) from None
    _take((request.options or {}).get(FIELD), raw_request, serving.tokenizer_manager)
    return await original(serving, request, raw_request)


async def _refuse_top_level(request, home: str) -> None:
    """Raises ValueError where a choice stands outside of ``home``: SGLang would not look at it."""
    misplaced = (await request.json()).get(FIELD)
    if isinstance(misplaced, dict) and any(key.startswith("kv_") for key in misplaced):
        raise ValueError(f"{FIELD} belongs into {home} on this endpoint, not at the top level")


def _take(custom: object, request, manager) -> None:
    """Leaves ``custom_params`` in the state of the HTTP request, where :func:`generate` finds them."""
    try:
        check(custom, manager.server_args)
    except ValueError as error:
        raise HTTPException(400, str(error)) from None
    setattr(request.state, _TAKEN, custom)
    routes.name(request, manager.server_args)


def generate(original, manager, obj, request=None):
    """Around ``TokenizerManager.generate_request``, an asynchronous generator."""
    settings = config.settings_of(manager.server_args)
    if settings is None:
        return original(manager, obj, request)
    if custom := routes.recall(request, _TAKEN):
        params = obj.sampling_params or {}
        obj.sampling_params = params | {FIELD: custom | (params.get(FIELD) or {})}
    ids = routes.ids_of(obj, request)
    return routes.keep_reports(drafting.generate(original, manager, obj, request, settings), ids)


def receive_report(
    original, manager, meta_info: dict, state, customized_info: dict, index: int, finish_reason
) -> None:
    """Around ``TokenizerManager.update_request_meta_info``.

    Upstream turns every entry into a list that streams slice token by token; the report is one
    object.
    """
    others = {key: values for key, values in customized_info.items() if key != KEY}
    original(manager, meta_info, state, others, index, finish_reason)
    if KEY in customized_info:
        for report in customized_info[KEY][index]:
            meta_info[KEY] = report
