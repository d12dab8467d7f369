"""The server that the programs run on, and what their command lines share."""

from __future__ import annotations

import argparse
import sys
import urllib.error
import warnings
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from typing import Iterator

import sglang as sgl
from sglang.lang.chat_template import (
    ChatTemplate,
    get_chat_template,
    register_chat_template,
    register_chat_template_matching_function,
)
from sglang.lang.interpreter import ProgramState

from sglang_vlkv.commands import Problem, media, values
from sglang_vlkv.commands.door import Parser
from sglang_vlkv.commands.server import DEFAULT, START, why
from sglang_vlkv.language import Endpoint
from sglang_vlkv.printable import printable

PICTURE = Path(__file__).parents[1] / "digits.png"

# SGLang knows a model's template by its path. This model's is Qwen2.5-VL's without a system prompt.
_QWEN = get_chat_template("qwen2-vl")
register_chat_template(
    ChatTemplate(
        name="tinyvlm",
        default_system_prompt=None,
        role_prefix_and_suffix=_QWEN.role_prefix_and_suffix,
        stop_str=_QWEN.stop_str,
        image_token=_QWEN.image_token,
    )
)
register_chat_template_matching_function(lambda path: "tinyvlm" if "tinyvlm" in path else None)


def connect(description: str, arguments: list[str] | None, **defaults) -> argparse.Namespace:
    """Parses the command line and makes its server the default backend.

    Args:
        defaults: the program's own options. A path is a picture, a list takes several values, and of a
            tuple one is chosen, its first by default.

    Raises:
        Problem: no such server answers.
    """
    parser = Parser(description=description)
    parser.add_argument("--server", type=values.server, default=DEFAULT)
    parser.add_argument("--custom-params", type=values.json_object, help='such as {"kv_policy": "h2o"}')
    for name, default in defaults.items():
        if isinstance(default, list):
            rest = {"nargs": "+"}
        elif isinstance(default, tuple):
            rest, default = {"choices": default}, default[0]
        else:
            rest = {"type": values.whole() if isinstance(default, int) else type(default)}
        parser.add_argument(f"--{name}", default=default, help="default: %(default)s", **rest)
    options = parser.parse_args(arguments)
    if "picture" in options:
        for note in media.image(options.picture).notes:
            print(printable(note), file=sys.stderr)
    try:
        backend = Endpoint(options.server, options.custom_params)
    except urllib.error.URLError as error:
        raise Problem(f"No server answers at {options.server} ({why(error)}). {START}") from error
    except (OSError, HTTPException, RuntimeError, ValueError, KeyError, TypeError) as error:
        raise Problem(f"{options.server} does not answer as SGLang does: {_said(error)}") from error
    sgl.set_default_backend(backend)
    return options


@contextmanager
def served() -> Iterator[None]:
    """Around programs: an answer that does not come is a Problem.

    SGLang warns of every error with its traceback, beside raising it or keeping it for ``state.error()``.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Error in stream_executor")
        try:
            yield
        except (OSError, HTTPException) as error:
            raise Problem(f"The server broke off before its answer was whole ({why(error)}).") from error
        except (RuntimeError, ValueError, KeyError, TypeError) as error:
            raise Problem(f"The server does not answer: {_said(error)}") from error


def _said(error: Exception) -> str:
    """What a server has said instead of what SGLang's client expected."""
    if isinstance(error, KeyError):
        return "what it sent SGLang's client does not understand; the server's log says more."
    said = error.args[0] if error.args else error
    said = said.get("error", said) if isinstance(said, dict) else said
    return str(said["message"] if isinstance(said, dict) and "message" in said else said)[:1000]


def shown(text: str) -> str:
    """An answer, for a terminal."""
    return printable(text, keep="\n\t")


def report(state: ProgramState, name: str) -> str:
    """What the server says about the cache of the ``sgl.gen`` called ``name``, in a line.

    Raises:
        RuntimeError: the server's answer, where this ``sgl.gen`` failed.
    """
    info = state.get_meta_info(name)
    if info is None:
        raise state.error()
    if (seen := info.get("kv_policy")) is None:
        return "no report: the server runs without --kv-policy"
    prefix = seen["prefix"]
    kept = f"{sum(seen['kept_per_layer'])} rows kept" if "kept_per_layer" in seen else seen["reason"]
    found = f"{prefix['kind']} prefix of {prefix['tokens']}/{seen['prompt_tokens']}"
    return printable(f"{seen['policy']}: {kept}; {found}")
