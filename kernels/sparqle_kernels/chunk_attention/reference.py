"""Reference of `chunk_attention`: plain PyTorch, the truth that other implementations answer to."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


def chunk_attention(
    q: Tensor, k: Tensor, v: Tensor, ring_k: Tensor, ring_v: Tensor, ring_position: Tensor
) -> Tensor:
    """A chunk attends to all of itself and to every written entry of the ring.

    q, k, v (B, H, T, d): the chunk. ring_k, ring_v (B, H, L, d) with ring_position (B, L) int64,
    -1 where nothing was written. Returns (B, H, T, d). The ring holds at most L frames, so its
    length is the left context; entries need no order, their age does not enter the score.
    """
    keys = torch.cat([ring_k, k], dim=2)
    values = torch.cat([ring_v, v], dim=2)
    written = ring_position >= 0
    # The mask alone is not enough: 0 * NaN is NaN, and a slot's last stream may have left one.
    for source in (keys, values):
        source[:, :, : ring_k.shape[2]].masked_fill_(~written[:, None, :, None], 0.0)
    here = written.new_ones(written.shape[0], k.shape[2])
    seen = torch.cat([written, here], dim=1)
    return scaled_dot_product_attention(q, keys, values, attn_mask=seen[:, None, None, :])
