"""Reference of `frame_attention`: plain PyTorch, the truth that other implementations answer to."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch.nn.functional import scaled_dot_product_attention

if TYPE_CHECKING:
    from torch import Tensor


def frame_attention(
    q: Tensor, frames: Tensor, age: Tensor, seen: Tensor, bias: Tensor, scale: float
) -> Tensor:
    """q (B, H, Q, W), frames (B, L, W), age, seen (B, Q, L), bias (H, n_ages) -> (B, H, Q, W)."""
    # The mask alone is not enough: 0 * NaN is NaN.
    frames = frames.masked_fill(~seen.any(dim=1)[:, :, None], 0.0)
    shared = frames[:, None].expand(-1, q.shape[1], -1, -1)
    mask = bias[:, age].transpose(0, 1).masked_fill(~seen[:, None], float("-inf"))
    return scaled_dot_product_attention(q, shared, shared, mask.to(q.dtype), scale=scale)
