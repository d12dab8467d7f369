"""One question about many pictures at once; each request is compressed by itself.

Draws pictures whose digits are known, so that it can say how many answers are right.
"""

from __future__ import annotations

import sys

import sglang as sgl

from examples.frontend.backend import connect, report, served, shown
from sglang_vlkv.commands.door import command
from sglang_vlkv.tinyvlm import tasks

# A program takes one picture; the usual task comes first.
TASKS = ("multi", *(task for task in tasks.TASKS if task not in ("multi", "images", "video")))


@sgl.function
def answer(s, picture, question):
    s += sgl.user(sgl.image(picture) + question)
    s += sgl.assistant(sgl.gen("answer", max_tokens=64))


@command
def main(arguments: list[str] | None = None) -> None:
    options = connect(__doc__, arguments, pictures=8, task=TASKS)
    samples = [tasks.draw(options.task, seed) for seed in range(options.pictures)]
    asked = [{"picture": s.images[0], "question": s.questions[0].text} for s in samples]
    right = 0
    with served():
        for sample, state in zip(samples, answer.run_batch(asked, temperature=0), strict=True):
            line, said, wanted = report(state, "answer"), state["answer"], sample.questions[0].answer
            right += said == wanted
            verdict = "" if said == wanted else f"  (it is{wanted})"
            print(f"> {sample.questions[0].text}\n{shown(said)}{verdict}")
            print(f"  [{line}]")
    print(f"{right} of {len(samples)} right")


if __name__ == "__main__":
    sys.exit(main())
