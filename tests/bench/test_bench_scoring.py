"""Scoring: word errors, intervals and revisions against hand-counted cases."""

from __future__ import annotations

import numpy as np
import pytest

from bench import scoring
from bench.scoring import Tally
from sparqle_stream.messages import Done, Final, Tail, Word


@pytest.fixture(scope="module")
def scorer():
    return scoring.Scorer()


@pytest.mark.parametrize(
    ("reference", "hypothesis", "counts"),
    [
        ("THE CAT SAT", "The cat sat.", (3, 0, 0, 0)),
        ("the cat sat", "the dog sat", (3, 1, 0, 0)),
        ("the cat sat", "cat sat", (3, 0, 1, 0)),
        ("the cat sat", "the cat sat down there", (3, 0, 0, 2)),
        ("the cat sat", "", (3, 0, 3, 0)),
        ("", "hello there", (0, 0, 0, 2)),
        ("Um.", "Mister Smith", (0, 0, 0, 2)),
        ("It's colour twenty one", "it is color 21", (4, 0, 0, 0)),
    ],
)
def test_errors_are_counted_by_word(scorer, reference, hypothesis, counts):
    tally = scorer.score(reference, hypothesis)
    assert (tally.words, tally.substitutions, tally.deletions, tally.insertions) == counts


@pytest.mark.parametrize(
    ("hypothesis", "n_right"),
    [("one two three", 1), ("three", 1), ("one two", 0), ("one two tree", 0), ("three one two", 0)],
)
def test_the_last_word_counts_when_it_stands_at_the_end(scorer, hypothesis, n_right):
    tally = scorer.score("alpha beta gamma", _rename(hypothesis))
    assert (tally.last_words, tally.last_words_right) == (1, n_right)


def _rename(text: str) -> str:
    """Number words would be made digits by the normaliser."""
    names = {"one": "alpha", "two": "beta", "three": "gamma", "tree": "gamut"}
    return " ".join(names[word] for word in text.split())


def test_an_utterance_without_words_has_no_last_word(scorer):
    assert scorer.score("", "hello").last_words == 0


def test_the_rate_is_the_corpus_one_and_not_a_mean_of_rates():
    """9 errors in 10 words and none in 90: 9 %, where the mean of both rates would be 45 %."""
    bad, good = Tally(words=10, substitutions=4, deletions=3, insertions=2), Tally(words=90)
    assert scoring.total([bad, good]).wer == 9.0
    assert Tally().wer == 0.0


def test_the_interval_is_that_of_the_binomial_where_it_is_known():
    """One-word utterances, a quarter wrong: the bootstrap's spread is sqrt(p (1 - p) / n)."""
    n = 400
    tallies = [Tally(words=1, substitutions=int(i % 4 == 0)) for i in range(n)]
    low, high = scoring.interval(tallies)
    wanted = 1.96 * 100 * np.sqrt(0.25 * 0.75 / n)  # 4.24
    assert 25 - low == pytest.approx(wanted, abs=0.6)
    assert high - 25 == pytest.approx(wanted, abs=0.6)
    assert [low, high] == scoring.interval(tallies)


def test_speakers_who_differ_widen_the_interval():
    """Ten utterances each of ten speakers, of whom half are never understood."""
    tallies = [(f"s{i % 10}", Tally(words=5, deletions=5 * (i % 2))) for i in range(100)]
    low, high = scoring.interval([tally for _, tally in tallies])
    speakers = scoring.by_speaker(tallies)
    low_speakers, high_speakers = scoring.interval(list(speakers.values()))
    assert low_speakers < low - 10
    assert high_speakers > high + 10


def test_one_utterance_has_no_interval():
    assert scoring.interval([Tally(words=3)]) is None


def test_speakers_are_summed_apart():
    sums = scoring.by_speaker(
        [("b", Tally(utterances=1, words=4)), ("a", Tally(words=1)), ("b", Tally(words=6))]
    )
    assert list(sums) == ["a", "b"]
    assert sums["b"] == Tally(utterances=1, words=10)


def word(text: str, start: float, end: float, emitted: float = 9.0) -> Word:
    return Word(text, start, end, emitted)


FIRST = Final("Good day,", (word("Good", 0.1, 0.3), word("day,", 0.3, 0.6)), segment=0, time=1.0)


def test_the_text_is_what_a_client_appends():
    later = Final(" all.", (word("all.", 0.7, 0.9),), segment=0, time=1.3)
    events = [FIRST, Tail("or", 1.1), later, Tail("and more", 1.4), Done(2.0, 0.1, 2.0)]
    assert scoring.text_of(events) == "Good day, all."
    assert scoring.n_revisions(events) == 0


@pytest.mark.parametrize(
    "second",
    [
        pytest.param(
            Final(" again", (word("again", 0.7, 0.9),), segment=-1, time=1.3), id="older segment"
        ),
        pytest.param(
            Final(" again", (word("again", 0.7, 0.9),), segment=0, time=0.9), id="older time"
        ),
        pytest.param(
            Final(" bad", (word("bad", 0.2, 0.9),), segment=0, time=1.3),
            id="before a word that left",
        ),
        pytest.param(
            Final(" b a", (word("b", 0.9, 1.0), word("a", 0.7, 0.9)), segment=0, time=1.3),
            id="words out of order",
        ),
        pytest.param(
            Final(" other", (word("again", 0.7, 0.9),), segment=0, time=1.3), id="other text"
        ),
    ],
)
def test_a_final_that_goes_back_is_a_revision(second):
    assert scoring.n_revisions([FIRST, second]) == 1
