"""What lies between a decoder layer's q-k-v projection and its attention: scale, rotate, write.

RMSNorm commutes with the projection but for one factor a row: with the norm's weights folded into
the matrix, norm(x) @ W = (x @ W') / rms(x). So the norm needs no pass over memory of its own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sparqle_kernels.choice import choose
from sparqle_kernels.rms_norm_rope_append import reference
from sparqle_kernels.rms_norm_rope_append.reference import Rotation, Slots

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Rotation", "Slots", "rms_norm_rope_append"]


def rms_norm_rope_append(
    x: Tensor, qkv: Tensor, eps: float, rotation: Rotation, slots: Slots
) -> Tensor:
    """Writes the rows' keys and values into their slots and returns their queries (B, H, R, d).

    x (B, R, E): the rows before their norm. qkv (B, R, (H + 2 KV) d): x times the projection with
    the norm's weights folded in; q, then k, then v. Rotation and slots: see there. Row r of a slot
    goes to entry start + r; a row whose slot is -1 is not active: it writes nothing and gets zeros.
    """
    if choose("rms_norm_rope_append", x, qkv, slots.k, slots.v).implementation == "triton":
        from sparqle_kernels.rms_norm_rope_append import triton

        return triton.rms_norm_rope_append(x, qkv, eps, rotation, slots)
    return reference.rms_norm_rope_append(x, qkv, eps, rotation, slots)
