"""Lists a picture's digits, then asks about each in a fork of its own, and joins the answers.

All forks continue one prompt, whose exact KV stays in the radix tree: each prefills its question and
is compressed for it alone.
"""

from __future__ import annotations

import sys

import sglang as sgl

from examples.frontend.backend import PICTURE, connect, report, served, shown
from sglang_vlkv.commands.door import command


@sgl.function
def describe(s, picture, colours):
    s += sgl.user(sgl.image(picture) + "list all")
    s += sgl.assistant(sgl.gen("listed", max_tokens=64))
    forks = s.fork(len(colours))
    for fork, colour in zip(forks, colours):
        fork += sgl.user(f"which digit is {colour}?")
        fork += sgl.assistant(sgl.gen("answers", max_tokens=16))
    forks.join()  # s["answers"] lists those of all forks
    s["reports"] = [report(fork, "answers") for fork in forks.states]


@command
def main(arguments: list[str] | None = None) -> None:
    options = connect(__doc__, arguments, picture=PICTURE, colours=["cyan", "green", "pink"])
    with served():
        state = describe.run(str(options.picture), options.colours, temperature=0, use_thread=False)
        print(f"{shown(state['listed'])}\n  [{report(state, 'listed')}]")
    for answer, line in zip(state["answers"], state["reports"], strict=True):
        print(f"{shown(answer)}\n  [{line}]")


if __name__ == "__main__":
    sys.exit(main())
