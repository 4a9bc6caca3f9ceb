"""words.py: counts become probabilities, rare words are left out, transcripts count too."""

from __future__ import annotations

import numpy as np
import pytest

from sparqle_stream import testing
from sparqle_stream.lexicon import Lexicon
from training.corpus import PackWriter
from training.words import count, estimate, read

TEXTS = [["the", "cat", "sat"], ["the", "cat", "ran"], ["the", "once"]]


def test_rare_words_are_left_out():
    words, grams = count(TEXTS, size=10, low=2)
    assert words == ["cat", "the"]
    assert sum(grams[0].values()) == 5  # of known words only


def test_the_most_frequent_words_are_kept():
    assert count(TEXTS, size=1, low=1)[0] == ["the"]


def test_what_is_stored_is_what_is_loaded():
    stored = estimate(*count(TEXTS * 3, size=10, low=1))
    lexicon = Lexicon.of(stored, testing.tiny_pieces())
    assert lexicon.words[1:] == ("cat", "once", "ran", "sat", "the")
    assert len(lexicon.bigrams.keys) == len(stored["bigram_words"])
    assert np.all(np.diff(lexicon.bigrams.keys) > 0)
    assert np.all(np.diff(lexicon.trigrams.keys) > 0)


def test_transcripts_count_as_often_as_asked(tmp_path):
    book = tmp_path / "book.txt"
    book.write_text("The Cat sat.\n\n")
    writer = PackWriter(tmp_path / "pack")
    for i, text in enumerate(["A dog ran", "it is 5 o'clock"]):  # digits are not spelled out
        facts = {"speaker": "s", "corpus": "c", "licence": "l"}
        writer.add(np.zeros(160, np.int16), id=str(i), text=text, **facts)
    writer.close()
    texts = read([book], [tmp_path / "pack"], repeat=2)
    assert texts == [["the", "cat", "sat"], ["a", "dog", "ran"], ["a", "dog", "ran"]]


def test_a_damaged_file_is_a_clear_error(tmp_path):
    from sparqle_stream.errors import ModelError

    (tmp_path / "words.safetensors").write_bytes(b"abc")
    with pytest.raises(ModelError, match="cannot read"):
        Lexicon.load(tmp_path / "words.safetensors", testing.tiny_pieces())
