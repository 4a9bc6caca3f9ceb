"""A server on a real socket, and clients that are not ours to talk to it."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import struct
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

import numpy as np
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from sparqle_stream import messages

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from websockets.sync.client import ClientConnection

    from sparqle_stream.engine import Engine

SAMPLE_RATE_HZ = 16_000
WAIT_S = 60.0  # for anything; far more than it takes


@contextmanager
def serving(engine: Engine, **settings: Any) -> Iterator[str]:
    from sparqle_stream import server

    settings = {"port": 0, "drain_s": 0.0} | settings
    with server.background(engine, server.ServerConfig(**settings)) as url:
        yield url


def wait_until(is_true: Callable[[], bool]) -> None:
    """Polls; a loaded machine may take long, so only what never happens fails."""
    end = time.monotonic() + WAIT_S
    while not is_true():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.005)


def s16(pcm) -> bytes:
    return np.round(pcm * 32_768).clip(-32_768, 32_767).astype("<i2").tobytes()


def open_stream(url: str, **query: Any) -> ClientConnection:
    """A websocket to /v1/stream, as some other program would make it."""
    text = urlencode(query)
    return connect(f"{url}/v1/stream?{text}", open_timeout=WAIT_S, compression=None, proxy=None)


def rest(websocket: ClientConnection) -> list[messages.Event]:
    """All events until the server closes, whatever the close code."""
    return [messages.from_json(frame) for frame in frames(websocket)]


def frames(websocket: ClientConnection) -> Iterator[str]:
    """All frames until the server closes."""
    with contextlib.suppress(ConnectionClosed):
        while True:
            yield websocket.recv(timeout=WAIT_S)


def get(url: str, path: str) -> tuple[int, dict[str, Any]]:
    """Status and JSON of a plain HTTP request to a server's ws:// address."""
    host, port = url.removeprefix("ws://").split(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=WAIT_S)
    with contextlib.closing(connection):
        connection.request("GET", path)
        response = connection.getresponse()
        body = response.read()
        is_json = response.headers["Content-Type"] == "application/json"
        return response.status, json.loads(body) if is_json else {}


def run(url: str, data: bytes, packet: int = 6_400, **query: Any) -> list[messages.Event]:
    """A whole stream from bytes of audio; a server that closes while it is sent is heard too."""
    with open_stream(url, **{"pace": "file"} | query) as websocket:
        with contextlib.suppress(ConnectionClosed):
            for start in range(0, len(data), packet):
                websocket.send(data[start : start + packet])
            websocket.send(json.dumps({"type": "end"}))
        return rest(websocket)


def words(events: list[messages.Event]) -> list[messages.Word]:
    return [word for e in events if isinstance(e, messages.Final) for word in e.words]


def text(events: list[messages.Event]) -> str:
    return "".join(e.text for e in events if isinstance(e, messages.Final))


def rounded(found: list[messages.Word]) -> list[tuple[str, float, float, float]]:
    """Words with times as the wire carries them."""
    return [(w.word, round(w.start, 3), round(w.end, 3), round(w.emitted, 3)) for w in found]


class RawClient:
    """A websocket client that nobody raised well: it may stop reading or vanish mid-frame."""

    def __init__(self, url: str, path: str, receive_buffer: int = 0) -> None:
        host, port = url.removeprefix("ws://").split(":")
        self.socket = socket.socket()
        if receive_buffer:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self.socket.settimeout(WAIT_S)
        self.socket.connect((host, int(port)))
        self.socket.sendall(
            f"GET {path} HTTP/1.1\r\nHost: {host}:{port}\r\nUpgrade: websocket\r\n"
            "Connection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
            "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n".encode()
        )
        self.answer = b""
        while b"\r\n\r\n" not in self.answer:
            self.answer += self.socket.recv(1)

    def send(self, data: bytes, opcode: int = 2) -> None:
        """One frame, masked with zeros."""
        length = bytes([0xFF]) + struct.pack(">Q", len(data))
        self.socket.sendall(bytes([0x80 | opcode]) + length + bytes(4) + data)

    def reset(self) -> None:
        """What the kernel does for a killed process with unread data: RST, no goodbye."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()
