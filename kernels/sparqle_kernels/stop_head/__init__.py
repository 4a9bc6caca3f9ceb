"""The LLM's last norm and its stop head: whether a chunk's text ends, before the vocabulary."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sparqle_kernels.choice import choose
from sparqle_kernels.stop_head import reference

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["stop_head"]


def stop_head(
    x: Tensor, norm: Tensor, eps: float, weight: Tensor, bias: Tensor, stop_at: float
) -> tuple[Tensor, Tensor]:
    """x (B, E) -> hidden (B, E) = x / rms(x) * norm, and (B,) bool: is its logit above stop_at.

    norm, weight (E,), bias (1,); the logit is hidden @ weight + bias. A NaN stops.
    """
    if choose("stop_head", x, norm, weight, bias).implementation == "triton":
        from sparqle_kernels.stop_head import triton

        return triton.stop_head(x, norm, eps, weight, bias, stop_at)
    return reference.stop_head(x, norm, eps, weight, bias, stop_at)
