"""Encoder: log-mel (B, 2 T, 80) -> frames (B, T, 512) at 50 Hz, chunk-causal.

Contract: a frame sees all of its own chunk, `ahead` frames after it, and the `left_frames` frames
before it, through K/V rings with absolute positions. Shape and weights are Whisper's (Radford et
al., 2022); the stem sees two mel frames ahead, which appears as a constant lag of one frame, so
that every step of 2 T mel frames emits exactly T.

Look-ahead is a lag too: frames come out `ahead` frames late, and a stream begins with as many of
silence. What lies ahead is computed along with the chunk, is seen by it, and is forgotten: its keys
are written when its own chunk comes (the right context of Emformer, Shi et al., 2021).

Positions are Whisper's sinusoids, taken modulo their table: a stream outlives 30 s. Latency: the
end of the chunk, plus config.FRAME_LAG_SAMPLES, plus the look-ahead.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparqle_kernels.add_layer_norm import add_layer_norm
from sparqle_kernels.chunk_attention import Ring, chunk_attention
from sparqle_stream.config import MEL_TAIL, SILENT_MEL
from sparqle_stream.rows import Rows

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
        return self.project(self.attn_ln(x))

    def project(self, normed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """normed by `attn_ln` (B, T, D) -> q, k, v (B, H, T, d)."""
        q, k, v = self.query(normed), self.key(normed), self.value(normed)
        return self._heads(q), self._heads(k), self._heads(v)

    def merge(self, x: Tensor, mixed: Tensor) -> Tensor:
        """Adds attention output (B, H, T, d) and the feed-forward layer to x (B, T, D)."""
        x, y = self._sub_layers(x, mixed)
        return x + y

    def merge_and_norm(
        self, x: Tensor, mixed: Tensor, after: nn.LayerNorm
    ) -> tuple[Tensor, Tensor]:
        """As `merge`, and what the norm `after` makes of it: one pass over memory for both."""
        return _add_norm(*self._sub_layers(x, mixed), after)

    def _sub_layers(self, x: Tensor, mixed: Tensor) -> tuple[Tensor, Tensor]:
        """x with the attention added, and what the feed-forward layer adds."""
        x, normed = _add_norm(x, self.out(mixed.transpose(1, 2).flatten(2)), self.mlp_ln)
        return x, self.fc2(F.gelu(self.fc1(normed)))

    def _heads(self, x: Tensor) -> Tensor:
        b, t, width = x.shape
        return x.reshape(b, t, self.n_heads, width // self.n_heads).transpose(1, 2)


def _add_norm(x: Tensor, y: Tensor, norm: nn.LayerNorm) -> tuple[Tensor, Tensor]:
    return add_layer_norm(x, y, norm.weight, norm.bias, norm.eps)


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

    def norms(self) -> list[nn.LayerNorm]:
        """The norm before each block, and the one behind the last."""
        return [*(block.attn_ln for block in self.layers()), self.ln_post]

    def stem(self, mel: Tensor, position: Tensor) -> Tensor:
        """mel (B, 3 + 2 T, 80), position (B,) of the first frame -> (B, T, D)."""
        x = F.gelu(self.conv1(mel.to(self.conv1.weight.dtype).transpose(1, 2)))
        x = F.gelu(self.conv2(x)).transpose(1, 2)
        steps = torch.arange(x.shape[1], device=x.device)
        index = (position[:, None] + steps) % self.cfg.n_positions
        return x + self.positions[index].to(x.dtype)

    def forward_train(
        self, mel: Tensor, chunk_frames: int, left_frames: int, offset: Tensor, ahead: int = 0
    ) -> Tensor:
        """Whole utterances with the masks of streaming: what training calls.

        mel (B, 2 T, 80); chunk_frames 0 means full context; offset (B,) shifts the positions.
        Returns (B, T, D), equal to `step` over chunks: frame p is of the audio `ahead` before p.
        """
        n_frames = mel.shape[1] // 2
        mel = F.pad(mel, (0, 0, MEL_TAIL + 2 * ahead, 0), value=SILENT_MEL)
        x = self.stem(mel, offset)
        frame, mask = windows(n_frames, chunk_frames, left_frames, ahead, x.device)
        if ahead:
            x = x[:, frame]
        for block in self.layers():
            q, k, v = block.qkv(x)
            x = block.merge(x, masked_attention(q, k, v, mask))
        out: Tensor = self.ln_post(x[:, :n_frames])
        return out


@dataclass(slots=True)
class EncoderState:
    mel_tail: Tensor  # (B, 3 + 2 * max_ahead_frames, M) mel frames that are still needed
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
        mel_tail=torch.full((batch, cfg.mel_tail, cfg.n_mels), SILENT_MEL, device=device),
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
    encoder: Encoder, state: EncoderState, mel: Tensor, active: Tensor | Rows, ahead: int = 0
) -> tuple[EncoderState, Tensor]:
    """mel (B, 2 T, 80) of one chunk, active (B,) -> frames (B, T, D); inactive rows get zeros.

    `ahead` frames of look-ahead, at most `max_ahead_frames`, the same in all steps of a stream.
    """
    n_new, chosen, cfg = mel.shape[1] // 2, Rows.of(active), encoder.cfg
    if len(chosen) == 0 or n_new == 0:
        return state, mel.new_zeros(chosen.n_out, n_new, cfg.width)
    rows = chosen.index
    mel = torch.cat([state.mel_tail[rows], chosen.take(mel)], dim=1)
    x = encoder.stem(mel[:, -(MEL_TAIL + 2 * (ahead + n_new)) :], state.position[rows])
    new_position = state.position[rows, None] + torch.arange(n_new, device=mel.device)
    norms = encoder.norms()
    normed = norms[0](x)
    for i, block in enumerate(encoder.layers()):
        q, k, v = block.project(normed)
        if i + 1 == cfg.n_layers:  # nobody asks for what lies ahead any more
            x, q = x[:, :n_new], q[:, :, :n_new]
        mixed = chunk_attention(q, k, v, Ring(state.k[i], state.v[i], state.ring_position, rows))
        x, normed = block.merge_and_norm(x, mixed, norms[i + 1])
        _write_ring(state.k[i], rows, new_position, k[:, :, :n_new])
        _write_ring(state.v[i], rows, new_position, v[:, :, :n_new])
    state.ring_position.index_put_(
        (rows[:, None], new_position[:, -cfg.left_frames :] % cfg.left_frames),
        new_position[:, -cfg.left_frames :],
    )
    state.mel_tail[rows] = mel[:, -cfg.mel_tail :]
    state.position[rows] += n_new
    return state, chosen.put(normed.to(mel.dtype))


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


def windows(
    n_frames: int, chunk_frames: int, left_frames: int, ahead: int, device: torch.device
) -> tuple[Tensor, Tensor | None]:
    """What whole utterances have to hold so that every chunk has its own look-ahead.

    Returns frame (N,): first the T frames, then for every chunk the `ahead` frames after it; and
    mask (N, N): may the first see the second? None for full context: one chunk, or chunk_frames 0.
    """
    size = chunk_frames or max(1, n_frames)
    frame = torch.arange(n_frames, device=device)
    start = torch.arange(0, n_frames, size, device=device)
    end = (start + size).clamp(max=n_frames)
    after = end[:, None] + torch.arange(ahead, device=device)
    every = torch.cat([frame, after.flatten()])
    if len(start) < 2:
        return every, None
    chunk = torch.cat(
        [frame // size, torch.arange(len(start), device=device).repeat_interleave(ahead)]
    )
    low, high = (start - left_frames)[chunk], end[chunk]
    may_see = (every[None] >= low[:, None]) & (every[None] < high[:, None])
    may_see[:, n_frames:] = chunk[None, n_frames:] == chunk[:, None]
    return every, may_see


def sinusoids(length: int, width: int, max_timescale: float = 10_000.0) -> Tensor:
    """Whisper's positions (length, width): sines, then cosines, of geometric time scales."""
    step = torch.log(torch.tensor(max_timescale)) / (width // 2 - 1)
    rates = torch.exp(-step * torch.arange(width // 2))
    angle = torch.arange(length)[:, None] * rates[None]
    return torch.cat([angle.sin(), angle.cos()], dim=1)
