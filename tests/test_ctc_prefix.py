"""CTC prefix scores against an enumeration of every path, and state that stays small."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from sparqle_stream.ctc_prefix import MAX_FRAMES, CtcPrefix, PieceTable

TABLE = PieceTable(("", " a", " ab", "a", "b", "ab", "ba"))


def random_log_probs(n_frames: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    scores = 2.0 * torch.randn(n_frames, len(TABLE.texts), generator=generator)
    return scores.log_softmax(dim=-1)


def every_text(log_probs: torch.Tensor) -> dict[str, float]:
    """Text -> probability, summed over all paths."""
    probs = log_probs.double().exp()
    out: dict[str, float] = {}
    for path in itertools.product(range(probs.shape[1]), repeat=len(probs)):
        chance = math.prod(probs[t, piece].item() for t, piece in enumerate(path))
        text = "".join(TABLE.texts[piece] for piece, _ in itertools.groupby(path))
        out[text] = out.get(text, 0.0) + chance
    return out


def begins_with(texts: dict[str, float], start: str) -> float:
    return sum(p for text, p in texts.items() if text.startswith(start))


@pytest.mark.parametrize("seed", range(3))
def test_scores_are_sums_over_all_paths(seed):
    log_probs = random_log_probs(5, seed)
    texts = every_text(log_probs)
    heard = CtcPrefix(TABLE)
    heard.hear(log_probs)
    asked = [" a", " ab", " ab a", " aba", " b", " a a", " abab"]
    scores = heard.scores(asked)
    for text, prefix, ended in zip(asked, scores.prefix, scores.ended, strict=True):
        assert prefix == pytest.approx(begins_with(texts, text), rel=1e-5, abs=1e-9), text
        over = texts.get(text, 0.0) + begins_with(texts, text + " ")
        assert ended == pytest.approx(over, rel=1e-5, abs=1e-9), text


@pytest.mark.parametrize("written", [[" a"], [" a", "b"], [" ab", "a"]])
def test_what_is_written_conditions_what_follows_inside_a_word(written):
    log_probs = random_log_probs(5, seed=7)
    texts, heard = every_text(log_probs), CtcPrefix(TABLE)
    heard.hear(log_probs)
    for text in written:
        heard.write(text)
    begun = "".join(written)
    scores = heard.scores(["", "a", "b", " a"])
    expected = [begins_with(texts, begun + more) for more in ("", "a", "b", " a")]
    assert scores.prefix / scores.prefix[0] == pytest.approx(
        np.array(expected) / expected[0], rel=1e-5
    )


def test_hearing_in_parts_is_hearing_at_once():
    log_probs = random_log_probs(30)
    whole, parts = CtcPrefix(TABLE), CtcPrefix(TABLE)
    whole.hear(log_probs)
    for part in log_probs.split([1, 7, 8, 14]):
        parts.hear(part)
    texts = [" a", " ab a", " ba"]
    np.testing.assert_allclose(parts.scores(texts).prefix, whole.scores(texts).prefix, rtol=1e-12)
    assert parts.rest() == whole.rest()


def spell(*pieces: str, sure: float = 0.9) -> torch.Tensor:
    """Frames of pieces, "" for blank, as log-probabilities."""
    probs = torch.full((len(pieces), len(TABLE.texts)), (1 - sure) / (len(TABLE.texts) - 1))
    for t, piece in enumerate(pieces):
        probs[t, TABLE.texts.index(piece)] = sure
    return probs.log()


def test_words_that_are_over_are_used_up():
    heard = CtcPrefix(TABLE)
    heard.hear(spell(" a", "b", "", "", " ab", "ba", "", " a", "", ""))
    heard.write(" ab")
    assert heard.done == 2
    assert heard.rest() == [(" ab", -5), ("ba", -4), (" a", -2)]
    heard.write(" abba")
    assert heard.done == 6
    assert heard.rest() == [(" a", -2)]
    scores = heard.scores([" a", " b", "a"])
    assert scores.prefix.argmax() == 0


def test_what_is_skipped_is_not_offered_again():
    heard = CtcPrefix(TABLE)
    heard.hear(spell(" a", "b", "", " ab", ""))
    heard.skip()
    assert heard.rest() == [(" ab", -1)]
    heard.write(" ab")
    assert heard.rest() == []
    heard.skip()
    assert heard.rest() == []
    assert heard.base.max() > 0


def test_state_stays_small_whether_or_not_anything_is_written():
    silent, writing = CtcPrefix(TABLE), CtcPrefix(TABLE)
    for i in range(400):
        chunk = spell(" ab", "", "a", "", "", "", "", "", sure=0.99)
        for heard in (silent, writing):
            heard.hear(chunk)
            assert heard.n_frames <= MAX_FRAMES
            assert len(heard.base) == heard.n_frames + 1
            assert np.isfinite(heard.base).all()
            assert heard.base.max() > 0
        writing.write(" aba")
        assert writing.n_frames < 40, i
        assert writing.scores([" aba"]).prefix[0] >= 0


def test_text_that_nothing_speaks_for_does_not_break_the_state():
    heard = CtcPrefix(TABLE)
    heard.hear(spell(*[" a", ""] * 4, sure=1.0 - 1e-15))
    heard.write(" bbbb")
    heard.write(" ab")
    heard.write(" a")
    heard.hear(spell(" ab", "", ""))
    scores = heard.scores([" ab", " ba"])
    assert np.isfinite(scores.prefix).all()
    assert scores.prefix[0] > scores.prefix[1]
