"""Servers forked from a process that has SGLang imported already, which is most of a start's work.

Run as a program by ``Prefork``, it imports what SGLang's processes import before they load plugins and
forks for each server. A server's process leaves forks of itself aside, which stand in for the
interpreters that multiprocessing spawns: they run the same code in the same environment with the same
files, and load their plugins themselves. Imports apart nothing is shared, and of SGLang nothing is patched.
"""

from __future__ import annotations

import fcntl
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
from importlib import import_module
from multiprocessing import util
from pathlib import Path

IMPORTS = ("entrypoints.http_server", "managers.scheduler", "managers.detokenizer_manager", "models.registry")
# What SGLang reads when it loads plugins, or later; other variables take effect on import.
READ_LATE = {
    "PYTHONPATH", "SGLANG_PLUGINS", "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY", "SGLANG_CPU_OMP_THREADS_BIND",
    "SGLANG_ENABLE_COLOCATED_BATCH_GEN",
}  # fmt: skip


class Forked:
    """As much of ``subprocess.Popen`` as ``Server`` needs, for a process that is not our child."""

    def __init__(self, pid: int) -> None:
        self.pid, self._handle = pid, os.pidfd_open(pid)
        self.returncode = "a status that its parent alone knows"

    def poll(self) -> str | None:
        return self.returncode if self._ended(0) else None

    def wait(self, timeout: float) -> None:
        if not self._ended(timeout):
            raise subprocess.TimeoutExpired(f"process {self.pid}", timeout)

    def _ended(self, timeout: float) -> bool:
        return bool(select.select([self._handle], [], [], timeout)[0])


class Prefork:
    """Starts servers in ``cwd`` and ``env``; imports at the first, ends with the process that made it."""

    def __init__(self, cwd: Path, env: dict[str, str]) -> None:
        self._cwd, self._env, self._process = cwd, env, None

    def start(self, flags: list[str], log: Path, env: dict[str, str]) -> Forked:
        """``python -m sglang.launch_server`` with ``flags``, in a session of its own.

        Args:
            env: of READ_LATE.
        """
        assert env.keys() <= READ_LATE
        if self._process is None:
            self._control, theirs = pair()
            command = [sys.executable, __file__, str(theirs.fileno())]
            files = [theirs.fileno()]
            self._process = subprocess.Popen(command, cwd=self._cwd, env=self._env, pass_fds=files)
            theirs.close()
        with log.open("w") as file:
            send(self._control, [flags, env], [file.fileno()])
        return Forked(int(self._control.recv(32)))

    def stop(self) -> None:
        if self._process is not None:
            self._control.close()
            self._process.wait(30)


def pair() -> tuple[socket.socket, socket.socket]:
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def send(control: socket.socket, message: list, files: list[int]) -> None:
    socket.send_fds(control, [json.dumps(message).encode()], files)


def receive(control: socket.socket) -> tuple[list, list[int]]:
    message, files, *_ = socket.recv_fds(control, 1 << 20, 32)
    if not message:
        os._exit(0)  # nobody is left to ask for anything
    return json.loads(message), files


def move(files: list[int], numbers: list[int]) -> None:
    """Opens each of ``files`` under its number instead, inheritable."""
    aside = [fcntl.fcntl(file, fcntl.F_DUPFD, 500) for file in files]
    for file, number in zip(aside, numbers, strict=True):
        os.dup2(file, number)
    for file in {*files, *aside} - {*numbers}:
        os.close(file)


def fork_servers(control: socket.socket) -> list[str]:
    """Returns in the servers' processes only: their flags."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them
    while True:
        (flags, env), files = receive(control)
        if pid := os.fork():
            os.close(files[0])
            control.send(str(pid).encode())
            continue
        control.close()
        os.setsid()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.dup2(files[0], 2)
        move(files, [1])
        os.environ.update(env)
        sys.path[1:1] = filter(None, env.get("PYTHONPATH", "").split(os.pathsep))
        return flags


def stand_in(control: socket.socket, spawned: int) -> None:
    """Waits to be told what an interpreter would be, and is that; some spawn others in turn."""
    leave_stand_ins([0] * spawned)
    (arguments, environment, numbers), files = receive(control)
    control.close()
    move(files, numbers)
    os.environ.clear()
    os.environ.update(environment)
    code = arguments.index("-c") + 1
    sys.argv = ["-c", *arguments[code + 1 :]]
    exec(arguments[code], {"__name__": "__main__"})


def leave_stand_ins(spawned: list[int]) -> None:
    """One for each process that this one will spawn; the numbers say how many those may spawn."""
    waiting = []
    for number in spawned:
        ours, theirs = pair()
        pid = os.fork()
        if pid == 0:
            for _, other in waiting:
                other.close()
            ours.close()
            stand_in(theirs, number)
        theirs.close()
        waiting.append((pid, ours))
    spawn = util.spawnv_passfds

    def spawn_or_use(path, arguments: list, files: list[int]) -> int:
        if "--multiprocessing-fork" not in arguments or not waiting:
            return spawn(path, arguments, files)
        pid, control = waiting.pop(0)
        with control:
            arguments = [os.fsdecode(argument) for argument in arguments]
            send(control, [arguments, dict(os.environ), list(files)], list(files))
        return pid

    util.spawnv_passfds = spawn_or_use


def serve(flags: list[str]) -> None:
    def number(flag: str) -> int:
        return int(flags[flags.index(flag) + 1]) if flag in flags else 1

    ranks, replicas = number("--tp-size"), number("--dp-size")
    # Schedulers and a detokenizer; replicas have a controller, which spawns the schedulers.
    leave_stand_ins([0] * (ranks + 1) if replicas == 1 else [ranks * replicas] * 2)
    sys.argv = ["launch_server.py", *flags]
    runpy.run_module("sglang.launch_server", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    sys.path[0] = os.getcwd()  # as under ``python -m``
    for name in IMPORTS:
        import_module(f"sglang.srt.{name}")
    serve(fork_servers(socket.socket(fileno=int(sys.argv[1]))))
