"""Lexicon: the words that speech is likely to hold, as paths of CTC pieces, and which follow which.

A tree of pieces leads to every word; every node knows the likeliest word below it (look-ahead).
Trigrams of words with back-off (Katz, 1987) say how well a word follows two others. Both are
counts of text (training.words), made once and read from `words.safetensors` in the model folder;
they stay in memory as they are stored. Stateless; scores are natural logarithms.
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
    from pathlib import Path

    from sparqle_stream.pieces import CtcPieces

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]
Stored = dict[str, npt.NDArray[Any]]
UNKNOWN = 0  # word id of everything that is not in the lexicon, and of the start of a text


@dataclass(frozen=True, slots=True)
class Scores:
    """(N,) logarithms: floats, or bytes that say which of 256 levels."""

    stored: memoryview
    levels: tuple[float, ...]  # () for floats

    @classmethod
    def of(cls, stored: Stored, name: str) -> Scores:
        values = stored[name]
        if values.dtype != np.uint8:
            return cls(values.astype(np.float32).data, ())
        low, step = stored[f"{name}_scale"].tolist()
        return cls(values.data, tuple(low + step * i for i in range(256)))

    def __getitem__(self, i: int) -> float:
        value: float = self.stored[i]
        return self.levels[int(value)] if self.levels else value


@dataclass(frozen=True, slots=True)
class Grams:
    """Word n-grams of one length: words `first[c] .. first[c + 1]` follow context c, sorted."""

    first: memoryview  # (contexts + 1,)
    words: memoryview  # (N,)
    log_probs: Scores  # (N,)

    @classmethod
    def of(cls, stored: Stored, name: str) -> Grams:
        counts, words = stored[f"{name}_counts"], stored[f"{name}_words"]
        first = np.concatenate([[0], np.cumsum(counts, dtype=np.int32)]).astype(np.int32)
        if first[-1] != len(words):
            raise ValueError(f"{first[-1]} {name}s are counted, {len(words)} are there")
        return cls(first.data, words.data, Scores.of(stored, f"{name}_log_probs"))

    def find(self, context: int, word: int) -> int:
        """Index of an n-gram, -1 if it is not there."""
        end = self.first[context + 1]
        at = bisect_left(self.words, word, self.first[context], end)
        return at if at < end and self.words[at] == word else -1


@dataclass(frozen=True)
class Lexicon:
    """Words, their tree of pieces, and their n-grams.

    Node 0 is the root. Children of node n are the nodes `first[n] .. first[n + 1]`; a node's piece
    is `piece[n]` and the word that ends there `word[n]` (UNKNOWN: none does).
    """

    words: tuple[str, ...]  # by id; words[UNKNOWN] is ""
    unigrams: Floats  # (W,) log-probabilities
    backoffs: Floats  # (W,)
    bigrams: Grams  # after word c
    pairs: memoryview  # (C,) sorted: bigrams that trigrams may follow
    pair_backoffs: Scores  # (C,)
    trigrams: Grams  # after bigram pairs[c]
    first: Ints
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
    def of(cls, stored: Stored, pieces: CtcPieces) -> Lexicon:
        """From the arrays that training.words makes."""
        words = ("", *bytes(stored["words"]).decode().split("\n"))
        texts = ("", *(pieces.piece(i) for i in range(1, pieces.size)))
        unigrams = stored["unigrams"].astype(np.float32)
        bigrams = Grams.of(stored, "bigram")
        pairs = np.arange(len(bigrams.words), dtype=np.int32)
        if "bigram_is_context" in stored:
            pairs = pairs[np.unpackbits(stored["bigram_is_context"])[: len(pairs)] > 0]
        return cls(
            words,
            unigrams,
            stored["unigram_backoffs"].astype(np.float32),
            bigrams,
            pairs.data,
            Scores.of(stored, "bigram_backoffs"),
            Grams.of(stored, "trigram"),
            *_grow(*_spellings(stored, words, texts, pieces), unigrams),
            texts,
            tuple(text.startswith(" ") for text in texts),
        )

    @cached_property
    def child(self) -> Ints:
        return np.arange(len(self.piece) + 1)

    def path(self, node: int) -> list[int]:
        """Pieces from the root to a node."""
        pieces = list[int]()
        while node:
            pieces.append(int(self.piece[node]))
            node = int(np.searchsorted(self.first, node, side="right")) - 1
        return pieces[::-1]

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
        weight = 0.0
        pair = self.bigrams.find(*context)
        at = bisect_left(self.pairs, pair) if pair >= 0 else len(self.pairs)
        if at < len(self.pairs) and self.pairs[at] == pair:
            triple = self.trigrams.find(at, word)
            if triple >= 0:
                return self.trigrams.log_probs[triple]
            weight = self.pair_backoffs[at]
        pair = self.bigrams.find(context[1], word)
        if pair >= 0:
            return weight + self.bigrams.log_probs[pair]
        return weight + float(self.backoffs[context[1]]) + float(self.unigrams[word])


def _spellings(
    stored: Stored, words: tuple[str, ...], texts: tuple[str, ...], pieces: CtcPieces
) -> tuple[Ints, Ints]:
    """Pieces of all words (ids from 1 on), one after the other, and how many each has."""
    if "spelling_pieces" not in stored:
        found = [pieces.encode(word) for word in words[1:]]
        counts = np.array([len(ids) for ids in found], np.int64)
        return np.array([i for ids in found for i in ids], np.int64), counts
    ids, counts = (stored[f"spelling_{name}"].astype(np.int64) for name in ("pieces", "counts"))
    if len(counts) != len(words) - 1 or counts.sum() != len(ids) or ids.max() >= len(texts):
        raise ValueError("its words are not spelled")
    if "".join([texts[i] for i in ids.tolist()]) != " ".join(words):
        raise ValueError("its words are spelled in other pieces")
    return ids, counts


def _grow(pieces: Ints, counts: Ints, unigrams: Floats) -> tuple[Ints, Ints, Ints, Floats]:
    """Spellings -> first, piece, word, best of the tree's nodes, level by level."""
    base = int(pieces.max(initial=0)) + 1
    starts = np.cumsum(counts) - counts
    at = np.zeros(len(counts), np.int64)  # the node that each word has come to
    parent, piece = [np.zeros(1, np.int64)], [np.zeros(1, np.int64)]
    n = 1
    for depth in range(counts.max(initial=0)):
        longer = np.nonzero(counts > depth)[0]
        keys, which = np.unique(
            at[longer] * base + pieces[starts[longer] + depth], return_inverse=True
        )
        at[longer] = n + which
        parent.append(keys // base)
        piece.append(keys % base)
        n += len(keys)
    above = np.concatenate(parent)  # sorted: children lie together
    first = np.searchsorted(above[1:], np.arange(n + 1)) + 1
    word = np.full(n, UNKNOWN)
    word[at] = np.arange(1, len(counts) + 1)
    word[0] = UNKNOWN
    best = np.where(word > 0, unigrams[word], -np.inf).astype(np.float32)
    end = n
    for level in parent[:0:-1]:  # from the leaves
        np.maximum.at(best, level, best[end - len(level) : end])
        end -= len(level)
    return first, np.concatenate(piece), word, best
