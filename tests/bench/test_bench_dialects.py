"""Dialects of others: what lag is counted from, by hand; ends, errors and addresses."""

from __future__ import annotations

import pytest

from bench.dialects import DIALECTS
from bench.openai_target import OpenAi
from bench.socket_target import Line, full_url
from bench.targets import End, Outcome
from sparqle_stream.errors import ConfigError


def openai(kind: str, **fields) -> dict:
    return {"type": kind, **fields}


EVENT = "conversation.item.input_audio_transcription."


def test_lag_of_openais_items_by_hand():
    """Speech began at 50. Item a ended at 1.2 s and was complete at 51.5: 0.3 s. Item b was
    committed by the client after 3 s and was complete at 53.4: 0.4 s. The server is not done
    before both are, nor before it has answered the commit.
    """
    outcome = Outcome(began_at=50.0, audio_s=2.0)
    line = Line(outcome, "")
    items = OpenAi(line)
    items.take(openai("input_audio_buffer.speech_started", item_id="a"), 50.4)
    items.take(openai(EVENT + "delta", item_id="a", delta=" good day"), 50.9)
    items.take(openai("input_audio_buffer.speech_stopped", item_id="a", audio_end_ms=1200), 51.4)
    items.take(openai("input_audio_buffer.committed", item_id="a"), 51.4)
    items.take(openai(EVENT + "completed", item_id="a", transcript="good day"), 51.5)
    assert not line.is_over.is_set()
    outcome.audio_s = 3.0
    items.farewell()
    items.take(openai("conversation.item.done", item={}), 53.1)
    assert not line.is_over.is_set()
    items.take(openai("input_audio_buffer.committed", item_id="b"), 53.2)
    items.take(openai(EVENT + "completed", item_id="b", transcript=""), 53.4)
    assert line.is_over.is_set()
    assert outcome.end is End.DONE
    assert [round(lag, 6) for _, lag in outcome.lags] == [0.3, 0.4]
    assert outcome.n_words == 2


def test_an_empty_commit_at_the_end_is_no_failure():
    line = Line(Outcome(), "")
    items = OpenAi(line)
    items.farewell()
    items.take(openai("error", error={"code": "input_audio_buffer_commit_empty"}), 1.0)
    assert line.outcome.end is End.DONE
    failed = Line(Outcome(), "")
    OpenAi(failed).take(openai("error", error={"code": "backlog", "message": "too slow"}), 1.0)
    assert (failed.outcome.end, failed.outcome.why) == (End.DROPPED, "too slow")
    assert failed.is_over.is_set()


def line_of(name: str, audio_s: float = 4.0) -> tuple:
    """A dialect on a connection whose audio began when the clock said 10."""
    line = Line(Outcome(began_at=10.0, audio_s=audio_s), "m")
    return DIALECTS[name](line), line


def lags(line: Line) -> list[float]:
    return [round(lag, 6) for _, lag in line.outcome.lags]


def test_lag_of_deepgrams_results_by_hand():
    """Audio until 1.0 s was covered at 11.25, until 2.5 s at 12.75; no words, no lag."""
    dialect, line = line_of("deepgram")
    assert line.is_ready.is_set()

    def results(start, duration, text, is_final):
        channel = {"alternatives": [{"transcript": text}]}
        return {
            "type": "Results",
            "start": start,
            "duration": duration,
            "is_final": is_final,
            "channel": channel,
        }

    dialect.take(results(0.0, 0.5, "", False), 10.9)
    dialect.take(results(0.0, 1.0, "good", False), 11.25)
    dialect.take(results(0.0, 2.5, "good day", True), 12.75)
    assert lags(line) == [0.25, 0.25]
    assert line.outcome.n_words == 2
    assert not line.is_over.is_set()
    dialect.take({"type": "Metadata", "duration": 4.0}, 14.1)
    assert line.outcome.end is End.DONE


def test_lag_of_whisperlives_segments_by_hand():
    """A moving segment counts when it changes; a completed one is counted as words once."""
    dialect, line = line_of("whisperlive")
    dialect.take({"uid": "u", "message": "SERVER_READY", "backend": "b"}, 9.0)
    assert line.is_ready.is_set()

    def segments(*parts):
        keys = ("start", "end", "text", "completed")
        return {"uid": "u", "segments": [dict(zip(keys, part, strict=True)) for part in parts]}

    done = ("0.000", "1.000", " good day", True)
    dialect.take(segments(("0.000", "0.500", " go", False)), 10.75)
    dialect.take(segments(("0.000", "0.500", " go", False)), 10.95)
    dialect.take(segments(done), 11.5)
    dialect.take(segments(done, ("1.200", "1.500", " to", False)), 11.75)
    assert lags(line) == [0.25, 0.5, 0.25]
    assert line.outcome.n_words == 2
    dialect.take({"uid": "u", "status": "WAIT", "message": 3.0}, 12.0)
    assert line.outcome.why == "WAIT: 3.0"


def test_lag_of_vllm_and_whisperlivekit_by_hand():
    """vLLM: all after the 4 s of audio. WhisperLiveKit: as the server says."""
    dialect, line = line_of("vllm")
    dialect.take({"type": "transcription.delta", "delta": "good"}, 11.0)
    dialect.take({"type": "transcription.done", "text": "good day"}, 14.5)
    assert (lags(line), line.outcome.n_words, line.outcome.end) == ([0.5], 2, End.DONE)
    dialect, line = line_of("whisperlivekit")
    dialect.take({"type": "config", "useAudioWorklet": True}, 9.9)
    update = {"lines": [{"text": "good day"}, {"text": None}], "remaining_time_transcription": 0.3}
    dialect.take(update, 11.0)
    dialect.take({"type": "ready_to_stop"}, 14.2)
    assert (lags(line), line.outcome.n_words, line.outcome.end) == ([0.3], 2, End.DONE)


@pytest.mark.parametrize(
    ("name", "event"),
    [
        ("vllm", {"type": "error", "error": "no", "code": "model_not_found"}),
        ("deepgram", {"type": "Error", "description": "no"}),
        ("whisperlivekit", {"type": "error", "error": "no"}),
    ],
)
def test_an_error_ends_the_stream(name, event):
    dialect, line = line_of(name)
    dialect.take(event, 11.0)
    assert (line.outcome.end, line.outcome.why) == (End.DROPPED, "no")
    assert line.is_over.is_set()


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("localhost:8000", "ws://localhost:8000/v1/realtime?intent=transcription"),
        ("https://host/v1/realtime?model=x", "wss://host/v1/realtime?model=x"),
    ],
)
def test_addresses(given, wanted):
    assert full_url(given, OpenAi.ROUTE) == wanted


@pytest.mark.parametrize("bad", ["ftp://host", "ws://host:port", "ws://[::1"])
def test_an_address_that_is_none(bad):
    with pytest.raises(ConfigError, match="not the address"):
        full_url(bad, OpenAi.ROUTE)
