"""Questions to a server, over HTTP."""

from __future__ import annotations

import http.client
import json
import urllib.error
import urllib.request

from sglang_vlkv.commands import Problem

TIMEOUT = 600.0  # seconds
DEFAULT = "http://127.0.0.1:30000"
START = "Start one with: make serve"


def post(url: str, path: str, body: dict, api_key: str = "") -> object:
    """The JSON that the server at ``url`` answers.

    Raises:
        Problem: nobody answers, not to the end or no JSON, or the server refuses.
    """
    headers = {"Content-Type": "application/json"}
    if api_key:
        headers["Authorization"] = f"Bearer {api_key}"
    request = urllib.request.Request(url + path, json.dumps(body).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
            said = response.read()
    except urllib.error.HTTPError as error:
        raise Problem(f"{url} answers HTTP {error.code}: {_refusal(error)}") from error
    except urllib.error.URLError as error:
        raise Problem(f"No server answers at {url} ({why(error)}). {START}") from error
    except (OSError, http.client.HTTPException) as error:
        raise Problem(f"{url} broke off before its answer was whole ({why(error)}).") from error
    try:
        return json.loads(said)
    except (ValueError, RecursionError) as error:
        words = said[:100].decode(errors="replace")
        raise Problem(f"{url} does not answer as SGLang does: {words}") from error


def _refusal(error: urllib.error.HTTPError) -> str:
    try:
        return message(error.read())
    except (OSError, http.client.HTTPException):
        return "and breaks off there"


def why(error: Exception) -> str:
    """What the system says of an error of the network, in its words alone."""
    error = getattr(error, "reason", error)  # a URLError wraps what went wrong
    return getattr(error, "strerror", None) or str(error)


def message(body: bytes) -> str:
    """What a refusal says."""
    text = body.decode(errors="replace")
    try:
        said = json.loads(text)
    except (ValueError, RecursionError):
        return text[:1000]
    if isinstance(said, dict):
        said = said.get("error", said)
    return str(said["message"] if isinstance(said, dict) and "message" in said else said)[:1000]
