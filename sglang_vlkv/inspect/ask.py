"""The question, asked over HTTP, and what the server reports about it."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from sglang_vlkv.commands import Problem
from sglang_vlkv.commands.media import Medium
from sglang_vlkv.commands.server import post
from sglang_vlkv.commands.shapes import fits
from sglang_vlkv.inspect.heat import unreadable


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
        Problem: nobody answers, the server refuses, or it reports nothing that can be read.
    """
    content = [*(medium.part for medium in media), {"type": "text", "text": question}]
    body = {
        "model": "default", "messages": [{"role": "user", "content": content}], "max_tokens": max_tokens,
        "temperature": 0, "return_meta_info": True, "return_prompt_token_ids": True,
        "custom_params": {"kv_report": "positions"} | custom,
    }  # fmt: skip
    said = post(url, "/v1/chat/completions", body, api_key)
    try:
        choice = said["choices"][0]
        report = (choice.get("meta_info") or {}).get("kv_policy")
        text, ids = choice["message"]["content"] or "", choice["prompt_token_ids"]
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise Problem(f"{url} does not answer as SGLang does: {str(said)[:300]}") from error
    if report is None:
        raise Problem(f"{url} reports nothing about its KV cache; start it with --kv-policy.")
    if (field := unreadable(report)) is not None or not fits(ids, list[int]) or not fits(text, str):
        words = "reports on its KV cache as no version does that this one reads"
        raise Problem(f"{url} {words}: {field or 'ids'}.")
    return Answer(question, text, report, _texts(url, expanded(ids, report), report, api_key))


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
    said = post(url, "/detokenize", {"tokens": ids, "skip_special_tokens": False}, api_key)
    texts = said.get("text") if isinstance(said, dict) else None
    if not fits(texts, list[str]) or len(texts) != len(ids):
        raise Problem(f"{url} does not answer as SGLang does: {str(said)[:300]}")
    return texts
