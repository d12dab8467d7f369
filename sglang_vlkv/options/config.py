"""From flags, keyword arguments, YAML or a request to a policy."""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from pathlib import Path

from sglang_vlkv.policies import policies
from sglang_vlkv.policies.none import NONE
from sglang_vlkv.printable import printable
from sglang_vlkv.stages.options import is_number, require, shortened
from sglang_vlkv.stages.policy import Policy

TWINS = OFF, RESUME, FALLBACK, PREFER = "off", "resume", "fallback", "prefer"
POLICY_DEFAULTS = {"kv_policy": NONE, "kv_budget": None, "kv_policy_config": None}
REQUEST_KEYS = tuple(POLICY_DEFAULTS)  # what custom_params may hold, beside kv_report
DEFAULTS = POLICY_DEFAULTS | {"kv_events_endpoint": None}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds our flags."""
    group = parser.add_argument_group("KV-cache compression (sglang_vlkv)")
    group.add_argument(
        "--kv-policy",
        choices=list(policies()),
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
        help="Further options: a JSON object, or a file that holds one.",
    )
    group.add_argument(
        "--kv-events-endpoint",
        default=DEFAULTS["kv_events_endpoint"],
        metavar="PORT-OR-ADDRESS",
        help="Publishes what happens to the KV cache on a ZeroMQ socket, which python -m sglang_vlkv.monitor "
        "shows: a port on loopback, tcp://ADDRESS:PORT or ipc://FILE. Default: nowhere.",
    )


@dataclass(frozen=True)
class Settings:
    """What a server was started with.

    Attributes:
        policy: for requests that ask for nothing.
        options: the policy's options as the operator gave them.
        allow_override: whether requests may choose policy, budget and options themselves: true, or
            a list of the policies they may choose.
        min_budget, max_budget: what a request's budget must lie in.
        twins: what the compacted rows of ended requests are kept for. ``off``: nothing, they go.
            ``resume``: retracted requests go on from them, and the same prompt is answered from
            them when its exact KV is gone. ``fallback``: new turns are, too, when the exact KV of
            what lost rows is gone. ``prefer``: whenever they reach further than exact KV.
        max_twins: most of the pool's slots that they take, as a fraction.
    """

    policy: Policy
    options: dict = field(default_factory=dict)
    allow_override: bool | list[str] = False
    min_budget: float = 0.01
    max_budget: float = 1.0
    twins: str = RESUME
    max_twins: float = 0.5

    def __post_init__(self) -> None:
        """Raises ValueError, naming the option, what it was and what it may be."""
        allowed, names = self.allow_override, list(policies())
        listed = isinstance(allowed, (list, tuple)) and all(name in names for name in allowed)
        words = f"true, false or a list of policies out of {', '.join(names)}"
        require(isinstance(allowed, bool) or listed, "allow_override", allowed, words)
        for name in ("min_budget", "max_budget"):
            value = getattr(self, name)
            require(is_number(value) and 0 < value <= 1, name, value, "a number in (0, 1]")
        require(self.twins in TWINS, "twins", self.twins, f"one of {', '.join(TWINS)}")
        fits = is_number(self.max_twins) and 0 <= self.max_twins <= 1
        require(fits, "max_twins", self.max_twins, "a number in [0, 1]")
        bounds = self.min_budget, self.max_budget
        require(bounds[0] <= bounds[1], "min_budget", bounds[0], "at most max_budget")
        if allowed and self.policy.name != NONE:
            budget = self.policy.budget
            require(bounds[0] <= budget <= bounds[1], "budget", budget, f"{self._range} with allow_override")

    @property
    def choices(self) -> list[str]:
        """Policies that a request may name."""
        if not self.allow_override:
            return []
        allowed = policies() if self.allow_override is True else self.allow_override
        return [name for name in allowed if name != NONE or self.max_budget == 1]

    def describe(self) -> dict:
        """As JSON values, for ``/server_info``."""
        limits = {name: getattr(self, name) for name in OPERATOR_OPTIONS}
        return {"policy": self.policy.name} | asdict(self.policy) | limits

    def for_request(self, custom_params: dict | None) -> Policy:
        """The policy of a request with these ``custom_params``.

        Without ``kv_policy`` it is the server's, with the server's options, at another budget or
        with further options. Another policy starts from its own defaults and the server's budget.

        Raises:
            ValueError: names the field, what it is and what it may be.
        """
        asked = {key: value for key, value in (custom_params or {}).items() if key in REQUEST_KEYS}
        if not asked:
            return self.policy
        first = f"custom_params.{next(iter(asked))}"
        if not self.allow_override:
            raise ValueError(
                f"{first} is set, but this server lets no request choose; it runs "
                f"{self.policy.name} for all. Leave it out, or start the server with "
                '--kv-policy-config \'{"allow_override": true}\'.'
            )
        name = asked.get("kv_policy", self.policy.name)
        words = f"one of {', '.join(self.choices)}"
        require(name in self.choices, "custom_params.kv_policy", name, words)
        options = {} if asked.get("kv_policy_config") is None else asked["kv_policy_config"]
        words = "an object of options"
        require(isinstance(options, dict), "custom_params.kv_policy_config", options, words)
        budget = asked.get("kv_budget")
        if budget is not None:
            in_range = is_number(budget) and self.min_budget <= budget <= self.max_budget
            require(in_range, "custom_params.kv_budget", budget, f"a number {self._range}")
            options = _with_budget(
                options, budget, "custom_params.kv_budget", "custom_params.kv_policy_config"
            )
        inherited = {}
        if name == self.policy.name:
            inherited = self.options
        elif NONE not in (name, self.policy.name):
            inherited = {"budget": self.policy.budget}
        policy = _policy(name, inherited | options, "custom_params.kv_policy_config")
        in_range = self.min_budget <= policy.budget <= self.max_budget
        require(in_range, "custom_params.kv_budget", policy.budget, self._range)
        words = "1 under kv_policy none; to keep less, name another kv_policy"
        require(name != NONE or policy.budget == 1, "custom_params.kv_budget", policy.budget, words)
        if self.max_budget < 1:
            self._within_maximum(policy)
        return policy

    def _within_maximum(self, policy: Policy) -> None:
        """Raises ValueError where options let prompts keep more than ``max_budget`` after all."""
        shortest = max(self.policy.min_prompt_tokens, math.ceil(1 / policy.budget))
        least = policy.min_prompt_tokens
        require(least <= shortest, "min_prompt_tokens", least, f"at most {shortest} on this server")
        layers, prompt = 100, 100_000  # where rounding counts for nothing
        most = policy.max_total(prompt, layers) / (layers * prompt)
        words = f"such that at most {self.max_budget} of a prompt stays; these may keep {most:.3f}"
        require(most <= self.max_budget + 1e-6, "custom_params.kv_policy_config", "", words)

    @property
    def _range(self) -> str:
        return f"in [{self.min_budget}, {self.max_budget}]"


OPERATOR_OPTIONS = ("allow_override", "min_budget", "max_budget", "twins", "max_twins")


def build_settings(
    kv_policy: str | None = NONE,
    kv_budget: float | None = None,
    kv_policy_config: str | dict | None = None,
) -> Settings | None:
    """What the flags ask for, or None where nothing of ours is to run.

    ``none`` with ``allow_override`` is something: requests may then ask for a policy.

    Raises:
        ValueError: unknown policy, unknown option, or a value out of range; says what is allowed.
    """
    name = kv_policy or NONE
    if name not in policies():
        raise ValueError(f"--kv-policy {name!r} is unknown; use {', '.join(policies())}")
    options = read_options(kv_policy_config)
    limits = {key: options.pop(key) for key in OPERATOR_OPTIONS if key in options}
    if name == NONE and not limits.get("allow_override"):
        return None
    if kv_budget is not None and name != NONE:
        options = _with_budget(options, kv_budget, "--kv-budget", "--kv-policy-config")
    policy = _policy(name, options, "--kv-policy-config")
    try:
        return Settings(policy, options, **limits)
    except ValueError as error:
        raise ValueError(f"--kv-policy-config: {error}") from None


def _with_budget(options: dict, budget: float, flag: str, source: str) -> dict:
    """``options``, which came from ``source``, with the ``budget`` that ``flag`` gave."""
    if options.get("budget", budget) != budget:
        raise ValueError(
            f"{flag} {budget} contradicts budget {shortened(options['budget'])} in {source}; give one of them"
        )
    return options | {"budget": budget}


def build_policy(
    kv_policy: str | None = NONE,
    kv_budget: float | None = None,
    kv_policy_config: str | dict | None = None,
) -> Policy | None:
    """The policy of :func:`build_settings`, or None."""
    settings = build_settings(kv_policy, kv_budget, kv_policy_config)
    return settings and settings.policy


def _policy(name: str, options: dict, source: str) -> Policy:
    """The policy ``name`` with ``options``, which came from ``source``."""
    policy = policies()[name]
    known = [option.name for option in fields(policy)]
    unknown = sorted(set(options) - set(known))
    if unknown:
        ours = f", {', '.join(OPERATOR_OPTIONS)}" if source.startswith("--") else ""
        raise ValueError(
            f"{source} has unknown option {printable(', '.join(unknown))[:200]}; {name} knows "
            f"{', '.join(known)}{ours}"
        )
    try:
        return policy(**options)
    except ValueError as error:
        where = "--kv-policy" if source.startswith("--") else "custom_params, kv_policy"
        raise ValueError(f"{where} {name}: {error}") from None


def read_options(config: str | dict | None) -> dict:
    """What ``--kv-policy-config`` holds.

    Raises:
        ValueError: no JSON object, and no file that holds one.
    """
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
        except UnicodeDecodeError:
            raise ValueError(f"{source} is not valid JSON: it is no text") from None
    try:
        options = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{source} is not valid JSON: {error}") from None
    except RecursionError:
        raise ValueError(f"{source} is not valid JSON: it is nested too deep") from None
    if not isinstance(options, dict):
        raise ValueError(f"{source} must hold a JSON object, not {type(options).__name__}")
    return options


def settings_of(server_args) -> Settings | None:
    """What a ServerArgs carries; None where nothing of ours is to run."""
    name, budget, config = (getattr(server_args, flag, value) for flag, value in POLICY_DEFAULTS.items())
    return _cached_settings(name, budget, json.dumps(config) if isinstance(config, dict) else config)


@cache  # a file is read once: what it says later is for the next server
def _cached_settings(name: str, budget: float | None, config: str | None) -> Settings | None:
    return build_settings(name, budget, config)
