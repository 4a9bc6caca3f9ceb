"""books.py: sentences and passages out of books, without what something is measured on."""

from __future__ import annotations

import json
import random
import sys

import pytest

from sparqle_stream.errors import ConfigError
from training import books, prepare
from training.books import LONGEST_PASSAGE, Shared, passages_of, sentences_of

PAGE = """<html><body><h1>CHAPTER I</h1>
<p>It was a bright cold day&nbsp;in April, and the clocks were striking. "Who's there?" he
asked. He listened -- and nobody answered him; it&#8217;s the wind.</p>
<p>In 1984 there were 3 of them here. Yes. THIS IS ALL IN CAPITALS HERE.</p>
<p><span>O</span>nce more<br/>the <i>wind</i> rose. We never (to be honest) liked them.
The café was closed that day.</p></body></html>"""


def test_sentences_of_a_page():
    """Whole sentences of plain words: no headings, digits, quotes, accents or shouting."""
    assert sentences_of(PAGE) == [
        "It was a bright cold day in April, and the clocks were striking.",
        "He listened, and nobody answered him;",
        "Once more the wind rose.",
    ]


def test_sentences_have_the_length_that_was_asked_for():
    text = "One two three. One two three four. One two three four five six."
    assert sentences_of(text, low=3, high=4) == ["One two three.", "One two three four."]


# --- passages ------------------------------------------------------------------------------------


def test_passages_hold_all_that_can_be_spoken_in_order():
    clauses = [f"{'w' * (i % 7 + 1)} and so on {'x' * (i % 5 + 1)}" for i in range(400)]
    marks = [",", ".", ";", "!", "?", ":"]
    text = " ".join(f"{clause}{marks[i % 6]}" for i, clause in enumerate(clauses))
    made = passages_of(text, random.Random(0))
    assert " ".join(made) == " ".join(clauses)
    lengths = [len(passage.split()) for passage in made]
    assert 1 < min(lengths[:-1]) < 12
    assert 35 < max(lengths) <= LONGEST_PASSAGE
    assert 15 < sum(lengths) / len(lengths) < 35
    assert passages_of(text, random.Random(0)) == made


def test_no_passage_goes_over_what_cannot_be_spoken(monkeypatch):
    monkeypatch.setattr(books, "SCALE", 1000.0)  # as long as may be
    text = (
        "One two, three four. In 1984 there were some. Five six; seven eight! THIS TOO. Nine ten."
    )
    assert passages_of(text, random.Random(0)) == [
        "one two three four",
        "five six seven eight",
        "nine ten",
    ]
    long = "a b c d e, " * 50
    assert [len(passage.split()) for passage in passages_of(long, random.Random(0))] == [
        LONGEST_PASSAGE,
        LONGEST_PASSAGE,
        50,
    ]


def test_what_is_measured_on_is_known_by_six_words_or_by_all():
    shared = Shared(["A B c d e f g!", "So it is.", ""])
    for text in ("x b c d e f g y", "a b c d e f", "so it is", "SO IT, IS"):
        assert text in shared
    for text in ("a b c d e x g", "so it is so", "b c d e f", "it is"):
        assert text not in shared


@pytest.mark.parametrize(
    ("name", "held", "said"),
    [
        ("a.jsonl", b"{", "line 1 of the manifest in .* cannot be used"),
        ("a.jsonl", b'{"audio": "a.wav"}', "line 1 of the manifest in .* cannot be used"),
        ("a.jsonl", b"[1]", "line 1 of the manifest in .* cannot be used"),
        ("a.txt", b"\xff\xfe", "has no texts to leave out"),
    ],
    ids=["cut", "textless", "list", "binary"],
)
def test_bad_texts_to_leave_out_are_told(tmp_path, name, held, said):
    (tmp_path / name).write_bytes(held)
    with pytest.raises(ConfigError, match=said):
        Shared.of([tmp_path / name])


@pytest.mark.parametrize("command", ["text", "passages"])
def test_books_on_the_command_line(tmp_path, monkeypatch, capsys, command):
    said = "They went down to the old harbour again."
    other = "Nobody knew what they had seen in there."
    (tmp_path / "a.txt").write_text(f"{said}\n\nIn 1984, I did.\n\n{other}\n")
    (tmp_path / "test.jsonl").write_text(
        json.dumps({"audio": "a.wav", "text": said.upper()}) + "\n"
    )
    (tmp_path / "dev.txt").write_text("something else\n")
    out = tmp_path / "out.txt"
    without = ["--without", str(tmp_path / "test.jsonl"), str(tmp_path / "dev.txt")]
    argv = ["prepare", command, str(out), str(tmp_path / "a.txt"), *without]
    monkeypatch.setattr(sys, "argv", argv)
    prepare.main()
    found = out.read_text().split("\n")[:-1]
    assert [line.lower().rstrip(".") for line in found] == [other.lower().rstrip(".")]
    assert (
        capsys.readouterr().out == f"1 {'sentences' if command == 'text' else command} -> {out}\n"
    )
