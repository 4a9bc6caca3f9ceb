"""Reference of `query_attention`: plain PyTorch, the truth that other implementations answer to."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


def query_attention(  # noqa: PLR0913 - one argument per tensor of the op
    q: Tensor, k: Tensor, v: Tensor, age: Tensor, seen: Tensor, bias: Tensor
) -> Tensor:
    """softmax(q k / sqrt(d) + bias[h, age]) v over the entries that are `seen`.

    q (B, H, Q, d); k, v (B, H, L, d); age (B, Q, L) int64, the index of (key time - query time)
    in the bias table (H, n_ages); seen (B, Q, L) bool. Returns (B, H, Q, d).
    """
    scores = bias[:, age].transpose(0, 1)  # (B, H, Q, L)
    mask = scores.masked_fill(~seen[:, None], float("-inf"))
    return scaled_dot_product_attention(q, k, v, attn_mask=mask.to(q.dtype))
