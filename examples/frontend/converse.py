"""Several turns about one picture, streamed: every turn's prefix is exact KV from the radix tree."""

from __future__ import annotations

import sys

import sglang as sgl

from examples.frontend.backend import PICTURE, connect, report, served, shown
from sglang_vlkv.commands.door import command

QUESTIONS = ["which digit is cyan?", "digits of green yellow orange?", "which digit is brown?"]


@sgl.function
def converse(s, picture, questions):
    for turn, question in enumerate(questions):
        s += sgl.user(sgl.image(picture) + question if turn == 0 else question)
        s += sgl.assistant(sgl.gen(f"answer {turn}", max_tokens=64))


@command
def main(arguments: list[str] | None = None) -> None:
    options = connect(__doc__, arguments, picture=PICTURE, questions=QUESTIONS)
    with served():
        state = converse.run(str(options.picture), options.questions, temperature=0, stream=True)
        for turn, question in enumerate(options.questions):
            print(f"> {shown(question)}")
            for piece in state.text_iter(f"answer {turn}"):
                print(shown(piece), end="", flush=True)
            print(f"\n  [{report(state, f'answer {turn}')}]")


if __name__ == "__main__":
    sys.exit(main())
