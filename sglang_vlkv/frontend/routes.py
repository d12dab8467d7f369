"""Where clients find the reports of their requests, whichever endpoint they use."""

from __future__ import annotations

import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing

from fastapi import HTTPException, Request
from starlette.convertors import PathConvertor, register_url_convertor

from sglang_vlkv.frontend.reports import ReportStore
from sglang_vlkv.options import config
from sglang_vlkv.scheduler.report import KEY

HEADER = "X-KV-Policy-Request"
CHOICES = "/choices"  # behind an id
_NAME = "kv_policy_request"  # in an HTTP request's state
_store = ReportStore()


def name(request, server_args) -> None:
    """Gives an HTTP request the id that its response tells in :data:`HEADER`."""
    if config.settings_of(server_args) is not None:
        setattr(request.state, _NAME, uuid.uuid4().hex)


def recall(request, key: str):
    """What the state of an HTTP request holds; None without one, as in an Engine."""
    return getattr(getattr(request, "state", None), key, None)


def ids_of(obj, request) -> tuple[str, ...]:
    """Ids that lead to the reports of all of a request's choices: its own, and its client's."""
    own = recall(request, _NAME)
    return tuple(name for name in (own, obj.rid) if isinstance(name, str)) if own else ()


async def keep_reports(answers: AsyncGenerator, request_ids: tuple[str, ...]) -> AsyncGenerator:
    """The ``answers`` of ``TokenizerManager.generate_request``, whose reports the store keeps."""
    async with aclosing(answers):
        async for answer in answers:
            for number, one in enumerate(answer if isinstance(answer, list) else [answer]):
                info = one["meta_info"]
                if KEY in info:
                    _store.put(info["id"], info[KEY], request_ids, one.get("index", number))
            yield answer


class AnyId(PathConvertor):
    """An id in a path, whatever a client has chosen: slashes and ends of lines too."""

    NAME = "kv_policy_id"
    regex = "(?s:.*)"


class TellName:
    """ASGI middleware that tells a client the id of its request, also before a stream begins."""

    def __init__(self, app) -> None:
        self._app = app

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        state = scope.setdefault("state", {})

        async def tell(message) -> None:
            if message["type"] == "http.response.start" and _NAME in state:
                header = HEADER.lower().encode(), state[_NAME].encode()
                message = message | {"headers": [*message["headers"], header]}
            await send(message)

        await self._app(scope, receive, tell)


def add(server_args, *_, **__) -> None:
    """Before ``http_server._setup_and_run_http_server``."""
    from sglang.srt.entrypoints import http_server

    app = http_server.app
    register_url_convertor(AnyId.NAME, AnyId())
    missing = {404: {"description": "Unknown, not finished, expired, or no KV policy on this server."}}
    if config.settings_of(server_args) is not None:
        app.add_middleware(TellName)

    @app.get("/kv_policy/twins", tags=["kv_policy"], summary="Count twins", responses=missing)
    async def kv_policy_twins():
        """Twins in the pool, their slots, and since the start: requests that went on from one, and
        twins that made room. Summed over data-parallel replicas."""
        states = await http_server.get_global_state().tokenizer_manager.get_internal_state()
        counts = [state["kv_policy"] for state in states if "kv_policy" in state]
        if not counts:
            raise HTTPException(404, "This server runs without a KV policy.")
        return {name: sum(count[name] for count in counts) for name in counts[0] if name != "ranks"}

    @app.get(
        f"/kv_policy/requests/{{request_id:{AnyId.NAME}}}{CHOICES}",
        tags=["kv_policy"], summary="Report every choice", responses=missing,
    )  # fmt: skip
    async def kv_policy_choices(request: Request, request_id: str):
        """The reports of all choices of a request (`n`, or several prompts), in their order; null
        for those that have not finished."""
        whole = request_id + CHOICES  # may be an id too; then its slash is percent-encoded
        found = [_store.choices(request_id), _store.get(whole)]
        if not request.scope.get("raw_path", b"").endswith(CHOICES.encode()):
            found.reverse()
        return _found(whole, next((one for one in found if one is not None), None))

    @app.get(
        f"/kv_policy/requests/{{request_id:{AnyId.NAME}}}",
        tags=["kv_policy"], summary="Report a request", responses=missing,
    )  # fmt: skip
    async def kv_policy_report(request_id: str):
        """What happened to the KV cache of a finished request, by the id of its response or the one
        in the response's header X-KV-Policy-Request; of its first choice where there are several."""
        return _found(request_id, _store.get(request_id))


def _found(request_id: str, found):
    if found is None:
        words = "unknown, not finished, expired, or no --kv-policy"
        raise HTTPException(404, f"No report for {request_id[:200]!r}: {words}.")
    return found
