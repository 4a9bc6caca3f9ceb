"""Chunk-causal encoder attention over a ring of cached keys plus the new chunk."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sparqle_kernels.choice import choose
from sparqle_kernels.chunk_attention import reference

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["chunk_attention"]


def chunk_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ring_k: Tensor,
    ring_v: Tensor,
    ring_position: Tensor,
    length: Tensor | None = None,
) -> Tensor:
    """A chunk attends to all of itself and to every written entry of the ring.

    q, k, v (B, H, T, d): the chunk. ring_k, ring_v (B, H, L, d) with ring_position (B, L) int64,
    -1 where nothing was written. length (B,) int64: frames of each row's chunk that are there, 0
    for a row that is not active; None: all. Frames past it may hold anything; they are seen by none
    and get zeros. Returns (B, H, T, d). The ring holds at most L frames, so its length is the
    left context; entries need no order, their age does not enter the score.
    """
    if choose("chunk_attention", q, k, v, ring_k, ring_v).implementation == "triton":
        from sparqle_kernels.chunk_attention import triton

        return triton.chunk_attention(q, k, v, ring_k, ring_v, ring_position, length)
    return reference.chunk_attention(q, k, v, ring_k, ring_v, ring_position, length)
