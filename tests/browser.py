"""A person in a browser before the page of examples/video_chat, and what stands behind it."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import requests
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

from examples.video_chat import client
from tests.serving import ROOT, Server, free_port

BROWSER = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--disable-dev-shm-usage", "--window-size=1400,1000",
)  # fmt: skip


def start(binary: str, driver: str, profile: Path) -> webdriver.Chrome:
    """A headless browser; ``get_log("browser")`` is its console."""
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for flag in (*BROWSER, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    return webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))


class Relay:
    """The line between the app and the server. It can be down, or fail in the middle of an answer.

    Attributes:
        events: how many events of a stream pass; None for all.
        hold: whether the line is silent after them; otherwise it is cut.
        left: whether the app closed a held line.
    """

    def __init__(self, server_port: int) -> None:
        self.server_port, self.port = server_port, free_port()
        self.up()
        self.mend()

    def up(self) -> None:
        self.listener = socket.create_server(("127.0.0.1", self.port))
        threading.Thread(target=self._accept, args=(self.listener,), daemon=True).start()

    def down(self) -> None:
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()

    def mend(self) -> None:
        """Lets everything pass again."""
        self.events, self.hold, self.left = None, False, False
        if self.listener.fileno() == -1:
            self.up()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                near, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=self._pass, args=(near,), daemon=True).start()

    def _pass(self, near: socket.socket) -> None:
        closed = threading.Event()
        # The app may leave at any time.
        with near, socket.create_connection(("127.0.0.1", self.server_port)) as far, suppress(OSError):
            threading.Thread(target=self._pass_request, args=(near, far, closed), daemon=True).start()
            passed = b""
            while data := far.recv(65536):
                before, passed = len(passed), passed + data
                events = passed.split(b"data: ")[1:]
                if self.events is None or len(events) <= self.events:
                    near.sendall(data)
                    continue
                end = len(passed) - sum(len(b"data: " + event) for event in events[self.events :])
                near.sendall(passed[before:end])
                if self.hold:
                    self.left = closed.wait(30)
                else:
                    near.shutdown(socket.SHUT_RDWR)
                return

    @staticmethod
    def _pass_request(near: socket.socket, far: socket.socket, closed: threading.Event) -> None:
        with suppress(OSError):
            while data := near.recv(65536):
                far.sendall(data)
        closed.set()


class App:
    """The app in a process of its own, on ``url``; ``relay`` is between it and the server."""

    def __init__(self, server: Server, max_mb: float) -> None:
        self.relay, port = Relay(server.port), free_port()
        self.url = f"http://127.0.0.1:{port}"
        self.server = f"http://127.0.0.1:{self.relay.port}"
        options = ["--server", self.server, "--port", str(port), "--max-mb", str(max_mb)]
        self.process = subprocess.Popen([sys.executable, "-m", "examples.video_chat.app", *options], cwd=ROOT)

    def __enter__(self) -> App:
        for _ in range(300):
            assert self.process.poll() is None, "the app ended"
            with suppress(requests.ConnectionError):
                requests.get(self.url + "/config", timeout=5)
                return self
            time.sleep(0.1)
        self.__exit__()
        raise TimeoutError("the app does not answer")

    def __exit__(self, *_) -> None:
        self.process.terminate()
        self.process.wait(30)
        self.relay.down()


class Page:
    """What a person sees and does."""

    def __init__(self, driver: webdriver.Chrome, server: Server) -> None:
        self.driver, self.server = driver, server

    def all(self, selector: str) -> list:
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def at(self, selector: str):
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def wait(self, condition):
        return WebDriverWait(self.driver, 60, poll_frequency=0.05).until(lambda _: condition())

    def open(self, *paths) -> None:
        before = len(self.all("#pending li"))
        self.at("#files").send_keys("\n".join(map(str, paths)))
        self.wait(lambda: len(self.all("#pending li")) == before + len(paths))

    def seek(self, seconds: float) -> None:
        self.driver.execute_script("document.getElementById('video').currentTime = arguments[0]", seconds)
        self.wait(lambda: self.at("#video").get_property("currentTime") == seconds)
        self.wait(self.at("#grab").is_enabled)

    def send(self, question: str) -> None:
        self.at("#question").send_keys(question, Keys.ENTER)

    def ask(self, question: str) -> tuple[str, dict]:
        """The answer that the page shows, and the server's own report on it."""
        turn = len(self.all("#turns li")) + 1
        self.send(question)
        [button] = self.wait(lambda: self.all(f"#turns li:nth-child({turn}) .summary"))
        self.wait(self.at("#ask").is_displayed)
        route = f"/kv_policy/requests/{button.get_attribute('data-id')}"
        seen = requests.get(self.server.url + route, timeout=10).json()
        assert button.text == client.summary(seen)
        return self.at(f"#turns li:nth-child({turn}) .answer").text, seen

    def problem(self) -> str:
        self.wait(lambda: self.at("#problem").is_displayed())
        return self.at("#problem").text

    def facts(self) -> dict[str, tuple[str, str]]:
        """Field of the report -> how it is written, and exactly."""
        facts = self.all("#report dd")
        return {d.get_attribute("data-field"): (d.text, d.get_attribute("title")) for d in facts}

    def charts(self) -> dict[str, dict[str, tuple[str, float]]]:
        """Title -> name -> the number beside the bar, and the share of its track that it fills."""
        found = {}
        for figure in self.all("#report figure"):
            texts = [span.text for span in figure.find_elements(By.TAG_NAME, "span")]
            bars = figure.find_elements(By.CLASS_NAME, "bar")
            tracks = figure.find_elements(By.CLASS_NAME, "track")
            shares = [bar.rect["width"] / track.rect["width"] for bar, track in zip(bars, tracks)]
            title = figure.find_element(By.TAG_NAME, "figcaption").text
            found[title] = dict(zip(texts[::2], zip(texts[1::2], shares), strict=True))
        return found
