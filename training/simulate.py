"""Simulated hearing: text -> the CTC posteriors that an ear might have given for it.

Words are spelled in pieces, pieces get durations, gaps and confusions. It trains the LLM to follow
a stream of pieces and write words without a second of audio.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from sparqle_stream.pieces import BLANK, CtcPieces
from training.align import AlignedWord
from training.text import spoken, written

if TYPE_CHECKING:
    import random

    from numpy.typing import NDArray

MOST_FRAMES = 400
# Letters that are taken for each other, by sound. What is in no class is never mistaken.
ALIKE = ("aeiouy", "td", "szc", "kcgq", "pb", "mn", "lr", "fv", "jg", "wh")


_Frame = tuple[int, float, int]  # best piece, its probability, and the piece with the rest
_SILENT: _Frame = (BLANK, 1.0, BLANK)


@dataclass(frozen=True, slots=True)
class Sketch:
    """Posteriors (T, V) and the words with the frame after which each is over."""

    posterior: NDArray[np.float32]
    words: list[AlignedWord]


def simulate(texts: list[str], pieces: CtcPieces, rng: random.Random) -> Sketch:
    """Utterances one after another, with one speaking rate and one quality of hearing.

    Two kinds of errors: letters that sound alike are mistaken, lost or doubled before the word is
    spelled in pieces, as an ear does that cannot spell; and pieces are misheard, in which case the
    right one keeps what the wrong one leaves.
    """
    # Mostly dense: the same queries hold more words to read. Audio brings its own pace later.
    gap, misspelt = 3.0 * rng.uniform(0.0, 1.0) ** 2, rng.uniform(0.0, 0.25)
    wrong, lost = rng.uniform(0.0, 0.15), rng.uniform(0.0, 0.1)
    frames: list[_Frame] = [_SILENT] * rng.randint(1, 8)
    words = []
    for word in " ".join(written(text) for text in texts).split():
        heard_word = mishear(spoken(word), misspelt, rng)
        for piece in pieces.encode(heard_word) if heard_word else []:
            frames += [_SILENT] * round(rng.expovariate(1.0) * gap)
            heard = rng.randrange(1, pieces.size) if rng.random() < wrong else piece
            sure = rng.uniform(0.5, 1.0)
            if rng.random() >= lost:
                if frames[-1][0] == heard:
                    frames.append(_SILENT)
                other = piece if rng.random() < 0.5 else BLANK
                frames += [(heard, sure, other)] * rng.choice((1, 1, 2))
        words.append(AlignedWord(word, len(frames)))
        if len(frames) > MOST_FRAMES:
            break
    frames += [_SILENT] * rng.randint(4, 30)
    posterior = np.zeros((len(frames), pieces.size), np.float32)
    for t, (piece, sure, other) in enumerate(frames):
        posterior[t, other] = 1.0 - sure
        posterior[t, piece] += sure
    return Sketch(posterior, words)


def mishear(word: str, rate: float, rng: random.Random) -> str:
    """Every letter is mistaken for one that sounds alike, dropped or doubled with chance `rate`.

    >>> mishear("finally", 0.0, random.Random(0))
    'finally'
    """
    out = ""
    for letter in word:
        if rng.random() >= rate:
            out += letter
            continue
        alike = [x for group in ALIKE if letter in group for x in group if x != letter]
        out += rng.choice([*alike, "", letter * 2])
    return out
