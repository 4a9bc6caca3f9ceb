"""Reference of `chunk_attention`: plain PyTorch, the truth that other implementations answer to."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


class Ring(NamedTuple):
    """Keys and values of past frames of all streams, and whose are read."""

    k: Tensor  # (S, H, L, d)
    v: Tensor  # (S, H, L, d)
    position: Tensor  # (S, L) int64, -1 where nothing was written
    rows: Tensor | None = None  # (B,) int64 stream of each row of the batch; None: B is S


def chunk_attention(
    q: Tensor, k: Tensor, v: Tensor, ring: Ring, length: Tensor | None = None
) -> Tensor:
    """q (B, H, Q, d), k, v (B, H, T, d), Q at most T -> (B, H, Q, d)."""
    ring_k, ring_v, position = ring[:3]
    if ring.rows is not None:
        ring_k, ring_v, position = ring_k[ring.rows], ring_v[ring.rows], position[ring.rows]
    keys = torch.cat([ring_k, k], dim=2)
    values = torch.cat([ring_v, v], dim=2)
    written = position >= 0
    here = written.new_ones(written.shape[0], k.shape[2])
    if length is not None:
        here = torch.arange(k.shape[2], device=k.device) < length[:, None]
    seen = torch.cat([written, here], dim=1)
    # The mask alone is not enough: 0 * NaN is NaN, and a slot's last stream may have left one.
    n_unsure = ring_k.shape[2] if length is None else seen.shape[1]
    for source in (keys, values):
        source[:, :, :n_unsure].masked_fill_(~seen[:, None, :n_unsure, None], 0.0)
    out = scaled_dot_product_attention(q, keys, values, attn_mask=seen[:, None, None, :])
    return out if length is None else out.masked_fill(~here[:, None, : q.shape[2], None], 0.0)
