"""`decode_attention` for a CPU: one slot at a time, no copy of keys and no work past its length."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


def decode_attention(q: Tensor, k: Tensor, v: Tensor, slots: Tensor, lengths: Tensor) -> Tensor:
    """As `reference.decode_attention`. Reads `slots` and `lengths` on the host."""
    n_kv, n_rows, width = k.shape[1], q.shape[2], q.shape[3]
    n_groups = q.shape[1] // n_kv
    # Heads that share keys lie behind each other, so that a slot is read once for all of them.
    packed = q.reshape(-1, 1, n_kv, n_groups * n_rows, width)
    out = torch.empty_like(packed)
    for i, (slot, length) in enumerate(zip(slots.tolist(), lengths.tolist(), strict=True)):
        keys, values = k[slot : slot + 1, :, :length], v[slot : slot + 1, :, :length]
        mask = None
        if n_rows > 1:
            mask = torch.ones(n_rows, length, dtype=torch.bool).tril(length - n_rows)
            mask = mask.repeat(n_groups, 1)
        out[i] = scaled_dot_product_attention(packed[i], keys, values, attn_mask=mask)
    return out.view(q.shape)
