"""CTC forced alignment: when does each word of a transcript end?

Viterbi over blank-interleaved pieces (Kürzinger et al., 2020, without the segmentation part).
It runs on the posteriors that the streaming encoder gave for this very audio, so a word's end is
the moment at which the engine could have known it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from sparqle_stream.ctc import BLANK, CtcPieces
from training.text import spoken

if TYPE_CHECKING:
    from numpy.typing import NDArray

CTC_EARLY_FRAMES = 1  # CTC peaks come about 50 ms before the end of a word (models.md 3.3)


@dataclass(frozen=True, slots=True)
class AlignedWord:
    """A written word and the CTC frame (40 ms) after which it is over."""

    text: str
    end_frame: int


def viterbi(log_probs: NDArray[np.float32], pieces: list[int]) -> tuple[NDArray[np.int64], float]:
    """log_probs (T, V), pieces (L) -> last frame of each piece (L), mean log-probability a frame.

    Returns a score of -inf when T frames cannot hold the pieces.
    """
    states = np.full(2 * len(pieces) + 1, BLANK)
    states[1::2] = pieces
    n_frames, n_states = len(log_probs), len(states)
    if n_frames < len(pieces) or not pieces:
        return np.zeros(len(pieces), np.int64), -np.inf
    emit = log_probs[:, states]
    can_skip = np.zeros(n_states, bool)
    can_skip[3::2] = states[3::2] != states[1:-2:2]
    score = np.full(n_states, -np.inf, np.float32)
    score[:2] = emit[0, :2]
    back = np.zeros((n_frames, n_states), np.int8)
    for t in range(1, n_frames):
        one = np.concatenate([[-np.inf], score[:-1]])
        two = np.where(can_skip, np.concatenate([[-np.inf, -np.inf], score[:-2]]), -np.inf)
        options = np.stack([score, one, two])
        back[t] = options.argmax(axis=0)
        score = options.max(axis=0) + emit[t]
    state = n_states - 1 if score[-1] >= score[-2] else n_states - 2
    total = float(score[state]) / n_frames
    last = np.full(len(pieces), -1)
    for t in range(n_frames - 1, -1, -1):
        if state % 2 and last[state // 2] < 0:
            last[state // 2] = t
        state -= int(back[t, state])
    return last, total


def align_words(
    log_probs: NDArray[np.float32], text: str, pieces: CtcPieces
) -> tuple[list[AlignedWord], float]:
    """Written words with their last CTC frame, and the alignment's score.

    A written word may be several spoken ones ("twenty-one") or none ("-"): the latter ends with
    the word before it.
    """
    written = text.split()
    spellings = [pieces.encode(spoken(word)) if spoken(word) else [] for word in written]
    flat = [piece for spelling in spellings for piece in spelling]
    ends, score = viterbi(log_probs, flat)
    words, used, end = [], 0, 0
    for word, spelling in zip(written, spellings, strict=True):
        used += len(spelling)
        if spelling:
            end = int(ends[used - 1]) + CTC_EARLY_FRAMES
        words.append(AlignedWord(word, min(end, len(log_probs) - 1)))
    return words, score
