"""Chromium without a screen, driven over its debugging protocol; found on PATH or not at all."""

from __future__ import annotations

import base64
import contextlib
import json
import shutil
import subprocess
import tempfile
import time
import urllib.request
from typing import TYPE_CHECKING, Any

from websockets.sync.client import connect

if TYPE_CHECKING:
    from collections.abc import Iterator

    from websockets.sync.client import ClientConnection

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
WAIT_S = 60.0
KEYS = {"Tab": (9, ""), "Enter": (13, "\r"), " ": (32, " ")}


def find() -> str | None:
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Page:
    """One tab."""

    def __init__(self, socket: ClientConnection) -> None:
        self._socket = socket
        self._n = 0
        self.urls: list[str] = []  # of everything that it asked for
        self.problems: list[str] = []  # exceptions, and what its policy forbade
        for domain in ("Page", "Runtime", "Network", "DOM", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        self._n += 1
        self._socket.send(json.dumps({"id": self._n, "method": method, "params": params}))
        while True:
            message = json.loads(self._socket.recv(timeout=WAIT_S))
            self._note(message)
            if message.get("id") == self._n:
                assert "error" not in message, message
                return message["result"]

    def _note(self, message: dict[str, Any]) -> None:
        match message.get("method"):
            case "Network.requestWillBeSent":
                self.urls.append(message["params"]["request"]["url"])
            case "Network.webSocketCreated":
                self.urls.append(message["params"]["url"])
            case "Runtime.exceptionThrown":
                self.problems.append(json.dumps(message["params"])[:500])
            case "Log.entryAdded":
                entry = message["params"]["entry"]
                if entry["level"] == "error":
                    self.problems.append(entry["text"])

    def run(self, script: str) -> Any:
        """The value of an expression."""
        result = self.call(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def wait_for(self, condition: str, seconds: float = WAIT_S) -> None:
        end = time.perf_counter() + seconds
        while not self.run(condition):
            assert time.perf_counter() < end, (condition, self.run("document.body.innerText"))
            time.sleep(0.05)

    def goto(self, url: str) -> None:
        self.call("Page.navigate", url=url)
        self.wait_for("document.readyState === 'complete' && !!document.getElementById('mic')")

    def press(self, key: str) -> None:
        code, text = KEYS[key]
        common = {"key": key, "windowsVirtualKeyCode": code}
        self.call("Input.dispatchKeyEvent", type="keyDown", text=text, **common)
        self.call("Input.dispatchKeyEvent", type="keyUp", **common)

    def choose_file(self, selector: str, path: str) -> None:
        document = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=document, selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", files=[path], nodeId=node)

    def screenshot(self) -> bytes:
        return base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"])


@contextlib.contextmanager
def open_page(fake_microphone: str = "") -> Iterator[Page]:
    """A tab of a fresh browser whose microphone plays a wav file."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [find(), "--headless=new", "--no-sandbox", "--remote-debugging-port=0"]
        command += [f"--user-data-dir={profile}", "--no-first-run", "--disable-gpu"]
        command += ["--disable-background-networking", "--disable-dev-shm-usage", "--mute-audio"]
        command += ["--disable-component-update", "--window-size=900,700"]
        if fake_microphone:
            command += ["--use-fake-ui-for-media-stream", "--use-fake-device-for-media-stream"]
            command += [f"--use-file-for-fake-audio-capture={fake_microphone}"]
        with subprocess.Popen(
            [*command, "about:blank"], stderr=subprocess.PIPE, text=True
        ) as chrome:
            try:
                yield from _attach(chrome)
            finally:
                chrome.terminate()
                chrome.wait(WAIT_S)
                chrome.stderr.close()


def _attach(chrome: subprocess.Popen[str]) -> Iterator[Page]:
    for line in chrome.stderr:
        if "DevTools listening on ws://" in line:
            address = line.split("ws://")[1].split("/")[0]
            break
    else:
        raise AssertionError("the browser did not start")
    with urllib.request.urlopen(f"http://{address}/json/list", timeout=WAIT_S) as answer:
        tab = next(t for t in json.load(answer) if t["type"] == "page")
    with connect(tab["webSocketDebuggerUrl"], max_size=None, proxy=None) as socket:
        yield Page(socket)
