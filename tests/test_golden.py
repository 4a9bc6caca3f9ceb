"""Golden captions: the demo clip through the shipped weights gives the captions that were seen.

They are what the model says, errors included, not what the clip says: a change of one word is a
change of weights, arithmetic or decoding that somebody should have meant. To renew them:

    sparqle-stream sparqle_stream/assets/demo.ogg --dtype float32 > tests/golden/demo.txt
"""

from __future__ import annotations

from difflib import SequenceMatcher
from pathlib import Path

import pytest

from sparqle_stream.config import EngineConfig, StreamOptions
from sparqle_stream.testing import text_of, words_of

GOLDEN = Path(__file__).parent / "golden" / "demo.txt"
SAME = 0.95  # of the words: float32 sums differ between CPUs, and a near tie may fall otherwise


@pytest.fixture(scope="module")
def events(llm_pulled, clip_path):
    from sparqle_stream import audio, models
    from sparqle_stream.engine import Engine

    clip = audio.read_file(clip_path)
    model = models.load(llm_pulled, dtype="float32")
    with Engine(model, EngineConfig(n_slots=1)) as engine:
        return list(engine.transcribe(clip, StreamOptions()))


def test_the_demo_says_what_it_said(events):
    said, golden = text_of(events).split(), GOLDEN.read_text().split()
    assert len(golden) > 10
    ratio = SequenceMatcher(None, said, golden, autojunk=False).ratio()
    assert ratio >= SAME, " ".join(said)


def test_words_come_in_order_and_after_they_were_said(events):
    words = words_of(events)
    assert all(a.end <= b.start + 1e-9 for a, b in zip(words, words[1:], strict=False))
    assert all(w.start <= w.end <= w.emitted for w in words)
