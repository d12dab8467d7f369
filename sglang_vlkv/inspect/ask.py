"""The question, asked over HTTP, and what the server reports about it."""

from __future__ import annotations

import http.client
import json
import urllib.error
import urllib.request
from typing import NamedTuple

import numpy as np

from sglang_vlkv.inspect import Problem
from sglang_vlkv.inspect.media import Medium

TIMEOUT = 600.0  # seconds


class Answer(NamedTuple):
    """An answer, and what became of its prompt.

    Attributes:
        question, text: what was asked, and answered.
        report: the server's, with positions unless the prompt was left alone.
        tokens: text of every position of the prompt; empty strings for visual tokens, and for what
            continues a character that began before.
    """

    question: str
    text: str
    report: dict
    tokens: list[str]


def ask(
    url: str, media: list[Medium], question: str, custom: dict, max_tokens: int = 64, api_key: str = ""
) -> Answer:
    """The greedy answer of the chat endpoint at ``url`` to a question about ``media``.

    Args:
        custom: the policy that the request chooses, as ``custom_params``; the server's where empty.

    Raises:
        Problem: nobody answers, the server refuses, or it reports nothing.
    """
    content = [*(medium.part for medium in media), {"type": "text", "text": question}]
    body = {
        "model": "default", "messages": [{"role": "user", "content": content}], "max_tokens": max_tokens,
        "temperature": 0, "return_meta_info": True, "return_prompt_token_ids": True,
        "custom_params": {"kv_report": "positions"} | custom,
    }  # fmt: skip
    said = _post(url, "/v1/chat/completions", body, api_key)
    try:
        choice = said["choices"][0]
        report = (choice.get("meta_info") or {}).get("kv_policy")
        text, ids = choice["message"]["content"] or "", choice["prompt_token_ids"]
    except (KeyError, IndexError, TypeError) as error:
        raise Problem(f"{url} does not answer as SGLang does: {str(said)[:300]}") from error
    if report is None:
        raise Problem(f"{url} reports nothing about its KV cache; start it with --kv-policy.")
    tokens = []
    if "positions" in report:
        tokens = _texts(url, expanded(ids, report), report, api_key)
    return Answer(question, text, report, tokens)


def expanded(ids: list[int], report: dict) -> list[int]:
    """One id per position, also from servers that return a placeholder for a whole span (LLaVA)."""
    if len(ids) == report["prompt_tokens"]:
        return ids
    whole = list(ids)
    for start, end in sorted(span for visual in report["visual"] for span in visual["spans"]):
        whole[start : start + 1] = [0] * (end - start)
    if len(whole) != report["prompt_tokens"]:
        raise Problem(
            f"The server returns {len(ids)} ids for {report['prompt_tokens']} prompt tokens, and they cannot "
            "be matched."
        )
    return whole


def _texts(url: str, ids: list[int], report: dict, api_key: str) -> list[str]:
    visual = {position for one in report["visual"] for span in one["spans"] for position in range(*span)}
    distinct = sorted({token for position, token in enumerate(ids) if position not in visual})
    texts = dict(zip(distinct, _decoded(url, [[token] for token in distinct], api_key), strict=True))
    tokens = ["" if position in visual else texts[token] for position, token in enumerate(ids)]
    parts = np.array([position for position, text in enumerate(tokens) if "\ufffd" in text], dtype=np.int64)
    if len(parts):  # tokens that hold a part of a character
        runs = np.split(parts, np.flatnonzero(np.diff(parts) != 1) + 1)
        wholes = _decoded(url, [[ids[position] for position in run] for run in runs], api_key)
        for run, whole in zip(runs, wholes, strict=True):
            tokens[run[0] : run[-1] + 1] = [whole] + [""] * (len(run) - 1)
    return tokens


def _decoded(url: str, ids: list[list[int]], api_key: str) -> list[str]:
    """The text of each list of ids."""
    return _post(url, "/detokenize", {"tokens": ids, "skip_special_tokens": False}, api_key)["text"]


def _post(url: str, path: str, body: dict, api_key: str) -> dict:
    headers = {"Content-Type": "application/json"}
    if api_key:
        headers["Authorization"] = f"Bearer {api_key}"
    try:
        request = urllib.request.Request(url.rstrip("/") + path, json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
            return json.load(response)
    except urllib.error.HTTPError as error:
        raise Problem(f"{url} answers HTTP {error.code}: {_message(error.read())}") from error
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)  # a URLError wraps what went wrong
        raise Problem(f"No server answers at {url} ({reason}).") from error
    except ValueError as error:
        raise Problem(f"{url} does not answer as SGLang does: {error}.") from error


def _message(body: bytes) -> str:
    """What a refusal says."""
    text = body.decode(errors="replace")
    try:
        said = json.loads(text)
    except ValueError:
        return text[:1000]
    if isinstance(said, dict):
        said = said.get("error", said)
    return str(said["message"] if isinstance(said, dict) and "message" in said else said)[:1000]
