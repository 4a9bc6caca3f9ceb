"""Seams: speech without a pause, cut where the LLM's slot is full; no word is lost or doubled.

The oracle knows of a slot only what was heard in it and what its prefix says: words that the delay
held back at a cut would be lost, and words that are heard again would be said twice.
"""

from __future__ import annotations

import numpy as np
import pytest

from sparqle_stream import messages
from sparqle_stream.config import StreamOptions, VadConfig
from sparqle_stream.errors import ConfigError
from sparqle_stream.testing import oracle_engine, say, vocabulary, words_of

OFF = VadConfig(kind="off")


@pytest.fixture
def engine():
    with oracle_engine() as engine:
        yield engine


@pytest.mark.parametrize("chunk_ms", [80, 320, 1280])
@pytest.mark.parametrize("delay_ms", [0, 240, 960])
def test_seams_of_long_speech_lose_and_double_nothing(engine, chunk_ms, delay_ms):
    """A minute without a pause, cut every 8 s in the middle of whatever is said."""
    words = vocabulary(250)
    options = StreamOptions(vad=OFF, chunk_ms=chunk_ms, delay_ms=delay_ms, max_segment_s=8.0)
    events = engine.transcribe(say(words, gap_ms=80), options)
    assert [w.word for w in words_of(events)] == words
    assert engine.metrics().seams >= 60 // (8 + 1.28) - 1
    assert sum(isinstance(e, messages.SpeechStopped) for e in events) == 1
    segments = segment_words(events)
    assert segments == sorted(segments)
    assert engine.metrics().seams <= len(set(segments)) <= engine.metrics().seams + 1
    n_before = segments.count(0)
    assert engine.workers[0].batch.seam_prefixes[0].split() == words[n_before - 8 : n_before]


@pytest.mark.slow
def test_an_hour_without_a_pause_loses_and_doubles_nothing(engine):
    words = vocabulary(11_250, n_syllables=3)  # 320 ms each
    options = StreamOptions(vad=OFF, chunk_ms=1280)
    out = words_of(engine.transcribe(say(words, gap_ms=80), options))
    assert [w.word for w in out] == words
    assert out[-1].end == pytest.approx(3600, abs=0.2)
    assert 140 <= engine.metrics().seams <= 160


def segment_words(events) -> list[int]:
    """The segment of every word."""
    return [e.segment for e in events if isinstance(e, messages.Final) for _ in e.words]


def test_a_seam_prefers_a_pause(engine):
    """Words at 0 .. 5.3 s, a pause of 0.6 s, words: the cut at most 6.5 s along is in the pause."""
    first, then = vocabulary(40)[:22], vocabulary(40)[22:]
    pause = np.zeros(9600, np.float32)
    pcm = np.concatenate([say(first, gap_ms=80), pause, say(then, gap_ms=80)])
    events = engine.transcribe(pcm, StreamOptions(vad=OFF, max_segment_s=6.5))
    assert [w.word for w in words_of(events)] == first + then
    assert segment_words(events)[:23] == [0] * 22 + [1]


def test_a_full_slot_is_a_seam_too(engine):
    """Limits of hours: the slot of 640 rows is what ends the segments."""
    words = vocabulary(900)
    options = StreamOptions(vad=OFF, max_segment_s=1e6)
    events = engine.transcribe(say(words, gap_ms=80), options)
    assert [w.word for w in words_of(events)] == words
    # 12.5 queries and 4.2 words a second fill 640 rows in about 38 s.
    assert len(say(words, gap_ms=80)) / 16_000 / 40 - 1 <= engine.metrics().seams <= 8


def test_the_prompt_stands_before_every_segment(engine):
    options = StreamOptions(vad=OFF, prompt="names are here", max_segment_s=4.0)
    engine.transcribe(say(vocabulary(40)), options)
    prefixes = engine.workers[0].batch.seam_prefixes
    assert prefixes
    assert all(prefix.split()[:3] == ["names", "are", "here"] for prefix in prefixes)


def test_the_task_stands_between_prompt_and_context(engine):
    """A long prompt loses its beginning, what was said is the newest: the task is never lost."""
    told = {"prompt": "names " * 60 + "are here", "instruction": "Write it down:"}
    engine.transcribe(say(vocabulary(40)), StreamOptions(vad=OFF, max_segment_s=4.0, **told))
    prefixes = engine.workers[0].batch.seam_prefixes
    assert prefixes
    assert all(" names are here Write it down: " in prefix for prefix in prefixes)


@pytest.mark.parametrize("field", ["prompt", "instruction"])
def test_a_prompt_that_is_no_text_is_refused(field):
    """Half a character of a JSON string, or bytes of another encoding on the command line."""
    with pytest.raises(ConfigError, match="no valid Unicode"):
        StreamOptions(**{field: "caf\udce9"})
