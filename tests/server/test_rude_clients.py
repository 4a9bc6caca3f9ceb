"""Real sockets and clients that nobody raised well, on every dialect: slots, memory."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import struct
import time
import zlib

import psutil
import pytest
from server_harness import WAIT_S, RawClient, get, run, s16, serving, text, wait_until

from sparqle_stream import testing
from sparqle_stream.config import EngineConfig, StreamOptions, VadConfig
from sparqle_stream.server import transport

OFF = StreamOptions(vad=VadConfig(kind="off"))
WORDS = testing.vocabulary(8)
PCM = testing.say(WORDS)
LISTEN = "/v1/listen?encoding=linear16&sample_rate=16000&interim_results=true"
PATHS = ["/v1/stream", LISTEN, "/asr", "/"]


@pytest.fixture(scope="module")
def engine():
    with testing.oracle_engine(EngineConfig(n_slots=2)) as engine:
        yield engine


@pytest.fixture(scope="module")
def url(engine):
    with serving(engine, defaults=OFF) as url:
        yield url


pytestmark = pytest.mark.usefixtures("no_traceback")


def is_well(engine, url) -> None:
    """No stream is left, and the next client is served."""
    wait_until(lambda: get(url, "/readyz")[1]["slots_free"] == 2)
    assert engine.metrics().n_streams == 0
    assert text(run(url, s16(PCM))) == " ".join(WORDS)


def begin(url, path) -> RawClient:
    client = RawClient(url, path)
    if path == "/":
        client.send(b'{"uid": "u"}', opcode=1)
    return client


def speech_of(path) -> bytes:
    return PCM.astype("<f4").tobytes() if path == "/" else s16(PCM)


@pytest.mark.parametrize("goodbye", ["reset", "fin", "half a frame"])
@pytest.mark.parametrize("path", PATHS)
def test_killed_in_the_middle_of_a_word(engine, url, path, goodbye):
    client = begin(url, path)
    client.send(speech_of(path))
    wait_until(lambda: engine.metrics().n_streams == 1)
    if goodbye == "half a frame":
        client.socket.sendall(b"\x82\xff" + struct.pack(">Q", 100_000) + bytes(50))
    if goodbye == "fin":
        client.socket.close()
    else:
        client.reset()
    is_well(engine, url)


def close_code(client: RawClient) -> int | None:
    """Code of the close frame at the end of what the server says; None for a reset before it."""
    received = b""
    with contextlib.suppress(ConnectionError):
        while part := client.socket.recv(65_536):
            received += part
    at = received.rfind(b"\x88")
    return None if at < 0 else struct.unpack(">H", received[at + 2 : at + 4])[0]


def memory() -> int:
    return psutil.Process(os.getpid()).memory_info().rss


@pytest.mark.parametrize("path", PATHS)
def test_a_compressed_bomb(engine, url, path):
    """Compression is not offered; a compressed frame all the same is not unpacked but refused."""
    client = begin(url, path)
    assert b"permessage-deflate" not in client.answer
    squeeze = zlib.compressobj(9, zlib.DEFLATED, -15)
    bomb = squeeze.compress(bytes(300 << 20)) + squeeze.flush(zlib.Z_SYNC_FLUSH)
    before = memory()
    frame = bytes([0xC2, 0xFF]) + struct.pack(">Q", len(bomb)) + bytes(4) + bomb
    with contextlib.suppress(ConnectionError):
        client.socket.sendall(frame)
    assert close_code(client) in (1002, None)  # the rest of the bomb may meet a closed socket
    assert memory() - before < 100 << 20
    client.socket.close()
    is_well(engine, url)


def test_an_offer_to_compress_is_declined(url):
    from websockets.sync.client import connect

    with connect(f"{url}/v1/stream", compression="deflate", proxy=None) as websocket:
        assert websocket.protocol.extensions == []


@pytest.mark.parametrize("path", PATHS)
def test_a_message_in_endless_pieces(engine, url, path):
    """No piece is too long, but together they are: 1009 before the memory is gone."""
    client = begin(url, path)
    piece = bytes(1 << 20)
    head = bytes([0x02, 0xFF]) + struct.pack(">Q", len(piece)) + bytes(4)
    with contextlib.suppress(ConnectionError):
        client.socket.sendall(head + piece)
        for _ in range(40):
            client.socket.sendall(bytes([0x00]) + head[1:] + piece)
    assert close_code(client) in (1009, None)
    client.socket.close()
    is_well(engine, url)


@pytest.mark.parametrize("path", [LISTEN, "/v1/stream"])
def test_a_reader_that_never_reads(engine, path):
    """Every flush has an answer: they pile up in the kernel, then in the outbox; then it ends."""
    with serving(engine, defaults=OFF, outbox_events=16, send_s=0.3, frames_per_s=1e9) as url:
        client = RawClient(url, path, receive_buffer=4096)
        kind = "flush" if path == "/v1/stream" else "Finalize"
        command = json.dumps({"type": kind}).encode()
        with contextlib.suppress(ConnectionError):
            for _ in range(200_000):
                client.send(command, opcode=1)
            pytest.fail("the answers went somewhere")
        client.socket.close()
        wait_until(lambda: get(url, "/readyz")[1]["slots_free"] == 2)
        assert engine.metrics().n_streams == 0


@pytest.mark.parametrize("path", PATHS)
def test_a_flood_of_empty_frames(engine, url, path):
    """5000 in a burst: read at the pace of the limit, and others are served meanwhile."""
    client = begin(url, path)
    opcode = 9 if path in (LISTEN, "/asr") else 2  # an empty frame is the end there: pings
    client.socket.settimeout(0.5)
    with contextlib.suppress(ConnectionError, TimeoutError):
        client.socket.sendall((bytes([0x80 | opcode, 0x80]) + bytes(4)) * 5_000)
    assert text(run(url, s16(PCM))) == " ".join(WORDS)
    client.reset()
    is_well(engine, url)


def test_a_peer_that_is_gone_without_a_word(engine):
    """No FIN, no RST: a cable was pulled. It answers no ping, and that tells."""
    with serving(engine, defaults=OFF, ping_s=0.3) as url:
        client = RawClient(url, "/v1/stream")
        client.send(s16(PCM))
        wait_until(lambda: engine.metrics().n_streams == 1)
        wait_until(lambda: engine.metrics().n_streams == 0)
        client.socket.close()
        wait_until(lambda: get(url, "/readyz")[1]["slots_free"] == 2)


@pytest.mark.parametrize("said", [b"", b"GET /v1/str", b"GET /v1/stream HTTP/1.1\r\nHost: x\r\n"])
def test_a_request_that_does_not_come(engine, monkeypatch, said):
    monkeypatch.setattr(transport, "REQUEST_S", 0.3)
    with serving(engine, defaults=OFF) as url:
        host, port = url.removeprefix("ws://").split(":")
        with socket.create_connection((host, int(port))) as sock:
            sock.settimeout(WAIT_S)
            sock.sendall(said)
            with contextlib.suppress(ConnectionResetError):
                assert sock.recv(1) == b""
        is_well(engine, url)


def test_another_request_on_a_connection_that_does_not_come(engine, monkeypatch):
    """uvicorn's timers end with its first byte. What is whole in the end is answered."""
    monkeypatch.setattr(transport, "REQUEST_S", 0.4)
    ask = b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"
    with serving(engine, defaults=OFF) as url:
        host, port = url.removeprefix("ws://").split(":")
        with socket.create_connection((host, int(port))) as sock:
            sock.settimeout(WAIT_S)
            for parts in ([ask], [ask[:5], ask[5:]]):
                for part in parts:
                    sock.sendall(part)
                    time.sleep(0.1)
                answer = b""
                while not answer.endswith(b"}"):
                    answer += sock.recv(4096)
                assert b"200 OK" in answer
            time.sleep(0.6)  # that one was whole in time
            sock.sendall(ask[:1])
            with contextlib.suppress(ConnectionResetError):
                assert sock.recv(1) == b""
        is_well(engine, url)


def test_an_old_connection_is_not_taken_for_a_silent_one(engine, monkeypatch):
    monkeypatch.setattr(transport, "REQUEST_S", 0.2)
    with serving(engine, defaults=OFF) as url:
        client = RawClient(url, "/v1/stream")
        time.sleep(0.5)
        client.send(b'{"type": "end"}', opcode=1)
        assert close_code(client) == 1000
        client.socket.close()


@pytest.mark.usefixtures("no_traceback")
def test_a_frame_that_is_none_after_our_close(engine, url):
    client = RawClient(url, "/v1/stream?nonsense=1")
    while b"nonsense" not in client.answer or b"\x88" not in client.answer:
        client.answer += client.socket.recv(1)
    time.sleep(0.1)  # the close frame is out, and the server waits for its echo
    client.socket.sendall(bytes([0x87, 0x80, 0, 0, 0, 0]))
    with contextlib.suppress(ConnectionResetError):
        while client.socket.recv(1000):
            pass
    client.socket.close()
    is_well(engine, url)


def test_many_at_once(engine, url):
    """A hundred connections to two slots: some get in, the rest are told, none hangs."""
    answers = []
    for i in range(100):
        client = RawClient(url, PATHS[i % len(PATHS)])
        answers.append(client.answer.split()[1])
        if i % 3:
            client.reset()
        else:
            client.socket.close()
    assert set(answers) <= {b"101", b"503"}
    assert b"101" in answers
    is_well(engine, url)
