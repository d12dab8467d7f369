"""Asks a running server about pictures or videos, and draws what it kept of the prompt."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from sglang_vlkv.commands import Problem, media, values
from sglang_vlkv.commands.door import Parser, command
from sglang_vlkv.commands.server import DEFAULT
from sglang_vlkv.inspect import page, png
from sglang_vlkv.inspect.ask import ask
from sglang_vlkv.inspect.heat import Choice, Kept
from sglang_vlkv.inspect.subject import Subject
from sglang_vlkv.options.config import read_options
from sglang_vlkv.printable import printable

LEFT_ALONE = 1  # exit status


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(prog="python -m sglang_vlkv.inspect", description=__doc__)
    add = parser.add_argument
    add("--image", type=Path, action="append", default=[], help="a picture; may be repeated")
    add("--video", type=Path, action="append", default=[], help="a video; may be repeated")
    add("--question", required=True)
    add("--url", type=values.server, default=DEFAULT, help="of the server; default %(default)s")
    add("--api-key", type=values.key, default="", help="of the server, where it wants one")
    add("--kv-policy", help="the request's policy; default: the server's")
    add("--kv-budget", type=values.share, help="the request's budget; default: the server's")
    add("--kv-policy-config", metavar="JSON-OR-FILE", help="the request's options")
    add("--layer", type=int, help="draw this layer alone; default: all")
    add("--head", type=int, help="draw this KV head alone; default: all")
    add("--max-tokens", type=values.whole(), default=64, help="of the answer; default %(default)s")
    add("--out", type=_stem, default="inspect", help="writes OUT.png and OUT.html; default %(default)s")
    add("--font", type=Path, help="font of the PNG; the default one has Latin letters only")
    parsed = parser.parse_args(arguments)
    if not parsed.image and not parsed.video:
        parser.error("give it something to look at: --image FILE or --video FILE")
    return parsed


def _stem(text: str) -> str:
    """A path without its ending; files can be written there."""
    values.new_file(f"{text}.png"), values.new_file(f"{text}.html")
    return text


def run(options: argparse.Namespace) -> int:
    """The exit status.

    Raises:
        Problem: what keeps the drawing from being made.
    """
    font = png.load_font(options.font)
    files = [media.image(path) for path in options.image] + [media.video(path) for path in options.video]
    for note in [note for file in files for note in file.notes]:
        print(printable(note), file=sys.stderr)
    answer = ask(
        options.url, files, options.question, _custom(options), options.max_tokens, options.api_key
    )
    kept = Kept(answer.report)
    choice = Choice()
    if kept.left_alone is None:
        _check("--layer", options.layer, kept.num_layers)
        _check("--head", options.head, kept.num_heads)
        choice = Choice(options.layer, options.head)
    subject = Subject(answer, kept, _pictures(kept, files), choice)
    Path(f"{options.out}.png").write_bytes(png.encode(png.draw(subject, font)))
    Path(f"{options.out}.html").write_bytes(page.render(subject).encode())
    print(f"answer: {printable(answer.text.strip())}\n{', '.join(subject.facts)}")
    print(f"wrote {options.out}.png and {options.out}.html")
    return 0 if kept.left_alone is None else LEFT_ALONE


def _custom(options: argparse.Namespace) -> dict:
    try:
        config = read_options(options.kv_policy_config)
    except ValueError as error:
        raise Problem(f"{error}.") from error
    custom = {"kv_policy": options.kv_policy, "kv_budget": options.kv_budget, "kv_policy_config": config}
    return {key: value for key, value in custom.items() if value not in (None, {})}


def _check(flag: str, value: int | None, count: int) -> None:
    if value is not None and not 0 <= value < count:
        raise Problem(f"{flag} is {value}; this model has 0 to {count - 1}.")


def _pictures(kept: Kept, files: list[media.Medium]) -> list[list]:
    """Per visual of the prompt, the picture behind each temporal group; empty where there is none."""
    pictures = []
    for visual in kept.visuals:
        same = [file for file in files if file.kind == visual.modality]
        known = visual.grid and len(same) == sum(one.modality == visual.modality for one in kept.visuals)
        pictures.append(same[visual.number - 1].frames(visual.grid[0]) if known else [])
    return pictures


@command
def main(arguments: list[str] | None = None) -> int:
    return run(parse(arguments))


if __name__ == "__main__":
    sys.exit(main())
