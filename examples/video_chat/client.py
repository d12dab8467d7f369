"""A conversation with a SGLang server about videos and pictures; the page and the terminal share it.

It talks the OpenAI API, and ``GET /kv_policy/requests/{response id}`` for what became of the KV cache.
"""

from __future__ import annotations

import base64
import mimetypes
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import httpx
import openai
import pydantic

IMAGE_TYPES = ("image/png", "image/jpeg", "image/webp", "image/gif", "image/bmp")
VIDEO_TYPES = ("video/mp4", "video/webm", "video/quicktime", "video/x-matroska")


class Problem(Exception):
    """What keeps an answer from coming; the message is for the person who asked."""


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


def data_url(path: Path) -> str:
    """The file, as a picture or a video of a message."""
    kind = mimetypes.guess_type(path.name, strict=False)[0] or "unknown"
    _check_type(kind, path.name)
    try:
        return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"
    except OSError as error:
        raise Problem(f"{path} cannot be read: {error.strerror}") from error


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
        raise Problem(f"No server answers at {server}. Start one with: make serve") from error
    except openai.APIStatusError as error:
        raise Problem(f"The server answers HTTP {error.status_code}: {_message(error)}") from error
    except openai.APIError as error:
        raise Problem(f"The server gave up in the middle of the answer: {error.message}") from error
    except httpx.TransportError as error:
        raise Problem(f"The connection to {server} broke in the middle of the answer.") from error
    if finish_reason is None:
        raise Problem("The server ended the answer in the middle.")
    seen = await report(server, chunk.id)
    yield {"id": chunk.id, "finish_reason": finish_reason, "report": seen, "summary": summary(seen)}


async def report(server: str, response_id: str) -> dict | None:
    """What became of the request's KV cache; None from a server that keeps no reports."""
    try:
        async with httpx.AsyncClient() as http:
            response = await http.get(f"{server}/kv_policy/requests/{response_id}")
    except httpx.TransportError as error:
        raise Problem(f"The server went away before it reported on its cache: {error}") from error
    return response.json() if response.status_code == 200 else None


def summary(report: dict | None) -> str:
    """A report in a line."""
    if report is None:
        return "no report: the server runs without --kv-policy, or the report has expired"
    tokens, prefix = report["prompt_tokens"], report["prefix"]
    line = f"{tokens:,} prompt tokens, {prefix['kind']} prefix: {prefix['tokens']:,} reused, "
    line += f"{tokens - prefix['tokens']:,} prefilled; "
    if "kept_per_layer" not in report:
        return line + f"all rows kept ({report['reason']})"
    layers, kept, full = report["kept_per_layer"], report["kept_bytes"], report["full_bytes"]
    line += f"{report['policy']} kept {sum(layers):,} of {tokens * len(layers):,} rows ("
    modalities = report["kept_per_modality"]
    line += ", ".join(f"{rows / sum(modalities.values()):.0%} {name}" for name, rows in modalities.items())
    return line + f"), {kept / 1e6:,.2f} of {full / 1e6:,.2f} MB"


def _part(url: str) -> dict:
    kind = url.partition(";")[0].removeprefix("data:")
    _check_type(kind, "a file")
    field = "image_url" if kind in IMAGE_TYPES else "video_url"
    return {"type": field, field: {"url": url}}


def _check_type(kind: str, name: str) -> None:
    if kind not in IMAGE_TYPES + VIDEO_TYPES:
        known = ", ".join(kind.partition("/")[2] for kind in IMAGE_TYPES + VIDEO_TYPES)
        raise Problem(f"{name} is of type {kind[:80]}; this reads {known}")


def _message(error: openai.APIStatusError) -> str:
    return (error.body or {}).get("message") or error.response.text[:1000]
