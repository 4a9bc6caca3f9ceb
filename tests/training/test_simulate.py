"""simulate.py: posteriors out of text that say the text, as well as an ear would."""

from __future__ import annotations

import random

import pytest
import torch

from sparqle_stream.pieces import BLANK, greedy_path
from training.simulate import MOST_FRAMES, simulate
from training.text import spoken, train_pieces, written

TEXTS = ["The cat sat on the mat,", "and there -- it WAS told.", "Hello, bell: a ball!"]


@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
    return train_pieces(TEXTS, 40, tmp_path_factory.mktemp("pieces") / "pieces.json")


class Certain(random.Random):
    """Draws no errors: every probability of one is at its lowest."""

    def uniform(self, low, high):
        return high if (low, high) == (0.5, 1.0) else low


def said(posterior, pieces):
    """What CTC's best path reads in posteriors (T, V)."""
    return pieces.decode([piece for _, piece in greedy_path(torch.from_numpy(posterior))])


@pytest.mark.parametrize("seed", range(10))
def test_without_errors_the_best_path_is_the_text(pieces, seed):
    sketch = simulate(TEXTS, pieces, Certain(seed))
    assert said(sketch.posterior, pieces) == spoken(" ".join(TEXTS))
    assert [w.text for w in sketch.words] == " ".join(map(written, TEXTS)).split()
    # A word is over one frame after its last piece, as alignment counts it: heard up to there,
    # all words so far can be read and no more.
    for i, word in enumerate(sketch.words):
        so_far = spoken(" ".join(w.text for w in sketch.words[: i + 1]))
        assert said(sketch.posterior[: word.end_frame], pieces) == so_far


@pytest.mark.parametrize("seed", range(10))
def test_with_errors_they_are_still_posteriors(pieces, seed):
    sketch = simulate(TEXTS * 9, pieces, random.Random(seed))
    n_frames = len(sketch.posterior)
    torch.testing.assert_close(
        torch.from_numpy(sketch.posterior.sum(axis=1)), torch.ones(n_frames), atol=1e-6, rtol=0
    )
    assert (sketch.posterior >= 0).all()
    ends = [w.end_frame for w in sketch.words]
    assert ends == sorted(ends)
    assert ends[-1] <= n_frames - 4
    assert n_frames < MOST_FRAMES + 100
    assert sketch.posterior[-1, BLANK] == 1.0


def test_the_same_seed_says_it_the_same_way(pieces):
    first, again = (simulate(TEXTS, pieces, random.Random(3)) for _ in range(2))
    assert (first.posterior == again.posterior).all()
    assert first.words == again.words
