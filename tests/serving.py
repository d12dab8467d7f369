"""Real servers for tests and benchmarks: start one, talk to it over HTTP, stop it."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Callable

import requests
from PIL import Image

from sglang_vlkv.tinyvlm import build, checkpoint, tokenizer, weights
from sglang_vlkv.tinyvlm.ask import data_url
from tests.prefork import READ_LATE, Prefork

ROOT = Path(__file__).resolve().parents[1]
POSITIONS = {"kv_report": "positions"}  # custom_params
TRAINED = ROOT / "examples" / "tinyvlm"


def random_checkpoint() -> Path:
    """A random-weight model, built once per version of its builder.

    Its greedy answers vary and never end, and its attention is peaked without having learned
    anything, so equality tests see more in it than in the trained model.
    """
    source = "".join(map(inspect.getsource, (build, checkpoint, tokenizer, weights)))
    version = hashlib.sha256(source.encode()).hexdigest()[:12]
    path = ROOT / ".cache" / f"random-vlm-{version}"
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(dir=path.parent))
        build.build(unfinished)
        try:
            unfinished.replace(path)
        except OSError:  # another process was faster
            shutil.rmtree(unfinished)
    return path


CHECKPOINT = random_checkpoint()

# SGLang's own leak checks: while idle, in every step while busy, and page by page.
LEAK_CHECKS = {
    "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_IDLE": "1",
    "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY": "1",
    "SGLANG_CHECK_KV_PAGE_INVARIANTS": "1",
}

# The scheduler sees the prompts of a batch when it has all of them: see Server.together.
TOGETHER = {"SGLANG_ENABLE_COLOCATED_BATCH_GEN": "1"}

# One thread: a tiny model gains nothing from more, and several servers share a machine's cores.
SMALL_SERVER = {"TORCHDYNAMO_DISABLE": "1", "OMP_NUM_THREADS": "1"}
LAUNCH = ("-m", "sglang.launch_server")


def environment(more: dict[str, str] | None = None) -> dict[str, str]:
    return os.environ | SMALL_SERVER | LEAK_CHECKS | (more or {})


class Server:
    """A SGLang server in a process tree of its own; a context manager.

    Args:
        flags: added to the command line.
        env: added to the environment; SGLang's leak checks are on unless set otherwise.
        command: what Python runs.
    """

    prefork: Prefork | None = None  # if set, starts those that it can

    def __init__(
        self,
        *flags: str,
        model: Path | str = CHECKPOINT,
        env: dict[str, str] | None = None,
        python: str = sys.executable,
        command: tuple[str, ...] = LAUNCH,
        cwd: Path = ROOT,
        start_timeout: float = 240.0,
    ) -> None:
        self._take_port()
        flags = [
            "--model-path", str(model), "--dtype", "float32",
            "--host", "127.0.0.1", "--port", str(self.port), "--mem-fraction-static", "0.3",
            "--random-seed", "0", *flags,
        ]  # fmt: skip
        ordinary = (python, command, cwd) == (sys.executable, LAUNCH, ROOT)
        if self.prefork and ordinary and READ_LATE.issuperset(env or {}):
            self.process = self.prefork.start(flags, self.log_path, env or {})
        else:
            self._run([python, *command, *flags], environment(env), cwd)
        self._await(start_timeout)

    def _take_port(self) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log_path = Path(tempfile.mkstemp(prefix="server-", suffix=".log")[1])

    def _run(self, command: list[str], env: dict[str, str], cwd: Path = ROOT) -> None:
        with self.log_path.open("w") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, env=env, cwd=cwd, start_new_session=True
            )

    def _await(self, timeout: float) -> None:
        try:
            self._wait_until_ready(timeout)
        except BaseException:
            self.stop()
            raise

    def _wait_until_ready(self, timeout: float) -> None:
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise RuntimeError(f"the server ended with {self.process.returncode}:\n{self.log()[-6000:]}")
            try:
                if requests.get(self.url + "/health", timeout=5).status_code == 200:
                    return
            except requests.RequestException:
                pass
            time.sleep(0.5)
        raise TimeoutError(f"no server after {timeout} s:\n{self.log()[-6000:]}")

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_) -> None:
        self.stop()

    def stop(self) -> None:
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self.process.wait(30)

    def alive(self) -> bool:
        return self.process.poll() is None

    def ends(self, within: float) -> bool:
        """Whether it ends by itself in as many seconds."""
        deadline = time.monotonic() + within
        while self.alive() and time.monotonic() < deadline:
            time.sleep(0.2)
        return not self.alive()

    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    def info(self) -> dict:
        return self._checked(requests.get(self.url + "/server_info", timeout=60))

    def post(self, path: str, body: dict | None = None, timeout: float = 300) -> requests.Response:
        return requests.post(self.url + path, json=body, timeout=timeout)

    def generate(
        self,
        text: str,
        images: list[Image.Image] = (),
        video: Path | None = None,
        max_new_tokens: int = 16,
        rid: str | None = None,
        custom: dict | None = None,
        **sampling,
    ) -> dict:
        """One greedy answer of ``/generate``; raises on an HTTP error."""
        return self._checked(
            self.post("/generate", self.body(text, images, video, max_new_tokens, rid, custom, **sampling))
        )

    @staticmethod
    def body(
        text: str,
        images: list[Image.Image] = (),
        video: Path | None = None,
        max_new_tokens: int = 16,
        rid: str | None = None,
        custom: dict | None = None,
        **sampling,
    ) -> dict:
        """The JSON of ``/generate`` for a chat prompt with images, video and text, in this order."""
        prompt = user_turn(text, len(images), bool(video))
        params = {"temperature": 0.0, "max_new_tokens": max_new_tokens, "ignore_eos": True} | sampling
        if custom:
            params["custom_params"] = custom
        body = {"text": prompt, "sampling_params": params, "return_logprob": True, "top_logprobs_num": 2}
        if images:
            body["image_data"] = [data_url(image) for image in images]
        if video:
            body["video_data"] = str(video)
        if rid:
            body["rid"] = rid
        return body

    def many(self, bodies: list[dict], workers: int = 64) -> list[dict]:
        """Answers of ``/generate`` to all ``bodies`` at once, in their order."""
        with ThreadPoolExecutor(workers) as pool:
            return list(pool.map(lambda body: self._checked(self.post("/generate", body)), bodies))

    def together(self, bodies: list[dict]) -> list[dict]:
        """Answers of ``/generate`` to all ``bodies``, whose requests the scheduler gets in one piece, in
        their order: none of them has begun before the last has come. Of a server with ``TOGETHER`` in its
        environment, and bodies of the same keys."""
        batch = {key: [body[key] for body in bodies] for key in bodies[0]}
        return self._checked(self.post("/generate", batch))

    def flush(self) -> None:
        """Empties the radix cache; waits until the server is idle."""
        deadline = time.monotonic() + 60
        while requests.post(self.url + "/flush_cache", timeout=60).status_code != 200:
            if time.monotonic() > deadline:
                raise TimeoutError(f"the server did not become idle:\n{self.log()[-4000:]}")
            time.sleep(0.1)

    @staticmethod
    def _checked(response: requests.Response) -> dict:
        if response.status_code != 200:
            raise RuntimeError(f"HTTP {response.status_code}: {response.text[:2000]}")
        return response.json()


def interrupted(server: Server, bodies: list[dict], interrupt: Callable[[], None]) -> list[dict]:
    """Answers to ``bodies`` at once; ``interrupt`` is called when all of them have begun to decode."""
    decoding = Barrier(len(bodies), interrupt)

    def one(body: dict) -> dict:
        url, body = server.url + "/generate", body | {"stream": True}
        with requests.post(url, json=body, stream=True, timeout=300) as response:
            lines = (line for line in response.iter_lines() if line)
            next(lines), next(lines)  # the second token comes from kept rows
            decoding.wait(300)
            *_, last, _ = lines  # b"data: [DONE]" ends the stream
        return json.loads(last.removeprefix(b"data: "))

    with ThreadPoolExecutor(len(bodies)) as pool:
        return list(pool.map(one, bodies))


def user_turn(text: str, num_images: int, has_video: bool) -> str:
    """The user's message in the chat template, with a placeholder per picture and video before its
    text, and the beginning of the answer."""
    media = "<|vision_start|><|image_pad|><|vision_end|>" * num_images
    media += "<|vision_start|><|video_pad|><|vision_end|>" * has_video
    return f"<|im_start|>user\n{media}{text}<|im_end|>\n<|im_start|>assistant\n"


def user_message(text: str, images=(), video=None) -> dict:
    """The same for OpenAI's chat endpoint."""
    parts = [{"type": "image_url", "image_url": {"url": data_url(image)}} for image in images]
    if video:
        parts.append({"type": "video_url", "video_url": {"url": str(video)}})
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}


def for_anthropic(message: dict) -> dict:
    """A message of the OpenAI API as the Anthropic API writes it."""
    if isinstance(message["content"], str):
        return message
    parts = []
    for part in message["content"]:
        if part["type"] == "image_url":
            data = part["image_url"]["url"].partition(",")[2]
            source = {"type": "base64", "media_type": "image/png", "data": data}
            part = {"type": "image", "source": source}
        parts.append(part)
    return message | {"content": parts}


def install_entry_point(folder: Path, group: str, name: str, value: str) -> None:
    """What pip would leave of a package with one entry point, for processes with ``folder`` on
    their ``PYTHONPATH``."""
    info = folder / f"{name}-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0\n")
    (info / "entry_points.txt").write_text(f"[{group}]\n{name} = {value}\n")


def output_ids(answer: dict) -> list[int]:
    return answer["output_ids"]


def report(answer: dict) -> dict:
    return answer["meta_info"]["kv_policy"]


def free_port() -> int:
    """One that nobody is given meanwhile: the system takes ports for others from 32768 up."""
    while True:
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port := random.randrange(20_000, 32_000)))
            except OSError:
                continue
            return port
