"""`stop_head` in Triton: a program owns one row; norm and dot in one trip to memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from sparqle_kernels.launch import Launch, tile

if TYPE_CHECKING:
    from torch import Tensor


@triton.jit
def stop_head_fwd(
    x, norm, weight, bias, hidden, logit, E, eps, BE: tl.constexpr
):  # fmt: skip
    i_b = tl.program_id(0).to(tl.int64)
    o_e = tl.arange(0, BE)
    m_e = o_e < E
    b_x = tl.load(x + i_b * E + o_e, mask=m_e, other=0.0).to(tl.float32)
    b_scale = 1.0 / tl.sqrt_rn(tl.sum(b_x * b_x, 0) / E + eps)
    b_n = tl.load(norm + o_e, mask=m_e, other=0.0).to(tl.float32)
    b_h = (b_x * b_scale * b_n).to(hidden.dtype.element_ty)  # the head sees what is stored
    tl.store(hidden + i_b * E + o_e, b_h, mask=m_e)
    b_w = tl.load(weight + o_e, mask=m_e, other=0.0).to(tl.float32)
    b_logit = tl.sum(b_h.to(tl.float32) * b_w, 0) + tl.load(bias).to(tl.float32)
    tl.store(logit + i_b, b_logit)


def launches(
    x: Tensor, norm: Tensor, eps: float, weight: Tensor, bias: Tensor
) -> tuple[list[Launch], tuple[Tensor, Tensor]]:
    """The launch, and the hidden (B, E) and logit (B,) that it fills."""
    x = x.contiguous()
    hidden = torch.empty_like(x)
    logit = x.new_empty(len(x), dtype=torch.float32)
    launch = Launch(
        stop_head_fwd,
        (len(x),),
        {
            **{"x": x, "norm": norm.contiguous(), "weight": weight.contiguous(), "bias": bias},
            **{"hidden": hidden, "logit": logit, "E": x.shape[1], "eps": float(eps)},
        },
        {"BE": tile(x.shape[1])},
    )
    return [launch], (hidden, logit)


def stop_head(
    x: Tensor, norm: Tensor, eps: float, weight: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor]:
    """As `reference.stop_head`; forward only."""
    todo, out = launches(x, norm, eps, weight, bias)
    for launch in todo:
        launch.run()
    return out
