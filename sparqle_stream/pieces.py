"""Pieces: what CTC spells with, ids <-> lower-case text. Id 0 is blank and has no text.

A small lower-case BPE vocabulary, so that a piece means something to the LLM. Stateless.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from sparqle_stream.tokenizer import read_tokenizer

if TYPE_CHECKING:
    from pathlib import Path

    import numpy.typing as npt
    from tokenizers import Tokenizer

BLANK = 0


@dataclass(slots=True)
class CtcPieces:
    """The piece vocabulary."""

    tokenizer: Tokenizer

    @classmethod
    def load(cls, path: Path) -> CtcPieces:
        """Raises ModelError."""
        return cls(read_tokenizer(path))

    @property
    def size(self) -> int:
        return int(self.tokenizer.get_vocab_size())

    def encode(self, text: str) -> list[int]:
        """Lower-case text -> piece ids, without blank."""
        return list(self.tokenizer.encode(text).ids)

    def piece(self, piece_id: int) -> str:
        """Text of one piece; a leading space marks the start of a word."""
        return str(self.tokenizer.id_to_token(piece_id)).replace("▁", " ")

    def decode(self, ids: list[int]) -> str:
        return "".join(self.piece(i) for i in ids if i != BLANK).strip()


def greedy_path(log_probs: npt.ArrayLike) -> list[tuple[int, int]]:
    """log_probs (T, V) -> [(frame, piece)], one entry for every new piece on the best path.

    Of a whole utterance: a piece that goes on past the end of a part would be counted twice.
    """
    best = np.asarray(log_probs).argmax(axis=-1).tolist()
    last, path = BLANK, []
    for frame, piece in enumerate(best):
        if piece not in (BLANK, last):
            path.append((frame, piece))
        last = piece
    return path
