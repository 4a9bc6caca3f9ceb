"""text.py: what CTC spells and what the LLM writes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.text import is_spelled_out, spoken, written


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Mr. O'Neil -- said: 'No!'", "mister o'neil said no"),
        ("Dr. St. John and MRS. Drew", "doctor saint john and missus drew"),
        ("It’s the dogs’ ‘bowl’", "it's the dogs bowl"),
        ("  twenty-one\nTIMES ", "twenty one times"),
        ("'' ' -", ""),
        ("", ""),
    ],
)
def test_spoken(text, expected):
    assert spoken(text) == expected


@given(text=st.text())
def test_spoken_text_is_letters_apostrophes_and_single_spaces(text):
    out = spoken(text)
    assert set(out) <= set("abcdefghijklmnopqrstuvwxyz' ")
    assert out.split(" ") == out.split() or out == ""
    assert spoken(out) == out


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("WE CALL IT BEAR", "We call it bear."),
        ("THEN I'LL GO SAID I", "Then I'll go said I."),
        ("IS IT YOU?", "Is it you?"),
        ("then i'll go said i", "Then I'll go said I."),
        ("is it you?", "is it you?"),
        ("It  is\nyou, isn’t it", "It is you, isn't it"),
        ("", ""),
    ],
)
def test_written(text, expected):
    """Capitals throughout, or none and no marks, are a corpus' habit; the rest is left as it is."""
    assert written(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Plain words, spoken — as ‘written’.", True),
        ("I was born in 1990", False),
        ("the U.S. senate", False),
        ("naïve", False),
        ("", False),
    ],
)
def test_is_spelled_out(text, expected):
    assert is_spelled_out(text) is expected
