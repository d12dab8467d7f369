"""Requests to a running server, over the OpenAI chat API."""

from __future__ import annotations

import math
import threading

import requests

from benchmarks.fidelity.metrics import TOP, Answer
from benchmarks.fidelity.questions import Prompt
from sglang_vlkv.options.config import PREFER

NONE = {"kv_policy": "none"}


class Client:
    """Asks one server; threads share it.

    Args:
        url: where the server listens.
        timeout: seconds per request.
    """

    def __init__(self, url: str, timeout: float = 600) -> None:
        self.url = url.rstrip("/")
        self._timeout = timeout
        self._local = threading.local()

    def _session(self) -> requests.Session:
        if not hasattr(self._local, "session"):
            self._local.session = requests.Session()
        return self._local.session

    def info(self, twins: bool = False) -> dict:
        """``/server_info``.

        Args:
            twins: whether turns are to be answered from twins.

        Raises:
            RuntimeError: the server lets no request choose its policy, or prefers exact KV to twins.
        """
        response = self._session().get(self.url + "/server_info", timeout=60)
        response.raise_for_status()
        info = response.json()
        running = info.get("kv_policy") or {}
        if running.get("allow_override") is not True or (twins and running["twins"] != PREFER):
            raise RuntimeError(
                f"{self.url} lets no request choose its policy, or answers no turn from twins. Start it "
                'with --kv-policy none --kv-policy-config \'{"allow_override": true, "twins": "prefer"}\'.'
            )
        return info

    def ask(self, prompt: Prompt, custom_params: dict, salt: str | None = None) -> Answer:
        """One greedy answer.

        Args:
            salt: requests with others share no KV with this one.

        Raises:
            RuntimeError: the server refused or failed.
        """
        response = self._session().post(
            self.url + "/v1/chat/completions",
            json={
                "model": "default",
                "messages": prompt.messages,
                "temperature": 0,
                "max_tokens": prompt.max_tokens,
                "custom_params": custom_params,
                "cache_salt": salt,
                "return_meta_info": True,
                "logprobs": True,
                "top_logprobs": TOP,
                # Ids and logprobs as two flat lists: texts of 20 tokens a position cost a third of the time.
                "return_flat_raw_output_top_logprobs": True,
                "return_flat_raw_top_logprobs_b64": False,
            },
            timeout=self._timeout,
        )
        if response.status_code != 200:
            raise RuntimeError(f"HTTP {response.status_code} for {custom_params}: {response.text[:1000]}")
        choice = response.json()["choices"][0]
        meta = choice["meta_info"]
        rows, width = meta["output_top_logprobs_shape"]
        ids, logprobs = meta["output_top_logprobs_idx_flat"], meta["output_top_logprobs_val_flat"]
        return Answer(
            text=choice["message"]["content"] or "",
            tokens=[token for _, token, *_ in meta["output_token_logprobs"]],
            top=[
                {
                    token: math.exp(logprob)
                    for token, logprob in zip(ids[i : i + width], logprobs[i : i + width])
                }
                for i in range(0, rows * width, width)
            ],
            report=meta["kv_policy"],
        )
