"""Whatever bytes a client sends: no traceback, no slot lost, nothing left behind, in any dialect.

Without sockets, so that many frames fit into seconds: a connection reads from a script and writes
into a list. SPARQLE_TEST_FUZZ_FRAMES=1000000 sends that many frames in all.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import logging
import os
import random
import sys
import tracemalloc
from dataclasses import replace
from urllib.parse import urlencode

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.requests import HTTPConnection

from sparqle_stream import testing
from sparqle_stream.config import EngineConfig, StreamOptions, VadConfig
from sparqle_stream.engine import Engine
from sparqle_stream.errors import BusyError, SparqleError
from sparqle_stream.server import openai_files, whisper_live
from sparqle_stream.server.app import DIALECTS
from sparqle_stream.server.connection import Connection
from sparqle_stream.server.hub import Hub
from sparqle_stream.server.settings import ServerConfig
from sparqle_stream.server.transport import ABORT, IS_GONE
from sparqle_stream.server.wyoming import NAME, WyomingDialect
from sparqle_stream.server.wyoming_wire import LINE_BYTES, WyomingWire

N_FRAMES = int(os.environ.get("SPARQLE_TEST_FUZZ_FRAMES", "6000"))
OFF = StreamOptions(vad=VadConfig(kind="off"))
CFG = ServerConfig(frames_per_s=1e9, defaults=OFF, outbox_events=100_000)
QUERIES = {
    "/v1/stream": {"pace": "file", "ack": "on"},
    "/v1/realtime": {},
    "/v1/listen": {"encoding": "linear16", "sample_rate": 16000, "interim_results": "true"},
    "/asr": {"mode": "diff"},
    "/": {},
}
# What clients really send: the fuzzer bends it.
SEEDS = {
    "/v1/stream": ['{"type": "flush"}', '{"type": "keepalive"}', '{"type": "end"}'],
    "/v1/realtime": [
        '{"type": "session.update", "session": {"type": "transcription", "audio": {"input": '
        '{"format": {"type": "audio/pcm", "rate": 16000}, "turn_detection": null}}}}',
        '{"type": "session.update", "model": "tiny"}',
        '{"type": "input_audio_buffer.append", "audio": "AAAAAAAA", "event_id": "e"}',
        '{"type": "input_audio_buffer.commit", "final": true}',
        '{"type": "input_audio_buffer.commit"}',
        '{"type": "input_audio_buffer.clear"}',
    ],
    "/v1/listen": [
        '{"type": "KeepAlive"}',
        '{"type": "Finalize"}',
        '{"type": "CloseStream"}',
        '{"type": "Configure", "keyterms": ["a"]}',
    ],
    "/asr": ["text"],
    "/": [
        '{"uid": "u", "language": null, "task": "transcribe", "use_vad": false, "model": "small",'
        ' "vad_parameters": {"threshold": 0.5}, "send_last_n_segments": 10}'
    ],
}
WYOMING_SEEDS = [
    b'{"type": "describe"}\n',
    b'{"type": "ping", "data_length": 12}\n{"text": "a"}',
    b'{"type": "transcribe", "data": {"language": "en", "transcript_names": ["a"]}}\n',
    b'{"type": "audio-start", "data": {"rate": 16000, "width": 2, "channels": 1}}\n',
    b'{"type": "audio-chunk", "data": {"rate": 8000, "width": 2, "channels": 1},'
    b' "payload_length": 4}\nabcd',
    b'{"type": "audio-stop", "data": {"timestamp": 3}}\n',
]
SPEECH = testing.say(["word"], gap_ms=40)
JSON_VALUES = [None, True, -1, 0.5, 1e999, "x" * 300, "\ud800", [], {}, [[]], {"a": {}}, "true", 7]


class Tolerant(testing.OracleBatch):
    """An oracle that hears letters in any noise: others are no letters of its alphabet."""

    def _hear(self, row, turn, ahead_frames):
        loudest = 50 / testing.CODE_LEVELS
        return super()._hear(row, replace(turn, pcm=np.clip(turn.pcm, 0, loudest)), ahead_frames)


@pytest.fixture(scope="module")
def engine():
    with Engine(testing.oracle_model(), EngineConfig(n_slots=4), make_slots=Tolerant) as engine:
        yield engine


@pytest.fixture(autouse=True)
def no_traceback(caplog):
    caplog.set_level(logging.WARNING)  # at INFO its list of records is what grows
    yield
    for record in caplog.records:
        assert record.levelno < logging.ERROR, record.getMessage()
        assert record.exc_info is None, record.getMessage()


class Script:
    """A websocket whose client says what it was told, then hangs up."""

    def __init__(self, frames: list[str | bytes]) -> None:
        self.scope = {"extensions": {ABORT: lambda: None, IS_GONE: lambda: False}}
        self.sent: list[str] = []
        self.closed_with: int | None = None
        self._frames = iter(frames)

    async def accept(self, subprotocol=None) -> None:
        assert subprotocol is None

    async def receive(self) -> dict:
        frame = next(self._frames, None)
        await asyncio.sleep(0)
        if frame is None or self.closed_with is not None:
            await asyncio.sleep(0.002)  # the worker may have something to say
            return {"type": "websocket.disconnect", "code": 1006}
        kind = "text" if isinstance(frame, str) else "bytes"
        return {"type": "websocket.receive", kind: frame}

    async def send_text(self, data: str) -> None:
        data.encode()
        json.loads(data)
        self.sent.append(data)

    async def close(self, code=1000, reason=None) -> None:
        assert len((reason or "").encode()) <= 123
        self.closed_with = int(code)


async def converse(hub: Hub, path: str, query: str, frames: list[str | bytes]) -> Script:
    """One connection, as the server's own routes do it."""
    script = Script(frames)
    link = Connection(script, hub, path)
    scope = {"type": "http", "path": path, "query_string": query.encode(), "headers": []}
    with hub.admit(link, "fuzz"):
        link.dialect = DIALECTS[path](link)
        try:
            link.dialect.begin(HTTPConnection(scope))
        except BusyError:
            raise
        except SparqleError as err:
            link.dialect.on_error(err)
        await link.run()
    assert link.stream is None
    return script


def settle(engine, hub: Hub) -> None:
    """Nothing is left: no connection, no stream."""
    assert not hub.connections
    assert engine.metrics().n_streams == 0


def bent(rng: random.Random, text: str) -> str | bytes:
    """A frame that is almost right."""
    kind = rng.randrange(7)
    if kind == 0:
        return text
    if kind == 1:
        return rng.randbytes(rng.choice([0, 1, 2, 3, 641, 5000]))
    if kind == 2:
        at = rng.randrange(len(text) + 1)
        return text[:at] + rng.choice(['"', "{", "\\u0000", "\\ud800", ",", "9" * 400]) + text[at:]
    if kind == 3:
        return text[: rng.randrange(len(text) + 1)]
    if kind == 4:
        return "[" * rng.choice([1, 10, 100_000])
    try:
        raw = json.loads(text)
    except ValueError:
        return text
    return json.dumps(changed(rng, raw))


def changed(rng: random.Random, raw: object) -> object:
    """One value somewhere inside becomes another."""
    if isinstance(raw, dict) and raw and rng.random() < 0.9:
        name = rng.choice(list(raw))
        if rng.random() < 0.1:
            return {
                **raw,
                rng.choice(["", "x", "session", "\u2028", "final"]): rng.choice(JSON_VALUES),
            }
        return {**raw, name: changed(rng, raw[name])}
    return rng.choice(JSON_VALUES)


def sound(rng: random.Random, path: str) -> str | bytes:
    kind = "<f4" if path == "/" else "<i2"
    scaled = SPEECH if path == "/" else SPEECH * 32_768
    data = scaled.astype(kind).tobytes()
    return data[: rng.choice([len(data), len(data) - 1, 7])]


@pytest.mark.parametrize("path", DIALECTS)
def test_bent_frames(engine, path):
    """Real frames with one thing wrong, in any order, over and over; memory does not grow."""
    rng = random.Random(path)
    query = urlencode(QUERIES[path])

    async def run(n_frames: int) -> None:
        hub = Hub(engine, CFG)
        n = 0
        while n < n_frames:
            frames: list[str | bytes] = [SEEDS[path][0]] if path == "/" else []
            for _ in range(rng.randrange(1, 12)):
                is_sound = rng.random() < 0.2
                frames.append(sound(rng, path) if is_sound else bent(rng, rng.choice(SEEDS[path])))
            script = await converse(hub, path, query, frames)
            n += len(frames)
            assert script.closed_with in (None, 1000, 1003, 1007, 1008, 1009), script.sent[-1:]
        settle(engine, hub)

    n_most = N_FRAMES // 6 - 1200
    # What comes once, such as the detector with its onnxruntime, has come after half of them.
    asyncio.run(run(max(300, n_most // 2)))
    gc.collect()
    n_before = sys.getallocatedblocks()
    asyncio.run(run(n_most // 2))
    gc.collect()
    n_grown = sys.getallocatedblocks() - n_before
    assert n_grown < 5000, f"{n_grown} objects are left behind"
    # The same in bytes, for some of them: it takes three times as long.
    tracemalloc.start()
    asyncio.run(run(300))
    gc.collect()
    before = tracemalloc.get_traced_memory()[0]
    asyncio.run(run(600))
    gc.collect()
    grown = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert grown < 300_000, f"{grown} bytes are left behind"


ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4)
    ),
    max_leaves=8,
)
SLOW_START = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]


@settings(max_examples=60, deadline=None, suppress_health_check=SLOW_START, derandomize=True)
@given(
    path=st.sampled_from(sorted(DIALECTS)),
    query=st.dictionaries(
        st.sampled_from(
            ["format", "sample_rate", "channels", "encoding", "mode", "intent", "model", "offset"]
            + ["stream_id", "after", "endpointing", "keyterm", "language", "prompt", "x", "ack"]
        ),
        st.text(max_size=12) | st.integers().map(str),
        max_size=5,
    ),
    frames=st.lists(
        st.binary(max_size=200) | st.text(max_size=60) | ANY_JSON.map(json.dumps), max_size=6
    ),
)
def test_anything_at_all(engine, path, query, frames):
    async def run() -> None:
        hub = Hub(engine, CFG)
        await converse(hub, path, urlencode(query), frames)
        settle(engine, hub)

    asyncio.run(run())


def bent_bytes(rng: random.Random, data: bytes) -> bytes:
    kind = rng.randrange(5)
    if kind == 0:
        return data
    if kind == 1:
        return rng.randbytes(rng.randrange(60))
    at = rng.randrange(len(data) + 1)
    if kind == 2:
        return data[:at]
    if kind == 3:
        return data[:at] + rng.randbytes(3) + data[at + 1 :]
    return data.replace(b"16000", rng.choice([b"-1", b"1e99", b"[]", b'"x"', b"99999999999"]))


class Writer:
    """Where Wyoming's answers go."""

    def __init__(self) -> None:
        self.transport = self
        self.data = b""

    def abort(self) -> None: ...

    def is_closing(self) -> bool:
        return True

    def write(self, data: bytes) -> None:
        self.data += data

    async def drain(self) -> None:
        await asyncio.sleep(0)

    def close(self) -> None: ...


def test_bent_wyoming(engine):
    rng = random.Random(5)

    async def run() -> None:
        hub = Hub(engine, CFG)
        n = 0
        while n < max(600, N_FRAMES // 6):
            reader = asyncio.StreamReader(limit=LINE_BYTES)
            for _ in range(rng.randrange(1, 12)):
                reader.feed_data(bent_bytes(rng, rng.choice(WYOMING_SEEDS)))
                n += 1
            reader.feed_eof()
            link = Connection(WyomingWire(reader, Writer(), 1 << 20), hub, NAME)
            dialect = WyomingDialect(link, "fuzz")
            link.dialect = dialect
            await link.run()
            dialect.release()
        settle(engine, hub)

    asyncio.run(run())


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    st.lists(
        st.tuples(
            st.sampled_from([*openai_files.HONOURED, *openai_files.REFUSED, "x", "stream[]"]),
            st.text(max_size=20) | ANY_JSON.map(json.dumps),
        ),
        max_size=5,
    )
)
def test_any_form(form):
    """Understood, or refused in words: nothing else is raised."""
    with contextlib.suppress(SparqleError):
        asked = openai_files.parse(form, "m-en", OFF)
        assert asked.response_format in openai_files.FORMATS


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    st.dictionaries(
        st.sampled_from(
            [*whisper_live.HONOURED, *whisper_live.WITHOUT_EFFECT, *whisper_live.REFUSED, "x"]
        ),
        ANY_JSON,
        max_size=5,
    )
)
def test_any_whisper_live_options(raw):
    with contextlib.suppress(SparqleError):
        asked = whisper_live.parse({"uid": "u"} | raw, "m-en", OFF)
        assert 1 <= asked.n_segments <= whisper_live.MAX_SEGMENTS
