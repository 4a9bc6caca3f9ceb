"""Counts words and their n-grams: `python -m training.words OUT.safetensors TEXT... [--packs ...]`.

In: texts, one sentence a line, each file with a weight; transcripts of packs. Out: the arrays that
`sparqle_stream.lexicon` reads. Interpolated, modified Kneser-Ney (Chen and Goodman, 1998); then
n-grams go whose loss changes the model least (relative entropy: Stolcke, 1998), until the rest fits
into `--megabytes`. 100 million words take minutes and 4 GB: everything is a sorted array.
"""

from __future__ import annotations

import argparse
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file
from tqdm import tqdm

from sparqle_stream.errors import ConfigError
from sparqle_stream.pieces import CtcPieces
from training.corpus import Pack
from training.errors import reported
from training.text import is_spelled_out, spoken

START = 0  # stands before the first word of a text, and for words that are not in the lexicon
MOST_WORDS = 65_535  # ids are stored in 16 bits
FLOOR = 1e-8  # probability of a word that was never seen
# Bytes that are stored for a bigram, for one that is the context of trigrams, and for a trigram.
BIGRAM_BYTES, CONTEXT_BYTES, TRIGRAM_BYTES = 3.125, 3.0, 3.0
SEEN_ONCE = 1.5  # trigrams that count less are not worth asking

Ints = npt.NDArray[np.int64]
Ids = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float64]
Weights = Sequence[tuple[str, float]]  # by name of file
Stored = dict[str, npt.NDArray[np.generic]]


class _Numbers(dict[str, int]):
    """Words -> numbers from 1 on, in the order in which they are first asked for."""

    def __missing__(self, word: str) -> int:
        self[word] = number = len(self) + 1
        return number


@dataclass(frozen=True, slots=True)
class Part:
    """Texts that count alike."""

    ids: Ids  # (S,) numbers of words; two STARTs before every text
    weight: float


class Corpus:
    """Texts as numbers of words: 4 bytes a word."""

    def __init__(self) -> None:
        self._numbers = _Numbers()
        self.parts: list[Part] = []

    def add(self, texts: Iterable[Sequence[str]], weight: float = 1.0) -> None:
        ids, number = array("i"), self._numbers.__getitem__
        for text in texts:
            ids.extend((START, START))
            ids.extend(map(number, text))
        self.parts.append(Part(np.frombuffer(ids, np.int32), weight))

    def words(self, size: int, low: float) -> list[str]:
        """The `size` most frequent words of those that count `low` or more, sorted."""
        seen = np.zeros(len(self._numbers) + 1)
        for part in self.parts:
            seen += part.weight * np.bincount(part.ids, minlength=len(seen))
        seen[START] = -1.0  # is no word
        names = ["", *self._numbers]
        likely = np.argsort(-seen, kind="stable")[:size]
        return sorted(names[i] for i in likely.tolist() if seen[i] >= low)

    def numbered(self, words: Sequence[str]) -> list[Part]:
        """The parts with ids from 1 on by `words`; all others are START."""
        ids = {word: i for i, word in enumerate(words, start=1)}
        table = np.array([START, *(ids.get(word, START) for word in self._numbers)], np.int32)
        return [Part(table[part.ids], part.weight) for part in self.parts]


def read(paths: Sequence[Path], packs: Sequence[Path], repeat: float, weights: Weights) -> Corpus:
    """Sentences of files, and transcripts of packs, which count `repeat` times."""
    corpus = Corpus()
    for path in tqdm(paths, desc="read", unit="file", disable=None):
        with path.open() as lines:
            corpus.add((spoken(line).split() for line in lines), weight_of(path, weights))
    for folder in packs:
        found = sorted({spoken(c.text) for c in Pack(folder).clips if is_spelled_out(c.text)})
        corpus.add((line.split() for line in found), repeat)
    return corpus


def weight_of(path: Path, weights: Weights) -> float:
    """The weight of the last pattern that a file's name matches; 1 without one."""
    return next((weight for name, weight in reversed(weights) if fnmatch(path.name, name)), 1.0)


# --- counting ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Trigrams:
    """How often words followed two others. A key is (first * size + second) * size + third."""

    keys: Ints  # (N,) sorted
    counts: Floats  # (N,) weighted
    size: int  # of the lexicon, START included


def summed(keys: Ints, values: Floats) -> tuple[Ints, Floats, Ids]:
    """Sorted keys, each once, the sums of their values, and where each key of before is now."""
    order = np.argsort(keys, kind="stable")
    keys = keys[order]
    is_new = np.concatenate([[True], keys[1:] != keys[:-1]])[: len(keys)]
    where = np.empty(len(keys), np.int32)
    where[order] = np.cumsum(is_new) - 1
    starts = np.nonzero(is_new)[0]
    return keys[starts], _sums(values[order], starts), where


def _sums(values: Floats, starts: Ints) -> Floats:
    out: Floats = np.add.reduceat(values, starts) if len(starts) else np.zeros(0)
    return out


def count(corpus: Corpus, size: int, low: float) -> tuple[list[str], Trigrams]:
    """The `size` most frequent words and how often each follows two others."""
    words = corpus.words(min(size, MOST_WORDS), low)
    base = len(words) + 1
    keys, counts = np.zeros(0, np.int64), np.zeros(0)
    for part in tqdm(corpus.numbered(words), desc="count", unit="part", disable=None):
        ids = part.ids.astype(np.int64)
        found = (ids[:-2] * base + ids[1:-1]) * base + ids[2:]
        found, n = np.unique(found[ids[2:] != START], return_counts=True)
        keys, counts = np.concatenate([keys, found]), np.concatenate([counts, part.weight * n])
        keys, counts, _ = summed(keys, counts)
    return words, Trigrams(keys, counts, base)


# --- probabilities -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Order:
    """N-grams of one length with a probability; `context` are sorted numbers of what precedes."""

    context: Ints  # (N,)
    word: Ints  # (N,)
    probs: Floats  # (N,)
    lower: Floats  # (N,) probability of the word after the shorter context
    share: Floats  # (N,) of all words of the text that follow this context

    def where(self, kept: npt.NDArray[np.bool_]) -> Order:
        probs, lower, share = self.probs[kept], self.lower[kept], self.share[kept]
        return Order(self.context[kept], self.word[kept], probs, lower, share)

    def starts(self) -> Ints:
        """First n-gram of every context."""
        return np.nonzero(np.diff(self.context, prepend=-1))[0]

    def rest(self) -> tuple[Floats, Floats]:
        """By context: probability of all other words, and what the shorter context gives them."""
        starts = self.starts()
        left, below = 1.0 - _sums(self.probs, starts), 1.0 - _sums(self.lower, starts)
        return np.maximum(left, 1e-6), np.maximum(below, 1e-6)

    def losses(self) -> Floats:
        """(N,) how far the model moves (relative entropy, nats a word) without one n-gram."""
        left, below = self.rest()
        group = np.repeat(np.arange(len(left)), np.diff(self.starts(), append=len(self.probs)))
        left, below = left[group], below[group]
        before = np.log(left) - np.log(below)  # back-off weight, and the one without the n-gram:
        after = np.log(left + self.probs) - np.log(below + self.lower)
        gone = self.probs * (np.log(self.lower) + after - np.log(self.probs))
        out: Floats = -self.share * (gone + left * (after - before))
        return out


def discounts(counts: Floats) -> tuple[float, float, float]:
    """What counts of 1, 2 and 3 or more lose (Chen and Goodman, 1998, equation 26)."""
    n = [int(np.count_nonzero(counts == i)) for i in range(1, 5)]
    if not all(n):
        return 0.5, 0.75, 0.75  # too few to say
    y = n[0] / (n[0] + 2 * n[1])
    found = [i - (i + 1) * y * n[i] / n[i - 1] for i in (1, 2, 3)]
    return tuple(float(np.clip(d, 0.1, i)) for i, d in enumerate(found, 1))  # type: ignore[return-value]


def discounted(context: Ints, counts: Floats, lower: Floats) -> Floats:
    """Probabilities of n-grams; between whole counts the discounts are interpolated."""
    starts = np.nonzero(np.diff(context, prepend=-1))[0]
    loss = np.interp(counts, [0, 1, 2, 3], [0, *discounts(counts)])
    total = _sums(counts, starts)
    n = np.diff(starts, append=len(counts))
    kept: Floats = (counts - loss) / np.repeat(total, n)
    return kept + np.repeat(_sums(loss, starts) / total, n) * lower


def probabilities(grams: Trigrams) -> tuple[Floats, Order, Order]:
    """Of single words (W,), of pairs and of triples, these without what was seen once."""
    size, n_words = grams.size, grams.counts.sum()
    # Kneser-Ney: shorter n-grams count in how many contexts they are seen. A text's first words
    # have one context only: they count themselves.
    tail = grams.keys % size**2
    seen = np.where(tail // size == START, grams.counts, np.minimum(grams.counts, 1.0))
    keys, raw, suffix = summed(tail, grams.counts)
    pairs: Floats = np.bincount(suffix, seen, minlength=len(keys)).astype(np.float64)
    del tail, seen
    context, word = keys // size, keys % size
    single = np.bincount(word, np.minimum(raw, 1.0), minlength=size)
    single = np.maximum(single / single.sum(), FLOOR)
    after = np.bincount(context, raw, minlength=size)  # how often words stand before others
    probs = discounted(context, pairs, single[word])
    order2 = Order(context, word, probs, single[word], after[context] / n_words)

    context = grams.keys // size
    probs3 = discounted(context, grams.counts, probs[suffix])
    starts = np.nonzero(np.diff(context, prepend=-1))[0]
    after = np.repeat(_sums(grams.counts, starts), np.diff(starts, append=len(context))) / n_words
    kept = (grams.counts > SEEN_ONCE) & (context % size != START)
    word = grams.keys[kept] % size
    return (
        single,
        order2,
        Order(context[kept], word, probs3[kept], probs[suffix[kept]], after[kept]),
    )


# --- pruning -------------------------------------------------------------------------------------


def pruned(order2: Order, order3: Order, size: int, most_bytes: float) -> tuple[Order, Order]:
    """The n-grams that matter most and fit; pairs that triples follow stay."""
    loss2, loss3 = order2.losses(), order3.losses()
    keys2 = order2.context * size + order2.word
    index3 = np.searchsorted(keys2, order3.context)

    def kept(limit: float) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_], float]:
        keep3 = loss3 > limit
        contexts = np.unique(index3[keep3])
        keep2 = loss2 > limit
        keep2[contexts] = True
        n2, n3 = np.count_nonzero(keep2), np.count_nonzero(keep3)
        size = BIGRAM_BYTES * n2 + CONTEXT_BYTES * len(contexts) + TRIGRAM_BYTES * n3
        return keep2, keep3, size

    low, high = -60.0, 0.0  # log of the least loss that an n-gram must be worth
    if kept(-1.0)[2] <= most_bytes:
        return order2, order3
    for _ in range(24):
        middle = (low + high) / 2
        low, high = (low, middle) if kept(np.exp(middle))[2] <= most_bytes else (middle, high)
    keep2, keep3, _ = kept(np.exp(high))
    return order2.where(keep2), order3.where(keep3)


# --- what is stored ------------------------------------------------------------------------------


def estimate(words: Sequence[str], grams: Trigrams, most_bytes: float = np.inf) -> Stored:
    """Arrays as `sparqle_stream.lexicon` reads them, n-grams of `most_bytes` or less."""
    size = grams.size
    single, order2, order3 = probabilities(grams)
    order2, order3 = pruned(order2, order3, size, most_bytes)
    weights2 = np.ones(size)
    left, below = order2.rest()
    weights2[order2.context[order2.starts()]] = left / below
    keys2 = order2.context * size + order2.word
    # What a pair has without its triple: its own probability, or that of its last word.
    tail = order3.context % size * size + order3.word
    at = np.minimum(np.searchsorted(keys2, tail), len(keys2) - 1)
    backed_off = weights2[order3.context % size] * single[order3.word]
    order3 = replace(order3, lower=np.where(keys2[at] == tail, order2.probs[at], backed_off))
    left, below = order3.rest()
    starts3 = order3.starts()
    is_context = np.zeros(len(keys2), bool)
    is_context[np.searchsorted(keys2, order3.context[starts3])] = True
    return {
        "words": np.frombuffer("\n".join(words).encode(), np.uint8).copy(),
        "unigrams": np.log(single).astype(np.float16),
        "unigram_backoffs": np.log(weights2).astype(np.float16),
        # Sorted n-grams: how many follow each context, and the words that do.
        "bigram_counts": np.bincount(order2.context, minlength=size).astype(np.uint16),
        "bigram_words": order2.word.astype(np.uint16),
        **in_bytes("bigram_log_probs", np.log(order2.probs)),
        # Of bigrams that trigrams follow only:
        "bigram_is_context": np.packbits(is_context),
        **in_bytes("bigram_backoffs", np.log(left / below)),
        "trigram_counts": np.diff(starts3, append=len(order3.word)).astype(np.uint16),
        "trigram_words": order3.word.astype(np.uint16),
        **in_bytes("trigram_log_probs", np.log(order3.probs)),
    }


def in_bytes(name: str, values: Floats) -> Stored:
    """Values in 256 even steps, and the least of them with the size of a step."""
    low = float(values.min(initial=0.0))
    step = max((float(values.max(initial=0.0)) - low) / 255, 1e-9)
    levels = np.round((values - low) / step).astype(np.uint8)
    return {name: levels, f"{name}_scale": np.array([low, step], np.float32)}


def spellings(words: Sequence[str], pieces: CtcPieces) -> Stored:
    """Pieces of every word, so that nobody has to cut words at start-up."""
    found = [pieces.encode(word) for word in words]
    return {
        "spelling_counts": np.array([len(ids) for ids in found], np.uint8),
        "spelling_pieces": np.array([i for ids in found for i in ids], np.uint16),
    }


def weighted(text: str) -> tuple[str, float]:
    """PATTERN=NUMBER of the command line."""
    name, _, number = text.rpartition("=")
    if not name:
        raise argparse.ArgumentTypeError(f"{text!r} is not PATTERN=NUMBER")
    return name, float(number)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m training.words", description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("text", type=Path, nargs="+", help="one sentence a line")
    parser.add_argument("--packs", type=Path, nargs="*", default=[], help="packs with transcripts")
    parser.add_argument("--repeat", type=float, default=1, help="how often transcripts count")
    parser.add_argument(
        "--weight",
        type=weighted,
        action="append",
        default=[],
        metavar="PATTERN=NUMBER",
        help="how often files of this name count (1)",
    )
    parser.add_argument("--size", type=int, default=65_000, help="words at most")
    parser.add_argument("--low", type=float, default=2, help="a word counts so much at least")
    parser.add_argument("--megabytes", type=float, default=26, help="of the file, about")
    parser.add_argument("--pieces", type=Path, help="pieces.json: stores words as pieces, too")
    args = parser.parse_args()
    with reported():
        make(args)


def make(args: argparse.Namespace) -> None:
    """Reads, counts and writes what `args` name. Raises ConfigError for texts without words."""
    words, grams = count(read(args.text, args.packs, args.repeat, args.weight), args.size, args.low)
    if not words:
        raise ConfigError(
            f"no word of the texts counts {args.low:g} or more", hint="give more text, or --low 1"
        )
    spelled = spellings(words, CtcPieces.load(args.pieces)) if args.pieces else {}
    n_bytes = sum(a.nbytes for a in spelled.values()) + sum(len(word) + 7 for word in words)
    stored = spelled | estimate(words, grams, 1e6 * args.megabytes - n_bytes - 4096)
    save_file(stored, args.out)
    n2, n3 = len(stored["bigram_words"]), len(stored["trigram_words"])
    n_bytes = args.out.stat().st_size
    print(f"{len(words)} words, {n2} bigrams, {n3} trigrams: {args.out}, {n_bytes / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
