"""Residual sum and LayerNorm in one pass: what stands between the sub-layers of a block."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sparqle_kernels.add_layer_norm import reference
from sparqle_kernels.choice import choose

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["add_layer_norm"]


def add_layer_norm(
    x: Tensor, y: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """x, y (..., D), weight, bias (D,) -> x + y, and its norm times weight plus bias."""
    if choose("add_layer_norm", x, y, weight, bias).implementation == "triton":
        from sparqle_kernels.add_layer_norm import triton

        return triton.add_layer_norm(x, y, weight, bias, eps)
    return reference.add_layer_norm(x, y, weight, bias, eps)
