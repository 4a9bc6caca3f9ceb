"""CTC head: encoder frames (B, T, 512) -> log-probabilities (B, T / 2, n_pieces) at 25 Hz.

Stateless: two neighbouring frames make one 40 ms CTC frame, and a chunk holds whole ones. Piece 0
is blank (Graves et al., 2006).
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from sparqle_stream.config import FRAMES_PER_CTC, CtcConfig


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
