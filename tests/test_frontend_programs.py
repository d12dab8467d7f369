"""The programs of examples/frontend, in SGLang's frontend language, against real servers."""

from __future__ import annotations

import re
import runpy
import sys

import numpy as np
import pytest
import sglang as sgl
from PIL import Image

from examples.frontend.backend import PICTURE, Endpoint
from examples.frontend.choose import choose
from examples.frontend.converse import converse
from sglang_vlkv.language import ask
from sglang_vlkv.tinyvlm import tasks

DIGITS = {"blue": 6, "brown": 7, "cyan": 1, "green": 7, "yellow": 8, "orange": 2, "teal": 0, "pink": 6}
CHOICES = [" cyan", " which digit is red?", " 1", " seven", " all the digits"]
pytestmark = pytest.mark.filterwarnings("ignore:.*found in sys.modules")  # run again, as __main__


class Refused(Exception):
    """The exit status, and what was said."""


@pytest.fixture
def run(trained, monkeypatch, capsys):
    """Runs a program of examples/frontend as ``python -m`` does; returns what it prints."""

    def run(name: str, *options: str) -> str:
        monkeypatch.setattr(sys, "argv", [name, "--server", trained.url, *options])
        with pytest.raises(SystemExit) as ended:
            runpy.run_module(f"examples.frontend.{name}", run_name="__main__")
        out, err = capsys.readouterr()
        if ended.value.code:
            raise Refused(ended.value.code, err)
        return out

    return run


def test_the_digits_are_those_of_the_picture():
    scene, _ = tasks.lay_out("multi", 5, 16)
    assert DIGITS == {tasks.NAMES[colour]: digit for colour, digit in scene.digits[0].items()}


def test_describe(trained, run):
    trained.flush()
    listed, report, *forks = run("describe").splitlines()
    assert dict(re.findall(r"([a-z]+) (\d)", listed)) == {c: str(d) for c, d in DIGITS.items()}
    assert re.fullmatch(r" *\[vlkv: 107 rows kept; cold prefix of 0/268\]", report)
    assert forks[::2] == [f" the digit is {colour} {DIGITS[colour]}" for colour in ("cyan", "green", "pink")]
    for report in forks[1::2]:
        numbers = re.search(r"vlkv: (\d+) rows kept; \w+ prefix of (\d+)/(\d+)", report).groups()
        kept, found, tokens = map(int, numbers)
        assert 268 < found < tokens and kept == round(0.1 * tokens * 4)


def test_choose(run):
    best, *others = run("choose", "--colour", "orange").splitlines()
    assert re.fullmatch(r"\* 2  -0\.\d+", best) and len(others) == 9 and not any("*" in o for o in others)


def test_converse(run):
    lines = run("converse").splitlines()
    assert lines[1::3] == [
        " the digit is cyan 1", " digits green 7 yellow 8 orange 2", " the digit is brown 7",
    ]  # fmt: skip
    prefixes = [int(re.search(r" prefix of (\d+)/", report)[1]) for report in lines[5::3]]
    assert prefixes[0] >= 271 and prefixes[1] > prefixes[0], "later turns reuse the earlier ones"


def test_batch(run):
    assert run("batch").endswith("8 of 8 right\n")


def test_a_backend_chooses_the_policy(trained, run):
    out = run("batch", "--custom-params", '{"kv_policy": "random"}')
    assert out.count("[random: ") == 8 and "\n0 of 8 right" in out
    backends = [Endpoint(trained.url, custom) for custom in (None, {"kv_policy": "h2o", "kv_budget": 0.3})]
    states = [converse.run(str(PICTURE), ["which digit is blue?"], backend=backend) for backend in backends]
    seen = [state.get_meta_info("answer 0")["kv_policy"] for state in states]
    assert [(report["policy"], report["budget"]) for report in seen] == [("vlkv", 0.1), ("h2o", 0.3)]


@sgl.function
def change(s, picture):
    s += sgl.user(sgl.image(picture) + "list all")
    s += sgl.assistant(sgl.gen("first", max_tokens=8))
    ask(s, kv_policy="h2o")
    s += sgl.user("which digit is blue?")
    s += sgl.assistant(sgl.gen("second", max_tokens=8))
    [fork] = s.fork(1)
    ask(fork)
    fork += sgl.user("which digit is cyan?")
    fork += sgl.assistant(sgl.gen("third", max_tokens=8))
    s["third"] = fork.get_meta_info("third")


@pytest.mark.parametrize("stream", [False, True])
def test_a_program_changes_what_it_asks_for(trained, stream):
    server = Endpoint(trained.url)
    state = change.run(str(PICTURE), backend=server.asking(kv_policy="snapkv"), temperature=0, stream=stream)
    assert "".join(state.text_iter())  # until the program, a thread of its own in a stream, has ended
    infos = [state.get_meta_info("first"), state.get_meta_info("second"), state["third"]]
    assert [info["kv_policy"]["policy"] for info in infos] == ["snapkv", "h2o", "vlkv"]
    assert server.custom_params is None


@pytest.mark.parametrize("name", ["describe", "converse", "batch"])
@pytest.mark.filterwarnings("error:Error in stream_executor")
def test_a_refused_choice_is_a_sentence(run, name):
    with pytest.raises(Refused) as ended:
        run(name, "--custom-params", '{"kv_policy": "best"}')
    status, said = ended.value.args
    assert status == 2 and said.count("\n") == 1 and "custom_params.kv_policy is 'best'; it must be" in said


def test_a_refusal_in_the_stream_is_a_sentence(run):
    """Which SGLang's client takes for an answer."""
    with pytest.raises(Refused) as ended:
        run("converse", "--questions", "x " * 20_000)
    status, said = ended.value.args
    assert status == 2 and said.count("\n") == 1 and "the server's log says more" in said


def test_a_jpeg_is_sent_too(run, tmp_path):
    """SGLang's own backend sends it such that the server takes it for a path."""
    with Image.open(PICTURE) as picture:
        picture.convert("RGB").save(tmp_path / "a.jpg", quality=98)
    lines = run("converse", "--picture", str(tmp_path / "a.jpg")).splitlines()
    assert lines[1] == " the digit is cyan 1"
    best, *_ = run("choose", "--colour", "orange", "--picture", str(tmp_path / "a.jpg")).splitlines()
    assert best.startswith("* 2 ")


@sgl.function
def choose_later(s, picture, earlier):
    s += sgl.user(sgl.image(picture) + "what is there?")
    s += sgl.assistant(earlier or sgl.gen("earlier", max_tokens=16, ignore_eos=True))
    s += sgl.user("and now?")
    s += sgl.assistant(sgl.select("choice", CHOICES))


def test_select_chooses_what_stock_chooses(stock, vlcache, tolerance):
    """Also behind an answer that came from a compressed cache: nothing of it is in a prefill."""
    ours, theirs = (Endpoint(server.url, chat_template_name="tinyvlm") for server in (vlcache, stock))

    def run(program, backend, *arguments):
        return program.run(str(PICTURE), *arguments, temperature=0, backend=backend, use_thread=False)

    mine, full = run(choose_later, ours, ""), run(choose_later, theirs, "")
    assert mine.get_meta_info("earlier")["kv_policy"]["policy"] == "vlcache"
    assert mine["earlier"] != full["earlier"]
    pairs = [(mine, run(choose_later, theirs, mine["earlier"]))]
    pairs += [[run(choose, backend, colour, CHOICES) for backend in (ours, theirs)] for colour in DIGITS]
    for mine, other in pairs:
        logprobs = [state.get_meta_info("choice")["normalized_prompt_logprobs"] for state in (mine, other)]
        np.testing.assert_allclose(*logprobs, atol=tolerance)
        assert mine["choice"] == other["choice"]
