"""Chunk-causal encoder attention over a ring of cached keys plus the new chunk."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sparqle_kernels.choice import choose
from sparqle_kernels.chunk_attention import reference
from sparqle_kernels.chunk_attention.reference import Ring

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Ring", "chunk_attention"]


def chunk_attention(
    q: Tensor, k: Tensor, v: Tensor, ring: Ring, length: Tensor | None = None
) -> Tensor:
    """A chunk attends to all of itself and to every written entry of its row's ring.

    k, v (B, H, T, d): the chunk. q (B, H, Q, d): its first Q frames, those that ask. ring: see
    there; it is read where it lies. length (B,) int64: frames of each row's chunk that are there, 0
    for a row that is not active; None: all. Frames past it may hold anything; they are seen by none
    and get zeros. Returns (B, H, Q, d). A ring holds at most L frames, so its length is the left
    context; entries need no order, their age does not enter the score.
    """
    if choose("chunk_attention", q, k, v, ring.k, ring.v).implementation == "triton":
        from sparqle_kernels.chunk_attention import triton

        return triton.chunk_attention(q, k, v, ring, length)
    return reference.chunk_attention(q, k, v, ring, length)
