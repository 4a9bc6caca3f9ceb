"""words.py: counts and probabilities as slow references have them, pruning, files and weights."""

from __future__ import annotations

import math
from collections import Counter, defaultdict

import numpy as np
import pytest

from sparqle_stream import testing
from sparqle_stream.errors import ModelError
from sparqle_stream.lexicon import Lexicon
from training import words as module
from training.corpus import PackWriter
from training.words import (
    Corpus,
    Order,
    count,
    discounts,
    estimate,
    in_bytes,
    main,
    probabilities,
    read,
    spellings,
)

TEXTS = [["the", "cat", "sat"], ["the", "cat", "ran"], ["the", "once"]]
LETTERS = "abcdefgh"


def corpus_of(*parts: tuple[list[list[str]], float]) -> Corpus:
    corpus = Corpus()
    for texts, weight in parts:
        corpus.add(texts, weight)
    return corpus


def random_texts(n: int, seed: int = 0) -> list[list[str]]:
    """Words of one letter, early ones more often."""
    rng = np.random.default_rng(seed)
    likely = 1.0 / np.arange(1, len(LETTERS) + 1)
    words = rng.choice(list(LETTERS), size=(n, 6), p=likely / likely.sum())
    return [row[: rng.integers(1, 7)].tolist() for row in words]


def counted(texts: list[list[str]], n: int) -> Counter[tuple[str, ...]]:
    """n-grams, one by one; "" stands before the first word."""
    lines = [["", "", *text] for text in texts]
    return Counter(tuple(x[i + 1 - n : i + 1]) for x in lines for i in range(2, len(x)))


def smoothed(counts: dict, lower: dict) -> dict:
    """Interpolated n-grams, one by one."""
    d = (0.0, *discounts(np.array(list(counts.values()), float)))
    total, lost = defaultdict(float), defaultdict(float)
    for gram, n in counts.items():
        total[gram[:-1]] += n
        lost[gram[:-1]] += d[min(int(n), 3)]
    return {
        g: (n - d[min(int(n), 3)] + lost[g[:-1]] * lower[g[1:]]) / total[g[:-1]]
        for g, n in counts.items()
    }


def test_rare_words_are_left_out():
    words, grams = count(corpus_of((TEXTS, 1)), size=10, low=2)
    assert words == ["cat", "the"]
    assert grams.counts.sum() == 5  # of known words only


def test_the_most_frequent_words_are_kept():
    assert count(corpus_of((TEXTS, 1)), size=1, low=1)[0] == ["the"]


def test_counts_are_those_of_a_counter():
    first, second = random_texts(40), random_texts(30, seed=1)
    words, grams = count(corpus_of((first, 1), (second, 0.5)), size=99, low=0)
    expected = Counter()
    for texts, weight in ((first, 1), (second, 0.5)):
        for gram, n in counted(texts, 3).items():
            expected[gram] += n * weight
    names = ["", *words]
    keys = [(k // grams.size**2, k // grams.size % grams.size, k % grams.size) for k in grams.keys]
    found = {tuple(names[i] for i in key): n for key, n in zip(keys, grams.counts, strict=True)}
    assert found == dict(expected)


def test_probabilities_are_kneser_neys():
    """Chen and Goodman's sums, n-gram by n-gram."""
    texts = random_texts(60)
    words, grams = count(corpus_of((texts, 1)), size=99, low=0)
    triples, pairs = counted(texts, 3), counted(texts, 2)
    continued = Counter(g[1:] for g in triples)
    continued = {g: pairs[g] if not g[0] else n for g, n in continued.items()}
    single = Counter(g[1] for g in pairs)
    p1 = {(w,): n / sum(single.values()) for w, n in single.items()}
    p2 = smoothed(continued, p1)
    p3 = smoothed(triples, p2)
    found1, order2, order3 = probabilities(grams)
    names = ["", *words]
    for word, p in zip(names[1:], found1[1:], strict=True):
        assert p == pytest.approx(p1[word,])
    assert len(order2.probs) == len(p2)
    for c, w, p in zip(order2.context, order2.word, order2.probs, strict=True):
        assert p == pytest.approx(p2[names[c], names[w]])
    assert len(order3.probs) == sum(n > 1 and g[1] != "" for g, n in triples.items())
    for c, w, p in zip(order3.context, order3.word, order3.probs, strict=True):
        gram = names[c // grams.size], names[c % grams.size], names[w]
        assert p == pytest.approx(p3[gram])


def test_the_loss_of_an_n_gram_is_the_distance_of_two_models():
    """One context, four words of six kept: leave one out, renormalize, sum over all words."""
    probs, lower = np.array([0.4, 0.2, 0.1, 0.05]), np.array([0.1, 0.25, 0.05, 0.2])
    rest = np.array([0.3, 0.1])  # lower probabilities of the two other words
    order = Order(np.zeros(4, int), np.arange(4), probs, lower, np.full(4, 0.3))

    def model(kept: np.ndarray) -> np.ndarray:
        p = np.where(kept, probs, 0.0)
        weight = (1 - p.sum()) / (1 - lower[kept].sum())
        return np.concatenate([np.where(kept, p, weight * lower), weight * rest])

    whole = model(np.ones(4, bool))
    for i, loss in enumerate(order.losses()):
        less = model(np.arange(4) != i)
        assert loss == pytest.approx(0.3 * float(whole @ np.log(whole / less)))


@pytest.mark.parametrize("n_bytes", [20, 60, 150])
def test_a_small_model_fits_and_is_still_one(n_bytes):
    words, grams = count(corpus_of((random_texts(400), 1)), size=99, low=0)
    whole, small = estimate(words, grams), estimate(words, grams, n_bytes)
    names = [n for n in whole if n.startswith(("bigram", "trigram")) and "scale" not in n]
    names.remove("bigram_counts")  # is as long as the lexicon
    assert sum(small[name].nbytes for name in names) <= n_bytes + 1
    assert sum(whole[name].nbytes for name in names) > n_bytes
    lexicon = Lexicon.of(small, testing.tiny_pieces())
    size = len(lexicon.words)
    for first in range(size):
        for second in range(1, size):
            total = sum(math.exp(lexicon.log_prob((first, second), w)) for w in range(1, size))
            assert total == pytest.approx(1.0, abs=0.02)


def test_what_is_stored_is_what_is_loaded():
    corpus, pieces = corpus_of((TEXTS * 3, 1)), testing.tiny_pieces()
    words, grams = count(corpus, size=10, low=1)
    stored = estimate(words, grams) | spellings(words, pieces)
    lexicon = Lexicon.of(stored, pieces)
    assert lexicon.words[1:] == ("cat", "once", "ran", "sat", "the")
    assert len(lexicon.bigrams.words) == len(stored["bigram_words"]) == 5
    assert len(lexicon.trigrams.words) == 4
    _, order2, _ = probabilities(grams)
    for c, w, p in zip(order2.context, order2.word, order2.probs, strict=True):
        found = lexicon.bigrams.log_probs[lexicon.bigrams.find(int(c), int(w))]
        assert found == pytest.approx(math.log(p), abs=0.01)


def test_bytes_keep_the_ends():
    stored = in_bytes("x", np.array([-9.5, -3.0, 0.5]))
    low, step = stored["x_scale"]
    np.testing.assert_allclose(low + step * stored["x"], [-9.5, -3.0, 0.5], atol=step / 2)


def test_files_and_transcripts_count_as_often_as_asked(tmp_path):
    book, talk = tmp_path / "book.txt", tmp_path / "talk-1.txt"
    book.write_text("The Cat sat.\n\nMr. Cat!\n")
    talk.write_text("The mouse")
    with PackWriter(tmp_path / "pack") as writer:
        for i, text in enumerate(["A dog ran", "it is 5 o'clock"]):  # digits are not spelled out
            facts = {"speaker": "s", "corpus": "c", "licence": "l"}
            writer.add(np.zeros(160, np.int16), id=str(i), text=text, **facts)
    corpus = read([book, talk], [tmp_path / "pack"], 2.0, [("*", 1.0), ("talk-*", 0.25)])
    assert [part.weight for part in corpus.parts] == [1.0, 0.25, 2.0]
    words = corpus.words(99, 0)
    assert words == ["a", "cat", "dog", "mister", "mouse", "ran", "sat", "the"]
    assert corpus.words(99, 1.2) == ["a", "cat", "dog", "ran", "the"]


def test_the_command_writes_what_loads(tmp_path, monkeypatch, capsys):
    text, out = tmp_path / "text.txt", tmp_path / "words.safetensors"
    text.write_text("\n".join(" ".join(line) for line in random_texts(100)))
    args = ["words", str(out), str(text), "--weight", "te*=2", "--megabytes", "0.01"]
    monkeypatch.setattr("sys.argv", args)
    main()
    assert "8 words" in capsys.readouterr().out
    assert len(Lexicon.load(out, testing.tiny_pieces()).words) == 9
    monkeypatch.setattr("sys.argv", ["words", str(out), str(text), "--weight", "2"])
    with pytest.raises(SystemExit):
        main()
    assert "is not PATTERN=NUMBER" in capsys.readouterr().err


def test_ids_fit_into_two_bytes(monkeypatch):
    monkeypatch.setattr(module, "MOST_WORDS", 2)
    assert len(count(corpus_of((TEXTS, 1)), size=9, low=0)[0]) == 2


def test_a_damaged_file_is_a_clear_error(tmp_path):
    (tmp_path / "words.safetensors").write_bytes(b"abc")
    with pytest.raises(ModelError, match="cannot read"):
        Lexicon.load(tmp_path / "words.safetensors", testing.tiny_pieces())


@pytest.mark.parametrize("said", ["", "each word once\n", "12 34\n12 34\n"])
def test_texts_without_a_word_that_counts_are_refused(tmp_path, monkeypatch, capsys, said):
    """They gave a lexicon of NaN."""
    (tmp_path / "text.txt").write_text(said)
    argv = ["words", str(tmp_path / "words.safetensors"), str(tmp_path / "text.txt")]
    monkeypatch.setattr("sys.argv", argv)
    with pytest.raises(SystemExit, match="2"):
        main()
    assert "error: no word of the texts counts 2 or more" in capsys.readouterr().err
    assert not (tmp_path / "words.safetensors").exists()
