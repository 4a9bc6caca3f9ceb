"""writing.py: capitals and marks by hand."""

from __future__ import annotations

import pytest

from bench.writing import Writing, compare, says_how_to_write, summary

SAID = 'He said: "Come in, Anna." Then he left.'


def test_a_text_is_right_beside_itself():
    assert compare(SAID, SAID) == Writing(8, 4, 4, 4, 4, 4, 4)


def test_counts_by_hand():
    # he(lower) said(no mark) come in(,) anna(pause instead of end) ... left?(the same kind as .)
    counts = compare(SAID, "he said Come in, Anna, then he Left?")
    assert counts == Writing(8, 4, 3, 2, 4, 3, 2)


def test_only_words_that_both_have_count():
    assert compare("One. Two, three four.", "one six, three for.").words == 2
    assert compare("Yes.", "") == Writing()


@pytest.mark.parametrize("text", ["", "no marks At all", "all small.", "ALL LARGE."])
def test_references_that_do_not_tell_are_left_out(text):
    assert not says_how_to_write(text)
    assert compare(text, "One. Two.") == Writing()


@pytest.mark.parametrize(
    ("written", "marks"),
    [
        ("Well - yes.", 2),
        ("Well -- yes!", 2),
        ("Well, yes…", 2),
        ("(Well) 'yes'.", 1),
        ("It's so?", 1),
    ],
)
def test_marks_of_many_kinds(written, marks):
    assert compare(written, written).marks == marks


def test_summary_is_over_all_utterances():
    pairs = [(SAID, SAID), (SAID, SAID.lower()), ("MUCH TO SAY", "Much to say.")]
    assert summary(pairs) == {
        "words": 16,
        "capitals": 8,
        "capital_precision_percent": 100,
        "capital_recall_percent": 50,
        "marks": 8,
        "mark_precision_percent": 100,
        "mark_recall_percent": 100,
    }
    assert summary([("much to say", "Much to say.")]) is None
