"""The greedy CTC text is what the engine itself heard, segment by segment."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn.functional import one_hot

from bench import heard
from sparqle_stream.config import EngineConfig, StreamOptions, VadConfig
from sparqle_stream.engine import Engine
from sparqle_stream.session import Session, Start
from sparqle_stream.testing import PIECES


class Spy:
    """The best CTC piece of every frame of every segment that sessions hear."""

    def __init__(self, monkeypatch) -> None:
        self.segments: list[list[int]] = []
        next_turn, hear = Session.next_turn, Session.hear

        def spied_turn(session):
            turn = next_turn(session)
            if turn.start is Start.SEGMENT:
                self.segments.append([])
            return turn

        def spied_hear(session, log_probs):
            self.segments[-1] += log_probs.argmax(axis=-1).tolist()
            return hear(session, log_probs)

        monkeypatch.setattr(Session, "next_turn", spied_turn)
        monkeypatch.setattr(Session, "hear", spied_hear)


@pytest.mark.parametrize(
    ("vad", "chunk_ms", "delay_ms"), [("silero", 320, 240), ("off", 160, 0), ("silero", 640, 500)]
)
def test_it_is_what_the_engine_heard(monkeypatch, tiny, clip, vad, chunk_ms, delay_ms):
    """Frame by frame, in two segments, each with the gain that its own level asks for."""
    options = StreamOptions(chunk_ms=chunk_ms, delay_ms=delay_ms, vad=VadConfig(kind=vad))
    speech, pause = clip[8_000:40_000], np.zeros(16_000, np.float32)
    pcm = np.concatenate([0.05 * speech, pause, speech, pause])
    spy = Spy(monkeypatch)
    with Engine(tiny, EngineConfig(n_slots=1, chunk_ms=chunk_ms, threads=1)) as engine:
        engine.transcribe(pcm, options)
    monkeypatch.undo()
    assert len(spy.segments) >= (1 if vad == "off" else 2)
    assert all(len(set(best)) > 10 for best in spy.segments)
    paths = [x.argmax(axis=-1).tolist() for x in heard.posteriors(tiny, options, pcm)]
    assert paths == spy.segments


def test_the_text_has_every_new_piece_once(monkeypatch, tiny):
    """Repeats are one piece, blanks none; segments are parted by a space."""
    a, b, z = (PIECES.index(x) for x in ("▁a", "b", "▁z"))
    paths = [[0, a, a, 0, b, b], [0, 0], [z, 0, b, 0, b]]
    log_probs = [one_hot(torch.tensor(path), len(PIECES) + 1).float() for path in paths]
    monkeypatch.setattr(heard, "posteriors", lambda *_: iter(log_probs))
    assert heard.greedy_text(tiny, StreamOptions(), np.zeros(0)) == "ab zbb"


def test_silence_is_not_heard(tiny):
    assert heard.greedy_text(tiny, StreamOptions(), np.zeros(16_000, np.float32)) == ""
