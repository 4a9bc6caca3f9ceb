"""An LLM as it was trained -> the same LLM ready to decode: dtype, int8, joined matrices.

Contract: int8 keeps the default LLM's logits at a mean cosine of 0.999 to float32's over English
text (bf16: 0.9998) and its loss within 0.01. Rows stay independent of their neighbours, since
activations are never quantised (a shared scale would tie them).

Why int8 weights with bf16 activations: a single row reads every weight once, so bytes are time. All
matrices of the default LLM on one thread of a Xeon with AMX, relative to float32: 1 row 0.45, 4
rows 0.33. Past 8 rows or so arithmetic counts and bf16 tiles win (16 rows: 0.43 against 0.75), so
that such CPUs get a second form once so many rows come together, and not before: one stream never
needs it. With AVX2 only: 1 row 0.56, 4 rows 0.44, 16 rows 0.97 without a second form.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparqle_stream.config import FEW_ROWS
from sparqle_stream.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

    from sparqle_stream.llm import Llm

DTYPES = ("auto", "float32", "bfloat16", "int8")


class Int8Linear(nn.Module):
    """y = W x without bias: W int8 with one scale per output channel, x bf16."""

    few: Tensor  # (out, in) int8
    scale: Tensor  # (out,) bf16
    many: Tensor | None  # (out, in) bf16, the same numbers, for many rows, once they come

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        low, high = torch.aminmax(weight, dim=1, keepdim=True)
        largest = torch.maximum(-low, high).float().clamp(min=1e-12)
        # Stored in bf16; divided by what is stored, so that its rounding adds nothing to the error.
        scale = (largest / 127.0).bfloat16().float()
        few = (weight * (1.0 / scale)).round_().clamp_(-127.0, 127.0)
        self.register_buffer("few", few.to(torch.int8))
        self.register_buffer("scale", scale[:, 0].bfloat16())
        self.register_buffer("many", None, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out)."""
        rows = x.reshape(-1, x.shape[-1])
        if len(rows) <= FEW_ROWS or not has_fast_bf16():
            y = torch._weight_int8pack_mm(rows, self.few, self.scale)
        else:
            if self.many is None:
                self.many = self.few * self.scale[:, None]
            y = F.linear(rows, self.many)
        return y.view(*x.shape[:-1], -1)


@cache
def has_fast_bf16() -> bool:
    """Has this CPU instructions for bf16 products?"""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def resolve(dtype: str, device: torch.device | str) -> str:
    """'auto' becomes what is fastest on the device; raises ConfigError for what cannot be."""
    is_cpu = torch.device(device).type == "cpu"
    if dtype not in DTYPES:
        raise ConfigError(f"unknown dtype {dtype!r}", hint=f"use {', '.join(DTYPES)}")
    if dtype == "int8" and not is_cpu:
        raise ConfigError("int8 runs on a CPU only", hint="use --dtype bfloat16 with CUDA")
    if dtype == "auto":
        return "int8" if is_cpu else "bfloat16"
    return dtype


def prepare(llm: Llm, dtype: str, device: torch.device | str = "cpu") -> Llm:
    """Changes `llm` in place for inference in one of DTYPES and returns it."""
    dtype = resolve(dtype, device)
    llm = llm.to(device).requires_grad_(False).eval()
    make_linear: Callable[[Tensor], nn.Module] = _plain_linear
    if dtype == "int8":
        make_linear = Int8Linear
        head = cast("nn.Linear | nn.Embedding", llm.tokens if llm.head is None else llm.head)
        llm.head = Int8Linear(head.weight)
    for layer in llm.blocks():
        attn, mlp = layer.attn, layer.mlp
        attn.qkv_proj = make_linear(_stacked(attn.q_proj, attn.k_proj, attn.v_proj))
        attn.o_proj = cast("nn.Linear", make_linear(attn.o_proj.weight))
        mlp.gate_up_proj = make_linear(_stacked(mlp.gate_proj, mlp.up_proj))
        mlp.down_proj = cast("nn.Linear", make_linear(mlp.down_proj.weight))
        del attn.q_proj, attn.k_proj, attn.v_proj, mlp.gate_proj, mlp.up_proj
    return llm.to(torch.bfloat16 if dtype == "int8" else getattr(torch, dtype))


def _stacked(*parts: nn.Linear) -> Tensor:
    return torch.cat([part.weight for part in parts])


def _plain_linear(weight: Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear
