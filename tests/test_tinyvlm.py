"""The tiny model's tasks, tokenizer and training code; no server."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoProcessor, Qwen2_5_VLForConditionalGeneration

from sglang_vlkv.commands import Problem
from sglang_vlkv.tinyvlm import ask, lessons, packing, tasks
from sglang_vlkv.tinyvlm.checkpoint import model_config, write_checkpoint
from sglang_vlkv.tinyvlm.start import WORDS, initial_model
from sglang_vlkv.tinyvlm.tokenizer import vocab_size

SMALL = dict(
    num_layers=3, num_heads=4, num_kv_heads=2, head_dim=32, hidden_size=128, intermediate_size=96,
    max_position_embeddings=4096, mrope_section=[2, 3, 11], rope_theta=300.0,
    vocab_size=vocab_size(WORDS), tie_word_embeddings=True,
)  # fmt: skip


def checkpoint(path, vision: str):
    """A small random model in ``path``, in float32, with biases and norms that matter."""
    local = vision == "local"
    window_size, full_attention_blocks = (28, ()) if local else (112, (1,))
    config = model_config(
        **SMALL, window_size=window_size, full_attention_blocks=full_attention_blocks, dtype="float32"
    )
    model = initial_model(config, seed=3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter += 0.2 * torch.randn_like(parameter)
    write_checkpoint(path, config, model.state_dict(), WORDS)
    return model, packing.Packer(Tokenizer.from_file(str(path / "tokenizer.json")))


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    path = tmp_path_factory.mktemp("local")
    return path, *checkpoint(path, "local")


@pytest.mark.parametrize("task", tasks.TASKS)
def test_draws_are_deterministic_and_differ(task):
    first, again, other = tasks.draw(task, 7, 100), tasks.draw(task, 7, 100), tasks.draw(task, 8, 100)
    assert first.questions == again.questions and first.questions != other.questions
    media = [sample.images + sample.frames for sample in (first, again, other)]
    equal = [np.array_equal(a, b) for a, b in zip(media[0], media[1])]
    assert all(equal) and not np.array_equal(media[0][0], media[2][0])
    assert bool(first.frames) == (task == "video") and len(media[0]) == 1 + (task in ("images", "video"))
    assert len(first.questions) == (3 if task == "turns" else 1)


@pytest.mark.parametrize("task", tasks.TASKS)
@pytest.mark.parametrize("num_visual", [64, 256, 1024])
def test_cells_show_what_the_answer_says(task, num_visual):
    for seed in range(5):
        sample = tasks.draw(task, seed, num_visual)
        cells = np.concatenate([cells_of(picture) for picture in sample.images + sample.frames])
        assert len(cells) == num_visual
        for question in sample.questions:
            shown = [sprite_of(cells[cell]) for cell in question.cells]
            words = question.answer.replace(",", "").split()
            digits = [word for word in words if word.isdigit()]
            if task in ("images", "video"):
                half = question.cells[0] >= num_visual // 2
                assert question.text.split()[1] == digits.pop(0) == str(half + 1)
            if task == "reading":
                assert shown.pop(0) == tasks.MARKER
                names = ["white"] * len(digits)
                assert np.array_equal(np.diff(question.cells), np.ones(tasks.LINE_DIGITS))
            else:
                names = [word for word in words if word in tasks.COLOURS]
            found = [((*tasks.NAMES, "white")[s // 10], str(s % 10)) for s in shown]
            assert found == list(zip(names, digits, strict=True))
            if task == "path":
                assert np.array_equal(np.diff(question.cells), np.ones(tasks.PATH_CELLS - 1))


def cells_of(picture) -> np.ndarray:
    pixels = np.asarray(picture)
    rows, columns = (side // tasks.CELL for side in pixels.shape[:2])
    return pixels.reshape(rows, 28, columns, 28, 3).swapaxes(1, 2).reshape(-1, 28, 28, 3)


def sprite_of(cell: np.ndarray) -> int:
    """The number of the one sprite that looks like this."""
    (number,) = np.flatnonzero((tasks.sprites() == cell).all((1, 2, 3)))
    return int(number)


def test_unknown_tasks_and_tiny_pictures_are_refused():
    with pytest.raises(ValueError, match="reading"):
        tasks.draw("colours", 0)
    with pytest.raises(ValueError, match="64"):
        tasks.draw("single", 0, 49)


def test_tokenizer(local):
    path, _, _ = local
    tokenizer = AutoProcessor.from_pretrained(path).tokenizer
    for word in WORDS:
        assert len(tokenizer.encode(word)) == 1, word
    for task in tasks.TASKS:
        for question in tasks.draw(task, 1).questions:
            ids = tokenizer.encode(question.answer)
            assert tokenizer.decode(ids) == question.answer
            assert len(ids) == len(question.answer.replace(",", " ,").split())
    text = "Ünïcode\n <|im_end|>\n12  reds"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode("<|im_end|>a") == [258, ord("a")]
    assert len(tokenizer) == vocab_size(WORDS)


@pytest.mark.parametrize("vision", ["local", "global"])
@pytest.mark.parametrize("task", ["turns", "images", "video"])
def test_training_forward_is_the_real_model(tmp_path, vision, task):
    """Packed and gathered, against Transformers on the chat template's prompt and the pictures."""
    model, packer = checkpoint(tmp_path, vision)
    processor = AutoProcessor.from_pretrained(tmp_path)
    real = Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float32).eval()
    num_visual = 64
    scenes, questions = zip(*(tasks.lay_out(task, seed, 8) for seed in (4, 5)))
    others = tasks.ask("single", scenes[1], np.random.default_rng(0))
    packed = [[packer.turns(questions[0])], [packer.turns(others), packer.turns(questions[1])]]
    grids = np.stack([np.stack(scene.grids) for scene in scenes])
    batch = packer.pack(grids, packed, video=task == "video")
    with torch.no_grad():
        got, _ = lessons.predict(model, lessons.pixels(), batch, batch.mask)
    for row, (seed, mine) in enumerate(zip((4, 5), packed)):
        sample = tasks.draw(task, seed, num_visual)
        messages = []
        for turn, question in enumerate(sample.questions):
            media = [{"type": "image"}] * len(sample.images) + [{"type": "video"}] * bool(sample.frames)
            content = [*(media if turn == 0 else []), {"type": "text", "text": question.text}]
            messages.append({"role": "user", "content": content})
            messages.append({"role": "assistant", "content": question.answer})
        text = processor.apply_chat_template(messages)[: -len("<|im_end|>\n")]
        video = [np.asarray(frame) for frame in sample.frames for _ in range(2)]
        inputs = processor(
            text=[text], images=sample.images or None, videos=[np.stack(video)] if video else None,
            return_tensors="pt", **({"do_sample_frames": False} if video else {}),
        )  # fmt: skip
        if video:
            inputs["second_per_grid_ts"] = torch.tensor([1.0])  # two frames per second
        length = len(mine[-1].ids)
        with torch.no_grad():
            want = real(**inputs).logits[0, -length:]
        assert inputs.input_ids[0, -length:].tolist() == mine[-1].ids
        start = sum(len(turns.ids) for turns in mine[:-1])
        torch.testing.assert_close(got[row, start : start + length], want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("video", [False, True])
def test_positions_are_those_of_sglang(video):
    from sglang.srt.layers.rotary_embedding import MRotaryEmbedding

    ids, positions = packing.prefix_of([257, 10], (2, 3, 5), video)
    grid = torch.tensor([[2, 6, 10]] if video else [[1, 6, 10]] * 2)
    want, _ = MRotaryEmbedding.get_rope_index(
        spatial_merge_size=2, image_token_id=262, video_token_id=263, vision_start_token_id=259,
        model_type="qwen2_5_vl", tokens_per_second=2, input_ids=ids[None],
        second_per_grid_ts=torch.tensor([1.0]),
        **{"video_grid_thw" if video else "image_grid_thw": grid},
    )  # fmt: skip
    assert torch.equal(positions, want)


def test_hidden_cells_are_hidden_from_the_decoded_answer_only(local):
    _, model, packer = local
    scene, questions = tasks.lay_out("multi", 3, 8)
    batch = packer.pack(np.stack(scene.grids)[None], [[packer.turns(questions)]])
    cells = lessons.pixels()
    with torch.no_grad():
        full, _ = lessons.predict(model, cells, batch, batch.mask)
        hidden, _ = lessons.predict(model, cells, batch, lessons.without(batch, batch.needed))
    first = len(packer.turns(questions).ids) - int(batch.last.sum())
    torch.testing.assert_close(full[0, :first], hidden[0, :first])
    assert not torch.allclose(full[0, first:], hidden[0, first:], atol=1e-3)
    assert batch.needed[0].sum(-1).unique().tolist() == [len(questions[0].cells)]
    needed = batch.needed[0, -1].nonzero().squeeze(1) - int(batch.visual.nonzero()[0])
    assert needed.tolist() == sorted(questions[0].cells)


@pytest.mark.parametrize("task", ["path", "reading"])
def test_the_watched_head_should_see_the_cell_of_the_next_label(local, task):
    _, _, packer = local
    scene, questions = tasks.lay_out(task, 3, 8)
    batch = packer.pack(np.stack(scene.grids)[None], [[packer.turns(questions)]])
    sprites = torch.full_like(batch.prefix, -1)
    sprites[batch.visual] = batch.grids.flatten()
    rows = batch.next[0] >= 0
    assert rows.sum() == (tasks.PATH_CELLS - 1 if task == "path" else tasks.LINE_DIGITS)
    seen = sprites[batch.next[0, rows]]
    want = packer.colours[seen // 10] if task == "path" else packer.digits[seen % 10]
    assert torch.equal(batch.labels[0, rows], want)


def test_training_steps_reduce_the_loss(local):
    _, _, packer = local
    model = initial_model(model_config(**SMALL, window_size=28, full_attention_blocks=()), seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    batch, mask, blind = lessons.training_batch(lessons.Training(0), 1, packer, small=True)
    losses = []
    for _ in range(3):
        logits, _ = lessons.predict(model, lessons.pixels(), batch, mask)
        loss = lessons.loss_of(logits, batch, blind, packer.digits)
        optimizer.zero_grad()
        (loss + lessons.alignment_loss(model, lessons.pixels(), packer)).backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[2] < losses[1] < losses[0]


def test_dropped_keys_are_never_needed_ones(local):
    _, _, packer = local
    batch, mask, blind = lessons.training_batch(lessons.Training(0, drop_keys=True), 1, packer, small=False)
    gone = ~mask[:, :, : len(batch.visual)] & batch.last[:, :, None]
    assert not (gone & batch.needed)[~blind].any()
    assert (gone & ~batch.needed)[~blind].any() and (gone & batch.needed)[blind].any()
    assert not gone[:, :, ~batch.visual].any()


def test_the_client_says_that_no_server_is_there():
    [picture] = tasks.draw("single", 0).images
    with pytest.raises(Problem, match="make serve"):
        ask.chat("http://127.0.0.1:9", [ask.user_message("red?", [ask.data_url(picture)])])
