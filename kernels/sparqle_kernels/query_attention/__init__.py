"""Q-Former attention: queries against a ring of timed entries with a learned time bias."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sparqle_kernels.choice import choose
from sparqle_kernels.query_attention import reference

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["query_attention"]


def query_attention(
    q: Tensor, k: Tensor, v: Tensor, age: Tensor, seen: Tensor, bias: Tensor
) -> Tensor:
    """softmax(q k / sqrt(d) + bias[h, age]) v over the entries that are `seen`.

    q (B, H, Q, d); k, v (B, H, L, d); age (B, Q, L) int64, the index of (key time - query time)
    in the bias table (H, n_ages); seen (B, Q, L) bool, at least one entry for every query; age and
    seen may be of batch 1, for all rows. What no query sees may hold anything, NaN too.
    Returns (B, H, Q, d).
    """
    if choose("query_attention", q, k, v, bias).implementation == "triton":
        from sparqle_kernels.query_attention import triton

        return triton.query_attention(q, k, v, age, seen, bias)
    return reference.query_attention(q, k, v, age, seen, bias)
