"""The process that answers requests: validating them, and handing out reports."""

from __future__ import annotations

from sglang_vlkv.report import KEY, OPTION, POSITIONS, ReportStore

_store = ReportStore()


def validate_request(_result, _manager, obj, _input_ids) -> None:
    """After ``TokenizerManager._validate_one_request``; a ValueError becomes an HTTP 400."""
    custom = (getattr(obj, "sampling_params", None) or {}).get("custom_params") or {}
    if OPTION in custom and custom[OPTION] != POSITIONS:
        raise ValueError(
            f"custom_params.{OPTION} is {custom[OPTION]!r}; the only value it takes is {POSITIONS!r}"
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
    from sglang.srt.entrypoints.http_server import app

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
