"""Prompts: drawn tasks, or somebody's own questions, as messages of the OpenAI chat API."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sglang_vlkv.commands import Problem
from sglang_vlkv.tinyvlm import tasks
from tests.serving import data_url

# Training uses seeds from 1,000,000 on.
TUNING_SEEDS = range(0, 100_000)
REPORT_SEEDS = range(100_000, 1_000_000)

VISUAL_TOKENS = 256
SIZED = tuple(f"{task}@{size}" for size in (64, 576, 1024) for task in ("multi", "list"))
TASKS = (*tasks.TASKS, *SIZED)  # what --tasks takes
TURNS = ("turn 1", "turn 2", "turn 3")
COLUMNS = tuple(column for task in TASKS for column in (TURNS if task == "turns" else (task,)))
# The columns whose mean is the headline. Turn 1 asks what single and multi ask.
HEADLINE = ("single", "multi", "list", "path", "reading", "turn 2", "turn 3")

VIDEO_FPS = 2  # SGLang samples two frames per second: all of them
VIDEO_FRAMES = 4  # two of the task, each twice


class Prompt(NamedTuple):
    """One question.

    Attributes:
        task: the column that it counts in: a task, one of ``TURNS``, or ``task@visual tokens``.
        seed: of the sample; for own questions the line number.
        messages: of ``/v1/chat/completions``; earlier turns are answered by the reference.
        answers: the accepted answers.
        cells: visual tokens that the answer needs; None where unknown.
        max_tokens: room for the answer, its end of turn and a little more.
        drawn: whether it is from ``tasks``, whose answers hold digits to be compared one by one.
    """

    task: str
    seed: int
    messages: list[dict]
    answers: tuple[str, ...]
    cells: tuple[int, ...] | None
    max_tokens: int
    drawn: bool = True


def family(task: str) -> str:
    """The task that a column is drawn from; columns of a family share their pictures."""
    return "turns" if task in TURNS else task


def drawn(task: str, seed: int) -> list[Prompt]:
    """The prompts of one sample: one, or the three turns of a conversation.

    Args:
        task: one of ``TASKS``.
    """
    kind, _, size = task.partition("@")
    sample = tasks.draw(kind, seed, int(size or VISUAL_TOKENS))
    media = [_part("image_url", data_url(image)) for image in sample.images]
    if sample.frames:
        media.append(_part("video_url", video_url(sample.frames)))
    prompts, messages = [], []
    for number, question in enumerate(sample.questions):
        text = {"type": "text", "text": question.text}
        messages = [*messages, {"role": "user", "content": [*(media if number == 0 else []), text]}]
        column = TURNS[number] if kind == "turns" else task
        length = len(re.findall(r"\w+|,", question.answer)) + 5
        prompts.append(Prompt(column, seed, messages, (question.answer,), question.cells, length))
        messages = [*messages, {"role": "assistant", "content": question.answer}]
    return prompts


def video_url(frames: list) -> str:
    """An MP4 that shows each frame twice, lossless, as a data URL.

    At two frames per second SGLang's sampling takes every frame, and RGB H.264 keeps every pixel, so
    that a temporal patch holds the drawn frame exactly.
    """
    import torch
    from torchcodec.encoders import VideoEncoder

    pixels = np.stack([np.asarray(frame) for frame in frames for _ in range(2)])
    encoder = VideoEncoder(
        torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), frame_rate=VIDEO_FPS
    )
    mp4 = encoder.to_tensor(format="mp4", codec="libx264rgb", pixel_format="rgb24", crf=0)
    return _url("video/mp4", mp4.numpy().tobytes())


def own(path: Path) -> list[Prompt]:
    """Questions of a JSONL file.

    A line holds ``question``, ``answer`` (a string, or a list of accepted ones), ``image`` or
    ``images`` or ``video`` (paths relative to the file, or URLs), and may hold ``task``,
    ``max_tokens`` (32) and ``cells``, the visual tokens that the answer needs.

    Raises:
        Problem: names the line that holds something else.
    """
    prompts = []
    for number, line in enumerate(path.read_text(errors="replace").splitlines()):
        try:
            prompts += [_own(path, number, json.loads(line))] if line.strip() else []
        except (ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError) as error:
            raise Problem(f"{path}, line {number + 1}: {error!r} is wrong with this question.") from error
    if not prompts:
        raise Problem(f"{path} holds no question.")
    return prompts


def _own(path: Path, number: int, entry: dict) -> Prompt:
    images = entry.get("images") or ([entry["image"]] if "image" in entry else [])
    content = [_part("image_url", _read(path.parent, image, "image/png")) for image in images]
    if "video" in entry:
        content.append(_part("video_url", _read(path.parent, entry["video"], "video/mp4")))
    if not content:
        raise ValueError("neither image, images nor video")
    content.append({"type": "text", "text": entry["question"]})
    answers = entry["answer"] if isinstance(entry["answer"], list) else [entry["answer"]]
    return Prompt(
        entry.get("task", "questions"),
        number,
        [{"role": "user", "content": content}],
        tuple(map(str, answers)),
        tuple(entry["cells"]) if "cells" in entry else None,
        int(entry.get("max_tokens", 32)),
        drawn=False,
    )


def _read(folder: Path, source: str, kind: str) -> str:
    if source.startswith(("http://", "https://", "data:")):
        return source
    return _url(kind, (folder / source).read_bytes())


def _url(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def _part(kind: str, url: str) -> dict:
    return {"type": kind, kind: {"url": url}}
