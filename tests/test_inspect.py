"""python -m sglang_vlkv.inspect: what it draws, against hand-made reports, real servers and a browser."""

from __future__ import annotations

import base64
import io
import itertools
import json
import random
import re
import struct
import subprocess
import sys
import threading
from array import array
from html.parser import HTMLParser
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageFont
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select, WebDriverWait

from examples.frontend.converse import main as converse
from examples.video_chat.make_clip import CLIP as WIDE_CLIP
from examples.video_chat.terminal import main as terminal
from sglang_vlkv.commands import Problem, media
from sglang_vlkv.inspect import page, png
from sglang_vlkv.inspect.__main__ import main
from sglang_vlkv.inspect.ask import Answer, ask, expanded
from sglang_vlkv.inspect.heat import ALL, DIM, TINT, Choice, Kept, colours, paint, unreadable
from sglang_vlkv.inspect.subject import Subject
from sglang_vlkv.printable import printable
from sglang_vlkv.tinyvlm import tasks
from sglang_vlkv.tinyvlm.ask import main as tinyvlm_ask
from tests.prompts import CLIP, picture
from tests.serving import ROOT

DIGITS = ROOT / "examples" / "digits.png"
LAYERS, HEADS = 3, 2
WIDE = (1, 4, 7)  # grid of an image
FRAMES = (3, 2, 3)  # of a video whose frames stand apart in the prompt
NASTY = "</script><script>alert(1)</script> <b>&amp; \"quotes\" 'n' so on"


def made_up(seed: int = 0, keep: int = 20) -> Kept:
    """A report on 3 text tokens, an image, 2 more, a video with a token between its frames, an
    image that states no grid, and text."""
    spans, start = [[3, 31]], 33
    for _ in range(FRAMES[0]):
        spans.append([start, start + 6])
        start += 7
    n = start + 10 + 5
    rng = random.Random(seed)
    positions = [[sorted(rng.sample(range(n), keep)) for _ in range(HEADS)] for _ in range(LAYERS)]
    return Kept({
        "policy": "vlcache", "budget": 0.25, "config": "VLCache(<b>)", "prompt_tokens": n,
        "visual_tokens": 56, "prefix": {"kind": "cold", "tokens": 0}, "positions": positions,
        "kept_per_layer": [keep] * LAYERS, "sparsity_per_layer": [0.25, 0.5, 1.0],
        "kept_bytes": 5_000, "full_bytes": 20_000, "visual": [
            {"modality": "image", "spans": spans[:1], "grid": list(WIDE)},
            {"modality": "video", "spans": spans[1:], "grid": list(FRAMES)},
            {"modality": "image", "spans": [[start, start + 10]], "grid": None},
        ],
    })  # fmt: skip


def made_up_subject(choice: Choice = ALL, question: str = NASTY) -> Subject:
    kept, rng = made_up(), random.Random(1)
    tokens = [f" word{position}" for position in range(kept.mask.shape[2])]
    tokens[0], tokens[-1] = "</script>", "\n"
    shows = [[picture(rng, 203, 91)], [picture(rng, 61, 83) for _ in range(3)], []]
    return Subject(Answer(question, NASTY, kept.report, tokens), kept, shows, choice)


def test_heat_is_the_share_of_layers_and_heads():
    kept = made_up()
    positions = kept.report["positions"]
    for layer, head in [(None, None), (1, None), (None, 1), (2, 0)]:
        pairs = [
            positions[at][number]
            for at in range(LAYERS) if layer in (None, at)
            for number in range(HEADS) if head in (None, number)
        ]  # fmt: skip
        want = [sum(p in pair for pair in pairs) / len(pairs) for p in range(kept.mask.shape[2])]
        assert np.allclose(kept.heat(Choice(layer, head)), want)
    image, video, unknown = kept.visuals
    assert [visual.name for visual in kept.visuals] == ["image 1", "video 1", "image 2"]
    heat = kept.heat()
    assert np.array_equal(kept.map_of(image)[0], heat[3:31].reshape(4, 7))
    for frame in range(FRAMES[0]):
        own = heat[33 + 7 * frame : 39 + 7 * frame]
        assert np.array_equal(kept.map_of(video)[frame], own.reshape(2, 3))
        assert kept.per_frame(video)[frame] == pytest.approx(own.sum())
    assert kept.text_positions.tolist() == [0, 1, 2, 31, 32, 39, 46, 53, *range(64, 69)]


@pytest.mark.parametrize("size", [(203, 91), (70, 40), (28, 160), (7, 4)])
def test_kept_tokens_light_up_exactly_where_they_are(size):
    """Over a grey picture of any shape, no pixel of a kept cell is as dark as one of a dropped cell."""
    heat = np.zeros(WIDE[1:])
    heat[[0, 1, 3], [6, 2, 0]] = 1.0
    pixels = np.asarray(paint(Image.new("RGB", size, (120, 120, 120)), heat)).astype(int)
    for y in range(size[1]):
        for x in range(size[0]):
            red, _, blue = pixels[y, x]
            if heat[y * 4 // size[1], x * 7 // size[0]]:
                assert red > 150 and red > blue
            else:
                assert tuple(pixels[y, x]) == (round(DIM * 120),) * 3


def test_the_picture_can_be_seen_and_more_heat_is_brighter():
    shown = picture(random.Random(3), 140, 80)
    grey = np.asarray(shown) @ [0.299, 0.587, 0.114]
    dropped = np.asarray(paint(shown, np.zeros((4, 7))))
    assert np.allclose(dropped, DIM * grey[..., None], atol=1)
    kept = np.asarray(paint(shown, np.ones((4, 7)))).astype(float)
    through = (kept - TINT * colours(np.ones(()))) / (1 - TINT)
    edges = np.isin(np.arange(140) % 20, (0, 19)) | np.isin(np.arange(80) % 20, (0, 19))[:, None]
    assert np.abs(through - np.asarray(shown))[~edges].max() < 2
    luminance = colours(np.linspace(0, 1, 50)) @ [0.299, 0.587, 0.114]
    assert (np.diff(luminance) > 0).all()


@pytest.mark.parametrize("choice", [ALL, Choice(1, None), Choice(2, 0)])
def test_the_drawing_shows_the_choice(choice):
    subject = made_up_subject(choice)
    drawing = np.asarray(png.draw(subject, png.load_font(None)))
    [shown], frames, _ = subject.pictures
    kept = subject.kept
    image, video, unknown = kept.visuals
    assert appears(drawing, 48, paint(scaled(shown, 752), kept.map_of(image, choice)[0]))
    width = int(450 * 61 / 83)  # frames are up to 450 pixels high
    for number, (heat, frame) in enumerate(zip(kept.map_of(video, choice), frames)):
        assert appears(drawing, 48 + number * (width + 24), paint(scaled(frame, width), heat))
    other = Choice(0, 1)
    assert not appears(drawing, 48, paint(scaled(shown, 752), kept.map_of(image, other)[0]))
    band = colours(kept.heat(choice)[unknown.positions])
    assert any((row[48 : 48 + 1504 : 1503 // 9][:10] == band).all() for row in drawing[::10])


def scaled(shown: Image.Image, width: int) -> Image.Image:
    return shown.resize((width, round(width * shown.height / shown.width)), Image.Resampling.LANCZOS)


def appears(drawing: np.ndarray, left: int, part: Image.Image) -> bool:
    """Whether ``part`` is in ``drawing``, pixel by pixel, ``left`` pixels from its left side."""
    part = np.asarray(part)
    column = drawing[:, left : left + part.shape[1]]
    starts = (column == part[0]).all((1, 2)).nonzero()[0]
    return any(np.array_equal(column[y : y + len(part)], part) for y in starts)


def test_the_font_can_be_chosen(tmp_path):
    """It draws what the file's bytes draw, and not what they draw in another size."""
    path, subject = tmp_path / "chosen.ttf", made_up_subject()
    data = ImageFont.load_default(16).font_bytes
    path.write_bytes(data)
    chosen = png.load_font(path)
    assert Path(chosen(16).path) == path
    drawing = png.draw(subject, chosen)
    assert drawing == png.draw(subject, lambda size: ImageFont.truetype(io.BytesIO(data), size))
    assert drawing != png.draw(subject, lambda size: chosen(size + 1))
    with pytest.raises(Problem, match="cannot be read as a font"):
        png.load_font(tmp_path / "none.ttf")


class Outline(HTMLParser):
    """Checks that elements are closed in order, and collects ids, attributes and texts."""

    VOID = {"meta", "input", "link", "br", "img"}

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open, self.attributes, self.texts = [], [], {}
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.attributes.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.setdefault(self.open[-1] if self.open else "", []).append(data)


def test_the_page_is_one_valid_file_and_what_is_not_ours_is_text():
    subject = made_up_subject(Choice(1, None))
    text = page.render(subject)
    seen = Outline(text)
    assert "http:" not in text and "https:" not in text
    assert not [a for _, a in seen.attributes if {"src", "href", "srcset"} & a.keys()]
    ids = [a["id"] for _, a in seen.attributes if "id" in a]
    assert len(ids) == len(set(ids)) and dict(seen.attributes)["html"]["lang"] == "en"
    assert {a["for"] for tag, a in seen.attributes if tag == "label"} <= set(ids)
    assert sum(tag == "script" for tag, _ in seen.attributes) == 2, "no more than ours"
    assert seen.texts["h1"] == [NASTY] and NASTY in seen.texts["title"][0]
    data = json.loads(seen.texts["script"][0])
    assert (data["layer"], data["head"]) == (1, None)
    assert (data["tokens"][0], data["tokens"][-1]) == ("</script>", "\\n")
    assert "kept 20.0 of 69 tokens per layer (29.0%)" in seen.texts["li"]
    assert "5.0 kB of 20.0 kB" in seen.texts["li"] and "VLCache(<b>)" in seen.texts["p"]


PIXELS = """
const canvas = arguments[0];
const {data, width, height} = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
return arguments[1].map(([x, y]) => {
  const at = 4 * (Math.floor(y * height) * width + Math.floor(x * width));
  return [...data.slice(at, at + 3)];
});
"""


def test_the_page_in_a_browser(driver, tmp_path):
    """Its canvases show what Python paints, for the layer and the head that are chosen by keyboard."""
    subject = made_up_subject()
    (tmp_path / "page.html").write_text(page.render(subject), encoding="utf-8")
    driver.get(f"file://{tmp_path}/page.html")
    WebDriverWait(driver, 30).until(lambda d: d.execute_script("return document.body.dataset.ready"))
    assert driver.find_element(By.TAG_NAME, "h1").text == NASTY
    kept = subject.kept

    def check(choice: Choice) -> None:
        for canvas, (visual, time) in enumerate([(0, 0), (1, 0), (1, 1), (1, 2)]):
            heat = kept.map_of(kept.visuals[visual], choice)[time]
            rows, columns = heat.shape
            cells = itertools.product(range(columns), range(rows), (0.05, 0.12, 0.51))
            at = [((x + within) / columns, (y + within) / rows) for x, y, within in cells]
            drawn = driver.find_elements(By.CSS_SELECTOR, "canvas.heat")[canvas]
            size = [drawn.get_property("width"), drawn.get_property("height")]
            painted = np.asarray(paint(subject.pictures[visual][time].resize(size), heat)).astype(int)
            want = [painted[int(y * size[1]), int(x * size[0])] for x, y in at]
            got = driver.execute_script(PIXELS, drawn, at)
            assert np.abs(np.array(got) - want).max() < 40, "but for how a picture is scaled"
            assert np.abs(np.array(got) - want).mean() < 3

    check(ALL)
    layer, head = (driver.find_element(By.ID, name) for name in ("layer", "head"))
    assert (layer.accessible_name, head.accessible_name) == ("Layer", "KV head")
    layer.send_keys("layer 1")
    check(Choice(1, None))
    head.send_keys(Keys.ARROW_DOWN)
    check(Choice(1, 0))
    assert "layer 1 and KV head 0" in driver.find_element(By.ID, "readout").text
    [pressed] = driver.find_elements(By.CSS_SELECTOR, "section:first-child [aria-pressed=true]")
    assert pressed.accessible_name.startswith("layer 1: ")
    first = driver.find_element(By.CSS_SELECTOR, "canvas.heat")
    first.send_keys(Keys.ARROW_RIGHT, Keys.ARROW_DOWN)
    position = 3 + 7 + 1
    share = kept.heat(Choice(1, 0))[position]
    told = f"image 1, row 1, column 1, position {position}: kept by {int(share)} of 1 layer-head pairs"
    assert told in driver.find_element(By.ID, "readout").text
    assert "image 1: heat map" in first.accessible_name
    driver.find_element(By.ID, "text").send_keys(Keys.ARROW_RIGHT)
    assert "word1" in driver.find_element(By.ID, "readout").text
    tone = driver.find_elements(By.CSS_SELECTOR, "#text span")[1].value_of_css_property("background-color")
    assert tuple(map(int, tone.strip("rgba()").split(",")[:3])) == tuple(colours(kept.heat(Choice(1, 0))[1]))
    Select(head).select_by_value("")
    check(Choice(1, None))
    driver.find_elements(By.CSS_SELECTOR, ".layers button")[2].send_keys(Keys.ENTER)
    check(Choice(2, None))
    Select(layer).select_by_value("")
    check(ALL)
    strength = driver.find_element(By.ID, "strength")
    strength.send_keys(Keys.HOME)
    [shown] = subject.pictures[0]
    size = [first.get_property("width"), first.get_property("height")]
    grid = [((x + 0.5) / 14, (y + 0.5) / 8) for x in range(14) for y in range(8)]
    plain = np.asarray(shown.resize(size)).astype(int)
    faded = np.array(driver.execute_script(PIXELS, first, grid))
    want = [plain[int(y * size[1]), int(x * size[0])] for x, y in grid]
    assert np.abs(faded - want).mean() < 3, "the picture alone"
    strength.send_keys(Keys.END)
    check(ALL)
    heat = kept.map_of(kept.visuals[0])[0]
    row, column = map(int, np.unravel_index(heat.argmax(), heat.shape))
    across, down = (column + 0.5) / 7 - 0.5, (row + 0.5) / 4 - 0.5  # from the picture's middle
    across, down = round(across * first.rect["width"]), round(down * first.rect["height"])
    ActionChains(driver).move_to_element_with_offset(first, across, down).perform()
    count = round(heat.max() * LAYERS * HEADS)
    place = f"image 1, row {row}, column {column}, position {3 + 7 * row + column}"
    told = f"{place}: kept by {count} of 6 layer-head pairs"
    assert told in driver.find_element(By.ID, "readout").text
    ours = "Multiple readback operations"  # this test's
    assert not [entry for entry in driver.get_log("browser") if ours not in entry["message"]]


def item(modality: str, ids: tuple[int, ...], **data):
    from sglang.srt.managers.schedule_batch import MultimodalDataItem
    from sglang.srt.multimodal.modality import Modality

    return MultimodalDataItem(modality=Modality[modality], pad_values=ids, model_specific_data=data)


def spans_of(ids: list[int], *items) -> list[dict]:
    from sglang_vlkv.scheduler.spans import visual_spans

    inputs = SimpleNamespace(mm_items=list(items), im_token_id=None, video_token_id=None)
    return visual_spans(SimpleNamespace(origin_input_ids=array("q", ids), multimodal_inputs=inputs))


def test_spans_and_grids_of_items():
    """Frames that stand apart, pictures that are equal, grids that are missing or do not fit."""
    grid = torch.tensor([[2, 4, 6]])
    frames = [1, *[900, 901] * 3, 2, 3, *[900, 901] * 3, 4]
    [video] = spans_of(frames, item("VIDEO", (900, 901), video_grid_thw=grid))
    assert video == {"modality": "video", "spans": [[1, 7], [9, 15]], "grid": [2, 2, 3]}
    one, two = item("IMAGE", (7,), image_grid_thw=grid[:, [0, 0, 1]]), item("AUDIO", (8,))
    assert [*map(lambda s: s["grid"], spans_of([7] * 4 + [8] + [7] * 4, one, two, one))] == [[2, 1, 2]] * 2
    adjacent = spans_of([1, *[7] * 8], one, one)
    assert [visual["spans"] for visual in adjacent] == [[[1, 5]], [[5, 9]]]
    several = torch.tensor([[1, 4, 6], [1, 2, 2], [1, 8, 2]])
    wrong = [several, grid + 1, -grid, grid * 0, several[:, :2], torch.empty(0, 3)]
    for data in ({}, *({"image_grid_thw": one} for one in wrong)):
        [unknown] = spans_of([5, 7, 7, 7, 7], item("IMAGE", (7,), **data))
        assert unknown == {"modality": "image", "spans": [[1, 5]], "grid": None}
    assert spans_of([1, 2, 3], one) == []


def test_an_item_that_holds_several_pictures():
    """As clients that embed pictures themselves send them: each is a picture of its own, wherever it stands."""
    grids = torch.tensor([[1, 4, 6], [1, 2, 2], [1, 8, 2]])
    ids = [1, *[7] * 6, 2, 3, *[7], *[7] * 4, 4]
    expected = [
        {"modality": "image", "spans": [[1, 7]], "grid": [1, 2, 3]},
        {"modality": "image", "spans": [[9, 10]], "grid": [1, 1, 1]},
        {"modality": "image", "spans": [[10, 14]], "grid": [1, 4, 1]},
    ]
    for stated in (grids, grids.tolist(), grids[None]):
        assert spans_of(ids, item("IMAGE", (7,), image_grid_thw=stated)) == expected
    frames = torch.tensor([[2, 4, 6], [1, 2, 2]])
    films = spans_of([*[8, 9] * 6, 1, 8], item("VIDEO", (8, 9), video_grid_thw=frames))
    assert [(film["spans"], film["grid"]) for film in films] == [([[0, 12]], [2, 2, 3]), ([[13, 14]], [1, 1, 1])]
    twice = item("IMAGE", (7,), image_grid_thw=grids[:2])
    assert [one["grid"] for one in spans_of([7] * 14, twice, twice)] == [[1, 2, 3], [1, 1, 1]] * 2


def test_ids_that_hold_one_placeholder_for_a_span():
    """As servers of LLaVA return them."""
    report = {"prompt_tokens": 9, "visual": [{"spans": [[6, 8]]}, {"spans": [[1, 4]]}]}
    assert expanded([5, 32000, 6, 7, 32000, 8], report) == [5, 0, 0, 0, 6, 7, 0, 0, 8]
    assert expanded(list(range(9)), report) == list(range(9))
    with pytest.raises(Problem, match="7 ids for 9 prompt tokens"):
        expanded(list(range(7)), report)


def given(answer: Answer, named: set[int]) -> dict:
    """Keeps the text of ``answer``'s prompt and the named visual tokens, and nothing else."""
    tokens, visual = answer.report["prompt_tokens"], answer.report["visual_tokens"]
    return {
        "kv_policy": "given",
        "kv_budget": (tokens - visual + len(named)) / tokens,
        "kv_policy_config": {"visual": sorted(named)},
    }


def test_pictures_light_up_where_the_request_says(any_policy, tmp_path):
    """Two equal pictures, and one that is not square; their tokens are counted one after the other."""
    picture(random.Random(5), 28 * 9, 28 * 12).save(tmp_path / "upright.png")
    files = [media.image(path) for path in (DIGITS, DIGITS, tmp_path / "upright.png")]
    question = "which digit\nis red, 漢字 or 😀?"
    first = ask(any_policy.url, files, question, {"kv_policy": "vlcache"}, 4)
    named = {3, 40, 255, 256 + 17, 511, 512, 512 + 9 + 4, 512 + 9 * 11 + 8}
    answer = ask(any_policy.url, files, question, given(first, named), 4)
    kept = Kept(answer.report)
    assert [visual.grid for visual in kept.visuals] == [(1, 16, 16), (1, 16, 16), (1, 12, 9)]
    maps = [kept.map_of(visual)[0] for visual in kept.visuals]
    assert set(np.concatenate([heat.ravel() for heat in maps]).nonzero()[0]) == named
    assert all(heat.sum() == (heat > 0).sum() for heat in maps), "by every layer and head"
    assert [maps[2][0, 0], maps[2][1, 4], maps[2][11, 8]] == [1.0] * 3, "row by row"
    assert (kept.heat()[kept.text_positions] == 1.0).all()
    words = "".join(answer.tokens[position] for position in kept.text_positions)
    media_tokens = "<|vision_start|><|vision_end|>" * 3
    start, end = f"<|im_start|>user\n{media_tokens}", "<|im_end|>\n<|im_start|>assistant\n"
    assert words == start + question + end


def test_frames_of_a_clip(any_policy):
    clip = media.video(CLIP)
    first = ask(any_policy.url, [clip], "red?", {"kv_policy": "vlcache"}, 4)
    [video] = Kept(first.report).visuals
    assert video.grid == (4, 12, 12)
    counted = sum(Kept(first.report).per_frame(video)) * 8  # layers times heads
    assert counted == pytest.approx(first.report["kept_per_modality"]["video"])
    choice = given(first, {0, 144 + 13, 144 + 143, 3 * 144})
    kept = Kept(ask(any_policy.url, [clip], "red?", choice, 4).report)
    assert kept.per_frame(video).tolist() == [1, 2, 0, 1]
    assert kept.map_of(video)[1, 1, 1] == kept.map_of(video)[1, 11, 11] == 1
    frames = clip.frames(4)
    assert [frame.size for frame in frames] == [(224, 224)] * 4
    colour = [np.asarray(frame)[y, x] for frame, (x, y) in zip(frames, [(183, 112), (112, 183)])]
    assert colour[0][0] > 180 > 120 > colour[0][1], "crimson is on the right at first"
    assert colour[1][2] > 180 > 120 > colour[1][0], "royal blue is below a second later"


def test_the_heat_is_where_the_answer_is(trained):
    """The trained model and the picture of the README: its policy keeps the digits that are asked for."""
    [question] = tasks.draw("multi", seed=5).questions
    answer = ask(trained.url, [media.image(DIGITS)], question.text, {})
    assert answer.text == question.answer and answer.report["policy"] == "vlkv"
    kept = Kept(answer.report)
    heat = kept.map_of(kept.visuals[0]).ravel()
    needed = np.isin(np.arange(256), question.cells)
    print(heat[needed], heat[~needed].mean())
    assert needed.sum() == 4 and heat[needed].min() >= 0.5 > 10 * heat[~needed].mean()


def run(capsys, *arguments) -> tuple[int, str, str]:
    """Exit code and what is written, of the command in this process."""
    try:
        status = main([*map(str, arguments)])
    except SystemExit as ended:
        status = ended.code
    return status, *capsys.readouterr()


def test_the_command(any_policy, tmp_path):
    """As a person runs it, with everything chosen."""
    out = tmp_path / "a.b"  # a dot is part of the name
    command = [
        sys.executable, "-m", "sglang_vlkv.inspect", "--url", any_policy.url, "--image", DIGITS,
        "--video", CLIP, "--question", "which digit is red?", "--kv-policy", "h2o", "--kv-budget", "0.2",
        "--kv-policy-config", '{"sink_tokens": 4}', "--layer", "2", "--head", "1", "--max-tokens", "4",
        "--out", out,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr
    answer, facts, wrote = done.stdout.splitlines()
    assert answer.startswith("answer: ") and wrote == f"wrote {out}.png and {out}.html"
    assert facts.startswith("policy h2o, budget 0.2, kept ") and "(20.0%)" in facts
    text = (tmp_path / "a.b.html").read_text(encoding="utf-8")
    seen = Outline(text)
    data = json.loads(seen.texts["script"][0])
    assert (data["layer"], data["head"], len(data["kept"]), len(data["kept"][0])) == (2, 1, 4, 2)
    assert [len(visual["pictures"]) for visual in data["visuals"]] == [1, 4]
    assert "sink_tokens=4" in seen.texts["p"][-1]
    assert Image.open(tmp_path / "a.b.png").width == 1600


@pytest.mark.parametrize("file, kind, grid", [(DIGITS, "image", (1, 16, 16)), (CLIP, "video", (4, 12, 12))])
def test_a_prompt_that_was_left_alone(any_policy, tmp_path, capsys, file, kind, grid):
    """It says why, and draws all of it as kept."""
    options = ("--url", any_policy.url, f"--{kind}", file, "--question", "red?", "--max-tokens", "4")
    code, out, err = run(capsys, *options, "--out", tmp_path / "x", "--layer", "2")
    assert (code, err) == (1, "") and out.startswith("answer: ")
    assert re.fullmatch(r"left alone: the budget keeps every row, kept all \d+ tokens", out.splitlines()[1])
    data = json.loads(Outline((tmp_path / "x.html").read_text()).texts["script"][0])
    assert data["alone"] and (data["rows"], data["sparsity"], data["layer"]) == (None, None, None)
    [visual] = data["visuals"]
    assert tuple(visual["grid"]) == grid and len(visual["pictures"]) == grid[0]
    drawing, whole = np.asarray(Image.open(tmp_path / "x.png")), np.ones(grid[1:])
    shown = (media.image if kind == "image" else media.video)(file).frames(grid[0])
    assert appears(drawing, 48, paint(scaled(shown[0], 752 if kind == "image" else 358), whole))


def left_alone(question: str = NASTY) -> Subject:
    report = made_up().report
    report = {name: report[name] for name in ("prompt_tokens", "visual")} | {"policy": "none", "reason": NASTY}
    subject = made_up_subject(question=question)
    return Subject(subject.answer._replace(report=report), Kept(report), subject.pictures)


def test_the_page_of_a_prompt_that_was_left_alone(driver, tmp_path):
    """Nothing to choose, nothing dropped, nothing about layers."""
    (tmp_path / "page.html").write_text(page.render(left_alone()), encoding="utf-8")
    driver.get(f"file://{tmp_path}/page.html")
    WebDriverWait(driver, 30).until(lambda d: d.execute_script("return document.body.dataset.ready"))
    for name in ("layer", "head", "budget"):
        assert not driver.find_element(By.ID, name).is_displayed()
    assert driver.find_element(By.ID, "strength").is_displayed()
    assert f"left alone: {NASTY}" in [one.text for one in driver.find_elements(By.CSS_SELECTOR, "#facts li")]
    titles = [one.text for one in driver.find_elements(By.CSS_SELECTOR, "#visuals h2")]
    assert titles == ["image 1: keeps 28 of 28 tokens", "video 1: keeps 18 of 18 tokens", "image 2: keeps 10 of 10 tokens"]
    assert len(driver.find_elements(By.CSS_SELECTOR, "canvas.heat")) == 4 and not driver.find_elements(By.CLASS_NAME, "layers")
    driver.find_element(By.CSS_SELECTOR, "canvas.heat").send_keys(Keys.ARROW_RIGHT)
    told = driver.find_element(By.ID, "readout").text
    assert told == "image 1, row 0, column 1, position 4: kept, as all are"
    assert not driver.get_log("browser")


CONTROLS = "a\x1b]0;T\x07\x9b31m\u202eb\u2066\u2028c\x7f\x00"


def test_what_others_wrote_is_drawn_with_its_control_characters_escaped(tmp_path):
    """The prompt, the answer, options and reasons, in the picture and in the page; markup is text."""
    subject = made_up_subject(question=CONTROLS)
    tokens = [CONTROLS, *subject.answer.tokens[1:]]
    report = subject.kept.report | {"policy": CONTROLS, "config": f"<b>{CONTROLS}"}
    for visual in report["visual"]:
        visual["modality"] = f"{CONTROLS}<i>"
    subject = Subject(Answer(CONTROLS, f"<u>{CONTROLS}\n", report, tokens), Kept(report), subject.pictures)
    escaped = printable(CONTROLS)
    for one in (subject, left_alone(CONTROLS)):
        text = page.render(one)
        assert not [char for char in CONTROLS if char not in "abcT]0;31m" and char in text]
        assert escaped in Outline(text).texts["h1"]
    seen = Outline(page.render(subject))
    assert f"<b>{escaped}" in seen.texts["p"] and f"policy {escaped}" in seen.texts["li"]
    data = json.loads(seen.texts["script"][0])
    assert data["tokens"][0] == escaped and data["visuals"][0]["name"] == f"{escaped}<i> 1"
    plain = Answer(escaped, f"<u>{escaped}", {}, [escaped, *tokens[1:]])
    calm = json.loads(json.dumps(report).replace(json.dumps(CONTROLS)[1:-1], json.dumps(escaped)[1:-1]))
    calm = Subject(plain._replace(report=calm), Kept(calm), subject.pictures)
    font = png.load_font(None)
    assert png.draw(subject, font) == png.draw(calm, font)


def test_a_report_that_is_none_of_ours_is_named():
    """By the field that is wrong."""
    whole = made_up().report
    assert unreadable(whole) is None and unreadable(left_alone().kept.report) is None
    for name in ("policy", "prompt_tokens", "visual", "positions", "kept_per_layer", "config", "kept_bytes"):
        rest = {key: value for key, value in whole.items() if key != name}
        assert unreadable(rest) == ("reason" if name == "positions" else name)
        assert unreadable(whole | {name: -1}) == name
    n = whole["prompt_tokens"]
    heads = whole["positions"]
    for name, value in [
        ("prompt_tokens", 0), ("prompt_tokens", 2**40), ("positions", []), ("positions", [[]] * LAYERS),
        ("positions", [[[n]] * HEADS] * LAYERS), ("positions", [heads[0], heads[1], heads[2][:1]]),
        ("kept_per_layer", [1]), ("sparsity_per_layer", [0.5]), ("sparsity_per_layer", ["a"] * LAYERS),
        ("visual", [3]), ("visual", [{"modality": "image", "spans": [[3, n + 1]], "grid": None}]),
        ("visual", [{"modality": "image", "spans": [], "grid": None}]),
        ("visual", [{"modality": "image", "spans": [[3, 31]], "grid": [1, 4, 8]}]),
        ("visual", [{"modality": "image", "spans": [[31, 3]], "grid": None}]),
    ]:  # fmt: skip
        assert unreadable(whole | {name: value}), (name, value)
    assert [unreadable(one) for one in (None, [], "a", {})] == ["object", "object", "object", "policy"]


class NotSglang(BaseHTTPRequestHandler):
    """Answers something; only with the right key below /locked."""

    def do_POST(self):
        refused = "locked" in self.path and self.headers["Authorization"] != "Bearer secret"
        self.send_response(401 if refused else 200)
        self.end_headers()
        answer = b'{"error": "Unauthorized"}' if refused else b'{"choices": []}'
        self.wfile.write(b"<html>" if "html" in self.path else answer)

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def not_sglang():
    with HTTPServer(("127.0.0.1", 0), NotSglang) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_mistakes(any_policy, stock, not_sglang, tmp_path, capsys):
    """Each is one sentence, and an exit code of its own."""
    broken = tmp_path / "broken.png"
    broken.write_text("not a picture")
    mine, ours = ("--url", any_policy.url), ("--kv-policy", "vlcache", "--max-tokens", "4")
    digits = ("--image", DIGITS)
    for options, said in [
        (("--url", "http://127.0.0.1:9", *digits), "No server answers at http://127.0.0.1:9 (Connection refused)"),
        (("--url", "localhost:9", *digits), "'localhost:9' is not the URL of a server"),
        (("--url", not_sglang, *digits), "does not answer as SGLang does: {'choices': []}"),
        (("--url", f"{not_sglang}/html", *digits), "/html does not answer as SGLang does: <html>"),
        (("--url", f"{not_sglang}/locked", *digits), "/locked answers HTTP 401: Unauthorized"),
        (("--url", f"{not_sglang}/locked", "--api-key", "secret", *digits), "{'choices': []}"),
        (("--url", stock.url, *digits), "reports nothing about its KV cache; start it with --kv-policy"),
        ((*mine, *digits, "--kv-policy", "best"), "HTTP 400: custom_params.kv_policy is 'best'; it must be"),
        ((*mine, *digits, "--kv-policy-config", "{"), "--kv-policy-config is not valid JSON"),
        ((*mine, *digits, *ours, "--layer", "4"), "--layer is 4; this model has 0 to 3."),
        ((*mine, *digits, *ours, "--head", "-1"), "--head is -1; this model has 0 to 1."),
        ((*mine, *digits, *ours, "--out", tmp_path / "no" / "x"), "x.png cannot be written: there is no folder"),
        ((*mine, *digits, *ours, "--kv-budget", "nan"), "--kv-budget: 'nan' is not a number above 0 and at most 1"),
        ((*mine, *digits, "--font", broken), "broken.png cannot be read as a font"),
        ((*mine, "--image", tmp_path / "none.png"), "none.png cannot be read: No such file or directory."),
        ((*mine, "--image", broken), "broken.png cannot be read as a picture: it is of no known kind."),
        ((*mine, "--video", broken), "broken.png cannot be read as a video"),
    ]:
        code, out, err = run(capsys, "--question", "red?", *options)
        assert (code, out) == (2, "") and said in err, (options, err)
        assert err.count("\n") == 1, err
    with pytest.raises(SystemExit):
        main(["--question", "red?"])
    assert "--image FILE or --video FILE" in capsys.readouterr().err


STRANGE = {  # what a viewer shows otherwise than the server sees it -> words of the note, if it needs one
    "turned.jpg": "viewers should turn it", "turned.png": "viewers should turn it", "turned.webp": "viewers should turn it",
    "cmyk.jpg": "", "palette.png": "", "grey.png": "", "bits.png": "", "rgba.png": "", "plain.jpg": "",
    "deep.png": "more than 8 bits", "clear.png": "transparent in part", "hole.png": "transparent in part",
    "moving.gif": "3 pictures, of which the server sees the first", "moving.webp": "3 pictures",
}  # fmt: skip


def strange_picture(folder: Path, name: str, shown: Image.Image | None = None) -> Path:
    """A file of a kind that programs read differently; ``shown`` is what a viewer shows, by default noise."""
    rng = random.Random(2)
    shown, path = shown or picture(rng, 60, 40), folder / name
    exif = Image.Exif()
    exif[media.ORIENTATION] = 6  # to be turned by a quarter
    kind, frames = name.partition(".")[0], {"save_all": True, "append_images": [picture(rng, *shown.size) for _ in range(2)]}
    lossless = {} if name.endswith("gif") else {"lossless": True} if name.endswith("webp") else {"quality": 95}
    if kind == "turned":
        shown.rotate(90, expand=True).save(path, exif=exif, **lossless)
    elif kind == "moving":
        shown.save(path, **frames, **lossless)
    elif kind == "clear":
        shown.quantize(200).save(path, transparency=3)
    elif kind == "hole":
        alpha = Image.new("L", shown.size, 255)
        alpha.paste(0, (0, 0, shown.width // 2, shown.height))
        shown.putalpha(alpha)
        shown.save(path)
    else:
        modes = {"cmyk": "CMYK", "palette": "P", "grey": "LA", "bits": "1", "rgba": "RGBA", "deep": "I;16"}
        mode = modes.get(kind, "RGB")
        (shown.convert("L") if mode in ("I;16", "LA") else shown).convert(mode).save(path, **lossless)
    return path


@pytest.mark.parametrize("name", STRANGE)
def test_a_picture_is_drawn_as_the_server_sees_it(tmp_path, name):
    """Its bytes are sent as they are, and what is drawn is what SGLang's own code makes of them."""
    from sglang.srt.multimodal.modality import Modality
    from sglang.srt.multimodal.processors.base_processor import BaseMultimodalProcessor

    path = strange_picture(tmp_path, name)
    medium = media.image(path)
    kind, _, sent = medium.url.partition(",")
    assert base64.b64decode(sent) == path.read_bytes() and kind.endswith(";base64")
    seen = BaseMultimodalProcessor._load_single_item(medium.url, Modality.IMAGE)
    assert np.array_equal(np.asarray(seen), np.asarray(medium.picture))
    assert [note for note in medium.notes if STRANGE[name] in note] if STRANGE[name] else not medium.notes
    assert all(name in note for note in medium.notes)


def turned_clip(path: Path) -> Path:
    """The sample clip of two pictures, 8 tokens high and 16 wide, with a matrix that turns it by a quarter."""
    data = bytearray(WIDE_CLIP.read_bytes())
    matrix = data.index(b"tkhd") + 44
    data[matrix : matrix + 36] = struct.pack(">9i", 0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    return path


def test_a_turned_video_is_drawn_as_the_server_sees_it(any_policy, tmp_path):
    """Upright: here server and drawing read what turns it."""
    plain, turned = media.video(WIDE_CLIP), media.video(turned_clip(tmp_path / "a.mp4"))
    for film, grid in ((plain, (2, 8, 16)), (turned, (2, 16, 8))):
        [seen] = Kept(ask(any_policy.url, [film], "red?", {"kv_policy": "vlcache"}, 2).report).visuals
        assert seen.grid == grid and {frame.size for frame in film.frames(2)} == {(28 * grid[2], 28 * grid[1])}
    upright = np.rot90(np.asarray(plain.frames(2)[0]), -1)
    assert np.abs(upright.astype(int) - np.asarray(turned.frames(2)[0])).mean() < 1


@pytest.mark.parametrize("name", ["turned.jpg", "cmyk.jpg", "clear.png", "moving.gif", "deep.png"])
def test_all_tools_answer_alike(trained, tmp_path, capsys, name):
    """About one file, what the API answers about its bytes; what differs for a person is said."""
    [question] = tasks.draw("multi", seed=5).questions
    with Image.open(DIGITS) as shown:
        path = strange_picture(tmp_path, name, shown.convert("RGB"))
    sent = {"type": "image_url", "image_url": {"url": media.data_url(path.read_bytes(), "image/png")}}
    content = [sent, {"type": "text", "text": question.text}]
    body = {"model": "m", "temperature": 0, "max_tokens": 64, "messages": [{"role": "user", "content": content}]}
    answer = trained.post("/v1/chat/completions", body).json()["choices"][0]["message"]["content"]
    assert (answer == question.answer) == (name not in ("turned.jpg", "deep.png")), "as it lies in the file"
    note = f"{name} " if STRANGE[name] else ""

    def told(main, *arguments) -> str:
        assert main([*map(str, arguments)]) == 0
        out, err = capsys.readouterr()
        assert f"{note}" in out + err and (note or not err)
        return out

    url, asked = ("--url", trained.url), ("--image", path, "--question", question.text)
    inspected = told(main, *url, *asked, "--out", tmp_path / "x")
    assert inspected.startswith(f"answer: {answer.strip()}\n")
    assert f"answer   {answer}\n" in told(tinyvlm_ask, *url, *asked)
    chat = ("--server", trained.url, "--image", path, "--max-tokens", "64", question.text)
    assert f"> {question.text}\n{answer}\n[" in told(terminal, *chat)
    program = ("--server", trained.url, "--picture", path, "--questions", question.text)
    assert f"> {question.text}\n{answer}\n  [" in told(converse, *program)
