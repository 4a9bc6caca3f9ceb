"""The lexicon: n-grams are probabilities, the tree spells every word, what is stored is loaded."""

from __future__ import annotations

import math

import numpy as np
import pytest

from sparqle_stream import testing
from sparqle_stream.lexicon import Lexicon
from tests.lexicons import lexicon_of
from training.words import Corpus, count, estimate, spellings

TEXTS = [["the", "cat", "sat"], ["the", "cat", "ran"], ["the", "dog", "sat"], ["a", "cat", "sat"]]


@pytest.fixture(scope="module")
def lexicon():
    return lexicon_of(TEXTS * 2)


def test_what_follows_a_context_sums_to_one(lexicon):
    size = len(lexicon.words)
    for first in range(size):
        for second in range(1, size):
            total = sum(math.exp(lexicon.log_prob((first, second), w)) for w in range(1, size))
            assert total == pytest.approx(1.0, abs=0.02)  # stored in half precision


def test_seen_words_are_likelier_after_what_was_seen_before_them(lexicon):
    the, cat, dog, sat = (lexicon.words.index(w) for w in ("the", "cat", "dog", "sat"))
    assert lexicon.log_prob((the, cat), sat) > lexicon.log_prob((the, cat), dog)
    assert lexicon.log_prob((0, the), cat) > lexicon.log_prob((0, the), dog)


def test_the_tree_spells_every_word_and_knows_the_best_below(lexicon):
    for i, word in enumerate(lexicon.words[1:], start=1):
        node, spelled = 0, ""
        while lexicon.word[node] != i:
            children = range(lexicon.first[node], lexicon.first[node + 1])
            texts = [spelled + lexicon.pieces[lexicon.piece[c]] for c in children]
            node = next(
                c for c, text in zip(children, texts, strict=True) if (" " + word).startswith(text)
            )
            spelled += lexicon.pieces[lexicon.piece[node]]
            assert lexicon.best[node] >= lexicon.unigrams[i]
        assert spelled == " " + word
        assert "".join(lexicon.pieces[piece] for piece in lexicon.path(node)) == spelled


def test_share_of_a_beginning(lexicon):
    both = np.exp([lexicon.unigrams[lexicon.words.index(w)] for w in ("sat",)])
    assert lexicon.share("sat", "s") == pytest.approx(float(np.log(both / both)[0]), abs=1e-6)
    assert lexicon.share("sitting", "si") == -5.0  # not in the lexicon: a nat a letter


@pytest.fixture(scope="module")
def stored():
    corpus = Corpus()
    corpus.add(TEXTS * 2)
    words, grams = count(corpus, 1000, 1)
    return estimate(words, grams) | spellings(words, testing.tiny_pieces())


def test_stored_spellings_are_those_of_the_pieces(lexicon, stored):
    spelled = Lexicon.of(stored, testing.tiny_pieces())
    for name in ("first", "piece", "word", "best"):
        np.testing.assert_array_equal(getattr(spelled, name), getattr(lexicon, name))


@pytest.mark.parametrize("name", ["spelling_pieces", "spelling_counts"])
def test_other_spellings_are_errors(stored, name):
    wrong = stored | {name: stored[name][::-1].copy()}
    if name == "spelling_counts":
        wrong = stored | {name: stored[name][1:]}
    with pytest.raises(ValueError, match="spelled"):
        Lexicon.of(wrong, testing.tiny_pieces())


def test_counts_that_do_not_fit_are_errors(stored):
    wrong = stored | {"trigram_counts": stored["trigram_counts"] + np.uint16(1)}
    with pytest.raises(ValueError, match="trigrams are counted"):
        Lexicon.of(wrong, testing.tiny_pieces())


def test_files_without_bytes_and_contexts_are_read(lexicon, stored):
    """The first form of the file: every bigram is a context, scores are half precision."""
    context = np.unpackbits(stored["bigram_is_context"])[: len(stored["bigram_words"])] > 0
    first = {n: a for n, a in stored.items() if "scale" not in n and "spelling" not in n}
    del first["bigram_is_context"]
    for name in ("bigram_log_probs", "bigram_backoffs", "trigram_log_probs"):
        low, step = stored[f"{name}_scale"]
        first[name] = (low + step * stored[name]).astype(np.float16)
    for name in ("bigram_backoffs", "trigram_counts"):
        every = np.zeros(len(context), first[name].dtype)
        every[context] = first[name]
        first[name] = every
    old, size = Lexicon.of(first, testing.tiny_pieces()), len(lexicon.words)
    for a, b, c in np.ndindex(size, size, size):
        assert old.log_prob((a, b), c) == pytest.approx(lexicon.log_prob((a, b), c), abs=0.01)
