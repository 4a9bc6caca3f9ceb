"""Decoder attention of a few new rows over slots of unequal lengths, with grouped keys.

    plan = make_plan(slots, lengths, n_rows, n_groups)   # once a pass
    mixed = decode_attention(q, k, v, plan)            # once a layer

q (B, H, R, d): R new rows of each of B slots; k, v (S, KV, N, d): all slots; H = G KV heads, G of
them share keys; slots (B,) int64, ascending; lengths (B,) int64: entries of each slot, the new ones
included, so that row r sits at lengths - R + r and sees everything up to itself.
Returns (B, H, R, d).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sparqle_kernels.choice import choose
from sparqle_kernels.decode_attention import cpu, reference

if TYPE_CHECKING:
    from torch import Tensor

    from sparqle_kernels.decode_attention import triton

    Plan = cpu.Plan | reference.Plan | triton.Plan

__all__ = ["decode_attention", "make_plan"]


def make_plan(slots: Tensor, lengths: Tensor, n_rows: int, n_groups: int) -> Plan:
    """What all layers of one pass share. Of three implementations the device decides."""
    match choose("decode_attention", slots).implementation:
        case "triton":
            from sparqle_kernels.decode_attention import triton

            return triton.Plan.of(slots, lengths, n_rows, n_groups)
        case "cpu":
            return cpu.Plan.of(slots, lengths, n_rows, n_groups)
        case _:
            return reference.Plan.of(slots, lengths, n_rows, n_groups)


def decode_attention(q: Tensor, k: Tensor, v: Tensor, plan: Plan) -> Tensor:
    return plan.attend(q, k, v)
