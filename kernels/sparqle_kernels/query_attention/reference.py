"""Reference of `query_attention`: plain PyTorch, the truth that other implementations answer to."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch.nn.functional import scaled_dot_product_attention

if TYPE_CHECKING:
    from torch import Tensor


def query_attention(
    q: Tensor, k: Tensor, v: Tensor, age: Tensor, seen: Tensor, bias: Tensor
) -> Tensor:
    """q (B, H, Q, d), k, v (B, H, L, d), age, seen (B, Q, L), bias (H, n_ages) -> (B, H, Q, d)."""
    # The mask alone is not enough: 0 * NaN is NaN.
    unseen = ~seen.any(dim=1)[:, None, :, None]  # (B, 1, L, 1)
    k, v = k.masked_fill(unseen, 0.0), v.masked_fill(unseen, 0.0)
    scores = bias[:, age].transpose(0, 1)  # (B, H, Q, L)
    mask = scores.masked_fill(~seen[:, None], float("-inf"))
    return scaled_dot_product_attention(q, k, v, attn_mask=mask.to(q.dtype))
