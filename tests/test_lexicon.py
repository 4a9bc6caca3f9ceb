"""The lexicon: n-grams are probabilities, the tree spells every word, what is stored is loaded."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tests.lexicons import lexicon_of

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
            children = lexicon.child[lexicon.first[node] : lexicon.first[node + 1]]
            texts = [spelled + lexicon.pieces[lexicon.piece[c]] for c in children]
            node = next(
                int(c)
                for c, text in zip(children, texts, strict=True)
                if (" " + word).startswith(text)
            )
            spelled += lexicon.pieces[lexicon.piece[node]]
            assert lexicon.best[node] >= lexicon.unigrams[i]
        assert spelled == " " + word


def test_share_of_a_beginning(lexicon):
    both = np.exp([lexicon.unigrams[lexicon.words.index(w)] for w in ("sat",)])
    assert lexicon.share("sat", "s") == pytest.approx(float(np.log(both / both)[0]), abs=1e-6)
    assert lexicon.share("sitting", "si") == -5.0  # not in the lexicon: a nat a letter
