"""Ask a running server about a picture.

``python -m sglang_vlkv.tinyvlm.ask --task multi --seed 5`` draws the picture and knows the answer;
``--image FILE --question TEXT`` sends yours. Prints what the server reports about the KV cache too.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
from pathlib import Path

from PIL import Image

from sglang_vlkv.commands import Problem, media, values
from sglang_vlkv.commands.door import Parser, command
from sglang_vlkv.commands.server import DEFAULT, post
from sglang_vlkv.printable import printable
from sglang_vlkv.tinyvlm import tasks

DRAWN = tuple(task for task in tasks.TASKS if task != "video")  # no encoder comes with this package


def chat(url: str, messages: list[dict], max_tokens: int = 256) -> tuple[str, dict]:
    """The greedy answer of ``url``'s ``/v1/chat/completions``, and its ``kv_policy`` report or {}.

    Raises:
        Problem: no server answers, or it answers with an error.
    """
    body = {
        "model": "default", "messages": messages, "max_tokens": max_tokens, "temperature": 0,
        "return_meta_info": True,
    }  # fmt: skip
    said = post(url, "/v1/chat/completions", body)
    try:
        choice = said["choices"][0]
        return choice["message"]["content"] or "", (choice.get("meta_info") or {}).get("kv_policy") or {}
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise Problem(f"{url} does not answer as SGLang does: {str(said)[:300]}") from error


def user_message(text: str, urls: list[str] = ()) -> dict:
    """A user's message: the pictures, by their data URLs, then the text."""
    content = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return {"role": "user", "content": [*content, {"type": "text", "text": text}]}


def data_url(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return media.data_url(buffer.getvalue(), "image/png")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser("python -m sglang_vlkv.tinyvlm.ask", description="Ask a running server about a picture.")
    add = parser.add_argument
    add("--url", type=values.server, default=DEFAULT, help="default: %(default)s")
    add("--image", type=Path, help="your picture; with --question")
    add("--question", help="your question; without --image, about the drawn picture")
    add("--task", choices=DRAWN, default="multi", help="what to draw and ask")
    add("--seed", type=values.whole(0), default=0)
    add("--visual-tokens", type=values.whole(64, 1024), default=256, help="of the drawn picture, 64 to 1024")
    add("--save", type=values.new_file, metavar="FILE", help="write the drawn picture there (PNG)")
    parsed = parser.parse_args(arguments)
    if parsed.image and not parsed.question:
        parser.error("--image needs --question")
    if parsed.image and parsed.save:
        parser.error("--save is for drawn pictures")
    return parsed


@command
def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    if options.image:
        picture, questions = media.image(options.image), ()
        urls = [picture.url]
        for note in picture.notes:
            print(printable(note), file=sys.stderr)
    else:
        sample = tasks.draw(options.task, options.seed, options.visual_tokens)
        urls, questions = list(map(data_url, sample.images)), sample.questions
    if options.question:
        questions = (tasks.Question(options.question, "", ()),)
    if options.save:
        sample.images[0].save(options.save, format="PNG")

    messages = []
    for turn, question in enumerate(questions):
        messages.append(user_message(question.text, urls if turn == 0 else []))
        answer, report = chat(options.url, messages)
        messages.append({"role": "assistant", "content": answer})
        print(f"question  {printable(question.text)}\nanswer   {printable(answer)}")
        if question.answer:
            print(f"expected {question.answer}  {'(exact)' if answer == question.answer else '(differs)'}")
        print(f"kv_policy {json.dumps(report)}\n")


if __name__ == "__main__":
    sys.exit(main())
