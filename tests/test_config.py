"""From flags, JSON or a file to a policy, or to a sentence that says what is allowed."""

import argparse
import json
from dataclasses import FrozenInstanceError, fields

import pytest

from sglang_vlkv.options.config import DEFAULTS, add_flags, build_policy, build_settings, settings_of
from sglang_vlkv.policies import policies
from sglang_vlkv.policies.vlcache import VLCache


@pytest.fixture
def parser():
    parser = argparse.ArgumentParser(prog="server", exit_on_error=False)
    add_flags(parser)
    return parser


def test_no_flags_mean_no_policy(parser):
    args = parser.parse_args([])
    assert vars(args) == DEFAULTS
    assert settings_of(args) is None
    assert settings_of(argparse.Namespace()) is None


def test_flags_make_a_policy(parser):
    config = '{"min_rows": 4, "modality_floors": {"text": 1}}'
    flags = ["--kv-policy", "vlcache", "--kv-budget", "0.25", "--kv-policy-config", config]
    assert settings_of(parser.parse_args(flags)).policy == VLCache(
        budget=0.25, min_rows=4, modality_floors={"text": 1}
    )


def test_defaults_are_the_specified_ones():
    policy = build_policy("vlcache")
    assert policy == VLCache(
        budget=0.1, recent_fraction=0.1, min_rows=16, max_rows=256, voting="post_vision",
        min_prompt_tokens=256, modality_floors={}, p=0.01, renormalise=True,
    )  # fmt: skip


def test_help_names_every_flag_and_policy(parser):
    text = parser.format_help()
    assert all(word in text for word in ["--kv-policy ", "--kv-budget ", "--kv-policy-config ", *policies()])


@pytest.mark.parametrize(
    "flags, word", [(["--kv-policy", "best"], "vlcache"), (["--kv-budget", "a tenth"], "kv-budget")]
)
def test_parser_refuses_what_cannot_be(parser, flags, word):
    with pytest.raises(argparse.ArgumentError, match=word):
        parser.parse_args(flags)


def test_json_file_and_mapping_say_the_same(tmp_path):
    options = {"budget": 0.2, "voting": "last_turn", "p": 0.05}
    file = tmp_path / "policy.json"
    file.write_text(json.dumps(options))
    built = [build_policy("vlcache", None, c) for c in (json.dumps(options), str(file), options)]
    assert built == [VLCache(**options)] * 3


def test_a_given_mapping_is_not_written_to():
    options = {"p": 0.05}
    build_policy("vlcache", 0.2, options)
    assert options == {"p": 0.05}


def test_repr_records_the_whole_run():
    policy = build_policy("vlcache", 0.25, {"modality_floors": {"text": 1.0}})
    assert eval(repr(policy), {"VLCache": VLCache}) == policy
    assert all(f"{option.name}=" in repr(policy) for option in fields(policy))


def test_a_policy_cannot_be_changed():
    with pytest.raises(FrozenInstanceError):
        build_policy("vlcache").budget = 0.5


def refusal(kv_policy="vlcache", kv_budget=None, kv_policy_config=None) -> str:
    with pytest.raises(ValueError) as raised:
        build_policy(kv_policy, kv_budget, kv_policy_config)
    return str(raised.value)


def test_unknown_policy_is_refused_naming_the_known_ones():
    message = refusal("best")
    assert all(word in message for word in ["--kv-policy", "'best'", "none", *policies()])


def test_unknown_options_are_refused_naming_the_known_ones():
    message = refusal(kv_policy_config={"ratio": 0.5, "p": 0.1, "bugdet": 0.1})
    assert "--kv-policy-config" in message and "bugdet, ratio" in message
    assert all(option.name in message for option in fields(VLCache))


@pytest.mark.parametrize("text", ['{"p": 0.1', "{p: 0.1}", "{} {}"])
def test_broken_json_is_refused(tmp_path, text):
    assert "--kv-policy-config is not valid JSON" in refusal(kv_policy_config=text)
    file = tmp_path / "policy.json"
    file.write_text(text)
    message = refusal(kv_policy_config=str(file))
    assert str(file) in message and "not valid JSON" in message


def test_a_file_must_hold_an_object(tmp_path):
    file = tmp_path / "policy.json"
    file.write_text("[1, 2]")
    message = refusal(kv_policy_config=str(file))
    assert str(file) in message and "object" in message


@pytest.mark.parametrize("text", ["no-such-file.json", "[1, 2]", "", "/"])
def test_what_is_neither_json_nor_a_file_is_refused(text):
    message = refusal(kv_policy_config=text)
    assert all(words in message for words in ["--kv-policy-config", repr(text), "neither", "file"])


def test_two_budgets_are_refused_unless_equal():
    message = refusal(kv_budget=0.2, kv_policy_config={"budget": 0.3})
    assert all(word in message for word in ["--kv-budget", "0.2", "0.3", "--kv-policy-config"])
    assert build_policy("vlcache", 0.2, {"budget": 0.2}).budget == 0.2


NAN = float("nan")


@pytest.mark.parametrize(
    "option, value, allowed",
    [
        ("budget", 0.0, "in (0, 1]"),
        ("budget", 1.01, "in (0, 1]"),
        ("budget", NAN, "in (0, 1]"),
        ("budget", "0.1", "a number"),
        ("budget", True, "a number"),
        ("budget", None, "a number"),
        ("recent_fraction", -0.1, "in [0, 1]"),
        ("recent_fraction", 1.1, "in [0, 1]"),
        ("recent_fraction", NAN, "in [0, 1]"),
        ("min_rows", 0, "at least 1"),
        ("min_rows", 4.0, "an integer"),
        ("min_rows", True, "an integer"),
        ("max_rows", 15, "at least min_rows"),
        ("voting", "newest", "post_vision, last_turn"),
        ("voting", 3, "a string"),
        ("min_prompt_tokens", 9, "at least"),
        ("modality_floors", ["text"], "an object"),
        ("modality_floors", {"words": 1.0}, "text, image, video, audio, system"),
        ("modality_floors", {"merged": 1.0}, "text, image, video, audio, system"),
        ("modality_floors", {"text": 1.5}, "in [0, 1]"),
        ("modality_floors", {"text": "all"}, "in [0, 1]"),
        ("modality_floors", {"text": True}, "in [0, 1]"),
        ("compact_always", 1, "true or false"),
        ("p", 0.0, "in (0, 1)"),
        ("p", 1.0, "in (0, 1)"),
        ("p", "1%", "a number"),
        ("renormalise", "no", "true or false"),
    ],
)
def test_wrong_values_are_refused_naming_option_value_and_range(option, value, allowed):
    message = refusal(kv_policy_config={option: value})
    (shown,) = value.items() if isinstance(value, dict) else [(value, value)]
    assert "--kv-policy vlcache" in message and option in message and allowed in message
    assert any(repr(part) in message for part in shown)


@pytest.mark.parametrize("budget", [0.001, 0.003, 0.0035, 1 / 300])
def test_small_budgets_name_a_prompt_length_that_is_accepted(budget):
    """Below it a layer would keep no token."""
    message = refusal(kv_budget=budget)
    stated = int(message.split(" = ")[1].split(",")[0])
    assert VLCache(budget=budget, min_prompt_tokens=stated).max_total(stated, 28) >= 28


def settings(**config):
    name = config.pop("kv_policy", "vlcache")
    return build_settings(name, config.pop("kv_budget", None), config)


def asks(custom: dict, **config):
    return settings(**{"allow_override": True} | config).for_request(custom)


def test_a_request_that_asks_for_nothing_gets_the_servers_policy():
    server = settings(allow_override=True, p=0.05)
    assert server.for_request(None) is server.for_request({"mine": 1}) is server.policy


def test_a_request_keeps_the_servers_options_for_the_same_policy_only():
    assert asks({"kv_budget": 0.2}, p=0.05, sink_tokens=2) == VLCache(budget=0.2, p=0.05, sink_tokens=2)
    other = asks({"kv_policy": "h2o"}, kv_budget=0.3, p=0.05, sink_tokens=2)
    assert other == policies()["h2o"](budget=0.3)
    assert asks({"kv_policy_config": {"p": 0.5}}, p=0.05, sink_tokens=2) == VLCache(p=0.5, sink_tokens=2)


def test_a_server_without_a_policy_of_its_own_lends_no_budget():
    assert asks({"kv_policy": "vlcache"}, kv_policy="none") == VLCache(budget=0.1)
    assert settings(kv_policy="none") is None
    assert settings(kv_policy="none", allow_override=[]) is None


def test_a_list_is_what_a_request_may_choose():
    assert asks({"kv_policy": "h2o"}, allow_override=["h2o", "none"]).name == "h2o"
    with pytest.raises(ValueError, match="kv_policy is 'snapkv'; it must be one of h2o, none"):
        asks({"kv_policy": "snapkv"}, allow_override=["h2o", "none"])


def test_bounds_hold_for_every_way_to_ask():
    bounds = {"min_budget": 0.05, "max_budget": 0.5}
    assert asks({"kv_budget": 0.5}, **bounds).budget == 0.5
    for custom in ({"kv_budget": 0.6}, {"kv_policy_config": {"budget": 0.6}}, {"kv_budget": 0.04}):
        with pytest.raises(ValueError, match=r"custom_params.kv_budget.*\[0.05, 0.5\]"):
            asks(custom, **bounds)
    with pytest.raises(ValueError, match="kv_policy is 'none'"):
        asks({"kv_policy": "none"}, **bounds)  # the full cache exceeds the maximum
    with pytest.raises(ValueError, match="contradicts"):
        asks({"kv_budget": 0.2, "kv_policy_config": {"budget": 0.3}})


@pytest.mark.parametrize(
    "config, words",
    [
        ({"allow_override": "yes"}, ["allow_override", "'yes'", "true, false or a list"]),
        ({"allow_override": ["vlcash"]}, ["allow_override", "vlcash", "vlcache"]),
        ({"min_budget": 0.5, "max_budget": 0.2}, ["min_budget", "0.5", "max_budget"]),
        ({"max_budget": 2}, ["max_budget", "2", "(0, 1]"]),
        ({"allow_override": True, "min_budget": 0.2}, ["budget", "0.1", "[0.2, 1.0]"]),
    ],
)
def test_bad_limits_are_refused(config, words):
    with pytest.raises(ValueError) as raised:
        settings(**config)
    assert all(word in str(raised.value) for word in words), raised.value


def test_a_configuration_file_is_read_once(tmp_path):
    file = tmp_path / "policy.json"
    file.write_text('{"p": 0.05}')
    args = argparse.Namespace(kv_policy="vlcache", kv_budget=None, kv_policy_config=str(file))
    before = settings_of(args)
    file.unlink()
    assert settings_of(args) is before and before.policy.p == 0.05


def test_a_budget_alone_says_nothing_on_a_server_without_a_policy():
    with pytest.raises(ValueError, match="kv_budget is 0.2; it must be 1 under kv_policy none"):
        asks({"kv_budget": 0.2}, kv_policy="none")


@pytest.mark.parametrize(
    "config",
    [
        {"min_prompt_tokens": 100_000},  # too short to be compacted, whatever it is
        {"renormalise": False, "budget": 0.5},  # spends up to a hundredth more
    ],
)
def test_options_do_not_lead_past_the_maximum(config):
    with pytest.raises(ValueError, match="at most 256|at most 0.5 of a prompt"):
        asks({"kv_policy": "vlcache", "kv_policy_config": config}, max_budget=0.5)
    assert asks({"kv_policy": "vlcache", "kv_policy_config": config}).name == "vlcache"


def test_a_list_of_policies_is_a_list_for_the_servers_own_too():
    with pytest.raises(ValueError, match="kv_policy is 'vlcache'; it must be one of snapkv"):
        asks({"kv_policy_config": {"p": 0.5}}, allow_override=["snapkv"])


@pytest.mark.parametrize(
    "options", [{"budget": 10**400}, {"budget": 5e-324}, {"p": -(10**400)}, {"max_rows": 5000}]
)
def test_numbers_beyond_all_bounds_are_refused(options):
    message = refusal(kv_policy_config=options)
    assert next(iter(options)) in message
