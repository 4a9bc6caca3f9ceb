"""/v1/stream with the `websockets` client: what comes out is what the engine says."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace

import numpy as np
import pytest
import soxr
from server_harness import (
    SAMPLE_RATE_HZ,
    WAIT_S,
    open_stream,
    rest,
    rounded,
    run,
    s16,
    serving,
    text,
    words,
)

from sparqle_stream import audio, messages
from sparqle_stream.audio import AudioFormat
from sparqle_stream.config import EngineConfig, StreamOptions, VadConfig
from sparqle_stream.engine import Engine
from sparqle_stream.server import fields, openai_session, stream


def heard(fmt: AudioFormat, data: bytes):
    """What the engine gets of `data` in one piece."""
    state, pcm = audio.step(fmt, audio.init_state(fmt), data)
    return np.concatenate([pcm, audio.flush(fmt, state)[1]])


@pytest.mark.parametrize("packet", [6_400, 1_001, 1_000_000])
def test_the_server_says_what_the_engine_says(engine, url, speech, packet):
    """Packets of odd size cut samples in two: the words must not know."""
    expected = words(engine.transcribe(speech))
    events = run(url, s16(speech), packet)
    assert len(expected) >= 5
    assert rounded(words(events)) == rounded(expected)
    kinds = [type(e) for e in events if not isinstance(e, messages.Tail | messages.Final)]
    assert kinds[0] is messages.Ready
    assert kinds[1] is messages.SpeechStarted
    assert kinds[-2:] == [messages.SpeechStopped, messages.Done]
    assert events[-1].duration == len(speech) / SAMPLE_RATE_HZ
    assert all(e.lag >= 0 for e in events)


def test_ready_says_what_is_in_force(url):
    events = run(url, b"", sample_rate=8000, format="mulaw", chunk_ms=640, delay_ms=80)
    assert [type(e) for e in events] == [messages.Ready, messages.Done]
    ready = asdict(events[0])
    assert ready.pop("stream_id")
    assert ready == {
        "model": "tiny",
        "sample_rate": 8000,
        "chunk_ms": 640,
        "delay_ms": 80,
        "time": 0.0,
        "lag": 0.0,
    }
    assert events[1].duration == 0.0


@pytest.mark.parametrize(
    ("encoding", "rate_hz", "channels"),
    [("f32le", 16_000, 1), ("s16le", 48_000, 2), ("mulaw", 8_000, 1), ("alaw", 8_000, 2)],
)
def test_every_format(engine, url, speech, encoding, rate_hz, channels):
    pcm = soxr.resample(speech, SAMPLE_RATE_HZ, rate_hz)
    both = np.stack([pcm, 0.5 * pcm][:channels], axis=1)
    encoded = {
        "f32le": lambda: both.astype("<f4").tobytes(),
        "s16le": lambda: s16(both),
        # Any bytes are G.711; loud noise in the place of speech would prove as much.
        "mulaw": lambda: nearest_codes(audio.mulaw_table(), both),
        "alaw": lambda: nearest_codes(audio.alaw_table(), both),
    }[encoding]()
    fmt = AudioFormat(encoding, rate_hz, channels)
    expected = words(engine.transcribe(heard(fmt, encoded)))
    events = run(url, encoded, 9_999, sample_rate=rate_hz, format=encoding, channels=channels)
    assert len(expected) >= 5
    assert rounded(words(events)) == rounded(expected)


def nearest_codes(table, samples) -> bytes:
    order = np.argsort(table, kind="stable")
    at = np.clip(np.searchsorted(table[order], samples.ravel()), 0, 255)
    return order[at].astype(np.uint8).tobytes()


def test_options_of_the_query_reach_the_engine(engine, url, speech):
    options = StreamOptions(
        chunk_ms=160, delay_ms=480, prompt="bimo dafu", vad=VadConfig(kind="webrtc", stop_ms=500)
    )
    expected = engine.transcribe(speech, options)
    query = {"chunk_ms": 160, "delay_ms": 480, "prompt": "bimo dafu"}
    events = run(url, s16(speech), **query, vad="webrtc", vad_stop_ms=500)
    assert rounded(words(events)) == rounded(words(expected))
    assert text(events) == text(expected)
    assert text(events) != text(engine.transcribe(speech))
    assert _times(events) == _times(expected)


def test_a_prompt_does_not_take_the_place_of_the_servers_task():
    """In no dialect: the instruction stays, whatever the client says was said before."""
    server = StreamOptions(prompt="ours", instruction="Translate into German:")
    asked = [
        stream.parse({"prompt": "theirs"}, server).options,
        fields.with_prompt(server, "theirs"),
        replace(
            openai_session.SessionConfig.default("tiny", server), prompt="theirs"
        ).stream_options(server),
    ]
    assert [o.prompt for o in asked] == ["theirs", "ours theirs", "theirs"]
    assert {o.instruction for o in asked} == {"Translate into German:"}
    told = openai_session.to_wire("id", openai_session.SessionConfig.default("tiny", server))
    assert "Translate" not in str(told)


def _times(events):
    kinds = (messages.SpeechStarted, messages.SpeechStopped)
    return [(type(e), round(e.time, 3)) for e in events if isinstance(e, kinds)]


def test_eight_clients_share_the_batch_and_none_notices(engine, url, speech):
    """Different audio, chunk sizes and packets at once: each gets what it gets alone."""
    short = speech[: 5 * SAMPLE_RATE_HZ // 2]
    jobs = [(np.roll(short, 4_000 * i), 320 if i % 2 else 160, 2_000 + 777 * i) for i in range(8)]
    wire = AudioFormat("s16le", SAMPLE_RATE_HZ, 1)
    alone = [
        engine.transcribe(heard(wire, s16(pcm)), StreamOptions(chunk_ms=ms)) for pcm, ms, _ in jobs
    ]

    def one(job):
        pcm, chunk_ms, packet = job
        return run(url, s16(pcm), packet, chunk_ms=chunk_ms)

    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(one, jobs))
    assert len({text(events) for events in alone}) >= 7
    for found, expected in zip(together, alone, strict=True):
        assert rounded(words(found)) == rounded(words(expected))
        assert text(found) == text(expected)


def test_flush_brings_the_last_words_out_and_goes_on(engine, url, speech):
    halves = np.split(speech, 2)
    alone = engine.open(StreamOptions(vad=VadConfig(kind="off")))
    for half in halves:
        alone.feed(half)
        alone.flush()
    alone.finish()
    expected = list(alone.events(timeout=WAIT_S))
    found = []
    with open_stream(url, vad="off") as websocket:
        for half in halves:
            websocket.send(s16(half))
            websocket.send('{"type": "flush"}')
            found.append(messages.from_json(websocket.recv(timeout=WAIT_S)))
            while not isinstance(found[-1], messages.Flushed):
                found.append(messages.from_json(websocket.recv(timeout=WAIT_S)))
        flushed = [e.time for e in found if isinstance(e, messages.Flushed)]
        assert flushed == [2.0, 4.0]
        websocket.send('{"type": "flush"}')  # nothing to bring out: answered all the same
        assert isinstance(messages.from_json(websocket.recv(timeout=WAIT_S)), messages.Flushed)
        websocket.send('{"type": "end"}')
        assert [type(e) for e in rest(websocket)] == [messages.Done]
    assert rounded(words(found)) == rounded(words(expected))
    assert len(words(found)) >= 2
    assert _times(found) == _times(expected)
    assert len(_times(found)) == 4


def test_a_stray_byte_at_the_end_is_reported(url, speech):
    whole, stray = s16(speech), s16(speech) + b"\x01"
    events = run(url, stray)
    warning = next(e for e in events if isinstance(e, messages.Warning))
    assert (warning.code, warning.message) == (
        "odd_bytes",
        "1 bytes at the end were not a whole sample",
    )
    assert rounded(words(events)) == rounded(words(run(url, whole)))


def test_no_tail_when_it_is_not_wanted(url, speech):
    with_tail, without = run(url, s16(speech)), run(url, s16(speech), tail="off")
    assert any(isinstance(e, messages.Tail) for e in with_tail)
    assert not any(isinstance(e, messages.Tail) for e in without)
    assert text(with_tail) == text(without)


def test_the_close_after_done_is_normal(url):
    with open_stream(url) as websocket:
        websocket.send(json.dumps({"type": "keepalive"}))
        websocket.send(json.dumps({"type": "end"}))
        rest(websocket)
    assert websocket.close_code == 1000


def test_a_backlog_ends_a_live_stream_and_slows_a_file_down(tiny, speech):
    data = s16(np.tile(speech, 2))
    with (
        Engine(tiny, EngineConfig(n_slots=2, threads=1, backlog_s=1.5)) as engine,
        serving(engine) as url,
    ):
        with open_stream(url) as websocket:
            websocket.send(data)
            error = rest(websocket)[-1]
        assert isinstance(error, messages.Error)
        assert error.code == "backlog"
        assert websocket.close_code == 1013
        events = run(url, data, 100_000)
        assert rounded(words(events)) == rounded(words(engine.transcribe(np.tile(speech, 2))))
        assert engine.metrics().n_streams == 0


def test_the_subprotocol_is_answered(url):
    from websockets.sync.client import connect

    offered = ["chat", "sparqle-stream"]
    with connect(f"{url}/v1/stream", subprotocols=offered, proxy=None) as websocket:
        assert websocket.subprotocol == "sparqle-stream"
