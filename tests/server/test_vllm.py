"""vLLM's realtime dialect on /v1/realtime, as its example client talks: told by the first event."""

from __future__ import annotations

import base64
import json

import pytest
from server_harness import WAIT_S, s16, serving
from websockets.sync.client import connect

from sparqle_stream import testing
from sparqle_stream.config import EngineConfig, StreamOptions, VadConfig
from sparqle_stream.server import vllm_realtime

OFF = StreamOptions(vad=VadConfig(kind="off"))
WORDS = ["far", "away", "bird", "sing", "alone"]
PCM = testing.say(WORDS)


@pytest.fixture(scope="module")
def url():
    with (
        testing.oracle_engine(EngineConfig(n_slots=4)) as engine,
        serving(engine, defaults=OFF) as url,
    ):
        yield url


def append(pcm) -> str:
    audio = base64.b64encode(s16(pcm)).decode()
    return json.dumps({"type": "input_audio_buffer.append", "audio": audio})


def commit(*, final: bool) -> str:
    event = {"type": "input_audio_buffer.commit"}
    return json.dumps(event | ({"final": True} if final else {}))


def begin(websocket, model: str = "tiny") -> None:
    created = json.loads(websocket.recv(timeout=WAIT_S))
    assert created["type"] == "session.created"
    assert created["id"].startswith("sess-")
    assert isinstance(created["created"], int)
    websocket.send(json.dumps({"type": "session.update", "model": model}))


def until_done(websocket) -> list[dict]:
    events = [json.loads(websocket.recv(timeout=WAIT_S))]
    while events[-1]["type"] not in ("transcription.done", "error"):
        events.append(json.loads(websocket.recv(timeout=WAIT_S)))
    return events


def test_two_utterances_over_one_connection(url):
    with connect(f"{url}/v1/realtime", proxy=None) as websocket:
        begin(websocket)
        for _ in range(2):
            websocket.send(commit(final=False))
            for start in range(0, len(PCM), 5_000):
                websocket.send(append(PCM[start : start + 5_000]))
            websocket.send(commit(final=True))
            events = until_done(websocket)
            deltas = [e["delta"] for e in events if e["type"] == "transcription.delta"]
            assert len(deltas) >= 2
            assert events[-1]["text"] == "".join(deltas) == " ".join(WORDS)
            usage = events[-1]["usage"]
            assert usage["prompt_tokens"] == round(len(PCM) / 1280)
            assert usage["completion_tokens"] == len(WORDS)
            assert usage["total_tokens"] == usage["prompt_tokens"] + len(WORDS)


def test_deltas_come_before_the_end(url):
    with connect(f"{url}/v1/realtime", proxy=None) as websocket:
        begin(websocket)
        websocket.send(commit(final=False))
        websocket.send(append(PCM))
        assert json.loads(websocket.recv(timeout=WAIT_S))["type"] == "transcription.delta"


@pytest.mark.parametrize(
    ("frame", "code"),
    [
        ("{", "invalid_json"),
        ("[]", "unknown_event"),
        ('{"type": "response.create"}', "unknown_event"),
        ('{"type": "input_audio_buffer.append", "audio": "?"}', "invalid_audio"),
        ('{"type": "input_audio_buffer.append", "audio": 7}', "invalid_audio"),
        ('{"type": "input_audio_buffer.append", "data": ""}', "unknown_event"),
        ('{"type": "input_audio_buffer.commit", "final": 3}', "invalid_json"),
        ('{"type": "session.update", "model": "other"}', "model_not_found"),
    ],
)
def test_errors_leave_the_connection_open(url, frame, code):
    with connect(f"{url}/v1/realtime", proxy=None) as websocket:
        begin(websocket)
        websocket.send(frame)
        assert json.loads(websocket.recv(timeout=WAIT_S))["code"] == code
        websocket.send(append(PCM))
        websocket.send(commit(final=True))
        assert until_done(websocket)[-1]["text"] == " ".join(WORDS)


def test_a_model_has_to_be_named_first(url):
    with connect(f"{url}/v1/realtime", proxy=None) as websocket:
        begin(websocket, "other")
        assert json.loads(websocket.recv(timeout=WAIT_S))["code"] == "model_not_found"
        websocket.send(commit(final=False))
        assert json.loads(websocket.recv(timeout=WAIT_S))["code"] == "model_not_validated"


@pytest.mark.parametrize(
    ("first", "is_vllm"),
    [
        ('{"type": "session.update", "model": "x"}', True),
        ('{"type": "session.update", "session": {"type": "transcription"}}', False),
        ('{"type": "session.update", "session": {}, "model": "x"}', False),
        ('{"type": "input_audio_buffer.commit", "final": false}', True),
        ('{"type": "input_audio_buffer.commit"}', False),
        ('{"type": "input_audio_buffer.append", "audio": ""}', False),
        ("nonsense", False),
        ("[]", False),
    ],
)
def test_the_first_event_tells(first, is_vllm):
    assert vllm_realtime.is_vllm(first) is is_vllm
