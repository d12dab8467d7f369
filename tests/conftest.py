"""Servers that several modules share; each is started at its first use."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import defaultdict

import pytest
import torch

from tests.equality import largest_deviation
from tests.listening import Watched, watch
from tests.prefork import Prefork
from tests.prompts import draw_prompt
from tests.serving import ROOT, TOGETHER, TRAINED, Server, environment, free_port

POOL = ("--max-total-tokens", "24000")


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(items):
    """Under pytest-xdist: one worker holds the servers that modules share, and a module with servers of
    its own stays in one piece; everything else goes wherever there is room."""
    shared = {"stock", "vlcache", "any_policy", "fleet"}
    modules = defaultdict(list)
    for item in items:
        modules[item.module].append(item)
    for module, of_module in modules.items():
        if any(shared.intersection(item.fixturenames) for item in of_module):
            group = "shared servers"
        elif hasattr(module, "Server") or any("trained" in item.fixturenames for item in of_module):
            group = module.__name__
        else:
            continue
        for item in of_module:
            item.add_marker(pytest.mark.xdist_group(group))


@pytest.fixture(scope="session", autouse=True)
def prefork():
    """Most servers start in a third of the time; ``VLKV_PREFORK=0`` starts each by its own command.

    What drives an accelerator cannot be forked.
    """
    if os.environ.get("VLKV_PREFORK") == "0" or torch.accelerator.is_available():
        yield
        return
    Server.prefork = Prefork(ROOT, environment())
    yield
    Server.prefork.stop()


@pytest.fixture(scope="module")
def one_thread():
    """For small shapes: threads cost more than they bring."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def stock():
    """SGLang on our CPU platform without the plugin that brings the policies."""
    with Server(*POOL, env={"SGLANG_PLUGINS": "vlkv_cpu"}) as server:
        yield server
        assert server.alive(), server.log()[-4000:]


@pytest.fixture(scope="session")
def vlcache():
    """VL-Cache at its defaults, a budget of 10%."""
    with Server(*POOL, "--kv-policy", "vlcache") as server:
        yield server
        assert server.alive(), server.log()[-4000:]


@pytest.fixture(scope="session")
def any_policy(tmp_path_factory):
    """Stays out of the way unless a request asks for a policy; examples/policy is installed beside it."""
    source, installed = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("installed")
    shutil.copytree(ROOT / "examples" / "policy", source, dirs_exist_ok=True)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--target", str(installed), str(source)], check=True, timeout=300)
    env = {"PYTHONPATH": str(installed)}
    allow = '{"allow_override": true}'
    with Server(*POOL, "--kv-policy", "none", "--kv-policy-config", allow, env=env) as server:
        yield server
        assert server.alive(), server.log()[-4000:]


@pytest.fixture(scope="module")
def trained():
    """The trained model, as ``make serve`` serves it; a server of the module's own."""
    flags = ("--kv-policy", "vlkv", "--kv-policy-config", '{"allow_override": true}')
    with Server(*POOL, *flags, model=TRAINED) as server:
        yield server
        assert server.alive(), server.log()[-4000:]


TIGHT = ("--schedule-conservativeness", "0.01")
# By name: slots of the pool, --kv-policy-config beside allow_override, flags, environment.
FLEET = {
    "prefer": (24000, {"twins": "prefer"}, (), {}),
    "fallback": (3000, {"twins": "fallback"}, (*TIGHT, "--enable-metrics"), {}),
    "resume": (6000, {"twins": "resume", "max_twins": 0.1}, TIGHT, {"SGLANG_TEST_RETRACT": "1"}),
    "off": (3000, {"twins": "off"}, TIGHT, {}),
    "mixed": (3000, {"twins": "prefer"}, (*TIGHT, "--enable-mixed-chunk", "--chunked-prefill-size", "128"), {}),
    "no overlap": (
        3000,
        {"twins": "fallback"},
        (*TIGHT, "--disable-overlap-schedule", "--chunked-prefill-size", "96"),
        {},
    ),
}  # fmt: skip


class Fleet:
    """One server for each way to keep twins; requests may choose their policy. All publish live events.

    What the others are compared with, "prefer" in a large pool, stays once it is up. Of the others
    one runs at a time: memory is short.
    """

    def __init__(self) -> None:
        self._servers: dict[str, Server] = {}

    def __getitem__(self, name: str) -> Server:
        if name not in self._servers:
            for other in set(self._servers) - {"prefer"} if name != "prefer" else ():
                self.stop(other)
            size, config, flags, env = FLEET[name]
            config = json.dumps({"allow_override": True} | config)
            pool = ("--max-total-tokens", str(size), "--decode-log-interval", "1")
            events = ("--kv-events-endpoint", str(free_port()))
            flags = (*pool, *events, "--kv-policy", "vlcache", "--kv-policy-config", config, *flags)
            self._servers[name] = Server(*flags, env=TOGETHER | env)
        return self._servers[name]

    def stop(self, name: str) -> None:
        server = self._servers.pop(name)
        alive, log = server.alive(), server.log()
        server.stop()
        assert alive, f"{name}: {log[-4000:]}"

    def stop_all(self) -> None:
        try:
            for name in list(self._servers):
                self.stop(name)
        finally:
            for server in self._servers.values():
                server.stop()


@pytest.fixture(scope="session")
def fleet():
    servers = Fleet()
    try:
        yield servers
    finally:
        servers.stop_all()


@pytest.fixture(scope="session")
def watched(fleet, tmp_path_factory) -> Watched:
    """A tight server under watch from an empty cache to the next flush."""
    recording = tmp_path_factory.mktemp("watched") / "events.jsonl"
    return watch(lambda: fleet["fallback"], FLEET["fallback"][0], recording)


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    """A browser, of which ``get_log("browser")`` is the console."""
    from tests import browser

    paths = shutil.which("chromium"), shutil.which("chromedriver")
    if not all(paths):
        pytest.skip("no browser: apt-get install chromium chromium-driver")
    driver = browser.start(*paths, tmp_path_factory.mktemp("browser"))
    yield driver
    driver.quit()


@pytest.fixture(scope="session")
def hugging_face():
    from tests.hf_reference import Reference

    return Reference()


@pytest.fixture(scope="session")
def tolerance(stock, hugging_face) -> float:
    """Least margin between two tokens, in nats, that rounding cannot turn around.

    Measured: four times the largest deviation of SGLang's logprobs from Hugging Face's, both in
    float32, over prompts of every kind; at least four times what rounding may do to them, which two
    libraries that happen to agree do not show.
    """
    deviation = rounding = 0.0
    for kind in ("image", "images", "text"):
        prompt = draw_prompt(1000, kind)
        answer = stock.generate(prompt.text, prompt.images)
        deviation = max(deviation, largest_deviation(hugging_face.generate(prompt, 16), answer))
        rounding = max(rounding, hugging_face.rounding(prompt, 16))
    print(f"largest logprob deviation of stock SGLang from Hugging Face: {deviation:.2e}, {rounding:.2e}")
    assert 0 < deviation < 1e-3 and 0 < rounding < 1e-3
    return 4 * max(deviation, rounding)
