"""The web page: serves it, and passes its conversation on to the SGLang server.

``python -m examples.video_chat.app --server http://127.0.0.1:30000``, then open http://127.0.0.1:8000.
It keeps nothing: the page holds the conversation and sends all of it with every question.
"""

from __future__ import annotations

import json
import socket
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pydantic
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import FileResponse, PlainTextResponse, Response, StreamingResponse
from fastapi.staticfiles import StaticFiles

from examples.video_chat import client
from sglang_vlkv.commands import Problem, values
from sglang_vlkv.commands.door import Parser, command
from sglang_vlkv.commands.server import DEFAULT, why

HERE = Path(__file__).parent
SAMPLES = {path.name: path for path in (HERE / "digits.mp4", HERE.parent / "digits.png")}
WORDS = 1_000_000  # bytes that a conversation may have besides its media


class Conversation(pydantic.BaseModel):
    """What the page sends: all turns, the last one without an answer, and what the request chooses."""

    turns: list[client.Turn] = pydantic.Field(min_length=1)
    custom_params: dict = {}


def create_app(server: str, max_mb: float = 64) -> FastAPI:
    """The app in front of ``server``, for conversations with up to ``max_mb`` MB of encoded media."""
    app, max_bytes = FastAPI(), int(max_mb * 1e6)

    @app.get("/config")
    def config() -> dict:
        return {"server": server, "types": client.IMAGE_TYPES + client.VIDEO_TYPES, "max_bytes": max_bytes}

    @app.get("/samples/{name}")
    def sample(name: str) -> Response:
        if name not in SAMPLES:
            return PlainTextResponse(f"There is no sample {name!r}; there are {', '.join(SAMPLES)}.", 404)
        return FileResponse(SAMPLES[name])

    @app.post("/chat")
    async def chat(request: Request) -> Response:
        body = await _body(request, max_bytes + WORDS)
        if body is None:
            return PlainTextResponse(f"The conversation is over {max_mb:g} MB. Start a new one.", 413)
        try:
            conversation = Conversation.model_validate_json(body)
        except pydantic.ValidationError as error:
            return PlainTextResponse(f"This is no conversation: {error}", 400)
        return StreamingResponse(_events(server, conversation), media_type="text/event-stream")

    app.mount("/", StaticFiles(directory=HERE / "static", html=True))
    return app


async def _body(request: Request, most: int) -> bytes | None:
    """The request's, or None where that is over ``most`` bytes, whether it says so before or not."""
    data = bytearray()
    if int(request.headers.get("content-length", 0)) <= most:
        async for piece in request.stream():
            data += piece
            if len(data) > most:
                return None
        return bytes(data)
    return None


async def _events(server: str, conversation: Conversation) -> AsyncIterator[str]:
    """Server-sent events: what ``client.ask`` yields, or ``{"error": message}`` at the end."""
    try:
        async for event in client.ask(server, conversation.turns, custom_params=conversation.custom_params):
            yield f"data: {json.dumps(event)}\n\n"
    except Problem as problem:
        yield f"data: {json.dumps({'error': str(problem)})}\n\n"


@command
def main(arguments: list[str] | None = None) -> None:
    words = "A page to talk about a video with a SGLang server."
    parser = Parser("python -m examples.video_chat.app", description=words)
    add = parser.add_argument
    add("--server", type=values.server, default=DEFAULT, help="the SGLang server")
    add("--host", default="127.0.0.1")
    add("--port", type=values.port, default=8000)
    size = values.number("a number above 0 and at most 100,000", lambda mb: 0 < mb <= 100_000)
    add("--max-mb", type=size, default=64, help="most media of a conversation, encoded")
    options = parser.parse_args(arguments)
    family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
    try:
        listener = socket.create_server((options.host, options.port), family=family)
    except (OSError, UnicodeError) as error:
        words = f"{options.host}, port {options.port}, cannot be listened on: {why(error)}. Name others."
        raise Problem(words) from error
    app = create_app(options.server, options.max_mb)
    uvicorn.Server(uvicorn.Config(app, log_level="warning")).run([listener])


if __name__ == "__main__":
    sys.exit(main())
