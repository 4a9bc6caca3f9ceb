"""Reference of `stop_head`: plain PyTorch, the truth that other implementations answer to."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch.nn.functional import rms_norm

if TYPE_CHECKING:
    from torch import Tensor


def stop_head(
    x: Tensor, norm: Tensor, eps: float, weight: Tensor, bias: Tensor, stop_at: float
) -> tuple[Tensor, Tensor]:
    """x (B, E), norm, weight (E,), bias (1,) -> hidden (B, E), is_stop (B,)."""
    hidden = rms_norm(x, norm.shape, norm, eps)
    return hidden, ~(hidden @ weight + bias <= stop_at)
