"""Lexicon: the words that speech is likely to hold, as paths of CTC pieces, and which follow which.

A tree of pieces leads to every word; every node knows the likeliest word below it (look-ahead).
Trigrams of words with back-off (Katz, 1987, with absolute discounts: Ney et al., 1994) say how well
a word follows two others. Both are counts of public-domain text (training.words), made once and
read from `words.safetensors` in the model folder. Stateless; scores are natural logarithms.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from sparqle_stream.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from sparqle_stream.ctc import CtcPieces

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]
UNKNOWN = 0  # word id of everything that is not in the lexicon, and of the start of a text


@dataclass(frozen=True, slots=True)
class Grams:
    """Word n-grams of one length: sorted keys, their log-probability, their weight as context."""

    keys: Ints  # (N,)
    log_probs: Floats  # (N,)
    backoffs: Floats  # (N,) log; zeros for the longest

    def find(self, key: int) -> int:
        """Index of a key, -1 if it is not there."""
        at = int(np.searchsorted(self.keys, key))
        return at if at < len(self.keys) and self.keys[at] == key else -1


@dataclass(frozen=True)
class Lexicon:
    """Words, their tree of pieces, and their n-grams.

    Node 0 is the root. Children of node n are `child[first[n] : first[n + 1]]`; a node's piece is
    `piece[n]` and the word that ends there `word[n]` (UNKNOWN: none does).
    """

    words: tuple[str, ...]  # by id; words[UNKNOWN] is ""
    unigrams: Floats  # (W,) log-probabilities
    backoffs: Floats  # (W,)
    bigrams: Grams
    trigrams: Grams
    first: Ints
    child: Ints
    piece: Ints
    word: Ints
    best: Floats  # (nodes,) log-probability of the likeliest word at or below a node
    pieces: tuple[str, ...]  # texts by id; "" for blank
    begins: tuple[bool, ...]  # whether a piece begins a word

    @classmethod
    def load(cls, path: Path, pieces: CtcPieces) -> Lexicon:
        """Raises ModelError for a file that is not whole."""
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        try:
            return cls.of(load_file(path), pieces)
        except (OSError, SafetensorError, KeyError, ValueError) as err:
            raise ModelError(f"cannot read {path}: {err}", hint="fetch or export it anew") from err

    @classmethod
    def of(cls, stored: dict[str, npt.NDArray[Any]], pieces: CtcPieces) -> Lexicon:
        """From the arrays that training.words makes."""
        words = ("", *bytes(stored["words"]).decode().split("\n"))
        unigrams = stored["unigrams"].astype(np.float32)
        size = len(words)
        contexts = np.repeat(np.arange(size), stored["bigram_counts"])
        bigrams = Grams(
            contexts * size + stored["bigram_words"],
            stored["bigram_log_probs"].astype(np.float32),
            stored["bigram_backoffs"].astype(np.float32),
        )
        # A trigram's context is the index of its first two words among the bigrams.
        pairs = np.repeat(np.arange(len(contexts)), stored["trigram_counts"])
        trigrams = Grams(
            pairs * size + stored["trigram_words"],
            stored["trigram_log_probs"].astype(np.float32),
            np.zeros(0, np.float32),
        )
        tree = _grow([pieces.encode(word) for word in words[1:]], unigrams)
        backoffs = stored["unigram_backoffs"].astype(np.float32)
        texts = ("", *(pieces.piece(i) for i in range(1, pieces.size)))
        begins = tuple(text.startswith(" ") for text in texts)
        return cls(words, unigrams, backoffs, bigrams, trigrams, *tree, texts, begins)

    @cached_property
    def _mass(self) -> npt.NDArray[np.float64]:
        """(W + 1,) sums of the probabilities of all words before one."""
        return np.concatenate([[0.0], np.cumsum(np.exp(self.unigrams.astype(np.float64)))])

    def share(self, word: str, begun: str) -> float:
        """log p(word | a word that begins like this), without context."""
        low = bisect_left(self.words, begun)
        high = bisect_left(self.words, begun + "\x7f")
        at = bisect_left(self.words, word)
        among = float(self._mass[high] - self._mass[low])
        if at == len(self.words) or self.words[at] != word or among <= 0:
            return -float(len(word) - len(begun))  # spelled: some one nat a letter
        return min(0.0, float(self.unigrams[at]) - math.log(among))

    def log_prob(self, context: tuple[int, int], word: int) -> float:
        """log p(word | the two words before it)."""
        size = len(self.words)
        pair = self.bigrams.find(context[0] * size + context[1])
        weight = 0.0
        if pair >= 0:
            at = self.trigrams.find(pair * size + word)
            if at >= 0:
                return float(self.trigrams.log_probs[at])
            weight = float(self.bigrams.backoffs[pair])
        at = self.bigrams.find(context[1] * size + word)
        if at >= 0:
            return weight + float(self.bigrams.log_probs[at])
        return weight + float(self.backoffs[context[1]]) + float(self.unigrams[word])


def _grow(
    spellings: Sequence[list[int]], unigrams: Floats
) -> tuple[Ints, Ints, Ints, Ints, Floats]:
    """Pieces of every word (ids from 1) -> first, child, piece, word, best of the tree's nodes."""
    into: dict[tuple[int, int], int] = {}
    parent, piece, word = [-1], [0], [UNKNOWN]
    for i, spelling in enumerate(spellings, start=1):
        node = 0
        for p in spelling:
            key = (node, p)
            if key not in into:
                into[key] = len(parent)
                parent.append(node)
                piece.append(p)
                word.append(UNKNOWN)
            node = into[key]
        word[node] = i
    n = len(parent)
    order = sorted(range(1, n), key=parent.__getitem__)
    child = np.array(order, dtype=np.int64)
    first = np.searchsorted(np.array(parent)[child], np.arange(n + 1)).astype(np.int64)
    words = np.array(word, dtype=np.int64)
    best = np.where(words > 0, unigrams[words], -np.inf).astype(np.float32)
    for node in range(n - 1, 0, -1):  # parents are older than their children
        best[parent[node]] = max(best[parent[node]], best[node])
    return first, child, np.array(piece, dtype=np.int64), words, best
