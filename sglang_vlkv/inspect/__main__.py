"""Asks a running server about pictures or videos, and draws what it kept of the prompt."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from sglang_vlkv.inspect import Problem, media, page, png
from sglang_vlkv.inspect.ask import ask
from sglang_vlkv.inspect.heat import Choice, Kept
from sglang_vlkv.inspect.subject import Subject
from sglang_vlkv.options.config import read_options

LEFT_ALONE, FAILED = 1, 2  # exit codes


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m sglang_vlkv.inspect", description=__doc__)
    parser.add_argument("--image", type=Path, action="append", default=[], help="a picture; may be repeated")
    parser.add_argument("--video", type=Path, action="append", default=[], help="a video; may be repeated")
    parser.add_argument("--question", required=True)
    parser.add_argument("--url", default="http://127.0.0.1:30000", help="of the server; default %(default)s")
    parser.add_argument("--api-key", default="", help="of the server, where it wants one")
    parser.add_argument("--kv-policy", help="the request's policy; default: the server's")
    parser.add_argument("--kv-budget", type=float, help="the request's budget; default: the server's")
    parser.add_argument("--kv-policy-config", metavar="JSON-OR-FILE", help="the request's options")
    parser.add_argument("--layer", type=int, help="draw this layer alone; default: all")
    parser.add_argument("--head", type=int, help="draw this KV head alone; default: all")
    parser.add_argument("--max-tokens", type=int, default=64, help="of the answer; default %(default)s")
    parser.add_argument(
        "--out", type=Path, default="inspect", help="writes OUT.png and OUT.html; default %(default)s"
    )
    parser.add_argument("--font", type=Path, help="font of the PNG; the default one has Latin letters only")
    parsed = parser.parse_args(arguments)
    if not parsed.image and not parsed.video:
        parser.error("give it something to look at: --image FILE or --video FILE")
    return parsed


def run(options: argparse.Namespace) -> int:
    """The exit code.

    Raises:
        Problem: what keeps the drawing from being made.
    """
    font = png.load_font(options.font)
    files = [media.image(path) for path in options.image] + [media.video(path) for path in options.video]
    answer = ask(
        options.url, files, options.question, _custom(options), options.max_tokens, options.api_key
    )
    if "positions" not in answer.report:
        print(f"answer: {answer.text.strip()}")
        print(f"Nothing to draw: the prompt was left alone, {answer.report['reason']}.", file=sys.stderr)
        return LEFT_ALONE
    kept = Kept(answer.report)
    _check("--layer", options.layer, kept.num_layers)
    _check("--head", options.head, kept.num_heads)
    subject = Subject(answer, kept, _pictures(kept, files), Choice(options.layer, options.head))
    _write(Path(f"{options.out}.png"), png.encode(png.draw(subject, font)))
    _write(Path(f"{options.out}.html"), page.render(subject).encode())
    print(f"answer: {answer.text.strip()}\n{', '.join(subject.facts)}")
    print(f"wrote {options.out}.png and {options.out}.html")
    return 0


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


def _write(path: Path, data: bytes) -> None:
    try:
        path.write_bytes(data)
    except OSError as error:
        raise Problem(f"{path} cannot be written: {error.strerror}.") from error


def main(arguments: list[str] | None = None) -> None:
    try:
        sys.exit(run(parse(arguments)))
    except Problem as problem:
        print(problem, file=sys.stderr)
        sys.exit(FAILED)


if __name__ == "__main__":
    main()
