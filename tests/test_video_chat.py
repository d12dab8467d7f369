"""examples/video_chat: its page in a real browser and its terminal form, before a real server."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys

import pytest
import requests
from PIL import Image
from selenium import webdriver
from selenium.webdriver.common.keys import Keys

from examples.video_chat import client, make_clip
from examples.video_chat import terminal as talking
from tests.browser import App, Page
from tests.servers import answering, hangs_up, sends
from tests.serving import ROOT

CLIP, PICTURE = make_clip.CLIP, ROOT / "examples" / "digits.png"
MAX_MB = 0.5


@pytest.fixture(scope="module")
def app(trained):
    with App(trained, MAX_MB) as app:
        yield app


@pytest.fixture
def relay(app):
    yield app.relay
    app.relay.mend()


@pytest.fixture
def page(driver, trained, app):
    driver.get_log("browser")  # forgets those before
    driver.get(app.url)
    page = Page(driver, trained)
    page.wait(lambda: page.at("#server").text == app.server)
    yield page
    unexpected = [entry for entry in driver.get_log("browser") if "status of 413" not in entry["message"]]
    assert not unexpected


def test_questions_about_a_video_and_what_became_of_the_cache(page, trained):
    trained.flush()
    page.open(CLIP)
    answer, seen = page.ask("which digit is red?")
    assert answer == "the digit is red 4"
    assert (seen["policy"], seen["prefix"]) == ("vlkv", {"kind": "cold", "tokens": 0})
    assert not page.all("#pending li"), "the video is sent once"
    prompt, kept, full = seen["prompt_tokens"], seen["kept_bytes"], seen["full_bytes"]
    assert page.facts() == {
        "policy": ("vlkv",) * 2,
        "budget": ("0.1",) * 2,
        "prompt_tokens": (f"{prompt:,}",) * 2,
        "visual_tokens": (f"{seen['visual_tokens']:,}",) * 2,
        "prefix.kind": ("cold",) * 2,
        "prefix.tokens": ("0",) * 2,
        "prefilled": (f"{prompt:,}",) * 2,
        "kept_bytes": (f"{kept / 1e3:.1f} kB", f"{kept:,}"),
        "full_bytes": (f"{full / 1e3:.1f} kB", f"{full:,}"),
        "freed_bytes": (f"{(full - kept) / 1e3:.1f} kB", f"{full - kept:,}"),
    }
    charts = page.charts()
    layers = charts.pop(f"Rows kept per layer, of {prompt}")
    assert [int(text) for text, _ in layers.values()] == seen["kept_per_layer"]
    shares = [kept / prompt for kept in seen["kept_per_layer"]]
    assert [share for _, share in layers.values()] == pytest.approx(shares, abs=0.01)
    modalities = charts.pop("Rows kept per modality, over layers and heads")
    assert {name: int(text) for name, (text, _) in modalities.items()} == seen["kept_per_modality"]
    assert seen["kept_per_modality"]["video"] > 0
    [tokens, held] = charts.values()
    assert tokens == {"reused": ("0", 0), "prefilled": (str(prompt), 1)}
    assert [share for _, share in held.values()] == pytest.approx([kept / full, 1 - kept / full], abs=0.01)

    answer, seen = page.ask("digits of yellow brown teal?")
    assert answer == "digits yellow 1 brown 9 teal 7"
    prefix, facts = seen["prefix"], page.facts()
    assert prefix["kind"] != "cold" and prefix["tokens"] >= prompt
    assert (facts["prefix.kind"][0], facts["prefix.tokens"][0]) == (prefix["kind"], str(prefix["tokens"]))
    assert int(facts["prefilled"][0]) == seen["prompt_tokens"] - prefix["tokens"]
    first, newest = page.all(".summary")
    assert newest.get_attribute("aria-pressed") == "true"
    first.click()
    assert page.facts()["prefix.kind"][0] == "cold", "earlier reports can be seen again"


def test_more_frames_and_files_in_later_turns(page):
    """Colours that only the newest frame or file shows."""
    page.open(CLIP)
    page.at("[aria-label='Remove digits.mp4']").click()
    assert not page.all("#pending li")
    page.wait(page.at("#grab").is_enabled)
    page.at("#grab").click()
    answer, seen = page.ask("which digit is red?")
    assert (answer, seen["visual_tokens"], seen["policy"]) == ("the digit is red 4", 128, "none")
    assert page.facts()["reason"][0] == seen["reason"] and "min_prompt_tokens" in seen["reason"]
    page.seek(1.5)
    page.at("#grab").click()
    assert page.at("#pending li span").text == "frame at 1.50 s"
    answer, seen = page.ask("which digit is teal?")
    assert (answer, seen["visual_tokens"], seen["policy"]) == ("the digit is teal 7", 256, "vlkv")
    assert "image" in seen["kept_per_modality"] and "video" not in seen["kept_per_modality"]
    page.open(PICTURE)
    answer, seen = page.ask("which digit is cyan?")
    assert (answer, seen["visual_tokens"]) == ("the digit is cyan 1", 512)


def test_samples_suggestions_and_the_chosen_policy(page):
    page.at("[data-sample='digits.png']").click()
    page.wait(lambda: page.all("#pending li"))
    [suggestion] = [button for button in page.all(".questions button") if button.text == "list all"]
    suggestion.click()
    answer, _ = page.ask("")
    assert answer == "list orange 2 yellow 8 green 7 teal 0 cyan 1 blue 6 pink 6 brown 7"
    page.at("#composer summary").click()
    page.at("#policy").send_keys("random")
    page.at("#budget").send_keys("0.05")
    answer, seen = page.ask("digits of cyan green yellow orange?")
    assert (seen["policy"], seen["budget"]) == ("random", 0.05)
    assert page.facts()["policy"][0] == "random"
    assert answer != "digits cyan 1 green 7 yellow 8 orange 2", "noise loses the digits"


def test_a_stopped_answer_streamed_so_far_and_stays(page, relay):
    relay.events, relay.hold = 2, True  # the first says no more than who speaks
    page.open(CLIP)
    page.send("tell all")
    page.wait(lambda: page.at(".answer").text)
    assert page.at(".answer").text.startswith("all") and len(page.at(".answer").text) < 100
    assert page.at("#turns").get_attribute("aria-busy") == "true"
    assert page.at("#stop").is_displayed() and not page.at("#ask").is_displayed()
    page.at("#stop").click()
    page.wait(lambda: page.at(".note").text == "Stopped.")
    page.wait(lambda: relay.left)  # the app has closed its request, which ends it on the server
    assert page.at("#ask").is_displayed() and not page.at("#problem").is_displayed()
    relay.events, relay.hold = None, False
    answer, seen = page.ask("which digit is red?")
    assert answer == "the digit is red 4"
    assert seen["prompt_tokens"] > 280, "the stopped turn is a part of the conversation"


def test_escape_stops_too_and_an_unanswered_question_comes_back(page, relay):
    relay.events, relay.hold = 0, True
    page.open(PICTURE)
    page.send("list all")
    page.wait(page.at("#stop").is_displayed)
    page.at("body").send_keys(Keys.ESCAPE)
    page.wait(page.at("#ask").is_displayed)
    assert not page.all("#turns li") and page.at("#question").get_property("value") == "list all"
    assert [span.text for span in page.all("#pending span")] == ["digits.png"]


def test_a_stream_that_breaks_and_a_server_that_is_gone(page, relay, app):
    page.open(CLIP)
    relay.events = 2
    page.send("tell all")
    assert f"The connection to {app.server} broke in the middle" in page.problem()
    assert "failed" in page.at("#turns li").get_attribute("class")
    relay.events = None
    relay.down()
    page.at("#ask").click()
    page.wait(lambda: f"No server answers at {app.server}" in page.problem())
    assert "make serve" in page.problem()
    relay.up()
    assert page.at("#question").get_property("value") == "tell all"
    page.at("#question").clear()
    answer, seen = page.ask("which digit is red?")
    assert (answer, seen["visual_tokens"]) == ("the digit is red 4", 256), "the video is sent again"
    assert seen["prompt_tokens"] < 280, "what failed is no part of the conversation"
    assert not page.at("#problem").is_displayed()


def test_what_the_server_refuses(page, tmp_path):
    page.open(CLIP)
    page.at("#composer summary").click()
    page.at("#policy").send_keys("best")
    page.send("which digit is red?")
    assert "HTTP 400: custom_params.kv_policy is 'best'; it must be one of none, vlcache" in page.problem()
    page.at("#policy").clear()
    broken = tmp_path / "broken.png"
    broken.write_text("not a picture")
    page.open(broken)
    page.at("#ask").click()
    page.wait(lambda: "Could not decode image" in page.problem())
    page.at("[aria-label='Remove broken.png']").click()
    assert page.ask("")[0] == "the digit is red 4"


def test_wrong_and_large_files(page, tmp_path, app):
    page.at("#files").send_keys(str(ROOT / "README.md"))
    assert page.problem().startswith("README.md is of type text/markdown; this page sends png, jpeg")
    large = tmp_path / "large.mp4"
    large.write_bytes(bytes(300_000))
    page.open(PICTURE)
    assert not page.at("#problem").is_displayed()
    page.at("#files").send_keys(str(large))
    used = len(client.open_file(PICTURE).url)
    assert page.problem() == (
        "large.mp4 is too large: encoded it takes 0.4 MB, a conversation holds 0.5 MB, "
        f"and {used / 1e6:.1f} MB are in this one already."
    )
    assert len(page.all("#pending li")) == 1
    for body, status, words in ((b"x" * 1_600_000, 413, "over 0.5 MB"), (b'{"turns": []}', 400, "turns")):
        response = requests.post(app.url + "/chat", data=body, timeout=30)
        assert response.status_code == status and words in response.text


def test_a_new_conversation(page):
    page.open(CLIP)
    page.ask("which digit is red?")
    page.at("#new").click()
    assert not page.all("#turns li") and not page.at("#report").is_displayed()
    assert not page.at("#player").is_displayed() and page.at("#empty").is_displayed()
    _, seen = page.ask("hello")
    assert (seen["visual_tokens"], seen["reason"]) == (0, "no image or video") and seen["prompt_tokens"] < 30


def test_keyboard_and_names(page, driver):
    """All by keyboard: Tab reaches every control in the order of the page, and each has a name."""
    page.open(CLIP)
    page.wait(page.at("#grab").is_enabled)
    for keys in ("one", Keys.SHIFT + Keys.ENTER, "two"):
        page.at("#question").send_keys(keys)
    assert page.at("#question").get_property("value") == "one\ntwo" and not page.all("#turns li")
    page.at("#question").clear()
    page.ask("which digit is red?")
    assert driver.switch_to.active_element == page.at("#question")
    controls = [e for e in page.all("button, input, textarea, summary, video") if e.is_displayed()]
    assert len(controls) > 12 and all(control.accessible_name for control in controls)
    log = page.at("#turns")
    assert (log.aria_role, log.get_attribute("aria-live")) == ("log", "polite")
    assert log.get_attribute("aria-busy") == "false"
    charts = page.all("#report [role=img]")
    assert len(charts) == 4 and "layer 3" in charts[1].accessible_name
    driver.execute_script("document.getElementById('new').focus()")
    reached = []
    for _ in range(40):
        reached.append(driver.switch_to.active_element.id)
        webdriver.ActionChains(driver).send_keys(Keys.TAB).perform()
    assert {c.id for c in controls if c.is_enabled() and c.tag_name != "video"} <= set(reached)


def terminal(*arguments: str, typed: str = "") -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "examples.video_chat.terminal", *arguments]
    return subprocess.run(command, input=typed, capture_output=True, text=True, cwd=ROOT, timeout=120)


def test_terminal(trained):
    trained.flush()
    options = ("--server", trained.url, "--video", str(CLIP))
    run = terminal(*options, "which digit is red?", f"/open {PICTURE}", "which digit is cyan?")
    assert run.returncode == 0, run.stderr
    first, second = run.stdout.strip().split("\n\n")
    question, answer, line = first.splitlines()
    assert (question, answer) == ("> which digit is red?", " the digit is red 4")
    assert line.startswith("[271 prompt tokens, cold prefix: 0 reused, 271 prefilled; vlkv kept 108 of 1,084")
    assert "% video" in line and line.endswith(" of 0.56 MB]")
    assert second.splitlines()[1] == " the digit is cyan 1" and "cold" not in second and "image" in second
    chosen = ("--custom-params", json.dumps({"kv_policy": "h2o"}))
    typed = terminal(*options, *chosen, typed="which digit is teal?\n\n")
    assert typed.returncode == 0 and "h2o kept" in typed.stdout and "> which digit is teal?" in typed.stdout


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--video", "README.md", "red?"), "README.md is of type text/markdown; this reads png"),
        (("--image", "nowhere.png", "red?"), "nowhere.png cannot be read: No such file"),
        (("--server", "http://127.0.0.1:9", "red?"), "No server answers at http://127.0.0.1:9"),
    ],
)
def test_terminal_mistakes(arguments, message):
    run = terminal(*arguments)
    assert run.returncode == 2 and run.stderr.startswith(message) and run.stderr.count("\n") == 1


def test_a_mistake_ends_no_conversation(trained, tmp_path):
    """What was typed wrong and what the server refuses is told, and what was said and opened stays."""
    broken = tmp_path / "broken.png"
    broken.write_bytes(PICTURE.read_bytes()[:2000])
    lines = [
        f"/open {CLIP}", "which digit is red?", "/opne x", "/open", "/open nowhere.png", f"/open {broken}",
        f"/open {ROOT / 'README.md'}", "/close", f"/open {PICTURE}", "x " * 20_000, "which digit is cyan?",
        f"/open {CLIP}", "/drop", "which digit is pink?", "/etc/passwd is what?",
    ]  # fmt: skip
    run = terminal("--server", trained.url, "--max-tokens", "16", typed="\n".join(lines))
    assert run.returncode == 2, "something was wrong"
    said = run.stderr.splitlines()
    assert [line[:24] for line in said] == [
        "There is no /opne; write", "Which file? Write /open ", "nowhere.png cannot be re", f"{broken} cannot be"[:24],
        "README.md is of type tex", "There is no /close; writ", "The server answers HTTP ",
    ]  # fmt: skip
    answers = [turn.splitlines() for turn in run.stdout.strip().split("\n\n")]
    assert [answer[1].strip() for answer in answers[:1]] == ["the digit is red 4"]
    assert answers[1][-2].strip() == "the digit is cyan 1", "with the picture that the refused question had"
    assert answers[2][1].strip() == "the digit is pink 6" and answers[3][0] == "> /etc/passwd is what?"
    prompts = [int(re.match(r"\[([\d,]+) prompt", answer[-1])[1].replace(",", "")) for answer in answers]
    assert prompts[1] > 500 and prompts[1] < prompts[2] < prompts[1] + 40, "a refused question is no turn"


def test_a_server_that_goes_away_ends_no_conversation(trained, app, relay, capsys):
    """In the middle of an answer, before a report, or between two questions."""

    async def talk() -> None:
        conversation = talking.Conversation(app.server, max_tokens=16)
        conversation.open(CLIP)
        relay.events = 2
        assert await talking.converse(conversation, ["tell all"]) == 1
        relay.events = None
        relay.down()
        assert await talking.converse(conversation, ["which digit is red?"]) == 1
        relay.up()
        assert await talking.converse(conversation, ["which digit is red?", "which digit is teal?"]) == 0

    asyncio.run(talk())
    out, err = capsys.readouterr()
    broke, gone = err.splitlines()
    assert "broke in the middle of the answer" in broke and gone.startswith(f"No server answers at {app.server}")
    assert " the digit is red 4\n" in out and " the digit is teal 7\n" in out


def test_an_answer_whose_report_does_not_come_is_an_answer():
    """The server ends once it has answered."""
    chunks = [{"delta": {"content": "\x1b[31mred\n"}}, {"delta": {}, "finish_reason": "stop"}]
    lines = [json.dumps({"id": "a/b", "choices": [{"index": 0} | chunk]}) for chunk in chunks]
    stream = "".join(f"data: {line}\n\n" for line in [*lines, "[DONE]"])

    def answer(handler) -> None:
        if handler.command == "POST":
            sends(stream.encode(), kind="text/event-stream")(handler)
        else:
            assert handler.path == "/kv_policy/requests/a%2Fb"
            hangs_up(handler)

    with answering(answer) as url:
        run = terminal("--server", url, "red?")
    assert (run.returncode, run.stderr) == (0, "")
    assert run.stdout == f"> red?\n\\x1b[31mred\n\n[{client.summary(None)}]\n\n"


def test_a_summary_of_any_report_is_a_line():
    whole = {
        "policy": "vlkv", "prompt_tokens": 30, "prefix": {"kind": "cold", "tokens": 0}, "kept_per_layer": [3, 3],
        "kept_per_modality": {"text": 0}, "kept_bytes": 1, "full_bytes": 10,
    }  # fmt: skip
    assert "vlkv kept 6 of 60 rows (0% text)" in client.summary(whole)
    for name in whole:
        for wrong in ({key: whole[key] for key in whole if key != name}, whole | {name: -1}, whole | {name: None}):
            assert client.summary(wrong) == "a report that this version does not read", (name, wrong)
    for wrong in ([], "a", 3, whole | {"prefix": {}}):
        assert client.summary(wrong) == "a report that this version does not read"


def test_the_page_shows_a_turned_picture_as_the_server_sees_it(page, tmp_path):
    """A camera's picture lies as it does in the file."""
    exif = Image.Exif()
    exif[0x112] = 6
    with Image.open(PICTURE) as shown:
        shown.convert("RGB").crop((0, 0, 448, 224)).save(tmp_path / "turned.jpg", exif=exif)
    page.open(tmp_path / "turned.jpg")
    picture = page.at("#pending img")
    page.wait(lambda: picture.get_property("naturalWidth"))
    drawn = picture.rect
    assert drawn["width"] == pytest.approx(2 * drawn["height"], rel=0.1)


def test_the_app_takes_no_more_than_it_allows(app):
    """Also of a body whose length nobody has told."""
    pieces = (b"x" * 100_000 for _ in range(20))
    answer = requests.post(app.url + "/chat", data=pieces, timeout=30)
    assert answer.status_code == 413 and "over 0.5 MB" in answer.text
