"""Simulated hearing: text -> the CTC posteriors that an ear might have given for it.

Words are spelled in pieces, pieces get durations, gaps and confusions. It trains the LLM to follow
a stream of pieces and write words without a second of audio.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from sparqle_stream.ctc import BLANK, CtcPieces
from training.align import AlignedWord
from training.text import spoken, written

if TYPE_CHECKING:
    import random

    from numpy.typing import NDArray

MOST_FRAMES = 400


@dataclass(frozen=True, slots=True)
class Sketch:
    """Posteriors (T, V) and the words with the frame after which each is over."""

    posterior: NDArray[np.float32]
    words: list[AlignedWord]


def simulate(texts: list[str], pieces: CtcPieces, rng: random.Random) -> Sketch:
    """Utterances one after another, with one speaking rate and error rate."""
    gap, wrong, lost = rng.uniform(0.0, 3.0), rng.uniform(0.0, 0.15), rng.uniform(0.0, 0.1)
    frames: list[tuple[int, float]] = [(BLANK, 1.0)] * rng.randint(1, 8)
    words = []
    for word in " ".join(written(text) for text in texts).split():
        for piece in pieces.encode(spoken(word)) if spoken(word) else []:
            frames += [(BLANK, 1.0)] * round(rng.expovariate(1.0) * gap)
            heard = rng.randrange(1, pieces.size) if rng.random() < wrong else piece
            sure = rng.uniform(0.5, 1.0)
            if rng.random() >= lost:
                if frames[-1][0] == heard:
                    frames.append((BLANK, 1.0))
                frames += [(heard, sure)] * rng.choice((1, 1, 2))
        words.append(AlignedWord(word, len(frames)))
        if len(frames) > MOST_FRAMES:
            break
    frames += [(BLANK, 1.0)] * rng.randint(4, 30)
    posterior = np.zeros((len(frames), pieces.size), np.float32)
    for t, (piece, sure) in enumerate(frames):
        posterior[t, BLANK] = 1.0 - sure
        posterior[t, piece] += sure
    return Sketch(posterior, words)
