"""WhisperLive at / and WhisperLiveKit at /asr, frame by frame as their stock clients talk."""

from __future__ import annotations

import json

import numpy as np
import pytest
from server_harness import WAIT_S, frames, s16, serving
from websockets.sync.client import connect

from sparqle_stream import testing
from sparqle_stream.config import EngineConfig, StreamOptions, VadConfig
from sparqle_stream.errors import ConfigError
from sparqle_stream.server import whisper_live, whisper_live_kit

OFF = StreamOptions(vad=VadConfig(kind="off"))
WORDS = testing.vocabulary(60)
PCM = testing.say(WORDS)
# What the stock client of WhisperLive 0.10 sends first.
OPTIONS = {
    "uid": "u-1",
    "language": None,
    "task": "transcribe",
    "model": "small",
    "use_vad": False,
    "send_last_n_segments": 10,
    "no_speech_thresh": 0.45,
    "clip_audio": False,
    "same_output_threshold": 10,
    "enable_translation": False,
    "target_language": "fr",
    "hotwords": None,
    "enable_diarization": False,
    "max_speakers": 10,
    "known_speakers": [],
    "word_timestamps": False,
    "initial_prompt": None,
    "vad_parameters": None,
}


@pytest.fixture(scope="module")
def url():
    with (
        testing.oracle_engine(EngineConfig(n_slots=4)) as engine,
        serving(engine, defaults=OFF) as url,
    ):
        yield url


def whisper_live_session(url, pcm, **options) -> tuple[list[dict], int]:
    """As its client does: options, wait for SERVER_READY, 4096 samples at a time, END_OF_AUDIO."""
    with connect(f"{url}/", proxy=None, compression=None) as websocket:
        websocket.send(json.dumps(OPTIONS | options))
        seen = [json.loads(websocket.recv(timeout=WAIT_S))]
        while seen[-1].get("message") != "SERVER_READY":
            seen.append(json.loads(websocket.recv(timeout=WAIT_S)))
        for start in range(0, len(pcm), 4096):
            websocket.send(pcm[start : start + 4096].astype("<f4").tobytes())
        websocket.send(b"END_OF_AUDIO")
        seen += [json.loads(frame) for frame in frames(websocket)]
    return seen, websocket.close_code


def test_whisper_live_segments(url):
    seen, code = whisper_live_session(url, PCM, word_timestamps=True)
    assert code == 1000
    assert {message["uid"] for message in seen} == {"u-1"}
    assert [m["message"] for m in seen if m.get("status") == "WARNING"] == [
        "this server runs tiny, whatever the client asks for"
    ]
    ready = next(m for m in seen if m.get("message") == "SERVER_READY")
    assert ready["backend"] == "faster_whisper"
    collected = as_the_stock_client_collects(seen)
    assert " ".join(s["text"].strip() for s in collected).split() == WORDS
    assert all(len(s["words"]) == len(s["text"].split()) for s in collected)
    moving = [m["segments"][-1] for m in seen if "segments" in m]
    assert sum(not s["completed"] for s in moving) >= 3
    assert moving[-1]["completed"]
    assert all(isinstance(s["start"], str) and s["start"].count(".") == 1 for s in moving)


def as_the_stock_client_collects(seen) -> list[dict]:
    """A completed segment is new if it does not start before the end of the last one kept."""
    kept: list[dict] = []
    for message in seen:
        for segment in message.get("segments", []):
            is_new = not kept or float(segment["start"]) >= float(kept[-1]["end"])
            if segment["completed"] and is_new:
                kept.append(segment)
    return kept


def test_whisper_live_sends_only_so_many_segments(url):
    seen, _ = whisper_live_session(url, PCM, send_last_n_segments=1)
    assert max(len(m["segments"]) for m in seen if "segments" in m) == 2
    assert len(as_the_stock_client_collects(seen)) >= 2


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"task": "translate"}, "task"),
        ({"enable_diarization": True}, "enable_diarization"),
        ({"audio_format": "uint8"}, "uint8"),
        ({"uid": None}, "uid"),
        ({"sped": 1}, "unknown option"),
        ({"vad_parameters": {"threshold": 7}}, "threshold"),
        ({"vad_parameters": {"window": 7}}, "window"),
        ({"vad_parameters": 5}, "vad_parameters"),
        ({"hotwords": ["a"]}, "hotwords"),
        ({"send_last_n_segments": 0}, "send_last_n_segments"),
    ],
)
def test_whisper_live_refuses_what_it_does_not_honour(url, options, named):
    with connect(f"{url}/", proxy=None) as websocket:
        websocket.send(json.dumps(OPTIONS | options))
        seen = [json.loads(frame) for frame in frames(websocket)]
    assert seen[-1]["status"] == "ERROR"
    assert named in seen[-1]["message"]
    assert websocket.close_code == 1008


def test_whisper_live_options():
    raw = OPTIONS | {"use_vad": True, "initial_prompt": "Anna", "hotwords": "Berta"}
    raw |= {"vad_parameters": {"threshold": 0.6, "min_silence_duration_ms": 700}, "max_speakers": 3}
    asked = whisper_live.parse(raw, "m-en", OFF)
    assert asked.options.prompt == "Anna Berta"
    assert (asked.options.vad.kind, asked.options.vad.stop_ms) == ("silero", 700)
    assert asked.options.vad.threshold == 0.6
    assert asked.warnings[0] == "max_speakers has no effect on this server"
    with pytest.raises(ConfigError, match="language"):
        whisper_live.parse(raw | {"language": "fr"}, "m-en", OFF)


@pytest.mark.parametrize("first", [b"\0\0\0\0", "hello", "[]"])
def test_whisper_live_wants_its_options_first(url, first):
    with connect(f"{url}/", proxy=None) as websocket:
        websocket.send(first)
        seen = [json.loads(frame) for frame in frames(websocket)]
    assert [m["status"] for m in seen] == ["ERROR"]
    assert websocket.close_code == 1007


def asr_session(url, query: str, pcm=PCM) -> list[dict]:
    with connect(f"{url}/asr{query}", proxy=None, compression=None) as websocket:
        data = s16(pcm)
        for start in range(0, len(data), 8_000):
            websocket.send(data[start : start + 8_000])
        websocket.send(b"")
        seen = [json.loads(frame) for frame in frames(websocket)]
    assert websocket.close_code == 1000
    return seen


def test_asr_full(url):
    seen = asr_session(url, "?language=en")
    assert seen[0] == {"type": "config", "useAudioWorklet": True, "mode": "full"}
    assert seen[-1] == {"type": "ready_to_stop"}
    states = seen[1:-1]
    assert " ".join(line["text"] for line in states[-1]["lines"]).split() == WORDS
    assert states[-1]["status"] == "active_transcription"
    assert all("type" not in state for state in states)
    lengths = [len(" ".join(line["text"] for line in s["lines"]).split()) for s in states]
    assert lengths == sorted(lengths), "lines are never taken back"
    assert states[-1]["lines"][0]["start"] == "0:00:00"
    assert states[-1]["buffer_transcription"] == ""


def test_asr_diff_builds_the_same_lines(url):
    seen = asr_session(url, "?mode=diff")
    lines: list[dict] = []
    for message in seen[1:-1]:
        if message["type"] == "snapshot":
            lines = list(message["lines"])
        else:
            del lines[: message.get("lines_pruned", 0)]
            lines += message.get("new_lines", [])
            assert len(lines) == message["n_lines"]
    assert [m["seq"] for m in seen[1:-1]] == list(range(1, len(seen) - 1))
    assert " ".join(line["text"] for line in lines).split() == WORDS


@pytest.mark.parametrize("query", ["", "?mode=diff"])
def test_asr_cuts_the_line_of_who_makes_no_pause(url, query):
    """The open line was sent whole with every word, and grew for as long as somebody talked."""
    states = asr_session(url, query)[1:-1]
    lines = [line for s in states for line in s.get("lines", []) + s.get("new_lines", [])]
    texts = [line["text"] for line in lines] + [s["buffer_transcription"] for s in states]
    assert max(len(text.split()) for text in texts) <= len(WORDS) / 2


def test_asr_prunes_old_lines(monkeypatch):
    """300 utterances: the client that follows the diffs has what the server has, the last 200."""

    class Link:
        def __init__(self):
            self.sent = []

        def send(self, text, *, is_tail=False):
            self.sent.append(json.loads(text))

    from sparqle_stream import messages

    dialect = whisper_live_kit.AsrDialect(Link())
    dialect._is_diff = True
    lines: list[dict] = []
    for i in range(300):
        word = messages.Word(f"w{i}", i, i + 0.5, i + 1)
        dialect.on_event(messages.Final(f"w{i}", (word,), i, i + 1.0))
        dialect.on_event(messages.SpeechStopped(i + 1.0))
    for message in dialect._link.sent:
        del lines[: message.get("lines_pruned", 0)]
        lines += message.get("new_lines", message.get("lines", []))
    assert [line["text"] for line in lines] == [f"w{i}" for i in range(100, 300)]


@pytest.mark.parametrize(
    ("query", "named"),
    [
        ("?mode=fast", "mode"),
        ("?target_language=de", "target_language"),
        ("?lang=en", "language"),
    ],
)
def test_asr_refuses_what_it_does_not_honour(url, query, named):
    with connect(f"{url}/asr{query}", proxy=None) as websocket:
        seen = [json.loads(frame) for frame in frames(websocket)]
    assert seen[-1]["type"] == "error"
    assert named in seen[-1]["error"]
    assert websocket.close_code == 1008


def test_asr_takes_no_text(url):
    with connect(f"{url}/asr", proxy=None) as websocket:
        websocket.send("hello")
        seen = [json.loads(frame) for frame in frames(websocket)]
    assert seen[-1]["type"] == "error"
    assert websocket.close_code == 1003


def test_an_empty_recording(url):
    seen, code = whisper_live_session(url, np.zeros(0, np.float32))
    assert code == 1000
    assert not any("segments" in message for message in seen)
    assert asr_session(url, "", np.zeros(0, np.float32))[-1] == {"type": "ready_to_stop"}
