"""Reference of `rms_norm_rope_append`: plain PyTorch, the truth of other implementations."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Rotation(NamedTuple):
    """cos, sin (N, d) float32 at every position; the first half of sin is negated.

    Rotating is x cos + (x with its halves swapped) sin.
    """

    cos: Tensor
    sin: Tensor


class Slots(NamedTuple):
    """K/V slots of all streams, and where each row of the batch writes."""

    k: Tensor  # (S, KV, N, d)
    v: Tensor  # (S, KV, N, d)
    slot: Tensor  # (B,) int64 slot of each row, -1: the row is not active
    start: Tensor  # (B,) int64 entry that its first new row takes


def rms_norm_rope_append(
    x: Tensor, qkv: Tensor, eps: float, rotation: Rotation, slots: Slots
) -> Tensor:
    """x (B, R, E), qkv (B, R, (H + 2 KV) d) -> rotated q (B, H, R, d); writes k and v in place."""
    _, n_kv, _, d = slots.k.shape
    exact = torch.promote_types(x.dtype, torch.float32)
    scale = (x.to(exact).square().mean(dim=-1, keepdim=True) + eps).rsqrt()
    heads = (
        (qkv.to(exact) * scale).view(*qkv.shape[:2], -1, d).transpose(1, 2)
    )  # (B, H + 2 KV, R, d)
    rotated, value = heads[:, :-n_kv], heads[:, -n_kv:]
    position = slots.start[:, None] + torch.arange(x.shape[1], device=x.device)  # (B, R)
    active = slots.slot >= 0
    at = position.where(active[:, None], 0)
    cos, sin = rotation.cos[at][:, None], rotation.sin[at][:, None]
    rotated = (rotated * cos + rotated.roll(d // 2, dims=-1) * sin).to(x.dtype)
    # Nothing is read back to see who is active: who is not writes what the first active row writes,
    # once more; where none is, everybody writes back what is there.
    source = torch.arange(len(active), device=x.device).where(active, active.int().argmax())
    index, at = slots.slot[source].clamp(min=0)[:, None], at[source]
    is_new = active[source, None, None, None]
    for kept, new in ((slots.k, rotated[:, -n_kv:]), (slots.v, value.to(x.dtype))):
        new = new.transpose(1, 2)[source]  # (B, R, KV, d)
        kept[index, :, at] = new.where(is_new, kept[index, :, at])
    q: Tensor = rotated[:, :-n_kv].masked_fill(~active[:, None, None, None], 0.0)
    return q
