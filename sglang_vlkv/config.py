"""From flags, keyword arguments or YAML to a policy."""

from __future__ import annotations

import argparse
import json
from dataclasses import fields
from pathlib import Path

from sglang_vlkv.base import Policy
from sglang_vlkv.policies import POLICIES

NONE = "none"
DEFAULTS = {"kv_policy": NONE, "kv_budget": None, "kv_policy_config": None}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds ``--kv-policy``, ``--kv-budget`` and ``--kv-policy-config``."""
    group = parser.add_argument_group("KV-cache compression (sglang_vlkv)")
    group.add_argument(
        "--kv-policy",
        choices=[NONE, *POLICIES],
        default=DEFAULTS["kv_policy"],
        help="Which KV rows of a prompt with images or video stay after its prefill; "
        "'vlcache' is VL-Cache (arXiv 2410.23317). Default: none, which changes nothing.",
    )
    group.add_argument(
        "--kv-budget",
        type=float,
        default=DEFAULTS["kv_budget"],
        help="Fraction of the prompt's KV rows that stays, in (0, 1]. Default: 0.1.",
    )
    group.add_argument(
        "--kv-policy-config",
        default=DEFAULTS["kv_policy_config"],
        metavar="JSON-OR-FILE",
        help="Further options of the policy: a JSON object, or a file that holds one.",
    )


def build_policy(
    kv_policy: str = NONE,
    kv_budget: float | None = None,
    kv_policy_config: str | dict | None = None,
) -> Policy | None:
    """The configured policy, or None for ``none``.

    Raises:
        ValueError: unknown policy, unknown option, or a value out of range; says what is allowed.
    """
    if kv_policy in (NONE, None):
        return None
    if kv_policy not in POLICIES:
        raise ValueError(f"--kv-policy {kv_policy!r} is unknown; use {NONE}, {', '.join(POLICIES)}")
    policy = POLICIES[kv_policy]
    options = _read_options(kv_policy_config)
    known = [option.name for option in fields(policy)]
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ValueError(
            f"--kv-policy-config has unknown option {', '.join(unknown)}; "
            f"{kv_policy} knows {', '.join(known)}"
        )
    if kv_budget is not None:
        if options.get("budget", kv_budget) != kv_budget:
            raise ValueError(
                f"--kv-budget {kv_budget} contradicts budget {options['budget']} "
                "in --kv-policy-config; give one of them"
            )
        options["budget"] = kv_budget
    try:
        return policy(**options)
    except ValueError as error:
        raise ValueError(f"--kv-policy {kv_policy}: {error}") from None


def _read_options(config: str | dict | None) -> dict:
    if config is None:
        return {}
    if isinstance(config, dict):
        return dict(config)
    text, source = config, "--kv-policy-config"
    if not config.lstrip().startswith("{"):
        source = f"--kv-policy-config file {config}"
        try:
            text = Path(config).read_text()
        except OSError as error:
            raise ValueError(
                f"--kv-policy-config {config!r} is neither a JSON object nor a readable file "
                f"({error.strerror})"
            ) from None
    try:
        options = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{source} is not valid JSON: {error}") from None
    if not isinstance(options, dict):
        raise ValueError(f"{source} must hold a JSON object, not {type(options).__name__}")
    return options


def policy_of(server_args) -> Policy | None:
    """The policy that a ServerArgs carries; None where it carries no flags of ours."""
    return build_policy(**{name: getattr(server_args, name, value) for name, value in DEFAULTS.items()})
