"""/v1/realtime with OpenAI's own client; every event is checked against its types, strictly."""

from __future__ import annotations

import base64
import json
import threading
from contextlib import contextmanager

import numpy as np
import pytest
import soxr
from openai import OpenAI
from openai.types.realtime import RealtimeServerEvent
from pydantic import TypeAdapter
from server_harness import SAMPLE_RATE_HZ, WAIT_S, frames, s16, serving, text, words
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from sparqle_stream import audio, messages
from sparqle_stream.audio import AudioFormat
from sparqle_stream.config import EngineConfig, StreamOptions, VadConfig
from sparqle_stream.engine import Engine
from sparqle_stream.server import openai_session

# The openai package connects as websockets before 17.1 wanted it.
pytestmark = pytest.mark.filterwarnings(
    "ignore:connect.* must be used as a context manager:DeprecationWarning"
)
STRICT = TypeAdapter(RealtimeServerEvent)
ITEM = "conversation.item.input_audio_transcription"


@contextmanager
def realtime(url, **options):
    """A connection of the openai package, past session.created."""
    http = url.replace("ws", "http", 1)
    options = {"extra_query": {"intent": "transcription"}} | options
    with (
        OpenAI(base_url=f"{http}/v1", api_key="none") as client,
        client.realtime.connect(websocket_connection_options={"proxy": None}, **options) as c,
    ):
        assert receive(c).type == "session.created"
        yield c


def receive(connection):
    """One event, as its exact type: a missing or misspelt field raises."""
    raw = connection._connection.recv(timeout=WAIT_S)
    event = connection.parse_event(raw)
    assert event.type == json.loads(raw)["type"]
    assert event.event_id
    return STRICT.validate_python(json.loads(raw))


def until(connection, kind):
    """Events up to and including one of `kind`."""
    events = []
    while not events or events[-1].type != kind:
        events.append(receive(connection))
        if kind != "error":
            assert events[-1].type != "error", events[-1]
    return events


def pcm24(speech) -> bytes:
    return s16(soxr.resample(speech, SAMPLE_RATE_HZ, 24_000))


def append(connection, data, packet=2_401):
    """50 ms packets, as LiveKit sends them, with samples cut in two."""
    for start in range(0, len(data), packet):
        part = data[start : start + packet]
        connection.input_audio_buffer.append(audio=base64.b64encode(part).decode())


def heard(data, rate_hz=24_000, encoding="s16le"):
    fmt = AudioFormat(encoding, rate_hz)
    state, pcm = audio.step(fmt, audio.init_state(fmt), data)
    return np.concatenate([pcm, audio.flush(fmt, state)[1]])


def kinds(events):
    return [event.type.removeprefix("conversation.item.") for event in events]


def deltas(events):
    return "".join(e.delta for e in events if e.type == f"{ITEM}.delta")


def test_a_segment_is_an_item(engine, url, speech):
    """server_vad: the order and the fields that voice frameworks wait for."""
    quiet = np.zeros(SAMPLE_RATE_HZ, np.float32)
    data = pcm24(np.concatenate([speech, quiet]))
    expected = engine.transcribe(heard(data))
    starts = [e.time for e in expected if isinstance(e, messages.SpeechStarted)]
    stops = [e.time for e in expected if isinstance(e, messages.SpeechStopped)]
    with realtime(url) as connection:
        append(connection, data)
        found = []
        for _ in starts:
            found += until(connection, f"{ITEM}.completed")
    assert len(starts) >= 1
    spoken = [e for e in found if e.type != f"{ITEM}.delta"]
    one_item = [
        "input_audio_buffer.speech_started",
        "input_audio_buffer.speech_stopped",
        "input_audio_buffer.committed",
        "added",
        "done",
        "input_audio_transcription.completed",
    ]
    assert kinds(spoken) == one_item * len(starts)
    completed = [e for e in found if e.type == f"{ITEM}.completed"]
    assert "".join(e.transcript for e in completed) == deltas(found)
    assert "".join(e.transcript for e in completed).split() == text(expected).split()
    assert len(words(expected)) >= 5
    began = [e for e in found if e.type.endswith("speech_started")]
    ended = [e for e in found if e.type.endswith("speech_stopped")]
    assert [e.audio_start_ms for e in began] == [round(1000 * x) for x in starts]
    assert [e.audio_end_ms for e in ended] == [round(1000 * x) for x in stops]
    seconds = [e.usage.seconds for e in completed]
    assert seconds == pytest.approx(np.subtract(stops, starts), abs=1e-3)
    ids = [e.item_id for e in completed]
    assert len(set(ids)) == len(ids)
    chain = [e.previous_item_id for e in found if e.type == "input_audio_buffer.committed"]
    assert chain == [None, *ids[:-1]]
    assert [e.item_id for e in began] == [e.item_id for e in ended] == ids
    assert len({e.event_id for e in found}) == len(found)


def test_the_client_commits(engine, url, speech):
    """turn_detection null: two commits are two items, nothing is lost between them."""
    halves = [pcm24(half) for half in np.split(speech, 2)]
    with realtime(url) as connection:
        session = {"type": "transcription", "audio": {"input": {"turn_detection": None}}}
        connection.session.update(session=session)
        updated = receive(connection)
        assert updated.type == "session.updated"
        assert updated.session.audio.input.turn_detection is None
        for half in halves:
            expected = engine.transcribe(heard(half))
            append(connection, half)
            connection.input_audio_buffer.commit()
            events = until(connection, f"{ITEM}.completed")
            transcript = events[-1].transcript
            assert transcript.split() == text(expected).split()
            assert deltas(events) == transcript
            assert len(transcript.split()) >= 2
            assert events[-1].usage.seconds == pytest.approx(2.0, abs=0.01)
            plain = [k for k in kinds(events) if not k.endswith("delta")]
            assert plain == [
                "input_audio_buffer.committed",
                "added",
                "done",
                "input_audio_transcription.completed",
            ]
            assert {e.item_id for e in events if hasattr(e, "item_id")} == {events[-1].item_id}


def test_a_commit_during_speech_ends_the_item(url, speech):
    """server_vad, but the client knows better: the words come out at once."""
    with realtime(url) as connection:
        append(connection, pcm24(speech[: 2 * SAMPLE_RATE_HZ]))
        connection.input_audio_buffer.commit()
        events = until(connection, f"{ITEM}.completed")
        assert len(events[-1].transcript.split()) >= 2
        assert events[0].type == "input_audio_buffer.speech_started"
        append(connection, pcm24(np.zeros(SAMPLE_RATE_HZ, np.float32)))
        connection.input_audio_buffer.commit()
        assert until(connection, f"{ITEM}.completed")[-1].transcript == ""


def test_clear_drops_what_is_not_captioned(engine, url, speech):
    first, second = np.split(speech, 2)
    with realtime(url) as connection:
        session = {"type": "transcription", "audio": {"input": {"turn_detection": None}}}
        connection.session.update(session=session)
        append(connection, pcm24(first))
        connection.input_audio_buffer.clear()
        until(connection, "input_audio_buffer.cleared")
        connection.input_audio_buffer.commit()
        error = until(connection, "error")[-1].error
        assert (error.type, error.code) == (
            "invalid_request_error",
            "input_audio_buffer_commit_empty",
        )
        append(connection, pcm24(second))
        connection.input_audio_buffer.commit()
        transcript = until(connection, f"{ITEM}.completed")[-1].transcript
    assert transcript.split() == text(engine.transcribe(heard(pcm24(second)))).split()


@pytest.mark.parametrize(
    ("fmt", "encoding", "rate_hz"),
    [
        ({"type": "audio/pcmu"}, "mulaw", 8_000),
        ({"type": "audio/pcma"}, "alaw", 8_000),
        ({"type": "audio/pcm", "rate": 16_000}, "s16le", 16_000),
        ({"type": "audio/pcm", "rate": 24_000}, "s16le", 24_000),
        (None, "s16le", 24_000),
    ],
)
def test_formats(engine, url, speech, fmt, encoding, rate_hz):
    wide = s16(soxr.resample(speech, SAMPLE_RATE_HZ, rate_hz))
    data = wide if encoding == "s16le" else wide[1::2]  # the high bytes: some sound or other
    with connect(f"{url}/v1/realtime", proxy=None) as websocket:
        session = {"audio": {"input": {"format": fmt, "turn_detection": None}}}
        send(websocket, "session.update", session={"type": "transcription"} | session)
        for start in range(0, len(data), 10_001):
            part = base64.b64encode(data[start : start + 10_001]).decode()
            send(websocket, "input_audio_buffer.append", audio=part)
        send(websocket, "input_audio_buffer.commit")
        events = list(received(websocket, f"{ITEM}.completed"))
    assert events[1]["session"]["audio"]["input"]["format"]["type"] == (fmt or {}).get(
        "type", "audio/pcm"
    )
    expected = engine.transcribe(heard(data, rate_hz, encoding))
    assert events[-1]["transcript"].split() == text(expected).split()


def send(websocket, kind, **fields):
    websocket.send(json.dumps({"type": kind} | fields))


def received(websocket, last):
    while True:
        event = json.loads(websocket.recv(timeout=WAIT_S))
        yield event
        if event["type"] == last:
            return


def test_every_setting_reaches_the_engine(engine, url, speech):
    """All that the table calls honoured, sent by the openai client, is what the engine is told."""
    data = pcm24(speech)
    vad = VadConfig(stop_ms=640, preroll_ms=300, threshold=0.6, threshold_off=0.45)
    options = StreamOptions(delay_ms=400, prompt="bimo dafu", vad=vad)
    expected = engine.transcribe(heard(data), options)
    turns = {
        "type": "server_vad",
        "threshold": 0.6,
        "prefix_padding_ms": 300,
        "silence_duration_ms": 640,
    }
    with realtime(url, model="tiny") as connection:
        given = {
            "format": {"type": "audio/pcm", "rate": 24_000},
            "transcription": {"model": "tiny", "prompt": "bimo dafu", "delay": "medium"},
            "turn_detection": turns | {"create_response": True, "interrupt_response": False},
            "noise_reduction": {"type": "near_field"},
        }
        session = {"type": "transcription", "audio": {"input": given}, "include": []}
        connection.session.update(session=session)
        effective = receive(connection).session.audio.input
        assert effective.turn_detection.to_dict() == turns
        assert effective.transcription.to_dict() == given["transcription"]
        assert effective.noise_reduction is None
        append(connection, data)
        connection.input_audio_buffer.commit()
        found = []
        for _ in [e for e in expected if isinstance(e, messages.SpeechStopped)]:
            found += until(connection, f"{ITEM}.completed")
    assert deltas(found).split() == text(expected).split()
    assert text(expected) != text(engine.transcribe(heard(data)))


def test_a_change_during_speech_loses_nothing(url, speech):
    """What was received is captioned with the old settings, then the new ones hold."""
    with realtime(url) as connection:
        append(connection, pcm24(speech[: 2 * SAMPLE_RATE_HZ]))
        transcription = {"prompt": "gado"}
        session = {"type": "transcription", "audio": {"input": {"transcription": transcription}}}
        connection.session.update(session=session)
        events = until(connection, "session.updated")
        assert f"{ITEM}.completed" in [e.type for e in events]
        start = receive_start(connection, pcm24(speech[2 * SAMPLE_RATE_HZ :]))
    assert start >= 2_000


def receive_start(connection, data):
    append(connection, data)
    return until(connection, "input_audio_buffer.speech_started")[-1].audio_start_ms


@pytest.mark.parametrize(
    ("session", "param", "code"),
    [
        (None, "session", "missing_required_parameter"),
        (7, "session", "invalid_type"),
        ({}, "session.type", "missing_required_parameter"),
        ({"type": "realtime"}, "session.type", "invalid_value"),
        ({"voice": "alloy"}, "session.voice", "unsupported_value"),
        ({"audoi": {}}, "session.audoi", "unknown_parameter"),
        ({"include": ["x"]}, "session.include", "unsupported_value"),
        ({"audio": []}, "session.audio", "invalid_type"),
        ({"audio": {"output": {"voice": "a"}}}, "session.audio.output", "unsupported_value"),
        ("format", {"type": "audio/mp3"}, "invalid_value"),
        ("format.type", {"type": "audio/mp3"}, "invalid_value"),
        ("format.rate", {"type": "audio/pcm", "rate": 4_000}, "invalid_value"),
        ("format.rate", {"type": "audio/pcm", "rate": 24_000.5}, "invalid_type"),
        ("format.rate", {"type": "audio/pcm", "rate": True}, "invalid_type"),
        ("format.rate", {"type": "audio/pcmu", "rate": 16_000}, "invalid_value"),
        ("format.bits", {"bits": 16}, "unknown_parameter"),
        ("transcription", None, "unsupported_value"),
        ("transcription.model", {"model": "whisper-2"}, "invalid_model"),
        ("transcription.model", {"model": 1}, "invalid_type"),
        ("transcription.language", {"language": "de"}, "invalid_value"),
        ("transcription.languages", {"languages": ["de"]}, "invalid_value"),
        ("transcription.languages", {"languages": "en"}, "invalid_type"),
        ("transcription.keywords", {"keywords": ["x"]}, "unsupported_value"),
        ("transcription.delay", {"delay": "none"}, "invalid_value"),
        ("transcription.prompt", {"prompt": "x" * 2_001}, "invalid_value"),
        ("transcription.prompt", {"prompt": "\ud800"}, "invalid_value"),
        ("turn_detection.type", {"type": "semantic_vad"}, "invalid_value"),
        ("turn_detection.eagerness", {"eagerness": "low"}, "unsupported_value"),
        ("turn_detection.idle_timeout_ms", {"idle_timeout_ms": 1}, "unsupported_value"),
        ("turn_detection.threshold", {"threshold": 1.5}, "invalid_value"),
        ("turn_detection.threshold", {"threshold": "0.5"}, "invalid_type"),
        ("turn_detection.prefix_padding_ms", {"prefix_padding_ms": -1}, "invalid_value"),
        ("turn_detection.silence_duration_ms", {"silence_duration_ms": 10**400}, "invalid_value"),
        ("turn_detection.silence_duration_ms", {"silence_duration_ms": 0.5}, "invalid_type"),
    ],
)
def test_a_refused_field_is_named_and_changes_nothing(url, session, param, code):
    if isinstance(session, str):  # a path below audio.input and what is given there
        name = session.partition(".")[0]
        path, given = f"session.audio.input.{session}", {name: param}
        path = path + ".type" if session == "format" else path
        session = {"type": "transcription", "audio": {"input": given | {"noise_reduction": None}}}
    else:
        path = param
        if session and isinstance(session, dict) and "type" not in session:
            session = {"type": "transcription"} | session
    with connect(f"{url}/v1/realtime", proxy=None) as websocket:
        before = json.loads(websocket.recv(timeout=WAIT_S))["session"]
        send(websocket, "session.update", session=session, event_id="mine")
        error = json.loads(websocket.recv(timeout=WAIT_S))["error"]
        assert (error["param"], error["code"], error["event_id"]) == (path, code, "mine")
        assert error["type"] == "invalid_request_error"
        send(websocket, "session.update", session={"type": "transcription"})
        assert json.loads(websocket.recv(timeout=WAIT_S))["session"] == before


@pytest.mark.parametrize(
    ("frame", "code"),
    [
        ("not json", "invalid_message"),
        ("[]", "invalid_message"),
        ('"x"', "invalid_message"),
        ("{}", "invalid_message"),
        ('{"type": null}', "invalid_message"),
        ("[" * 100_000, "invalid_message"),
        (b"\0\1", "wrong_frame_type"),
        ({"type": "response.create"}, "invalid_value"),
        ({"type": "conversation.item.create", "item": {}}, "invalid_value"),
        ({"type": "transcription_session.update", "session": {}}, "invalid_value"),
        ({"type": "input_audio_buffer.append"}, "invalid_type"),
        ({"type": "input_audio_buffer.append", "audio": 7}, "invalid_type"),
        ({"type": "input_audio_buffer.append", "audio": "%%%"}, "invalid_value"),
        ({"type": "input_audio_buffer.append", "audio": "AAA"}, "invalid_value"),
        ({"type": "input_audio_buffer.append", "audio": "é"}, "invalid_value"),
        ({"type": "input_audio_buffer.append", "audio": "", "rate": 1}, "unknown_parameter"),
        ({"type": "input_audio_buffer.commit"}, "input_audio_buffer_commit_empty"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_bad_event_is_answered_and_the_session_goes_on(url, speech, frame, code):
    with connect(f"{url}/v1/realtime", proxy=None) as websocket:
        websocket.recv(timeout=WAIT_S)
        websocket.send(json.dumps(frame) if isinstance(frame, dict) else frame)
        answer = json.loads(websocket.recv(timeout=WAIT_S))
        assert STRICT.validate_python(answer).type == "error"
        assert (answer["error"]["type"], answer["error"]["code"]) == ("invalid_request_error", code)
        part = base64.b64encode(pcm24(speech[:SAMPLE_RATE_HZ])).decode()
        send(websocket, "input_audio_buffer.append", audio=part)
        send(websocket, "input_audio_buffer.commit")
        assert list(received(websocket, f"{ITEM}.completed"))[-1]["transcript"]


def test_an_append_over_the_limit(engine):
    with serving(engine, append_bytes=1_000) as url, realtime(url) as connection:
        connection.input_audio_buffer.append(audio=base64.b64encode(bytes(1_001)).decode())
        assert until(connection, "error")[-1].error.param == "audio"


def test_the_whole_file_in_one_append(tiny, speech):
    """OpenAI's clients may do so: with little room the socket waits, no audio is refused."""
    with (
        Engine(tiny, EngineConfig(n_slots=1, threads=1, backlog_s=1.5)) as engine,
        serving(engine) as url,
        realtime(url) as connection,
    ):
        session = {"type": "transcription", "audio": {"input": {"turn_detection": None}}}
        connection.session.update(session=session)
        append(connection, pcm24(speech), packet=10**9)
        connection.input_audio_buffer.commit()
        transcript = until(connection, f"{ITEM}.completed")[-1].transcript
        assert len(transcript.split()) >= 5


@pytest.mark.parametrize(
    ("query", "code", "part"),
    [
        ("?model=gpt-4o", "invalid_model", "this server runs 'tiny'"),
        ("?intent=conversation", "invalid_option", "intent=transcription"),
        ("?intnet=transcription", "invalid_option", "did you mean intent?"),
    ],
)
def test_a_query_that_cannot_be_served(url, query, code, part):
    with connect(f"{url}/v1/realtime{query}", proxy=None) as websocket:
        events = [json.loads(frame) for frame in frames(websocket)]
        assert [event["type"] for event in events] == ["session.created", "error"]
        assert events[1]["error"]["code"] == code
        assert part in events[1]["error"]["message"]
        assert websocket.close_code == 1008


@pytest.mark.parametrize(
    "query", ["", "?intent=transcription", "?model=tiny", "?model=gpt-4o-transcribe"]
)
def test_queries_of_known_clients(url, query):
    with connect(f"{url}/v1/realtime{query}", proxy=None) as websocket:
        created = json.loads(websocket.recv(timeout=WAIT_S))
    assert created["type"] == "session.created"
    assert created["session"]["type"] == "transcription"


@pytest.mark.parametrize(
    ("model", "commits"),
    [("gpt-4o-mini-transcribe", False), ("whisper-1", False), ("gpt-realtime-whisper", True)],
)
def test_openais_own_models_mean_the_one_that_runs(model, commits):
    """Plugins ask for them by default; those without turn detection leave the field out."""
    session = {"type": "transcription", "audio": {"input": {"transcription": {"model": model}}}}
    before = openai_session.SessionConfig.default("m-en", StreamOptions())
    after = openai_session.update(before, session, StreamOptions())
    assert after.model == "m-en"
    assert (after.turn_detection is None) == commits
    hints = {"model": model, "languages": ["en-GB"], "keywords": []}
    turns = {"transcription": hints, "turn_detection": {"type": "server_vad"}}
    session["audio"]["input"] = turns
    after = openai_session.update(before, session, StreamOptions())
    assert (after.language, after.turn_detection) == ("en-GB", before.turn_detection)


FIRST_UPDATES = {
    "livekit-plugins-openai 1.8.9": (
        {"model": "gpt-4o-mini-transcribe", "language": "en"},
        {"type": "server_vad", "threshold": 0.5}
        | {"prefix_padding_ms": 600, "silence_duration_ms": 350},
    ),
    "pipecat-ai 1.14.0": ({"model": "gpt-realtime-whisper", "language": "en"}, None),
}


@pytest.mark.parametrize("plugin", FIRST_UPDATES)
def test_what_plugins_ask_for_by_default(plugin):
    transcription, turns = FIRST_UPDATES[plugin]
    given = {"format": {"type": "audio/pcm", "rate": 24_000}, "transcription": transcription}
    session = {"type": "transcription", "audio": {"input": given | {"turn_detection": turns}}}
    before = openai_session.SessionConfig.default("m-en", StreamOptions())
    told = openai_session.to_wire("s", openai_session.update(before, session, StreamOptions()))
    assert told["audio"]["input"]["turn_detection"] == turns
    assert told["audio"]["input"]["transcription"]["model"] == "m-en"


def test_a_commit_in_a_full_house_keeps_the_slot(tiny, speech):
    """Commit ends a stream of the engine and begins the next: nobody may slip in between."""
    with Engine(tiny, EngineConfig(n_slots=1, threads=1)) as engine, serving(engine) as url:
        stop = threading.Event()
        refused = []

        def knock():
            while not stop.is_set():
                try:
                    with connect(f"{url}/v1/stream", proxy=None):
                        refused.append(False)
                except InvalidStatus as err:
                    refused.append(err.response.status_code == 503)

        with realtime(url) as connection:
            knocker = threading.Thread(target=knock)
            knocker.start()
            try:
                for _ in range(5):
                    append(connection, pcm24(speech[:SAMPLE_RATE_HZ]))
                    connection.input_audio_buffer.commit()
                    until(connection, f"{ITEM}.completed")
            finally:
                stop.set()
                knocker.join()
        assert len(refused) >= 5
        assert all(refused)
