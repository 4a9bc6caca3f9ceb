"""Encoder: log-mel (B, 2 T, 80) -> frames (B, T, 512) at 50 Hz, chunk-causal.

Contract: a frame sees all of its own chunk and the `left_frames` frames before the chunk, through
K/V rings with absolute positions. Shape and weights are Whisper's (Radford et al., 2022); the stem
sees two mel frames ahead, which appears as a constant lag of one frame, so that every step of
2 T mel frames emits exactly T. Positions are Whisper's sinusoids, taken modulo their table: a
stream outlives 30 s. Latency: the end of the chunk, plus config.FRAME_LAG_SAMPLES.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparqle_kernels.chunk_attention import chunk_attention
from sparqle_stream.config import MEL_TAIL, SILENT_MEL

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sparqle_stream.config import EncoderConfig


class Block(nn.Module):
    """Pre-norm Transformer block; the key projection has no bias, as in Whisper."""

    def __init__(self, cfg: EncoderConfig) -> None:
        super().__init__()
        self.n_heads = cfg.n_heads
        self.attn_ln = nn.LayerNorm(cfg.width)
        self.query = nn.Linear(cfg.width, cfg.width)
        self.key = nn.Linear(cfg.width, cfg.width, bias=False)
        self.value = nn.Linear(cfg.width, cfg.width)
        self.out = nn.Linear(cfg.width, cfg.width)
        self.mlp_ln = nn.LayerNorm(cfg.width)
        self.fc1 = nn.Linear(cfg.width, 4 * cfg.width)
        self.fc2 = nn.Linear(4 * cfg.width, cfg.width)

    def qkv(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, T, D) -> q, k, v (B, H, T, d)."""
        x = self.attn_ln(x)
        return self._heads(self.query(x)), self._heads(self.key(x)), self._heads(self.value(x))

    def merge(self, x: Tensor, mixed: Tensor) -> Tensor:
        """Adds attention output (B, H, T, d) and the feed-forward layer to x (B, T, D)."""
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        out: Tensor = x + self.fc2(F.gelu(self.fc1(self.mlp_ln(x))))
        return out

    def _heads(self, x: Tensor) -> Tensor:
        b, t, width = x.shape
        return x.reshape(b, t, self.n_heads, width // self.n_heads).transpose(1, 2)


class Encoder(nn.Module):
    """Weights of a chunk-causal Whisper encoder. History lives in EncoderState only."""

    positions: Tensor

    def __init__(self, cfg: EncoderConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.conv1 = nn.Conv1d(cfg.n_mels, cfg.width, 3)
        self.conv2 = nn.Conv1d(cfg.width, cfg.width, 3, stride=2)
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.n_layers))
        self.ln_post = nn.LayerNorm(cfg.width)
        self.register_buffer("positions", sinusoids(cfg.n_positions, cfg.width), persistent=False)

    def layers(self) -> Iterator[Block]:
        return cast("Iterator[Block]", iter(self.blocks))

    def stem(self, mel: Tensor, position: Tensor) -> Tensor:
        """mel (B, 3 + 2 T, 80), position (B,) of the first frame -> (B, T, D)."""
        x = F.gelu(self.conv1(mel.to(self.conv1.weight.dtype).transpose(1, 2)))
        x = F.gelu(self.conv2(x)).transpose(1, 2)
        steps = torch.arange(x.shape[1], device=x.device)
        index = (position[:, None] + steps) % self.cfg.n_positions
        return x + self.positions[index].to(x.dtype)

    def forward_train(
        self, mel: Tensor, chunk_frames: int, left_frames: int, offset: Tensor
    ) -> Tensor:
        """Whole utterances with the masks of streaming: what training calls.

        mel (B, 2 T, 80); chunk_frames 0 means full context; offset (B,) shifts the positions.
        Returns (B, T, D), equal to `step` over chunks.
        """
        mel = F.pad(mel, (0, 0, MEL_TAIL, 0), value=SILENT_MEL)
        x = self.stem(mel, offset)
        mask = chunk_mask(x.shape[1], chunk_frames, left_frames, x.device)
        for block in self.layers():
            q, k, v = block.qkv(x)
            x = block.merge(x, masked_attention(q, k, v, mask))
        out: Tensor = self.ln_post(x)
        return out


@dataclass(slots=True)
class EncoderState:
    mel_tail: Tensor  # (B, 3, M) mel frames that the stem still needs
    k: Tensor  # (L, B, H, left, d)
    v: Tensor  # (L, B, H, left, d)
    ring_position: Tensor  # (B, left) absolute frame of each ring entry, -1: never written
    position: Tensor  # (B,) frames emitted since the start of the stream


def init_state(
    cfg: EncoderConfig,
    batch: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> EncoderState:
    ring = (cfg.n_layers, batch, cfg.n_heads, cfg.left_frames, cfg.head_width)
    return EncoderState(
        mel_tail=torch.full((batch, MEL_TAIL, cfg.n_mels), SILENT_MEL, device=device),
        k=torch.zeros(ring, dtype=dtype, device=device),
        v=torch.zeros(ring, dtype=dtype, device=device),
        ring_position=torch.full((batch, cfg.left_frames), -1, device=device),
        position=torch.zeros(batch, dtype=torch.int64, device=device),
    )


def reset_rows(state: EncoderState, mask: Tensor) -> None:
    """Rows of `mask` (B,) forget everything. K/V bytes stay: position -1 makes them invisible."""
    state.mel_tail[mask] = SILENT_MEL
    state.ring_position[mask] = -1
    state.position[mask] = 0


def step(
    encoder: Encoder, state: EncoderState, mel: Tensor, active: Tensor
) -> tuple[EncoderState, Tensor]:
    """mel (B, 2 T, 80) of one chunk, active (B,) -> frames (B, T, D); inactive rows get zeros."""
    n_new = mel.shape[1] // 2
    out = mel.new_zeros(mel.shape[0], n_new, encoder.cfg.width)
    rows = active.nonzero()[:, 0]
    if len(rows) == 0 or n_new == 0:
        return state, out
    mel = torch.cat([state.mel_tail[rows], mel[rows]], dim=1)
    x = encoder.stem(mel, state.position[rows])
    new_position = state.position[rows, None] + torch.arange(n_new, device=mel.device)
    seen_position = state.ring_position[rows]
    for i, block in enumerate(encoder.layers()):
        q, k, v = block.qkv(x)
        mixed = chunk_attention(q, k, v, state.k[i, rows], state.v[i, rows], seen_position)
        x = block.merge(x, mixed)
        _write_ring(state.k[i], rows, new_position, k)
        _write_ring(state.v[i], rows, new_position, v)
    state.ring_position.index_put_(
        (rows[:, None], new_position[:, -encoder.cfg.left_frames :] % encoder.cfg.left_frames),
        new_position[:, -encoder.cfg.left_frames :],
    )
    state.mel_tail[rows] = mel[:, -MEL_TAIL:]
    state.position[rows] += n_new
    out[rows] = encoder.ln_post(x).to(out.dtype)
    return state, out


def _write_ring(ring: Tensor, rows: Tensor, position: Tensor, new: Tensor) -> None:
    """Writes new (b, H, T, d) into ring (B, H, L, d) at position (b, T) modulo L."""
    length = ring.shape[2]
    slots = position[:, -length:] % length
    ring[rows[:, None], :, slots] = new[:, :, -length:].transpose(1, 2)  # (b, T, H, d)


def masked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Attention of whole utterances, q, k, v (B, H, T, d), mask (T, T) bool.

    On CPUs the fused kernel's backward takes twice as long as plain matrix products at T 640.
    """
    if q.device.type != "cpu" or q.shape[2] > 1024:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    with torch.autocast("cpu", enabled=False):
        bias = torch.zeros(q.shape[2], k.shape[2], dtype=q.dtype)
        if mask is not None:
            bias.masked_fill_(~mask, -torch.inf)
        queries, keys, values = (x.flatten(0, 1) for x in (q, k, v))
        scores = torch.baddbmm(bias, queries, keys.transpose(1, 2), alpha=q.shape[3] ** -0.5)
        return torch.bmm(scores.softmax(dim=-1), values).view(q.shape)


def chunk_mask(
    n_frames: int, chunk_frames: int, left_frames: int, device: torch.device
) -> Tensor | None:
    """(T, T) bool: may query frame i see key frame j. None for full context (chunk_frames 0)."""
    if chunk_frames == 0:
        return None
    frame = torch.arange(n_frames, device=device)
    start = frame // chunk_frames * chunk_frames
    low, high = start - left_frames, start + chunk_frames
    return (frame[None] >= low[:, None]) & (frame[None] < high[:, None])


def sinusoids(length: int, width: int, max_timescale: float = 10_000.0) -> Tensor:
    """Whisper's positions (length, width): sines, then cosines, of geometric time scales."""
    step = torch.log(torch.tensor(max_timescale)) / (width // 2 - 1)
    rates = torch.exp(-step * torch.arange(width // 2))
    angle = torch.arange(length)[:, None] * rates[None]
    return torch.cat([angle.sin(), angle.cos()], dim=1)
