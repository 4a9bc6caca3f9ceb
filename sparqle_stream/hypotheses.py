"""Hypotheses of the word beam, as columns: what is done to all of them at once.

Each is a history, by number, and an open word, by its node in the tree of words. Log mass is kept
apart for paths that end in blank and in the word's last piece (Hannun et al., 2014).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Doubles = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
NEVER = -math.inf
# Rows of Hypotheses.
HIST, NODE, BEGAN, MOVED, LAST, ENDS, SOURCE, BEGINS = range(8)
BLANK_MASS, PIECE_MASS, PAST, AHEAD = range(4)


class Hypotheses(NamedTuple):
    """Readings up to an open word, as columns."""

    # (8, N): history, node, frames of the open word's first and last piece, last piece, whether a
    # word may end here; what grew in this frame knows from which one, and whether by a new word.
    ints: Ints
    # (4, N): log mass that ends in blank and in the piece; scores of the language model for the
    # history and, ahead, for the open word.
    floats: Doubles

    def where(self, kept: Bools | Ints) -> Hypotheses:
        return Hypotheses(self.ints[:, kept], self.floats[:, kept])

    def mass(self) -> Doubles:
        """(N,) log mass of CTC."""
        out: Doubles = np.logaddexp(self.floats[BLANK_MASS], self.floats[PIECE_MASS])
        return out

    def scores(self) -> Doubles:
        """(N,) log mass with the language model."""
        out: Doubles = self.mass() + (self.floats[PAST] + self.floats[AHEAD])
        return out

    def keys(self) -> Ints:
        """(N,) history and node in one number."""
        out: Ints = (self.ints[HIST] << 32) + self.ints[NODE]
        return out


def joined(parts: list[Hypotheses]) -> Hypotheses:
    """All of some, in order."""
    if len(parts) == 1:
        return parts[0]
    ints = np.concatenate([p.ints for p in parts], axis=1)
    return Hypotheses(ints, np.concatenate([p.floats for p in parts], axis=1))
