"""CTC head: encoder frames (B, T, 512) -> log-probabilities (B, T / 2, n_pieces) at 25 Hz.

Stateless: two neighbouring frames make one 40 ms CTC frame, and a chunk holds whole ones. Piece 0
is blank (Graves et al., 2006). The pieces are a small lower-case BPE vocabulary, so that a piece
means something to the LLM. The greedy path gives the grey tail and the times of words.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor, nn
from torch.nn import functional as F

from sparqle_stream.config import FRAMES_PER_CTC, CtcConfig

if TYPE_CHECKING:
    from pathlib import Path

    from tokenizers import Tokenizer

BLANK = 0


class CtcHead(nn.Module):
    """Two frames side by side, one hidden layer, pieces."""

    def __init__(self, cfg: CtcConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(FRAMES_PER_CTC * cfg.width)
        self.hidden = nn.Linear(FRAMES_PER_CTC * cfg.width, cfg.hidden)
        self.out = nn.Linear(cfg.hidden, cfg.n_pieces)

    def forward(self, frames: Tensor) -> Tensor:
        """frames (B, T, D), T even -> log-probabilities (B, T / 2, n_pieces) float32."""
        b, t, d = frames.shape
        pairs = frames.reshape(b, t // FRAMES_PER_CTC, FRAMES_PER_CTC * d)
        x = F.gelu(self.hidden(self.norm(pairs.to(self.norm.weight.dtype))))
        scores: Tensor = self.out(x)
        return scores.float().log_softmax(dim=-1)


@dataclass(slots=True)
class CtcPieces:
    """The piece vocabulary: ids <-> lower-case text. Id 0 is blank and has no text."""

    tokenizer: Tokenizer

    @classmethod
    def load(cls, path: Path) -> CtcPieces:
        from tokenizers import Tokenizer

        return cls(Tokenizer.from_file(str(path)))

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


def greedy_path(log_probs: Tensor) -> list[tuple[int, int]]:
    """log_probs (T, V) -> [(frame, piece)], one entry for every new piece on the best path.

    Of a whole utterance: a piece that goes on past the end of a part would be counted twice.
    """
    best = log_probs.argmax(dim=-1).tolist()
    last, path = BLANK, []
    for frame, piece in enumerate(best):
        if piece not in (BLANK, last):
            path.append((frame, piece))
        last = piece
    return path
