"""Q-Former cross-attention that never projects its frames: the projections move to the queries.

q (W_k f) = (W_k^T q) f and sum p (W_v f) = W_v (sum p f): with the key projection folded into the
queries and the value projection taken out of the sum, all heads share the frames themselves as keys
and values, and projected keys exist nowhere.

    folded = fold_keys(q, key_weight)                          # (B, H, Q, W)
    mixed = frame_attention(folded, frames, age, seen, bias, d**-0.5)
    out = unfold_values(mixed, value_weight, value_bias)       # (B, H, Q, d), as query_attention

It pays while there are few queries: folded queries and mixed frames are W wide. With 4 queries
against 80 frames of 512 (8 heads of 64) it moves 0.21 MB instead of 0.49 in bf16, with a ninth of
the arithmetic; with 16 queries against 128 frames (a chunk of 1280 ms) 0.66 instead of 0.79.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from sparqle_kernels.choice import choose
from sparqle_kernels.frame_attention import reference

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["fold_keys", "frame_attention", "unfold_values"]

# A program holds whole rows of queries and sums; float32 rows that are wider spill.
MAX_WIDTH = {torch.float32: 128, torch.float16: 512, torch.bfloat16: 512}


def frame_attention(
    q: Tensor, frames: Tensor, age: Tensor, seen: Tensor, bias: Tensor, scale: float
) -> Tensor:
    """softmax(scale q f + bias[h, age]) f over the frames that are `seen`.

    q (B, H, Q, W), with keys folded in; frames (B, L, W); age (B, Q, L) int64, index into the
    bias table (H, n_ages); seen (B, Q, L) bool, at least one frame for every query; both may be of
    batch 1. What no query sees may hold anything, NaN too. Returns (B, H, Q, W).
    """
    fits = q.shape[3] <= MAX_WIDTH.get(q.dtype, 0)
    if fits and choose("frame_attention", q, frames, bias).implementation == "triton":
        from sparqle_kernels.frame_attention import triton

        return triton.frame_attention(q, frames, age, seen, bias, scale)
    return reference.frame_attention(q, frames, age, seen, bias, scale)


def fold_keys(q: Tensor, weight: Tensor) -> Tensor:
    """q (B, H, Q, d), weight (H d, W) of the key projection -> (B, H, Q, W)."""
    _, h, _, d = q.shape
    return q @ weight.view(h, d, -1)


def unfold_values(mixed: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """mixed (B, H, Q, W), weight (H d, W), bias (H d,) of the value projection -> (B, H, Q, d)."""
    h = mixed.shape[1]
    return mixed @ weight.view(h, -1, mixed.shape[3]).transpose(1, 2) + bias.view(h, 1, -1)
