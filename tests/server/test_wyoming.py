"""Wyoming over TCP with the protocol's own package, as Home Assistant talks."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import struct
import time

import pytest
from server_harness import WAIT_S, get, s16, serving, wait_until

from sparqle_stream import testing
from sparqle_stream.config import EngineConfig, StreamOptions, VadConfig
from sparqle_stream.errors import ConfigError
from sparqle_stream.server import ServerConfig, serve, wyoming

pytest.importorskip("wyoming", reason="wyoming is not installed")
# The package imports audioop, which Python 3.13 drops (and a backport replaces).
pytestmark = pytest.mark.filterwarnings("ignore:'audioop' is deprecated:DeprecationWarning")
OFF = StreamOptions(vad=VadConfig(kind="off"))
WORDS = ["far", "away", "bird", "sing"]
PCM = testing.say(WORDS)


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


@pytest.fixture(scope="module")
def engine():
    with testing.oracle_engine(EngineConfig(n_slots=1)) as engine:
        yield engine


@pytest.fixture(scope="module")
def server(engine):
    """Port of Wyoming and address of the rest."""
    port = free_port()
    with serving(engine, defaults=OFF, wyoming_port=port) as url:
        yield port, url


def talk(port: int, *events, until: str) -> list:
    """Sends events with the package's client, and reads until one of type `until`."""
    from wyoming.client import AsyncTcpClient

    async def run():
        async with AsyncTcpClient("127.0.0.1", port) as client:
            for event in events:
                await client.write_event(event.event())
            seen = [await asyncio.wait_for(client.read_event(), WAIT_S)]
            while seen[-1].type != until:
                seen.append(await asyncio.wait_for(client.read_event(), WAIT_S))
            return seen

    return asyncio.run(run())


def speech(pcm, rate=16_000, channels=1) -> list:
    from wyoming.audio import AudioChunk, AudioStart, AudioStop

    data = s16(pcm)
    kind = {"rate": rate, "width": 2, "channels": channels}
    chunks = [AudioChunk(audio=data[i : i + 2048], **kind) for i in range(0, len(data), 2048)]
    return [AudioStart(**kind), *chunks, AudioStop()]


def test_describe(server):
    from wyoming.info import Describe, Info

    info = Info.from_event(talk(server[0], Describe(), until="info")[-1])
    (program,) = info.asr
    assert program.supports_transcript_streaming
    assert [m.name for m in program.models] == ["tiny"]
    assert program.models[0].languages == ["en"]


def test_ping(server):
    from wyoming.ping import Ping, Pong

    assert Pong.from_event(talk(server[0], Ping(text="x"), until="pong")[0]).text == "x"


def test_a_command_is_transcribed(server):
    from wyoming.asr import Transcribe, Transcript

    seen = talk(server[0], Transcribe(language="en"), *speech(PCM), until="transcript")
    kinds = [event.type for event in seen]
    assert kinds[0] == "transcript-start"
    assert kinds[-2:] == ["transcript-stop", "transcript"]
    chunks = [e.data["text"] for e in seen if e.type == "transcript-chunk"]
    assert len(chunks) >= 2
    assert Transcript.from_event(seen[-1]).text == "".join(chunks) == " ".join(WORDS)


def test_the_slot_is_held_only_while_a_command_runs(server):
    """One slot, many connections that wait: each gets its turn."""
    from wyoming.asr import Transcribe

    port, url = server
    with socket.create_connection(("127.0.0.1", port)) as idle:
        idle.sendall(b'{"type": "transcribe"}\n')
        for _ in range(3):
            seen = talk(port, Transcribe(), *speech(PCM), until="transcript")
            assert seen[-1].data["text"] == " ".join(WORDS)
        assert get(url, "/readyz")[1]["slots_free"] == 1


def test_two_commands_over_one_connection(server):
    """The second is sent before the first is answered: it waits for its turn."""
    from wyoming.ping import Ping

    both = [*speech(PCM), *speech(testing.say(["second"])), Ping()]
    seen = talk(server[0], *both, until="pong")
    texts = [event.data["text"] for event in seen if event.type == "transcript"]
    assert texts == [" ".join(WORDS), "second"]


def test_a_busy_server_says_so_and_the_connection_goes_on(server, engine):
    stream = engine.open(OFF)
    seen = talk(server[0], *speech(PCM), until="error")
    assert seen[-1].data["code"] == "busy"
    stream.cancel()
    assert talk(server[0], *speech(PCM), until="transcript")[-1].data["text"] == " ".join(WORDS)


@pytest.mark.parametrize(
    ("event", "named"),
    [
        ({"type": "transcribe", "data": {"name": "whisper"}}, "unknown model"),
        ({"type": "transcribe", "data": {"transcript_names": "x"}}, "transcript_names"),
        ({"type": "transcribe", "data": {"vad_sensitivity": "x"}}, "vad_sensitivity"),
        ({"type": "audio-start", "data": {"rate": 16000, "width": 4, "channels": 1}}, "two bytes"),
        ({"type": "audio-start", "data": {"rate": 1, "width": 2, "channels": 1}}, "rate"),
        ({"type": "audio-chunk", "data": {}}, "width"),
    ],
)
def test_what_is_not_honoured_is_refused(server, event, named):
    with socket.create_connection(("127.0.0.1", server[0])) as sock, sock.makefile("rb") as file:
        sock.sendall(json.dumps(event).encode() + b"\n")
        line = json.loads(file.readline())
        assert line["type"] == "error"
        assert named in json.loads(file.read(line["data_length"]))["text"]
        sock.sendall(b'{"type": "unknown-event"}\n{"type": "ping"}\n')
        assert json.loads(file.readline())["type"] == "pong"


@pytest.mark.parametrize(
    "junk",
    [
        b"hello\n",
        b"[]\n",
        b'{"type": "audio-chunk", "payload_length": 99999999999}\n',
        b'{"type": "audio-chunk", "payload_length": -5}\n',
        b'{"type": "x", "data_length": 3}\n[1]',
        b'{"type": "x", "data": 5, "data_length": 2}\n{}',
        b"x" * 100_000,
        b'{"type": "audio-chunk", "payload_length": 100}\nhalf',
    ],
)
def test_bytes_that_are_no_event_end_the_connection(server, junk, caplog):
    with socket.create_connection(("127.0.0.1", server[0])) as sock:
        sock.settimeout(WAIT_S)
        sock.sendall(junk)
        sock.shutdown(socket.SHUT_WR)
        assert sock.recv(10) == b""
    assert not [r for r in caplog.records if r.levelname == "ERROR"]


def test_a_client_that_vanishes_frees_its_slot(server, engine):
    port, url = server
    with socket.create_connection(("127.0.0.1", port)) as sock:
        sock.sendall(b'{"type": "audio-start", "data": {"rate":16000,"width":2,"channels":1}}\n')
        wait_until(lambda: engine.metrics().n_streams == 1)
    wait_until(lambda: engine.metrics().n_streams == 0)
    assert get(url, "/readyz")[1]["slots_free"] == 1


def test_sensitivity_and_names_reach_the_engine(engine):
    class Hub:
        cfg = ServerConfig(defaults=OFF)
        model = "m-en"

    data = {"vad_sensitivity": "relaxed", "transcript_names": ["Anna"], "transcript_terms": ["db"]}
    options = wyoming.parse(data, Hub())
    assert (options.vad.stop_ms, options.prompt) == (800, "Anna, db")
    assert wyoming.parse({}, Hub()) == OFF


def test_a_drain_ends_waiting_connections(engine):
    port = free_port()
    with serving(engine, defaults=OFF, wyoming_port=port):
        sock = socket.create_connection(("127.0.0.1", port))
        sock.settimeout(WAIT_S)
        sock.sendall(b'{"type": "ping"}\n')
        assert b"pong" in sock.recv(1000)
    assert sock.recv(10) == b""
    sock.close()


def test_a_port_that_is_taken(engine, server):
    with pytest.raises(ConfigError, match="in use"):
        serve(engine, ServerConfig(port=0, wyoming_port=server[0]))


@pytest.mark.usefixtures("no_traceback")
def test_a_shutdown_with_a_connection_that_waits_leaves_no_traceback(engine):
    port = free_port()
    with serving(engine, defaults=OFF, wyoming_port=port):
        sock = socket.create_connection(("127.0.0.1", port))
        sock.settimeout(WAIT_S)
        sock.sendall(b'{"type": "ping"}\n')
        assert b"pong" in sock.recv(1000)
    sock.close()


@pytest.mark.usefixtures("no_traceback")
def test_a_client_that_resets_leaves_no_traceback(server):
    """With and without audio before it; the slot is free at once."""
    from wyoming.info import Describe

    port, url = server
    for said in (b"", b'{"type": "describe"}\n', b'{"type": "transcribe"}\n'):
        sock = socket.create_connection(("127.0.0.1", port))
        sock.sendall(said)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        sock.close()
    wait_until(lambda: get(url, "/readyz")[1]["slots_free"] == 1)
    assert [e.type for e in talk(port, Describe(), until="info")] == ["info"]


def test_a_client_that_reads_nothing_does_not_hold_a_shutdown(engine):
    port = free_port()
    with serving(engine, defaults=OFF, wyoming_port=port, outbox_events=10**6, frames_per_s=1e9):
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.connect(("127.0.0.1", port))
        sock.settimeout(1.0)
        with contextlib.suppress(TimeoutError):  # once the server waits for its reader
            for _ in range(20_000):
                sock.sendall(b'{"type": "describe"}\n')
        began = time.monotonic()
    assert time.monotonic() - began < 10
    sock.close()
