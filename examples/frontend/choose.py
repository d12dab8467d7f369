"""Answers by choosing: the likeliest of the choices continues the prompt.

``sgl.select`` reads the logprobs of the choices' own tokens in a prefill. Nothing is decoded, so under
every policy it chooses what the full cache chooses.
"""

from __future__ import annotations

import sys

import sglang as sgl

from examples.frontend.backend import PICTURE, connect, served, shown
from sglang_vlkv.commands.door import command


@sgl.function
def choose(s, picture, colour, choices):
    s += sgl.user(sgl.image(picture) + f"which digit is {colour}?")
    s += sgl.assistant(f" the digit is {colour}" + sgl.select("choice", choices))


@command
def main(arguments: list[str] | None = None) -> None:
    digits = [str(digit) for digit in range(10)]
    options = connect(__doc__, arguments, picture=PICTURE, colour="cyan", choices=digits)
    choices = [f" {choice}" for choice in options.choices]
    with served():
        state = choose.run(str(options.picture), options.colour, choices, temperature=0, use_thread=False)
        logprobs = state.get_meta_info("choice")["normalized_prompt_logprobs"]
    for choice, logprob in sorted(zip(choices, logprobs), key=lambda pair: -pair[1]):
        print(f"{'*' if choice == state['choice'] else ' '}{shown(choice)}  {logprob:.3f}")


if __name__ == "__main__":
    sys.exit(main())
