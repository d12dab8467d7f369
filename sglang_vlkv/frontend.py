"""The process that answers requests: validating them, and handing out reports."""

from __future__ import annotations

from sglang_vlkv import config
from sglang_vlkv.report import KEY, OPTION, POSITIONS, ReportStore

_store = ReportStore()
_KEYS = (*config.REQUEST_KEYS, OPTION)


def validate_request(_result, manager, obj, _input_ids) -> None:
    """After ``TokenizerManager._validate_one_request``; a ValueError becomes an HTTP 400."""
    custom = (getattr(obj, "sampling_params", None) or {}).get("custom_params") or {}
    if not isinstance(custom, dict):
        raise ValueError(f"custom_params is {custom!r}; it must be an object")
    unknown = [key for key in custom if str(key).startswith("kv_") and key not in _KEYS]
    if unknown:
        raise ValueError(f"custom_params.{unknown[0]} is unknown; known are {', '.join(_KEYS)}")
    if OPTION in custom and custom[OPTION] != POSITIONS:
        raise ValueError(
            f"custom_params.{OPTION} is {custom[OPTION]!r}; the only value it takes is {POSITIONS!r}"
        )
    settings = config.settings_of(manager.server_args)
    if settings is not None:
        settings.for_request(custom)
    elif asked := [key for key in custom if key in config.REQUEST_KEYS]:
        raise ValueError(
            f"custom_params.{asked[0]} is set, but this server runs without a KV policy. Leave it "
            "out, or start the server with --kv-policy and --kv-policy-config "
            '\'{"allow_override": true}\'.'
        )


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
            _store.put(meta_info["id"], report)


def add_routes(*args, **kwargs) -> None:
    """Before ``http_server._setup_and_run_http_server``."""
    from fastapi import HTTPException
    from sglang.srt.entrypoints import http_server

    app = http_server.app

    @app.get("/kv_policy/twins")
    async def kv_policy_twins():
        """Twins in the pool, their slots, and since the start: requests that went on from one, and
        twins that made room. Summed over data-parallel replicas."""
        states = await http_server._global_state.tokenizer_manager.get_internal_state()
        counts = [state["kv_policy"] for state in states if "kv_policy" in state]
        if not counts:
            raise HTTPException(404, "This server runs without a KV policy.")
        return {name: sum(count[name] for count in counts) for name in counts[0] if name != "ranks"}

    @app.get("/kv_policy/requests/{response_id}")
    async def kv_policy_report(response_id: str):
        """The report of a finished request, by the id of its response."""
        report = _store.get(response_id)
        if report is None:
            raise HTTPException(
                404,
                f"No report for {response_id!r}: unknown, not finished, expired, or no --kv-policy.",
            )
        return report
