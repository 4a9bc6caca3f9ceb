"""The LLM's last norm and its stop head: how much a chunk's text wants to end.

Asked before the vocabulary is touched. The comparison is left to whoever asked: a writer may hold
the logit against odds of its own, and a NaN is below none of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sparqle_kernels.choice import choose
from sparqle_kernels.stop_head import reference

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["stop_head"]


def stop_head(
    x: Tensor, norm: Tensor, eps: float, weight: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor]:
    """x (B, E) -> hidden (B, E) = x / rms(x) * norm, and its logit hidden @ weight + bias (B,).

    norm, weight (E,), bias (1,); the logit is float32.
    """
    if choose("stop_head", x, norm, weight, bias).implementation == "triton":
        from sparqle_kernels.stop_head import triton

        return triton.stop_head(x, norm, eps, weight, bias)
    return reference.stop_head(x, norm, eps, weight, bias)
