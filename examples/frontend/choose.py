"""Answers by choosing: the likeliest of the choices continues the prompt.

``sgl.select`` reads the logprobs of the choices' own tokens in a prefill. Nothing is decoded, so under
every policy it chooses what the full cache chooses.
"""

from __future__ import annotations

import sglang as sgl

from examples.frontend.backend import PICTURE, connect


@sgl.function
def choose(s, picture, colour, choices):
    s += sgl.user(sgl.image(picture) + f"which digit is {colour}?")
    s += sgl.assistant(f" the digit is {colour}" + sgl.select("choice", choices))


def main() -> None:
    digits = [str(digit) for digit in range(10)]
    options = connect(__doc__, picture=str(PICTURE), colour="cyan", choices=digits)
    choices = [f" {choice}" for choice in options.choices]
    state = choose.run(options.picture, options.colour, choices, temperature=0, use_thread=False)
    logprobs = state.get_meta_info("choice")["normalized_prompt_logprobs"]
    for choice, logprob in sorted(zip(choices, logprobs), key=lambda pair: -pair[1]):
        print(f"{'*' if choice == state['choice'] else ' '}{choice}  {logprob:.3f}")


if __name__ == "__main__":
    main()
