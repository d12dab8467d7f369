"""A conversation with a SGLang server about videos and pictures; the page and the terminal share it.

It talks the OpenAI API, and ``GET /kv_policy/requests/{response id}`` for what became of the KV cache.
"""

from __future__ import annotations

import mimetypes
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from urllib.parse import quote

import httpx
import openai
import pydantic

from sglang_vlkv.commands import Problem, media
from sglang_vlkv.commands.server import START, message
from sglang_vlkv.commands.shapes import lacks

IMAGE_TYPES = ("image/png", "image/jpeg", "image/webp", "image/gif", "image/bmp")
VIDEO_TYPES = ("video/mp4", "video/webm", "video/quicktime", "video/x-matroska")


_SUMMARY = {"policy": str, "prompt_tokens": int, "prefix": dict}  # fields of a report, as in docs/requests.md
_PREFIX = {"kind": str, "tokens": int}
_COMPACTED = {
    "kept_per_layer": list[int], "kept_per_modality": dict[str, int], "kept_bytes": int, "full_bytes": int,
}  # fmt: skip


class Turn(pydantic.BaseModel):
    """A question and its answer.

    Attributes:
        question: what the person asks.
        media: data URLs of the pictures and videos that come with this turn, before its question.
        answer: what the model said; None for the turn that is being asked.
    """

    question: str
    media: list[str] = []
    answer: str | None = None


def open_file(path: Path) -> media.Medium:
    """The file, as a picture or a video of a message.

    Raises:
        Problem: it cannot be read, or is of another type.
    """
    kind = mimetypes.guess_type(path.name, strict=False)[0] or "unknown"
    _check_type(kind, path.name)
    medium = media.image(path) if kind in IMAGE_TYPES else media.video(path)
    _check_type(_kind_of(medium.url), path.name)
    return medium


def messages(turns: Sequence[Turn]) -> list[dict]:
    """The whole conversation as OpenAI messages."""
    history = []
    for turn in turns:
        content = [*map(_part, turn.media), {"type": "text", "text": turn.question}]
        history.append({"role": "user", "content": content})
        if turn.answer is not None:
            history.append({"role": "assistant", "content": turn.answer})
    return history


async def ask(
    server: str, turns: Sequence[Turn], max_tokens: int = 256, custom_params: dict | None = None
) -> AsyncIterator[dict]:
    """Asks the last of ``turns`` and streams the answer. Closing the iterator aborts the request.

    Args:
        server: URL of the SGLang server.
        max_tokens: most tokens of the answer.
        custom_params: what this request chooses, such as ``{"kv_policy": "h2o"}``.

    Yields:
        ``{"text": piece}`` for every piece of the answer, and at the end ``{"id": response id,
        "finish_reason": reason, "report": report or None, "summary": the report in a line}``.

    Raises:
        Problem: no server, a refused request, a stream that breaks off.
    """
    body = {"custom_params": custom_params} if custom_params else {}
    finish_reason = None
    try:
        async with openai.AsyncOpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0) as client:
            stream = await client.chat.completions.create(
                model="default", messages=messages(turns), max_tokens=max_tokens, temperature=0,
                stream=True, extra_body=body,
            )  # fmt: skip
            async with stream:
                async for chunk in stream:
                    for choice in chunk.choices:
                        finish_reason = choice.finish_reason or finish_reason
                        if choice.delta.content:
                            yield {"text": choice.delta.content}
    except openai.APIConnectionError as error:
        raise Problem(f"No server answers at {server}. {START}") from error
    except openai.APIStatusError as error:
        refusal = message(error.response.content)
        raise Problem(f"The server answers HTTP {error.status_code}: {refusal}") from error
    except openai.APIError as error:
        raise Problem(f"The server gave up in the middle of the answer: {error.message}") from error
    except httpx.HTTPError as error:
        raise Problem(f"The connection to {server} broke in the middle of the answer.") from error
    except (ValueError, TypeError, AttributeError) as error:  # of what it sent, which nothing has checked
        raise Problem(f"{server} does not answer as SGLang does.") from error
    if finish_reason is None:
        raise Problem("The server ended the answer in the middle.")
    seen = await report(server, chunk.id)
    yield {"id": chunk.id, "finish_reason": finish_reason, "report": seen, "summary": summary(seen)}


async def report(server: str, response_id: str) -> dict | None:
    """What became of the request's KV cache; None where the server keeps no reports, or is gone."""
    try:
        async with httpx.AsyncClient() as http:
            response = await http.get(f"{server}/kv_policy/requests/{quote(response_id, safe='')}")
        return response.json() if response.status_code == 200 else None
    except (httpx.HTTPError, ValueError):
        return None


def summary(report: dict | None) -> str:
    """A report in a line."""
    if report is None:
        return "no report: the server runs without --kv-policy, is gone, or the report has expired"
    compacted = isinstance(report, dict) and "kept_per_layer" in report
    fields = _SUMMARY | (_COMPACTED if compacted else {"reason": str})
    if lacks(report, fields) or lacks(report["prefix"], _PREFIX):
        return "a report that this version does not read"
    tokens, prefix = report["prompt_tokens"], report["prefix"]
    line = f"{tokens:,} prompt tokens, {prefix['kind']} prefix: {prefix['tokens']:,} reused, "
    line += f"{tokens - prefix['tokens']:,} prefilled; "
    if not compacted:
        return line + f"all rows kept ({report['reason']})"
    layers, kept, full = report["kept_per_layer"], report["kept_bytes"], report["full_bytes"]
    line += f"{report['policy']} kept {sum(layers):,} of {tokens * len(layers):,} rows ("
    modalities = report["kept_per_modality"]
    every = sum(modalities.values()) or 1
    line += ", ".join(f"{rows / every:.0%} {name}" for name, rows in modalities.items())
    return line + f"), {kept / 1e6:,.2f} of {full / 1e6:,.2f} MB"


def _kind_of(url: str) -> str:
    return url.partition(";")[0].removeprefix("data:")


def _part(url: str) -> dict:
    kind = _kind_of(url)
    _check_type(kind, "a file")
    field = "image_url" if kind in IMAGE_TYPES else "video_url"
    return {"type": field, field: {"url": url}}


def _check_type(kind: str, name: str) -> None:
    if kind not in IMAGE_TYPES + VIDEO_TYPES:
        known = ", ".join(kind.partition("/")[2] for kind in IMAGE_TYPES + VIDEO_TYPES)
        raise Problem(f"{name} is of type {kind[:80]}; this reads {known}.")
