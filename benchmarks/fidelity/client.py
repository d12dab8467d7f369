"""Requests to a running server, over the OpenAI chat API."""

from __future__ import annotations

import math
import threading

import requests

from benchmarks.fidelity.metrics import TOP, Answer
from benchmarks.fidelity.questions import Prompt
from sglang_vlkv.commands import Problem
from sglang_vlkv.commands.server import message
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

    def _asked(self, method: str, path: str, **options) -> dict:
        """The JSON object of an answer."""
        try:
            response = self._session().request(method, self.url + path, **options)
            said = response.json() if response.status_code == 200 else None
        except (requests.JSONDecodeError, RecursionError) as error:
            raise Problem(f"{self.url} does not answer as SGLang does.") from error
        except requests.RequestException as error:
            raise Problem(f"{self.url} does not answer ({type(error).__name__}).") from error
        if response.status_code != 200:
            raise Problem(f"{self.url} answers HTTP {response.status_code}: {message(response.content)}")
        if not isinstance(said, dict):
            raise Problem(f"{self.url} does not answer as SGLang does.")
        return said

    def info(self, twins: bool = False) -> dict:
        """``/server_info``.

        Args:
            twins: whether turns are to be answered from twins.

        Raises:
            Problem: no server answers, it lets no request choose its policy, or prefers exact KV to twins.
        """
        info = self._asked("get", "/server_info", timeout=60)
        running = info.get("kv_policy") or {}
        if running.get("allow_override") is not True or (twins and running["twins"] != PREFER):
            raise Problem(
                f"{self.url} lets no request choose its policy, or answers no turn from twins. Start it "
                'with --kv-policy none --kv-policy-config \'{"allow_override": true, "twins": "prefer"}\'.'
            )
        return info

    def ask(self, prompt: Prompt, custom_params: dict, salt: str | None = None) -> Answer:
        """One greedy answer.

        Args:
            salt: requests with others share no KV with this one.

        Raises:
            Problem: the server refused or failed.
        """
        said = self._asked(
            "post",
            "/v1/chat/completions",
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
        choice = said["choices"][0]
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
