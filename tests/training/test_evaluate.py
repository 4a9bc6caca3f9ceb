"""evaluate.py: word error rates as others count them."""

from __future__ import annotations

import pytest

from training.evaluate import error_rates


def test_rates_are_counted_over_the_whole_set():
    """Not averaged over clips: 1 substitution, 1 deletion, 2 insertions in 11 words."""
    rates = error_rates(
        ["the cat sat on the mat", "good day", "so it is"],
        ["the cat sat on a mat", "good", "so it is not at"],
    )
    assert rates["words"] == 11
    assert (rates["substitutions"], rates["deletions"], rates["insertions"]) == (1, 1, 2)
    assert rates["wer"] == pytest.approx(100 * 4 / 11)


def test_spelling_and_punctuation_do_not_count():
    rates = error_rates(["Mr. Smith's colour, isn't it?"], ["mister smith's color is not it"])
    assert rates["wer"] == 0.0


def test_clips_without_words_are_not_in_the_rate():
    """False words in noise have a figure of their own, per minute."""
    assert error_rates(["", "so it is"], ["ghost", "so it is"])["wer"] == 0.0
