"""Several turns about one picture, streamed: every turn's prefix is exact KV from the radix tree."""

from __future__ import annotations

import sglang as sgl

from examples.frontend.backend import PICTURE, connect, report

QUESTIONS = ["which digit is cyan?", "digits of green yellow orange?", "which digit is brown?"]


@sgl.function
def converse(s, picture, questions):
    for turn, question in enumerate(questions):
        s += sgl.user(sgl.image(picture) + question if turn == 0 else question)
        s += sgl.assistant(sgl.gen(f"answer {turn}", max_tokens=64))


def main() -> None:
    options = connect(__doc__, picture=str(PICTURE), questions=QUESTIONS)
    state = converse.run(options.picture, options.questions, temperature=0, stream=True)
    for turn, question in enumerate(options.questions):
        print(f"> {question}")
        for piece in state.text_iter(f"answer {turn}"):
            print(piece, end="", flush=True)
        print(f"\n  [{report(state, f'answer {turn}')}]")


if __name__ == "__main__":
    main()
