"""The conversation in a terminal: the answer as it comes, and a line about the KV cache per turn.

``python -m examples.video_chat.terminal --video examples/video_chat/digits.mp4 "which digit is red?"
"which digit is teal?"``. Without questions it reads them from standard input, one per line.
``/open FILE`` in place of a question adds a picture or a video to the next one; ``/drop`` takes all that were
added away again. What goes wrong is told, and the conversation goes on without it.
"""

from __future__ import annotations

import asyncio
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from examples.video_chat import client
from sglang_vlkv.commands import Problem, values
from sglang_vlkv.commands.door import FAILED, Parser, command, complain
from sglang_vlkv.commands.server import DEFAULT
from sglang_vlkv.printable import printable

OPEN, DROP = "/open", "/drop"
LINES = "\n\t"  # what an answer may hold besides what can be seen


class Conversation:
    """What has been said, and the files of the next question.

    Args:
        server: URL of the SGLang server.
        options: of ``client.ask``.
    """

    def __init__(self, server: str, **options) -> None:
        self._server, self._options = server, options
        self._turns: list[client.Turn] = []
        self._media: list[str] = []

    def open(self, path: Path) -> None:
        """Adds a file to the next question.

        Raises:
            Problem: it cannot be read, or not be sent.
        """
        medium = client.open_file(path)
        self._media = [*self._media, medium.url]
        for note in medium.notes:
            print(f"[{printable(note)}]")

    async def ask(self, question: str) -> None:
        """Prints the answer. A question without one leaves its files to the next.

        Raises:
            Problem: there is none, and the conversation is what it was.
        """
        turn, pieces = client.Turn(question=question, media=self._media), []
        async for event in client.ask(self._server, [*self._turns, turn], **self._options):
            if "text" in event:
                pieces.append(event["text"])
                print(printable(event["text"], keep=LINES), end="", flush=True)
            else:
                print(f"\n[{printable(event['summary'])}]\n")
        turn.answer = "".join(pieces)
        self._turns.append(turn)
        self._media = []

    async def take(self, line: str) -> None:
        """A question, or what begins with a slash.

        Raises:
            Problem: it could not be done.
        """
        word, _, rest = line.partition(" ")
        if word == OPEN and rest.strip():
            self.open(Path(rest.strip()).expanduser())
        elif word == OPEN:
            raise Problem(f"Which file? Write {OPEN} FILE.")
        elif word == DROP:
            self._media = []
        elif re.fullmatch(r"/[a-z]+", word):
            raise Problem(f"There is no {word}; write {OPEN} FILE, {DROP}, or a question.")
        else:
            print(f"> {printable(line)}")
            await self.ask(line)


async def converse(conversation: Conversation, lines: Iterable[str]) -> int:
    """Takes one line after the other; returns how many could not be done."""
    problems = 0
    for line in lines:
        try:
            await conversation.take(line)
        except Problem as problem:
            problems += 1
            sys.stdout.flush()
            complain(problem)
    return problems


def typed() -> Iterator[str]:
    """The lines of standard input, asking for them where a person types."""
    sys.stdin.reconfigure(errors="replace")
    while True:
        if sys.stdin.isatty():
            print(f"question, or {OPEN} FILE: ", end="", flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.strip()


@command
def main(arguments: list[str] | None = None) -> int:
    """The exit status: 2 where anything could not be done."""
    words = "Talk about a video with a SGLang server."
    parser = Parser("python -m examples.video_chat.terminal", description=words)
    add = parser.add_argument
    add("questions", nargs="*", help="without any, they come from standard input")
    add("--server", type=values.server, default=DEFAULT)
    add("--video", type=Path, action="append", default=[], help="for the first question")
    add("--image", type=Path, action="append", default=[], help="for the first question")
    add("--max-tokens", type=values.whole(), default=256, help="of an answer")
    add("--custom-params", type=values.json_object, help='such as {"kv_policy": "h2o"}')
    options = parser.parse_args(arguments)
    conversation = Conversation(
        options.server, max_tokens=options.max_tokens, custom_params=options.custom_params
    )
    for path in options.video + options.image:
        conversation.open(path)
    problems = asyncio.run(converse(conversation, options.questions or typed()))
    return FAILED if problems else 0


if __name__ == "__main__":
    sys.exit(main())
