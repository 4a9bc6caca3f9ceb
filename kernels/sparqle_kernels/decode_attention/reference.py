"""Reference of `decode_attention`: plain PyTorch, the truth that other implementations answer to.

Runs on any device and never waits for it: unequal lengths are a mask over whole slots.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


def decode_attention(q: Tensor, k: Tensor, v: Tensor, slots: Tensor, lengths: Tensor) -> Tensor:
    """The newest rows of some slots attend to everything their slot holds up to themselves.

    q (B, H, R, d): R new rows each; k, v (S, KV, N, d): all slots, heads in groups of H / KV;
    slots (B,) int64: the slot of each row of the batch; lengths (B,) int64: entries of the slot,
    the new ones included, so that row r sits at lengths - R + r. Returns (B, H, R, d).
    """
    n_rows, n_slot = q.shape[2], k.shape[2]
    row = torch.arange(n_rows, device=q.device)
    last_seen = lengths[:, None] - n_rows + row  # (B, R)
    seen = torch.arange(n_slot, device=q.device) <= last_seen[..., None]  # (B, R, N)
    return scaled_dot_product_attention(
        q, k[slots], v[slots], attn_mask=seen[:, None], enable_gqa=True
    )
