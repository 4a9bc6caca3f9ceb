"""Counts words and their n-grams: `python -m training.words OUT.safetensors TEXT... [--packs ...]`.

Interpolated absolute discounting (Ney, Essen and Kneser, 1994): every count loses `DISCOUNT`, what
is lost goes to the shorter context. N-grams seen once are left out, their mass goes the same way.
"""

from __future__ import annotations

import argparse
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from tqdm import tqdm

from training.corpus import Pack
from training.text import is_spelled_out, spoken

DISCOUNT = 0.75
START = 0  # stands before the first word of a text, and for words that are not in the lexicon


def read(paths: list[Path], packs: list[Path], repeat: int) -> list[list[str]]:
    """Sentences as words; those of packs count `repeat` times."""
    lines = [line for path in paths for line in path.read_text().splitlines()]
    texts = [spoken(line).split() for line in lines]
    for folder in packs:
        found = sorted({spoken(c.text) for c in Pack(folder).clips if is_spelled_out(c.text)})
        texts += [line.split() for line in found] * repeat
    return [text for text in texts if text]


def count(
    texts: list[list[str]], size: int, low: int
) -> tuple[list[str], list[Counter[tuple[int, ...]]]]:
    """The `size` most frequent words, and counts of their 1-, 2- and 3-grams."""
    seen = Counter(word for text in texts for word in text)
    words = sorted(w for w, n in seen.most_common(size) if n >= low)
    ids = {word: i for i, word in enumerate(words, start=1)}
    grams: list[Counter[tuple[int, ...]]] = [Counter(), Counter(), Counter()]
    for text in tqdm(texts, desc="count", unit="text", disable=None):
        line = [START, START] + [ids.get(word, START) for word in text]
        for i in range(2, len(line)):
            if not line[i]:
                continue
            for n in (1, 2, 3):
                grams[n - 1][tuple(line[i + 1 - n : i + 1])] += 1
    return words, grams


def discounted(
    counts: Counter[tuple[int, ...]], lower: dict[tuple[int, ...], float], low: int
) -> tuple[dict[tuple[int, ...], float], dict[tuple[int, ...], float]]:
    """Probabilities of n-grams seen `low` times or more, and the weight of each context."""
    total: Counter[tuple[int, ...]] = Counter()
    kept: defaultdict[tuple[int, ...], float] = defaultdict(float)
    for gram, n in counts.items():
        total[gram[:-1]] += n
        if n >= low:
            kept[gram[:-1]] += n - DISCOUNT
    weight = {context: 1.0 - kept[context] / n for context, n in total.items()}
    probs = {
        gram: (n - DISCOUNT) / total[gram[:-1]] + weight[gram[:-1]] * lower[gram[1:]]
        for gram, n in counts.items()
        if n >= low
    }
    return probs, weight


def estimate(words: list[str], grams: list[Counter[tuple[int, ...]]]) -> dict[str, np.ndarray]:
    """Arrays as `sparqle_stream.lexicon` reads them."""
    size = len(words) + 1
    n_all = sum(grams[0].values())
    single = {gram: n / n_all for gram, n in grams[0].items()}
    pairs, weight1 = discounted(grams[1], single, 2)

    def pair_prob(gram: tuple[int, ...]) -> float:
        return pairs.get(gram) or weight1.get(gram[:1], 1.0) * single[gram[1:]]

    lower = {gram[1:]: pair_prob(gram[1:]) for gram, n in grams[2].items() if n >= 2}
    triples, weight2 = discounted(grams[2], lower, 2)
    # A trigram's context must be there as a bigram.
    for gram in triples:
        if gram[:2] not in pairs and gram[:2] != (START, START) and gram[1] != START:
            pairs[gram[:2]] = pair_prob(gram[:2])
    order2 = sorted(pairs)
    index = {gram: i for i, gram in enumerate(order2)}
    order3 = sorted((index[g[:2]], g[2]) for g in triples if g[:2] in index)
    unigrams = np.full(size, 1e-8)
    for (word,), p in single.items():
        unigrams[word] = p
    half = np.float16
    return {
        "words": np.frombuffer("\n".join(words).encode(), np.uint8).copy(),
        "unigrams": np.log(unigrams).astype(half),
        "unigram_backoffs": np.log([max(weight1.get((w,), 1.0), 1e-4) for w in range(size)]).astype(
            half
        ),
        # Sorted n-grams: how many follow each context, and the words that do.
        "bigram_counts": np.bincount([a for a, _ in order2], minlength=size).astype(np.int32),
        "bigram_words": np.array([b for _, b in order2], np.uint16),
        "bigram_log_probs": np.log([pairs[g] for g in order2]).astype(half),
        "bigram_backoffs": np.log([max(weight2.get(g, 1.0), 1e-4) for g in order2]).astype(half),
        "trigram_counts": np.bincount([c for c, _ in order3], minlength=len(order2)).astype(
            np.uint16
        ),
        "trigram_words": np.array([w for _, w in order3], np.uint16),
        "trigram_log_probs": np.log([triples[order2[c] + (w,)] for c, w in order3]).astype(half),
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m training.words", description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("text", type=Path, nargs="+", help="one sentence a line")
    parser.add_argument("--packs", type=Path, nargs="*", default=[], help="packs with transcripts")
    parser.add_argument("--repeat", type=int, default=1, help="how often transcripts count")
    parser.add_argument("--size", type=int, default=50_000, help="words at most")
    parser.add_argument("--low", type=int, default=2, help="a word is seen so often at least")
    args = parser.parse_args()
    words, grams = count(read(args.text, args.packs, args.repeat), args.size, args.low)
    stored = estimate(words, grams)
    save_file(stored, args.out)
    n2, n3 = len(stored["bigram_words"]), len(stored["trigram_words"])
    size = args.out.stat().st_size / 1e6
    print(f"{len(words)} words, {n2} bigrams, {n3} trigrams: {args.out}, {size:.1f} MB")


if __name__ == "__main__":
    main()
