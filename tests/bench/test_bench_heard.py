"""The greedy CTC text is what the engine itself heard, segment by segment."""

from __future__ import annotations

import pytest

from bench import heard
from sparqle_stream.config import EngineConfig, StreamOptions, VadConfig
from sparqle_stream.ctc import BLANK
from sparqle_stream.engine import Engine
from sparqle_stream.messages import SpeechStarted, SpeechStopped
from sparqle_stream.session import Session, Start


class Spy:
    """The best pieces of every segment that a session hears."""

    def __init__(self, monkeypatch) -> None:
        self.segments: list[list[int]] = []
        next_turn, allow = Session.next_turn, Session.allow

        def spied_turn(session):
            turn = next_turn(session)
            if turn.start is Start.SEGMENT:
                self.segments.append([])
            return turn

        def spied_allow(session, log_probs):
            self.segments[-1] += log_probs.argmax(dim=-1).tolist()
            return allow(session, log_probs)

        monkeypatch.setattr(Session, "next_turn", spied_turn)
        monkeypatch.setattr(Session, "allow", spied_allow)

    def text(self, pieces) -> str:
        texts = []
        for best in self.segments:
            changes = [b for a, b in zip([BLANK, *best], best, strict=False) if a != b]
            texts.append(pieces.decode(changes))
        return " ".join(text for text in texts if text)


@pytest.mark.parametrize(
    ("vad", "chunk_ms", "delay_ms"), [("silero", 320, 240), ("off", 160, 0), ("silero", 640, 500)]
)
def test_it_is_what_the_engine_heard(monkeypatch, tiny, clip, vad, chunk_ms, delay_ms):
    options = StreamOptions(chunk_ms=chunk_ms, delay_ms=delay_ms, vad=VadConfig(kind=vad))
    pcm = clip[: 6 * 16_000]
    spy = Spy(monkeypatch)
    with Engine(tiny, EngineConfig(n_slots=1, chunk_ms=chunk_ms, threads=1)) as engine:
        events = engine.transcribe(pcm, options)
    engine_heard = spy.text(tiny.pieces)
    assert len(engine_heard) > 20
    assert heard.greedy_text(tiny, options, pcm, events) == engine_heard


def test_segments_are_where_the_events_say():
    events = [SpeechStarted(0.5), SpeechStopped(1.25), SpeechStarted(2.0), SpeechStopped(2.0625)]
    assert heard.spoken(events) == [(8_000, 20_000), (32_000, 33_000)]


def test_silence_is_not_heard(tiny):
    assert heard.greedy_text(tiny, StreamOptions(), [], []) == ""
