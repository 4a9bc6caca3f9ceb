"""Reference of `stop_head`: plain PyTorch, the truth that other implementations answer to."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn.functional import rms_norm

if TYPE_CHECKING:
    from torch import Tensor


def stop_head(
    x: Tensor, norm: Tensor, eps: float, weight: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor]:
    """x (B, E), norm, weight (E,), bias (1,) -> hidden (B, E), logit (B,) at least float32."""
    hidden = rms_norm(x, norm.shape, norm, eps)
    exact = torch.promote_types(x.dtype, torch.float32)
    return hidden, hidden.to(exact) @ weight.to(exact) + bias.to(exact)
