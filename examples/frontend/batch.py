"""One question about many pictures at once; each request is compressed by itself.

Draws pictures whose digits are known, so that it can say how many answers are right.
"""

from __future__ import annotations

import sglang as sgl

from examples.frontend.backend import connect, report
from sglang_vlkv.tinyvlm import tasks


@sgl.function
def answer(s, picture, question):
    s += sgl.user(sgl.image(picture) + question)
    s += sgl.assistant(sgl.gen("answer", max_tokens=64))


def main() -> None:
    options = connect(__doc__, pictures=8, task="multi")
    samples = [tasks.draw(options.task, seed) for seed in range(options.pictures)]
    arguments = [{"picture": s.images[0], "question": s.questions[0].text} for s in samples]
    right = 0
    for sample, state in zip(samples, answer.run_batch(arguments, temperature=0), strict=True):
        line, said, wanted = report(state, "answer"), state["answer"], sample.questions[0].answer
        right += said == wanted
        print(f"> {sample.questions[0].text}\n{said}{'' if said == wanted else f'  (it is{wanted})'}")
        print(f"  [{line}]")
    print(f"{right} of {len(samples)} right")


if __name__ == "__main__":
    main()
