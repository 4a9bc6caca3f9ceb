"""One launch of a Triton kernel as data: it can be run, or compiled for a GPU that is not here.

The ops build launches from tensors; on the device 'meta' nothing is computed, so that
`sparqle_kernels.aot` compiles exactly what would run, with the same tiles and specialisation.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

LOG2_E = 1.4426950408889634  # exp(x) = exp2(x * LOG2_E), and a GPU has exp2


@dataclass(frozen=True, slots=True)
class Launch:
    """`args` and `constants` by the kernel's parameter names, `grid` in programs."""

    kernel: Any  # triton.JITFunction, or its interpreted twin
    grid: tuple[int, ...]
    args: dict[str, Tensor | int | float]
    constants: dict[str, Any] = field(default_factory=dict)
    n_warps: int = 4
    n_stages: int = 2

    @property
    def options(self) -> dict[str, Any]:
        """What is told to the compiler; a * b + c may be one instruction with one rounding."""
        return {"num_warps": self.n_warps, "num_stages": self.n_stages, "enable_fp_fusion": True}

    def run(self) -> None:
        """Starts it; raises NotImplementedError for bfloat16 in Triton's interpreter."""
        if is_interpreted(self.kernel) and torch.bfloat16 in {
            x.dtype for x in self.args.values() if isinstance(x, Tensor)
        }:
            raise NotImplementedError(
                "Triton's interpreter computes bfloat16 with NumPy, which has no such type: its"
                " rounding is not a GPU's. Test in float16 and float32, or on a GPU."
            )
        if min(self.grid) > 0:
            self.kernel[self.grid](**self.args, **self.constants, **self.options)


def is_interpreted(kernel: Any) -> bool:  # noqa: ANN401 - Triton has no types
    return type(kernel).__name__ == "InterpretedFunction"


def tile(n: int, low: int = 16, high: int = 1 << 30) -> int:
    """The power of two that holds n, within [low, high]: what Triton takes as a tile's side."""
    return max(low, min(high, 1 << (max(1, n) - 1).bit_length()))


def keys_of_tile(dtype: torch.dtype) -> int:
    """Keys that an attention kernel takes at once; with 32 in float32 some tiles spill."""
    return 16 if dtype == torch.float32 else 64


def warps(n_queries: int) -> int:
    """For a tile of so many queries; with four warps tiles of 32 spilled registers."""
    return 4 if n_queries <= 16 else 8


def precision(dtype: torch.dtype) -> str:
    """How `tl.dot` multiplies: float32 is not cut to TF32's 10 bits."""
    return "ieee" if dtype == torch.float32 else "tf32"


def dense(x: Tensor) -> Tensor:
    """x with its last axis contiguous, which is all that the kernels ask of a layout."""
    return x if x.stride(-1) == 1 else x.contiguous()
