"""Ask a running server about a picture.

``python -m sglang_vlkv.tinyvlm.ask --task multi --seed 5`` draws the picture and knows the answer;
``--image FILE --question TEXT`` sends yours. Prints what the server reports about the KV cache too.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import sys
import urllib.error
import urllib.request
from pathlib import Path

from PIL import Image

from sglang_vlkv.tinyvlm import tasks

DRAWN = tuple(task for task in tasks.TASKS if task != "video")  # no encoder comes with this package


class Unreachable(Exception):
    """No server answers, or it answers with an error; the message is for the user."""


def chat(url: str, messages: list[dict], max_tokens: int = 256, timeout: float = 300.0) -> tuple[str, dict]:
    """The greedy answer of ``url``'s ``/v1/chat/completions``, and its ``kv_policy`` report or {}."""
    body = {
        "model": "default", "messages": messages, "max_tokens": max_tokens, "temperature": 0,
        "return_meta_info": True,
    }  # fmt: skip
    request = urllib.request.Request(
        url.rstrip("/") + "/v1/chat/completions",
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request, timeout=timeout) as response:
            choice = json.load(response)["choices"][0]
    except urllib.error.HTTPError as error:
        raise Unreachable(f"{url} answers HTTP {error.code}: {error.read().decode()[:1000]}") from error
    except OSError as error:
        raise Unreachable(f"no server at {url} ({error}); start one with: make serve") from error
    return choice["message"]["content"], (choice.get("meta_info") or {}).get("kv_policy") or {}


def user_message(text: str, images: list[Image.Image] = ()) -> dict:
    """A user's message: the pictures, then the text."""
    content = [{"type": "image_url", "image_url": {"url": data_url(image)}} for image in images]
    return {"role": "user", "content": [*content, {"type": "text", "text": text}]}


def data_url(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def main() -> None:
    parser = argparse.ArgumentParser(description="Ask a running server about a picture.")
    parser.add_argument("--url", default="http://127.0.0.1:30000")
    parser.add_argument("--image", type=Path, help="your picture; with --question")
    parser.add_argument("--question", help="your question; without --image, about the drawn picture")
    parser.add_argument("--task", choices=DRAWN, default="multi", help="what to draw and ask")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--visual-tokens", type=int, default=256, help="of the drawn picture, 64 to 1024")
    parser.add_argument("--save", type=Path, help="write the drawn picture here (PNG)")
    arguments = parser.parse_args()
    if arguments.image and not arguments.question:
        parser.error("--image needs --question")
    if arguments.image:
        images, questions = [Image.open(arguments.image).convert("RGB")], ()
    else:
        try:
            sample = tasks.draw(arguments.task, arguments.seed, arguments.visual_tokens)
        except ValueError as error:
            parser.error(str(error))
        images, questions = sample.images, sample.questions
    if arguments.question:
        questions = (tasks.Question(arguments.question, "", ()),)
    if arguments.save:
        if arguments.image:
            parser.error("--save is for drawn pictures")
        images[0].save(arguments.save)

    messages = []
    for turn, question in enumerate(questions):
        messages.append(user_message(question.text, images if turn == 0 else []))
        try:
            answer, report = chat(arguments.url, messages)
        except Unreachable as error:
            sys.exit(str(error))
        messages.append({"role": "assistant", "content": answer})
        print(f"question  {question.text}\nanswer   {answer}")
        if question.answer:
            print(f"expected {question.answer}  {'(exact)' if answer == question.answer else '(differs)'}")
        print(f"kv_policy {json.dumps(report)}\n")


if __name__ == "__main__":
    main()
