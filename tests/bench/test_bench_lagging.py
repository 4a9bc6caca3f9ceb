"""Lagging: AL, LAAL and DAL of cases that are worked out by hand."""

from __future__ import annotations

import pytest

from bench import lagging
from sparqle_stream.messages import Final, SpeechStopped, Word


def test_a_perfect_writer_lags_by_its_delay():
    """4 words in 4 s, each written a second after its ideal moment 0, 1, 2, 3: AL 1.

    The fourth is written when the source has ended: tau is 4.
    """
    delays = [1.0, 2.0, 3.0, 4.0]
    assert lagging.average(delays, 4.0, 4) == pytest.approx(1.0)
    assert lagging.length_adaptive(delays, 4.0, 4) == pytest.approx(1.0)
    assert lagging.differentiable(delays, 4.0) == pytest.approx(1.0)


def test_whoever_waits_for_the_end_lags_by_all_of_it():
    """All 4 words at 4 s. AL stops at the first: 4. DAL: a word a second after another, so that
    words leave at 4, 5, 6, 7 and each is 4 s late.
    """
    delays = [4.0, 4.0, 4.0, 4.0]
    assert lagging.average(delays, 4.0, 4) == pytest.approx(4.0)
    assert lagging.differentiable(delays, 4.0) == pytest.approx(4.0)


def test_average_by_hand():
    """6 s, 3 words of reference: ideal moments 0, 2, 4. Words at 1.5, 2.5, 6, 6.

    AL: (1.5 - 0) + (2.5 - 2) + (6 - 4) over the 3 until the source has ended = 4 / 3.
    LAAL: 4 were written, ideal moments 0, 1.5, 3: (1.5 + 1 + 3) / 3 = 5.5 / 3.
    DAL: steps of 1.5: 1.5, max(2.5, 3) = 3, max(6, 4.5) = 6, max(6, 7.5) = 7.5
    minus 0, 1.5, 3, 4.5: 1.5 + 1.5 + 3 + 3 over 4 = 2.25.
    """
    delays = [1.5, 2.5, 6.0, 6.0]
    assert lagging.average(delays, 6.0, 3) == pytest.approx(4 / 3)
    assert lagging.length_adaptive(delays, 6.0, 3) == pytest.approx(5.5 / 3)
    assert lagging.differentiable(delays, 6.0) == pytest.approx(2.25)


def test_too_many_words_make_al_better_but_not_laal():
    """8 words instead of 4 in 4 s: AL takes ideal moments a second apart and praises it."""
    delays = [0.5 * (i + 1) for i in range(8)]
    assert lagging.average(delays, 4.0, 4) == pytest.approx(0.5 - 0.5 * 3.5)
    assert lagging.length_adaptive(delays, 4.0, 4) == pytest.approx(0.5)


def test_more_words_of_reference_than_were_written():
    """Two of 4 words, at 1 and 3 s of 4: (1 - 0 + 3 - 1) / 2; nothing reached the end."""
    assert lagging.average([1.0, 3.0], 4.0, 4) == pytest.approx(1.5)
    assert lagging.length_adaptive([1.0, 3.0], 4.0, 4) == pytest.approx(1.5)


def test_a_first_word_after_the_source_has_ended():
    """With compute the clock runs on: the score is that delay."""
    assert lagging.average([4.5, 4.6], 4.0, 2) == 4.5
    assert lagging.length_adaptive([4.5, 4.6], 4.0, 2) == 4.5


def test_words_of_a_stream_are_there_when_their_final_is():
    two = Final("a b", (Word("a", 0, 0.1, 0.5), Word("b", 0.2, 0.3, 0.5)), 0, 0.5)
    one = Final(" c", (Word("c", 0.5, 0.6, 1.0),), 0, 1.0)
    arrivals = [(0.7, two), (0.8, SpeechStopped(0.4)), (1.3, one)]
    assert lagging.of_words(arrivals) == [0.7, 0.7, 1.3]


def test_a_summary_is_the_mean_over_recordings():
    """1 s and 4 s of lagging; the recording without a caption is left out."""
    got = lagging.summary(
        [([1.0, 2.0, 3.0, 4.0], 4.0, 4), ([], 2.0, 3), ([4.0, 4.0, 4.0, 4.0], 4.0, 4)]
    )
    assert got == {"recordings": 2, "al_ms": 2500.0, "laal_ms": 2500.0, "dal_ms": 2500.0}
    assert lagging.summary([([], 2.0, 3)]) == {
        "recordings": 0,
        "al_ms": None,
        "laal_ms": None,
        "dal_ms": None,
    }


def test_a_text_that_is_not_known_is_what_was_written():
    delays = [0.5 * (i + 1) for i in range(8)]
    assert lagging.summary([(delays, 4.0, 0)])["al_ms"] == 500.0
