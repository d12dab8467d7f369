"""The server that the programs run on, and what their command lines share."""

from __future__ import annotations

import argparse
import json
import sys
import urllib.error
from pathlib import Path

import sglang as sgl
from sglang.lang.chat_template import (
    ChatTemplate,
    get_chat_template,
    register_chat_template,
    register_chat_template_matching_function,
)
from sglang.lang.interpreter import ProgramState

from sglang_vlkv.language import Endpoint

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


def connect(description: str, **defaults) -> argparse.Namespace:
    """Parses the command line and makes its server the default backend.

    Args:
        defaults: the program's own options; a list takes several values.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--server", default="http://127.0.0.1:30000")
    parser.add_argument("--custom-params", type=json.loads, help='such as {"kv_policy": "h2o"}')
    for name, default in defaults.items():
        several = {"nargs": "+"} if isinstance(default, list) else {"type": type(default)}
        parser.add_argument(f"--{name}", default=default, help=f"default: {default}", **several)
    arguments = parser.parse_args()
    try:
        backend = Endpoint(arguments.server, arguments.custom_params)
    except urllib.error.URLError as error:
        sys.exit(f"No server answers at {arguments.server} ({error.reason}). Start one with: make serve")
    sgl.set_default_backend(backend)
    return arguments


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
    return f"{seen['policy']}: {kept}; {prefix['kind']} prefix of {prefix['tokens']}/{seen['prompt_tokens']}"
