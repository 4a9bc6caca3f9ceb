"""Reference of `utterance_attention`: plain PyTorch, the truth of other implementations."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


def utterance_attention(
    q: Tensor, k: Tensor, v: Tensor, chunk_frames: int, left_frames: int
) -> Tensor:
    """q, k, v (B, H, T, d) -> (B, H, T, d)."""
    if chunk_frames == 0:
        return scaled_dot_product_attention(q, k, v)
    frame = torch.arange(q.shape[2], device=q.device)
    start = (frame // chunk_frames * chunk_frames)[:, None]
    mask = (frame >= start - left_frames) & (frame < start + chunk_frames)  # (T, T)
    return scaled_dot_product_attention(q, k, v, attn_mask=mask)
