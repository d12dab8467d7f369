"""The conversation in a terminal: the answer as it comes, and a line about the KV cache per turn.

``python -m examples.video_chat.terminal --video examples/video_chat/digits.mp4 "which digit is red?"
"which digit is teal?"``. Without questions it reads them from standard input, one per line.
``/open FILE`` in place of a question adds a picture or a video to the next one.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from examples.video_chat import client

OPEN = "/open "


async def converse(server: str, media: list[str], lines: Iterable[str], **options) -> None:
    """Asks one question after the other.

    Args:
        server: URL of the SGLang server.
        media: data URLs that come with the first question.
        lines: questions, and files to open.
        options: of ``client.ask``.
    """
    turns: list[client.Turn] = []
    for line in lines:
        if line.startswith(OPEN):
            media = [*media, client.data_url(Path(line.removeprefix(OPEN).strip()))]
            continue
        turns.append(client.Turn(question=line, media=media))
        media, pieces = [], []
        print(f"> {line}")
        async for event in client.ask(server, turns, **options):
            if "text" in event:
                pieces.append(event["text"])
                print(event["text"], end="", flush=True)
            else:
                print(f"\n[{event['summary']}]\n")
        turns[-1].answer = "".join(pieces)


def typed() -> Iterator[str]:
    """The lines of standard input, asking for them where a person types."""
    while True:
        if sys.stdin.isatty():
            print("question, or /open FILE: ", end="", flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description="Talk about a video with a SGLang server.")
    parser.add_argument("questions", nargs="*", help="without any, they come from standard input")
    parser.add_argument("--server", default="http://127.0.0.1:30000")
    parser.add_argument("--video", type=Path, action="append", default=[], help="for the first question")
    parser.add_argument("--image", type=Path, action="append", default=[], help="for the first question")
    parser.add_argument("--max-tokens", type=int, default=256, help="of an answer")
    parser.add_argument("--custom-params", type=json.loads, help='such as {"kv_policy": "h2o"}')
    arguments = parser.parse_args()
    try:
        media = [client.data_url(path) for path in arguments.video + arguments.image]
        asyncio.run(
            converse(
                arguments.server.rstrip("/"), media, arguments.questions or typed(),
                max_tokens=arguments.max_tokens, custom_params=arguments.custom_params,
            )
        )  # fmt: skip
    except client.Problem as problem:
        sys.exit(str(problem))
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
