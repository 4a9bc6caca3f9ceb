"""/v1/listen with Deepgram's own client; every answer is checked against its types, strictly."""

from __future__ import annotations

import contextlib
import json
from contextlib import contextmanager

import pytest
from server_harness import WAIT_S, frames, s16, serving
from websockets.exceptions import ConnectionClosedOK, InvalidStatus
from websockets.sync.client import connect

from sparqle_stream import testing
from sparqle_stream.config import EngineConfig, StreamOptions, VadConfig
from sparqle_stream.errors import ConfigError
from sparqle_stream.server import deepgram

deepgram_sdk = pytest.importorskip("deepgram", reason="deepgram-sdk is not installed")
# The package connects as websockets before 17.1 wanted it, and imports names of before 14.
pytestmark = [
    pytest.mark.filterwarnings("ignore:connect.* must be used as a context:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*:DeprecationWarning:websockets"),
    pytest.mark.filterwarnings("ignore:.*:DeprecationWarning:deepgram"),
]
OFF = StreamOptions(vad=VadConfig(kind="off"))
WORDS = ["far", "away", "bird", "sing", "alone"]
SPEECH = s16(testing.say(WORDS))
QUERY = {"model": "nova-3", "encoding": "linear16", "sample_rate": "16000"}


@pytest.fixture(scope="module")
def url():
    with (
        testing.oracle_engine(EngineConfig(n_slots=4)) as engine,
        serving(engine, defaults=OFF, api_key="k") as url,
    ):
        yield url


@contextmanager
def listening(url, **options):
    from deepgram import DeepgramClient
    from deepgram.environment import DeepgramClientEnvironment

    base = url.replace("ws", "http", 1)
    environment = DeepgramClientEnvironment(base=base, production=url, agent=url, agent_rest=base)
    client = DeepgramClient(api_key="k", environment=environment)
    with client.listen.v1.connect(**QUERY | options) as connection:
        yield connection


def strict(event):
    """The event as its exact type: a missing or misspelt field raises."""
    if event.type == "Error":
        raise AssertionError(event)
    return type(event).model_validate(event.model_dump(), strict=True)


def to_the_end(connection) -> list:
    events = []
    with contextlib.suppress(ConnectionClosedOK):  # any other close is an error here
        while True:
            events.append(strict(connection.recv()))
    return events


def best(event):
    return event.channel.alternatives[0]


def transcript(events) -> str:
    return " ".join(best(e).transcript for e in events if e.type == "Results" and e.is_final)


def test_final_results_of_the_stock_client(url):
    with listening(url) as connection:
        connection.send_media(SPEECH)
        connection.send_keep_alive()
        connection.send_close_stream()
        events = to_the_end(connection)
    assert transcript(events).split() == WORDS
    assert all(e.is_final for e in events if e.type == "Results")
    words = [w for e in events if e.type == "Results" for w in best(e).words]
    assert [w.word for w in words] == WORDS
    assert all(a.end <= b.start for a, b in zip(words, words[1:], strict=False))
    assert words[0].start == pytest.approx(0.04, abs=0.05)
    assert events[-2].speech_final is True
    assert events[-1].type == "Metadata"
    assert events[-1].duration == pytest.approx(len(SPEECH) / 32_000)
    assert events[0].metadata.model_info.name == "tiny"
    assert events[0].metadata.request_id == events[-1].request_id


def test_interim_results_grow_into_the_final_one(url):
    with listening(url, interim_results="true", vad_events="true") as connection:
        for start in range(0, len(SPEECH), 6_400):
            connection.send_media(SPEECH[start : start + 6_400])
        connection.send_close_stream()
        events = to_the_end(connection)
    assert events[0].type == "SpeechStarted"
    interim = [best(e) for e in events if e.type == "Results" and not e.is_final]
    assert interim  # of several that wait for a slow reader only the last goes out
    settled = 0
    for alternative in interim:
        flags = [w.final for w in alternative.words]
        assert flags == sorted(flags, reverse=True), "the tail comes last"
        assert [w.word for w in alternative.words if w.final] == WORDS[: sum(flags)]
        assert sum(flags) >= settled, "final words are never taken back"
        settled = sum(flags)
    assert transcript(events).split() == WORDS


def test_finalize_is_acknowledged_and_the_stream_goes_on(url):
    with listening(url) as connection:
        for word in ("first", "second"):
            connection.send_media(s16(testing.say([word], gap_ms=40)))
            connection.send_finalize()
            event = strict(connection.recv())
            assert (event.from_finalize, event.is_final) == (True, True)
            assert best(event).transcript == word
        connection.send_finalize()
        assert strict(connection.recv()).from_finalize is True
        connection.send_close_stream()
        assert [e.type for e in to_the_end(connection)] == ["Metadata"]


def test_speech_without_a_pause_is_settled_all_the_same(url):
    words = testing.vocabulary(40)
    with listening(url) as connection:
        connection.send_media(s16(testing.say(words)))
        connection.send_close_stream()
        events = to_the_end(connection)
    finals = [e for e in events if e.type == "Results"]
    assert len(finals) >= 2
    assert not any(e.speech_final for e in finals[:-1])
    assert transcript(events).split() == words


def test_utterance_end_after_a_gap(url):
    with listening(url, interim_results="true", utterance_end_ms="1000") as connection:
        connection.send_media(s16(testing.say(["word"], gap_ms=40)))
        connection.send_finalize()
        connection.send_media(bytes(3 * 32_000))
        connection.send_finalize()
        connection.send_media(bytes(320))
        connection.send_close_stream()
        events = to_the_end(connection)
    (end,) = [e for e in events if e.type == "UtteranceEnd"]
    (word,) = [w for e in events if e.type == "Results" and e.is_final for w in best(e).words]
    assert end.last_word_end == word.end


def test_punctuation_is_written_only_when_asked_for():
    assert deepgram.bare(" Don't, ") == "don't"
    assert deepgram.bare("“Well!") == "“well"


@pytest.mark.parametrize("scheme", ["token", "bearer"])
def test_a_browser_sends_its_key_as_a_subprotocol(url, scheme):
    address = f"{url}/v1/listen?encoding=linear16&sample_rate=16000"
    with connect(address, subprotocols=[scheme, "k"], proxy=None) as websocket:
        assert websocket.subprotocol == scheme
        websocket.send(b"")  # how older clients end
        assert [json.loads(f)["type"] for f in frames(websocket)] == ["Metadata"]
    with pytest.raises(InvalidStatus):
        connect(address, subprotocols=[scheme, "wrong"], proxy=None).__enter__()


@pytest.mark.parametrize(
    ("query", "named"),
    [
        ("diarize=true", "diarize"),
        ("multichannel=true", "multichannel"),
        ("redact=pci", "redact"),
        ("callback=http://x", "callback"),
        ("punctuat=true", "did you mean punctuate"),
        ("punctuate=yes", "neither true nor false"),
        ("encoding=opus", "opus"),
        ("sample_rate=5", "sample_rate"),
        ("utterance_end_ms=1000", "interim_results"),
        ("interim_results=true&utterance_end_ms=10", "1000..5000"),
        ("endpointing=soon", "endpointing"),
        ("keyterm=" + "x" * 3000, "too long"),
        ("channels=2&channels=2", "twice"),
    ],
)
def test_what_is_not_honoured_is_refused(url, query, named):
    base = "" if "encoding" in query else "&encoding=linear16"
    base += "" if "sample_rate" in query else "&sample_rate=16000"
    with connect(f"{url}/v1/listen?token=k&{query}{base}", proxy=None) as websocket:
        (error,) = [json.loads(frame) for frame in frames(websocket)]
    assert error["type"] == "Error"
    assert error["variant"] == "invalid_option"
    assert named in error["description"]
    assert websocket.close_code == 1008


def test_fields_that_ask_for_nothing_are_no_error():
    query = [("diarize", "false"), ("tag", "a"), ("tag", "b"), ("mip_opt_out", "true")]
    query += [("keyterm", "Anna"), ("keyterm", "Berta"), ("endpointing", "10"), ("model", "x")]
    asked = deepgram.parse([*query, *QUERY.items()][:7] + [*QUERY.items()][1:], "m-en", OFF)
    assert asked.options.prompt == "Anna, Berta"
    assert asked.options.vad.stop_ms == deepgram.MIN_STOP_MS
    assert asked.has_endpoints
    with pytest.raises(ConfigError, match="language 'fr'"):
        deepgram.parse([*QUERY.items(), ("language", "fr")], "m-en", OFF)


def test_configure_and_nonsense(url):
    address = f"{url}/v1/listen?token=k&encoding=mulaw&sample_rate=8000"
    with connect(address, proxy=None) as websocket:
        websocket.send('{"type": "Configure", "keyterms": ["x"]}')
        assert json.loads(websocket.recv(timeout=WAIT_S))["type"] == "ConfigureFailure"
        websocket.send('{"type": "Finalise"}')
        error = [json.loads(frame) for frame in frames(websocket)][-1]
    assert "did you mean Finalize" in error["description"]
    assert websocket.close_code == 1007
