"""Encoder attention over whole utterances with the masks of streaming, forward and backward.

Nothing calls it yet: training looks ahead, which these masks do not, and no GPU has timed it. Until
then `encoder.masked_attention` is what training runs on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sparqle_kernels.choice import choose
from sparqle_kernels.utterance_attention import reference

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["utterance_attention"]


def utterance_attention(
    q: Tensor, k: Tensor, v: Tensor, chunk_frames: int, left_frames: int
) -> Tensor:
    """A frame sees all of its own chunk and `left_frames` before the chunk; q, k, v (B, H, T, d).

    What `chunk_attention` gives chunk by chunk. chunk_frames 0 means full context. Returns
    (B, H, T, d); differentiable.
    """
    # detached: the kernels have a backward pass of their own
    chosen = choose("utterance_attention", q.detach(), k.detach(), v.detach())
    if chosen.implementation == "triton":
        from sparqle_kernels.utterance_attention import triton

        return triton.utterance_attention(q, k, v, chunk_frames, left_frames)
    return reference.utterance_attention(q, k, v, chunk_frames, left_frames)
