"""Delays: hand-computed waits of a stream of three segments, and percentiles."""

from __future__ import annotations

import pytest

from bench import delays
from sparqle_stream.messages import Done, Final, Ready, SpeechStarted, SpeechStopped, Tail, Word


def final(segment: int, at: float, *times: tuple[float, float]) -> Final:
    words = tuple(Word(f"w{i}", start, end, at) for i, (start, end) in enumerate(times))
    return Final(" ".join(w.word for w in words), words, segment, at)


# Two words leave together, one follows, a pause; one word, cut off by the end of the stream.
STREAM = [
    (0.01, Ready("id", "m", 16_000, 320, 240)),
    (0.50, SpeechStarted(0.2)),
    (1.05, final(0, 1.0, (0.3, 0.5), (0.55, 0.9))),
    (1.06, Tail("and", 1.0)),
    (1.90, final(0, 1.8, (1.2, 1.4))),
    (1.91, SpeechStopped(1.7)),
    (3.00, SpeechStarted(2.9)),
    (3.55, final(1, 3.5, (3.0, 3.25))),
    (4.20, Done(4.0, 0.5, 4.0)),
]


def test_delays_of_a_stream_with_compute():
    got = delays.measure(STREAM)
    assert got.emission == pytest.approx([0.55, 0.15, 0.5, 0.3])
    assert got.first_word == pytest.approx([0.75, 0.55])
    assert got.end_to_final == pytest.approx([0.5, 0.3])


def test_algorithmic_delays_know_stream_time_only():
    got = delays.algorithmic(event for _, event in STREAM)
    assert got.emission == pytest.approx([0.5, 0.1, 0.4, 0.25])
    assert got.first_word == pytest.approx([0.7, 0.5])
    assert got.end_to_final == pytest.approx([0.4, 0.25])


def test_a_word_that_ends_when_it_leaves_is_counted():
    got = delays.algorithmic([final(0, 1.0, (0.3, 0.5), (0.55, 1.0)), final(0, 1.2, (1.0, 1.2))])
    assert got.n_unsure == 2
    assert delays.measure(STREAM).n_unsure == 0


def test_a_segment_without_words_waits_for_nothing():
    """Noise that the detector took for speech must not count with the words of its neighbour."""
    noise = [(2.0, SpeechStarted(1.9)), (2.5, SpeechStopped(2.2))]
    got = delays.measure(STREAM[:6] + noise + STREAM[6:])
    assert got.end_to_final == pytest.approx([0.5, 0.3])
    assert got.n_without_words == 1
    assert delays.measure(STREAM).n_without_words == 0
    cut_off = [*STREAM[:6], (3.0, SpeechStarted(2.9)), (4.2, Done(4.0, 0.5, 4.0))]
    assert delays.measure(cut_off).n_without_words == 1
    assert delays.measure([(0.1, Done(0.1, 0.0, 0.1))]).n_without_words == 0


def test_streams_add_up():
    twice = delays.measure(STREAM)
    twice.extend(delays.measure([*STREAM[:2], *STREAM[5:]]))
    assert twice.n_without_words == 1
    twice = delays.measure(STREAM)
    twice.extend(delays.measure(STREAM))
    assert [twice.summary()[name]["n"] for name in twice.summary()] == [8, 4, 4]


def test_percentiles_lie_between_the_nearest_values():
    """0, 10 .. 100 ms: the p-th percentile of these eleven is p ms."""
    values = [i / 100 for i in (7, 3, 10, 0, 1, 2, 9, 5, 8, 6, 4)]
    assert delays.percentiles_ms(values) == {
        "n": 11,
        "p50": 50.0,
        "p90": 90.0,
        "p95": 95.0,
        "p99": 99.0,
        "max": 100.0,
    }


def test_one_value_is_every_percentile():
    assert set(delays.percentiles_ms([0.25]).values()) == {1, 250.0}


def test_no_values_are_no_figures():
    got = delays.percentiles_ms([])
    assert got.pop("n") == 0
    assert set(got.values()) == {None}
