"""A process of clients: draws what to ask and how to misbehave until the storm is over.

Before every request it reads the server's ``address`` in its folder (the server may come back on another
port), and for every request it writes a line of JSON to ``events-INDEX.jsonl`` there.
"""

from __future__ import annotations

import asyncio
import json
import random
import socket
import time
from collections.abc import Coroutine
from pathlib import Path
from urllib.parse import urlsplit

import aiohttp

from tests.chaos.judge import judge
from tests.chaos.plan import Plan, Raw, Spec
from tests.serving import for_anthropic

# How often each is drawn.
ACTIONS = {
    "ask": 72, "several": 5, "sampled": 3, "abort": 4, "hang up": 5, "hang up at once": 3, "slow reader": 1,
    "malformed": 9, "raw": 1.5, "pause": 0.5, "flush": 1.5, "abort all": 0.1, "look": 1,
}  # fmt: skip
PAUSES = ("in_place", "retract", "abort")
LOST = (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError, ConnectionError)


class Unfinished(Exception):
    """A stream ended early, or an answer was aborted by somebody else; ``status`` is its response's."""

    def __init__(self, why: str, status: int = 200) -> None:
        super().__init__(why)
        self.status = status


class Clients:
    def __init__(self, plan: Plan, folder: Path, index: int) -> None:
        self.plan, self.folder, self.index = plan, folder, index
        self.rng = random.Random(f"client{plan.seed}-{index}")
        self.made = 0
        self.log = (folder / f"events-{index}.jsonl").open("w", buffering=1)

    async def run(self) -> None:
        timeout = aiohttp.ClientTimeout(total=self.plan.deadline)
        # Not kept alive: a server may close an idle connection just as the next request goes out.
        connector = aiohttp.TCPConnector(limit=0, force_close=True)
        async with aiohttp.ClientSession(timeout=timeout, connector=connector) as self.session:
            await asyncio.gather(*(self.work() for _ in range(self.plan.clients)))

    async def work(self) -> None:
        while self.made < self.plan.requests and (self.plan.ends is None or time.time() < self.plan.ends):
            self.made += 1
            await self.one(self.made)

    async def one(self, number: int) -> None:
        action = self.rng.choices(list(ACTIONS), list(ACTIONS.values()))[0]
        url = (self.folder / "address").read_text()
        event = {"action": action, "rid": f"{self.index}-{number}", "began": time.time()}
        try:
            async with asyncio.timeout(self.plan.deadline + 5):
                event |= await getattr(self, action.replace(" ", "_"))(url, event["rid"])
        except TimeoutError:
            event["outcome"] = "stuck"
        except LOST as error:
            event |= {"outcome": "lost", "error": repr(error)[:200]}
        except Unfinished as error:
            event |= {"outcome": "aborted by others", "error": str(error)[:200], "status": error.status}
        event["ended"] = time.time()
        self.log.write(json.dumps(event) + "\n")
        if event["outcome"] == "lost":
            await self.wait_for_a_server()

    async def wait_for_a_server(self) -> None:
        deadline, patience = time.time() + 300, aiohttp.ClientTimeout(total=10)
        while time.time() < deadline:
            url = (self.folder / "address").read_text()
            try:
                async with self.session.get(url + "/model_info", timeout=patience) as reply:
                    if reply.status == 200:
                        return
            except (*LOST, TimeoutError):
                pass
            await asyncio.sleep(0.5)

    # ---- Whole answers ----

    def draw(self, no_draft: bool = False) -> Spec:
        """Now and then what all clients ask at that moment, so that prompts meet their like."""
        specs = [spec for spec in self.plan.specs if not (no_draft and spec.drafts)]
        if self.rng.random() < 0.25:
            return random.Random(f"hot{self.plan.seed}-{time.time() // 4}").choice(specs)
        return self.rng.choice(specs)

    async def ask(self, url: str, rid: str) -> dict:
        spec = self.draw()
        endpoints = ["generate", "generate", "chat"]
        endpoints += ["messages"] * (not spec.films)
        endpoints += ["completions"] * (not spec.shows)
        endpoint, stream = self.rng.choice(endpoints), self.rng.random() < 0.4
        text, seen = await getattr(self, "by_" + endpoint)(url, rid, spec, stream)
        told = {"endpoint": endpoint, "stream": stream, "spec": spec.name}
        return told | self.judged(spec, text, seen)

    def judged(self, spec: Spec, text: str, seen: dict) -> dict:
        verdict = judge(text, seen, spec.alone, spec.resumed)
        event = {
            "outcome": "answered", "verdict": verdict, "tokens": len(text), "prefix": seen["prefix"]["kind"],
            "retractions": seen["retractions"], "compacted": seen["policy"] != "none",
        }  # fmt: skip
        if verdict not in ("equal", "coin toss", "ties"):
            event |= {"text": text, "report": {k: v for k, v in seen.items() if k != "positions"}}
        return event

    async def by_generate(self, url: str, rid: str, spec: Spec, stream: bool) -> tuple[str, dict]:
        body = self.body(spec, rid) | {"stream": stream}
        answer, heard, _ = await self.answer(url, "/generate", body)
        if stream:
            answer = heard[-1]
        finish(answer["meta_info"]["finish_reason"])
        return answer["text"], answer["meta_info"]["kv_policy"]

    def body(self, spec: Spec, rid: str, **sampling) -> dict:
        return spec.request(**sampling) | {"rid": rid, "return_logprob": self.rng.random() < 0.2}

    async def by_chat(self, url: str, rid: str, spec: Spec, stream: bool) -> tuple[str, dict]:
        body = {
            "model": "m", "messages": spec.messages, "max_tokens": spec.max_new_tokens, "temperature": 0,
            "ignore_eos": True, "custom_params": spec.custom, "return_meta_info": not stream,
            "stream": stream, "rid": rid,
        }  # fmt: skip
        answer, heard, _ = await self.answer(url, "/v1/chat/completions", body)
        if not stream:
            [choice] = answer["choices"]
            finish(choice["finish_reason"])
            return choice["message"]["content"], choice["meta_info"]["kv_policy"]
        choices = [choice for chunk in heard for choice in chunk["choices"]]
        finish(next((c["finish_reason"] for c in choices if c.get("finish_reason")), None))
        text = "".join(choice["delta"].get("content") or "" for choice in choices)
        return text, await self.report(url, heard[0]["id"])

    async def by_completions(self, url: str, rid: str, spec: Spec, stream: bool) -> tuple[str, dict]:
        body = {
            "model": "m", "prompt": spec.body["text"], "max_tokens": spec.max_new_tokens, "temperature": 0,
            "ignore_eos": True, "custom_params": spec.custom, "stream": stream, "rid": rid,
        }  # fmt: skip
        answer, heard, _ = await self.answer(url, "/v1/completions", body)
        choices = [choice for chunk in (heard if stream else [answer]) for choice in chunk["choices"]]
        finish(next((c["finish_reason"] for c in choices if c.get("finish_reason")), None))
        text = "".join(choice["text"] for choice in choices)
        return text, await self.report(url, (heard[0] if stream else answer)["id"])

    async def by_messages(self, url: str, rid: str, spec: Spec, stream: bool) -> tuple[str, dict]:
        body = {
            "model": "m", "messages": [for_anthropic(message) for message in spec.messages],
            "max_tokens": spec.max_new_tokens, "temperature": 0, "custom_params": spec.custom,
            "stream": stream,
        }  # fmt: skip
        answer, heard, name = await self.answer(url, "/v1/messages", body)
        if stream:
            text = "".join(chunk.get("delta", {}).get("text", "") for chunk in heard)
        else:
            text = "".join(part.get("text", "") for part in answer["content"])
        if len(text) < len(spec.alone.text):
            raise Unfinished("cut short: this endpoint calls an abort the end of a turn")
        return text, await self.report(url, name)

    async def answer(self, url: str, path: str, body: dict) -> tuple[dict, list[dict], str]:
        """The JSON of an answer, or what a stream said; and the id of its report."""
        async with self.session.post(url + path, json=body) as reply:
            if reply.status != 200:
                raise Unfinished(f"HTTP {reply.status}: {(await reply.text())[:150]}", reply.status)
            name = reply.headers["X-KV-Policy-Request"]
            if not body["stream"]:
                return await reply.json(), [], name
            heard, whole = [], False
            async for line in reply.content:
                if line.startswith(b"data: ") and line.strip() != b"data: [DONE]":
                    heard.append(json.loads(line[6:]))
                whole |= line.startswith(b"data: [DONE]") or line.startswith(b"event: message_stop")
                if heard and "error" in heard[-1]:
                    raise Unfinished(str(heard[-1]["error"])[:150])
        if not whole or not heard:
            raise aiohttp.ClientPayloadError("the stream ended early")
        return {}, heard, name

    async def report(self, url: str, name: str) -> dict:
        async with self.session.get(f"{url}/kv_policy/requests/{name}") as reply:
            if reply.status != 200:
                raise Unfinished(f"no report: HTTP {reply.status}", reply.status)
            return await reply.json()

    async def several(self, url: str, rid: str) -> dict:
        """Choices of one prompt, which share its rows."""
        spec, count = self.draw(no_draft=True), self.rng.randint(2, 4)
        body = self.body(spec, rid, n=count) | {"stream": False}
        if "image_data" in body:
            body["image_data"] = [body["image_data"]]  # the pictures of the first prompt
        answers, *_ = await self.answer(url, "/generate", body)
        verdicts = []
        for answer in answers:
            finish(answer["meta_info"]["finish_reason"])
            verdicts.append(self.judged(spec, answer["text"], answer["meta_info"]["kv_policy"]))
        worst = next((v for v in verdicts if v["verdict"] != "equal"), verdicts[0])
        return worst | {"spec": spec.name, "choices": count, "verdicts": [v["verdict"] for v in verdicts]}

    async def sampled(self, url: str, rid: str) -> dict:
        body = self.body(self.draw(no_draft=True), rid, temperature=1.0)
        await self.answer(url, "/generate", body | {"stream": False})
        return {"outcome": "answered"}

    # ---- Answers that are cut ----

    async def abort(self, url: str, rid: str) -> dict:
        body = self.body(self.draw(), rid, max_new_tokens=200) | {"stream": self.rng.random() < 0.5}

        async def later() -> int:
            await asyncio.sleep(self.rng.random() * 0.6)
            async with self.session.post(url + "/abort_request", json={"rid": rid}) as reply:
                return reply.status

        aside = asyncio.create_task(swallow_lost(later()))
        try:
            async with self.session.post(url + "/generate", json=body) as reply:
                await reply.read()
        finally:
            aborted = await aside
        return {"outcome": "cut", "statuses": [reply.status, aborted]}

    async def hang_up(self, url: str, rid: str) -> dict:
        """In the middle of a stream."""
        body = self.body(self.draw(), rid) | {"stream": True}
        async with self.session.post(url + "/generate", json=body) as reply:
            for _ in range(self.rng.randint(1, 6)):
                await reply.content.readline()
            reply.close()
        return {"outcome": "cut", "status": reply.status}

    async def hang_up_at_once(self, url: str, rid: str) -> dict:
        """Before the first byte of the answer."""
        body = self.body(self.draw(), rid) | {"stream": self.rng.random() < 0.5}
        reader, writer = await connected(url)
        await sent(writer, url, "/generate", json.dumps(body).encode())
        await asyncio.sleep(self.rng.choice([0, 0.01, 0.1]))
        writer.transport.abort()
        return {"outcome": "cut"}

    async def slow_reader(self, url: str, rid: str) -> dict:
        """A kilobyte a second, through the smallest buffers there are."""
        body = self.body(self.draw(), rid) | {"stream": True}
        reader, writer = await connected(url, buffer=1024)
        try:
            await sent(writer, url, "/generate", json.dumps(body).encode())
            status = await status_of(reader)
            for _ in range(20):
                if not await reader.read(1024):
                    break
                await asyncio.sleep(1)
        finally:
            writer.transport.abort()
        return {"outcome": "cut", "status": status}

    # ---- What is wrong in itself ----

    async def malformed(self, url: str, rid: str) -> dict:
        case = self.rng.choice(self.plan.malformed)
        request = self.session.request(case.method, url + case.path, data=case.body, headers=case.headers)
        try:
            async with request as reply:
                await reply.read()
        except TimeoutError:
            return {"case": case.name, "outcome": "stuck"}
        return {"case": case.name, "outcome": outcome(reply.status), "status": reply.status}

    async def raw(self, url: str, rid: str) -> dict:
        case = self.rng.choice(self.plan.raw)
        status = await send_raw(url, case, wait=20)
        return {"case": case.name, "outcome": outcome(status), "status": status}

    # ---- What an operator does ----

    async def pause(self, url: str, rid: str) -> dict:
        mode = self.rng.choice(PAUSES)
        async with self.session.post(url + "/pause_generation", json={"mode": mode}) as paused:
            await paused.read()
        await asyncio.sleep(self.rng.random() * 0.5)
        async with self.session.post(url + "/continue_generation", json={}) as reply:
            await reply.read()
        return {"outcome": "done", "mode": mode, "statuses": [paused.status, reply.status]}

    async def flush(self, url: str, rid: str) -> dict:
        async with self.session.post(url + "/flush_cache") as reply:
            return {"outcome": "done", "status": reply.status}

    async def abort_all(self, url: str, rid: str) -> dict:
        async with self.session.post(url + "/abort_request", json={"abort_all": True}) as reply:
            return {"outcome": "done", "status": reply.status}

    async def look(self, url: str, rid: str) -> dict:
        paths = ["/kv_policy/twins", "/server_info", "/v1/models", f"/kv_policy/requests/{rid}"]
        path = self.rng.choice(paths)
        async with self.session.get(url + path) as reply:
            await reply.read()
        return {"outcome": "done", "status": reply.status}


def outcome(status: int | None) -> str:
    """Of what is wrong in itself; ``status`` is None where nothing came back."""
    if status is None:
        return "closed"
    return "answered" if status == 200 else "refused"


def finish(reason: dict | str | None) -> None:
    """Raises Unfinished unless an answer is whole."""
    reason = reason["type"] if isinstance(reason, dict) else reason
    if reason not in ("length", "stop"):
        raise Unfinished(f"finish reason {reason}")


async def swallow_lost(task: Coroutine[None, None, int]) -> int | None:
    """A lost server is noticed by the request itself."""
    try:
        return await task
    except LOST:
        return None


async def connected(url: str, buffer: int | None = None):
    """A connection of its own; ``buffer`` bytes to receive into."""
    address = urlsplit(url)
    connection = socket.socket()
    connection.setblocking(False)
    if buffer:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
    try:
        await asyncio.get_running_loop().sock_connect(connection, (address.hostname, address.port))
    except OSError:
        connection.close()
        raise
    return await asyncio.open_connection(sock=connection, limit=buffer or 2**16)


async def sent(writer: asyncio.StreamWriter, url: str, path: str, body: bytes) -> None:
    head = f"POST {path} HTTP/1.1\r\nHost: {urlsplit(url).netloc}\r\nContent-Type: application/json\r\n"
    writer.write(head.encode() + b"Content-Length: %d\r\n\r\n" % len(body) + body)
    await writer.drain()


async def status_of(reader: asyncio.StreamReader) -> int | None:
    """The status in the first line of a response."""
    parts = (await reader.readline()).split()
    return int(parts[1]) if len(parts) > 1 and parts[1].isdigit() else None


async def send_raw(url: str, case: Raw, wait: float) -> int | None:
    """What comes back for bytes that are no request: a status, or nothing."""
    reader, writer = await connected(url)
    try:
        writer.write(case.data)
        await writer.drain()
        return None if case.closes else await asyncio.wait_for(status_of(reader), wait)
    except (TimeoutError, ConnectionError):
        return None
    finally:
        writer.transport.abort()


def run(plan: Plan, folder: Path, index: int) -> None:
    """What a client process does."""
    asyncio.run(Clients(plan, folder, index).run())
