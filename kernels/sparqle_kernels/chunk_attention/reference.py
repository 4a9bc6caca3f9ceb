"""Reference of `chunk_attention`: plain PyTorch, the truth that other implementations answer to."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


def chunk_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ring_k: Tensor,
    ring_v: Tensor,
    ring_position: Tensor,
    length: Tensor | None = None,
) -> Tensor:
    """q, k, v (B, H, T, d), ring_k, ring_v (B, H, L, d), ring_position (B, L) -> (B, H, T, d)."""
    keys = torch.cat([ring_k, k], dim=2)
    values = torch.cat([ring_v, v], dim=2)
    written = ring_position >= 0
    here = written.new_ones(written.shape[0], k.shape[2])
    if length is not None:
        here = torch.arange(k.shape[2], device=k.device) < length[:, None]
    seen = torch.cat([written, here], dim=1)
    # The mask alone is not enough: 0 * NaN is NaN, and a slot's last stream may have left one.
    n_unsure = ring_k.shape[2] if length is None else seen.shape[1]
    for source in (keys, values):
        source[:, :, :n_unsure].masked_fill_(~seen[:, None, :n_unsure, None], 0.0)
    out = scaled_dot_product_attention(q, keys, values, attn_mask=seen[:, None, None, :])
    return out if length is None else out.masked_fill(~here[:, None, :, None], 0.0)
