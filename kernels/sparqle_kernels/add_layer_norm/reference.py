"""Reference of `add_layer_norm`: plain PyTorch, the truth that other implementations answer to."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch.nn.functional import layer_norm

if TYPE_CHECKING:
    from torch import Tensor


def add_layer_norm(
    x: Tensor, y: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """x, y (..., D), weight, bias (D,) -> x + y and its norm, both (..., D)."""
    total = x + y
    return total, layer_norm(total, weight.shape, weight, bias, eps)
