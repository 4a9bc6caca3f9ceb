"""Delays against a forced alignment: known posteriors, known ends, delays by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bench import aligned
from bench.players import Take, VirtualEngine
from sparqle_stream import testing
from sparqle_stream.config import EngineConfig, StreamOptions, VadConfig
from sparqle_stream.messages import Done, Final, SpeechStarted, SpeechStopped, Word

NO_VAD = StreamOptions(vad=VadConfig(kind="off"))


def heard(*letters: str) -> np.ndarray:
    """Certain log-probs (C, V) of one piece a frame: '' is blank, '_a' begins a word."""
    pieces = [x.replace("_", "▁") or "<blank>" for x in letters]
    out = np.full((len(letters), len(testing.PIECES) + 1), -30.0, np.float32)
    out[range(len(letters)), [testing.PIECES.index(piece) for piece in pieces]] = 0.0
    return out


def test_ends_of_words_by_hand():
    """Two segments from samples 1600 and 32 000 on; frames of 640 samples, which lag by 320.

    'go' has its last piece in frame 2 and a frame for the peak that comes early: it is over after
    frame 3, at 1600 + 4 * 640 - 320 = 3840 samples. 'on' of the second segment: frame 1 and one.
    """
    first = heard("", "_g", "o", "", "", "")
    second = heard("_o", "n", "", "")
    ends = aligned.word_ends([first, second], [1600, 32_000], "GO on.", testing.tiny_pieces())
    assert [word for word, _ in ends] == ["GO", "on."]
    assert [end * 16_000 for _, end in ends] == pytest.approx([3840, 32_000 + 3 * 640 - 320])


def test_a_text_that_was_not_heard_has_no_ends():
    log_probs = heard("", "_g", "o", "", "", "")
    assert aligned.word_ends([log_probs], [0], "xylophone", testing.tiny_pieces()) is None
    assert aligned.word_ends([], [], "go", testing.tiny_pieces()) is None


def test_starts_of_segments_by_hand():
    """Of the first word in each; frames of 640 samples, which lag by 320, less 40 ms of lead.

    'go' begins in frame 2, at 1600 + 2 * 640 - 320 - 640 samples; in the second segment nobody
    speaks; 'on' begins in the first frame of the third, which is not heard before it begins.
    """
    first, third = heard("", "", "_g", "o", "", "_u", "p", ""), heard("_o", "n", "", "")
    segments, starts = [first, heard("", ""), third], [1600, 16_000, 32_000]
    got = aligned.first_starts(segments, starts, "GO - up on.", testing.tiny_pieces(), lead=640)
    assert got == pytest.approx([1920 / 16_000, None, 2.0])
    late = aligned.first_starts([first], [0], "Go up", testing.tiny_pieces())
    assert late == pytest.approx([960 / 16_000])


def test_a_missed_first_word_makes_the_wait_longer():
    """'good' was said from 0.2 s on; the first caption is 'day'. Nothing was said in the second
    segment, whose caption is made up; in the third something, but nothing was written."""
    found = aligned.Aligned()
    played = Take(
        arrivals=[
            (0.3, SpeechStarted(0.1)),
            (1.1, Final("day", (Word("day", 0.7, 0.9, 1.0),), 0, 1.0)),
            (1.5, Final(" to", (Word("to", 1.0, 1.2, 1.4),), 0, 1.4)),
            (1.6, SpeechStopped(1.5)),
            (2.1, SpeechStarted(2.0)),
            (2.9, Final(" so", (Word("so", 2.1, 2.3, 2.8),), 1, 2.8)),
            (3.0, SpeechStopped(2.9)),
            (4.1, SpeechStarted(4.0)),
            (5.0, Done(5.0, 1.0, 5.0)),
        ]
    )
    aligned.add_first(found, played, [0.2, None, 4.2])
    assert found.first_heard == pytest.approx([0.8])
    assert found.first_clock == pytest.approx([0.9])
    got = found.summary()
    assert got["first_word_algorithmic_ms"]["max"] == 800.0
    assert got["first_word_with_compute_ms"]["n"] == 1


def take(*words: tuple[str, float, float]) -> Take:
    """Words with the stream time that had to be heard and the clock's at which they were there."""
    finals = [(at, Final(w, (Word(w, 0.0, t, t),), 0, t)) for w, t, at in words]
    around = [(0.0, SpeechStarted(0.0)), (9.0, SpeechStopped(8.0)), (9.0, Done(8.0, 1.0, 8.0))]
    return Take(arrivals=[around[0], *finals, *around[1:]])


def test_delays_of_words_that_were_written_as_said():
    """'day' was written as 'night', so it has no delay; 'Good' and 'all' have theirs."""
    found = aligned.Aligned()
    written = take(("Good", 1.0, 1.1), ("night", 1.5, 1.6), ("all.", 2.0, 2.3))
    aligned.add(found, written, [("GOOD", 0.6), ("DAY", 1.2), ("ALL", 1.5)])
    assert found.heard == pytest.approx([0.4, 0.5])
    assert found.clock == pytest.approx([0.5, 0.8])


def test_a_summary_counts_what_was_left_out():
    found = aligned.Aligned([0.4, 0.5], [0.5, 0.8], n_said=3, n_left_out=1)
    got = found.summary()
    assert (got["words_said"], got["recordings_left_out"]) == (3, 1)
    assert (got["algorithmic_ms"]["p50"], got["with_compute_ms"]["max"]) == (450.0, 800.0)


def test_the_text_is_aligned_with_what_the_engine_heard(monkeypatch, oracle):
    """What `say` spells is heard a letter a frame, so that the ends are known.

    The tiny model hears noise; posteriors that spell the audio stand in for it.
    """
    words = ["bold", "day"]
    pcm = testing.say(words, gap_ms=320)
    played = VirtualEngine(oracle, EngineConfig(n_slots=1, threads=1)).play(pcm, NO_VAD)
    late = [""] * (oracle.cfg.encoder.ahead_frames(NO_VAD.delay_ms) // 2)
    frames = [*late, "", "_b", "o", "l", "d", *[""] * 8, "_d", "a", "y", *[""] * 8]
    spelled = torch.from_numpy(heard(*frames))
    monkeypatch.setattr(aligned, "posteriors", lambda *_: iter([spelled]))
    found = aligned.measure(oracle, NO_VAD, [(pcm, "Bold day", played)])
    ends = [(640 * 6 - 320) / 16_000, (640 * 17 - 320) / 16_000]
    left = [e.time for e in played.events if isinstance(e, Final) for _ in e.words]
    assert found.heard == pytest.approx([t - end for t, end in zip(left, ends, strict=True)])
    assert all(clock >= at for clock, at in zip(found.clock, found.heard, strict=True))
    assert (found.n_said, found.n_left_out) == (2, 0)
    lead_s = oracle.cfg.captions.lead_ms / 1000
    begin = max((640 * 1 - 320) / 16_000 - lead_s, 0.0)  # 'b' is in frame 1
    assert found.first_heard == pytest.approx([left[0] - begin])
    bad = aligned.measure(oracle, NO_VAD, [(pcm, "xylophone", played)])
    assert (bad.n_said, bad.n_left_out, bad.heard) == (0, 1, [])
