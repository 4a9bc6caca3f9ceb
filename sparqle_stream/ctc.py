"""CTC head: encoder frames (B, T, 512) -> log-probabilities (B, T / 2, n_pieces) at 25 Hz.

Contract: strictly causal, no latency: two neighbouring frames make one 40 ms CTC frame, and a chunk
holds whole ones. With blocks a CTC frame also looks at those before it, of which a state keeps
`kernel` - 1 for each block. Piece 0 is blank (Graves et al., 2006).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparqle_stream.config import FRAMES_PER_CTC, CtcConfig
from sparqle_stream.rows import Rows

if TYPE_CHECKING:
    from collections.abc import Iterator


class CtcBlock(nn.Module):
    """A gated depthwise convolution over the past and an MLP, each added to what it was given:
    Conformer's modules (Gulati et al., 2020) without attention, which the encoder has."""

    def __init__(self, cfg: CtcConfig) -> None:
        super().__init__()
        width = cfg.hidden
        self.gate_ln = nn.LayerNorm(width)
        self.gate = nn.Linear(width, 2 * width)
        self.conv = nn.Conv1d(width, width, cfg.kernel, groups=width)
        self.conv_ln = nn.LayerNorm(width)
        self.merge = nn.Linear(width, width)
        self.mlp_ln = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor, past: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, C, D), past (B, K - 1, D) -> the same of the frames after them."""
        gated = F.glu(self.gate(self.gate_ln(x)), dim=-1)
        seen = torch.cat([past.to(gated.dtype), gated], dim=1)
        mixed = self.conv(seen.transpose(1, 2)).transpose(1, 2)
        x = x + self.merge(F.gelu(self.conv_ln(mixed)))
        x = x + self.fc2(F.gelu(self.fc1(self.mlp_ln(x))))
        return x, seen[:, x.shape[1] :]


class CtcHead(nn.Module):
    """Two frames side by side, one hidden layer, blocks if there are any, pieces."""

    def __init__(self, cfg: CtcConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.norm = nn.LayerNorm(FRAMES_PER_CTC * cfg.width)
        self.hidden = nn.Linear(FRAMES_PER_CTC * cfg.width, cfg.hidden)
        self.blocks = nn.ModuleList(CtcBlock(cfg) for _ in range(cfg.n_blocks))
        if cfg.n_blocks:
            self.out_norm = nn.LayerNorm(cfg.hidden)
        self.out = nn.Linear(cfg.hidden, cfg.n_pieces)

    def layers(self) -> Iterator[CtcBlock]:
        return cast("Iterator[CtcBlock]", iter(self.blocks))

    def forward(self, frames: Tensor) -> Tensor:
        """Whole utterances: frames (B, T, D), T even -> log-probabilities (B, T / 2, V) float32."""
        return self.hear(frames, self.silence(len(frames), frames))[0]

    def hear(self, frames: Tensor, past: Tensor) -> tuple[Tensor, Tensor]:
        """frames (B, T, D), past (B, N, K - 1, H) -> log-probabilities, the new past."""
        b, t, d = frames.shape
        pairs = frames.reshape(b, t // FRAMES_PER_CTC, FRAMES_PER_CTC * d)
        x = F.gelu(self.hidden(self.norm(pairs.to(self.norm.weight.dtype))))
        new = []
        for block, before in zip(self.layers(), past.unbind(1), strict=True):
            x, after = block(x, before)
            new.append(after)
        if new:
            x = self.out_norm(x)
        scores: Tensor = self.out(x)
        return scores.float().log_softmax(dim=-1), torch.stack(new, dim=1) if new else past

    def silence(self, batch: int, like: Tensor) -> Tensor:
        """The past (B, N, K - 1, H) of a segment that begins."""
        cfg = self.cfg
        return like.new_zeros(batch, cfg.n_blocks, cfg.kernel - 1, cfg.hidden)


@dataclass(slots=True)
class CtcState:
    past: Tensor  # (B, N, K - 1, H) what each block saw last


def init_state(head: CtcHead, batch: int) -> CtcState:
    return CtcState(head.silence(batch, head.norm.weight.detach()))


def reset_rows(state: CtcState, mask: Tensor) -> None:
    """Rows of `mask` (B,) start a new segment."""
    state.past[mask] = 0.0


def step(
    head: CtcHead, state: CtcState, frames: Tensor, active: Tensor | Rows
) -> tuple[CtcState, Tensor]:
    """frames (B, T, D), active (B,) -> log-probs (B, T / 2, V); zeros for inactive rows."""
    rows = Rows.of(active)
    log_probs, past = head.hear(rows.take(frames), state.past[rows.index])
    state.past[rows.index] = past
    return state, rows.put(log_probs)
