"""Decoder attention of a few new rows over slots of unequal lengths, with grouped keys."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sparqle_kernels.decode_attention import cpu, reference

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["decode_attention"]


def decode_attention(q: Tensor, k: Tensor, v: Tensor, slots: Tensor, lengths: Tensor) -> Tensor:
    """q (B, H, R, d) over k, v (S, KV, N, d) -> (B, H, R, d); see `reference.decode_attention`."""
    if q.device.type == "cpu":
        return cpu.decode_attention(q, k, v, slots, lengths)
    return reference.decode_attention(q, k, v, slots, lengths)
