"""A storm over one server: clients, kills and restarts, memory sampled, and what is left after it."""

from __future__ import annotations

import json
import multiprocessing
import re
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Callable, Iterator

import psutil
import requests

from tests.chaos import client
from tests.chaos.plan import Malformed, Plan
from tests.conversation import twins
from tests.serving import Server

KILLS = ("scheduler", "all")
ROLES = ("tokenizer", "scheduler", "detokenizer")
SERVERS_END = 30.0  # seconds in which the others end when one of a server's processes was killed


@dataclass
class Storm:
    """What happened.

    Attributes:
        events: a request each, as the clients saw it.
        outages: when the server was killed, by which ``KILLS``, when it was back, and whether its other
            processes had to be killed too.
        memory: per server in turn, per process, ``[seconds since its start, resident bytes]``.
        crashes: what the log of a server says that ended by itself.
        calm: what is left after the storm.
    """

    seconds: float = 0.0
    events: list[dict] = field(default_factory=list)
    outages: list[dict] = field(default_factory=list)
    memory: list[dict[str, list[list[float]]]] = field(default_factory=list)
    crashes: list[str] = field(default_factory=list)
    retractions: int = 0
    calm: dict = field(default_factory=dict)


class Supervisor:
    """Keeps one server up, at the address that the clients read."""

    def __init__(self, start: Callable[[], Server], folder: Path) -> None:
        self.storm, self.folder, self._start = Storm(), folder, start
        self.server: Server | None = None
        self._lock = threading.Lock()
        self.start()

    def start(self) -> None:
        self.server = self._start()
        self._began, self._processes = time.time(), {}
        self.storm.memory.append(self._processes)
        unfinished = self.folder / "address.new"
        unfinished.write_text(self.server.url)
        unfinished.replace(self.folder / "address")

    def stop(self) -> None:
        self.server.stop()

    def family(self) -> dict[str, psutil.Process]:
        """The server's processes by role; it starts its scheduler first, then its detokenizer."""
        parent = psutil.Process(self.server.process.pid)
        children = sorted(parent.children(), key=psutil.Process.create_time)
        children = [child for child in children if not tracks_resources(child)]
        return dict(zip(ROLES, [parent, *children], strict=False))

    def sample(self) -> None:
        """Resident memory of every process."""
        try:
            family = self.family()
            for role, process in family.items():
                point = [round(time.time() - self._began, 1), process.memory_info().rss]
                self._processes.setdefault(role, []).append(point)
        except psutil.Error:
            pass  # it has just been killed

    def watch(self, until: Callable[[], bool], every: float) -> None:
        """Samples, and starts the server again where it ended by itself."""
        while not until():
            time.sleep(every)
            if not self.server.alive():
                self.storm.crashes.append(self.server.log()[-3000:])
                self._restart({"what": "by itself", "at": time.time()})
            self.sample()

    def kill(self, what: str) -> None:
        """SIGKILL of the scheduler, or of all processes at once, and a new server."""
        outage = {"what": what, "at": time.time()}
        if what == "scheduler":
            scheduler = self.family()["scheduler"]
            if scheduler.status() == psutil.STATUS_ZOMBIE:
                self.storm.crashes.append(self.server.log()[-3000:])
            scheduler.kill()
            outage["others ended"] = self.server.ends(SERVERS_END)
        self._restart(outage)

    def _restart(self, outage: dict) -> None:
        self._count()
        self.server.stop()
        self.start()
        self.storm.outages.append(outage | {"back": time.time()})

    def _count(self) -> None:
        log = self.server.log()
        self.storm.retractions += sum(int(n) for n in re.findall(r"#retracted_reqs: (\d+)", log))
        self.storm.calm.setdefault("leaks in logs", 0)
        self.storm.calm["leaks in logs"] += log.lower().replace("leak_", "").count("leak")

    def settle(self) -> None:
        """Waits until the server is idle, empties its cache, and notes what is left."""
        server, calm = self.server, self.storm.calm
        server.post("/continue_generation", {})
        started = time.time()
        try:
            server.flush()
            calm["flushed"] = True
        except TimeoutError:
            calm["flushed"] = False
        calm["seconds until idle"] = round(time.time() - started, 1)
        time.sleep(1.5)  # the idle check runs when the loop comes round
        self._count()
        calm["alive"] = server.alive()
        if not calm["alive"]:
            return
        left = twins(server)
        calm |= {"twins": left["twins"], "twin slots": left["slots"], "hits": left["hits"]}
        calm |= slots(server)


def tracks_resources(process: psutil.Process) -> bool:
    """Whether it is multiprocessing's, which serves nobody."""
    try:
        return "resource_tracker" in " ".join(process.cmdline())
    except psutil.ZombieProcess:
        return False


def slots(server: Server) -> dict:
    """Of the pool: how many there are and how many are used, and the requests that hold them."""
    [load] = requests.get(server.url + "/v1/loads?include=all", timeout=60).json()["loads"]
    names = {
        "slots": "max_total_num_tokens", "used slots": "num_used_tokens", "running": "num_running_reqs",
        "waiting": "num_waiting_reqs",
    }  # fmt: skip
    return {ours: load[theirs] for ours, theirs in names.items()}


@contextmanager
def clients(plan: Plan, folder: Path, processes: int) -> Iterator[list]:
    """Client processes at work; they are gone afterwards, whatever happened."""
    context = multiprocessing.get_context("fork")
    running = [context.Process(target=client.run, args=(plan, folder, i)) for i in range(processes)]
    for process in running:
        process.start()
    try:
        yield running
    finally:
        for process in running:
            if process.is_alive():
                process.kill()
            process.join()


def rage(
    start: Callable[[], Server], plan: Plan, folder: Path, processes: int, kills: list[float], every: float
) -> Storm:
    """The whole storm.

    Args:
        start: starts the server.
        kills: seconds after which it is killed, one way after the other.
        every: seconds between two looks at its memory.
    """
    supervisor = Supervisor(start, folder)
    began = time.time()
    try:
        with clients(plan, folder, processes) as running:
            for index, after in enumerate(kills):
                supervisor.watch(lambda: time.time() >= began + after or ended(running), min(every, 0.5))
                if not ended(running):
                    supervisor.kill(KILLS[index % len(KILLS)])
            supervisor.watch(lambda: ended(running), every)
            failed = [process.exitcode for process in running if process.exitcode]
            if failed:
                raise RuntimeError(f"client processes failed: {failed}")
        supervisor.storm.seconds = time.time() - began
        supervisor.settle()
    finally:
        supervisor.stop()
    for path in sorted(folder.glob("events-*.jsonl")):
        supervisor.storm.events += [json.loads(line) for line in path.read_text().splitlines()]
    return supervisor.storm


def ended(running: list) -> bool:
    return not any(process.is_alive() for process in running)


def probe(server: Server, case: Malformed, patience: float = 60.0) -> int | str:
    """The status of a malformed request; ``"ended"`` where it brings the server down."""
    try:
        reply = requests.request(
            case.method, server.url + case.path, data=case.body, headers=case.headers, timeout=patience
        )
    except requests.RequestException as error:
        return "ended" if server.ends(10) else type(error).__name__
    return reply.status_code
