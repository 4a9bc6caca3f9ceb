"""Which implementation of an op runs, and why. Nothing else in this package decides.

`sparqle-stream doctor` prints the reason. Triton runs where it can: tensors of one type that it has
kernels for, on a CUDA device. Everywhere else the plain PyTorch of `reference` is right.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from importlib import metadata
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ON_CPU = {"decode_attention": "cpu"}  # ops with code of their own for a CPU


@dataclass(frozen=True, slots=True)
class Choice:
    """`implementation` is the module in the op's package, `reason` one phrase for people."""

    implementation: str
    reason: str


@functools.cache
def on_device(op: str, device_type: str) -> Choice:
    """What runs on a device ('cpu', 'cuda' ...) when the tensors are ordinary ones."""
    if device_type == "cpu":
        if op in ON_CPU:
            return Choice(ON_CPU[op], "written for a CPU")
        return Choice("reference", "on a CPU PyTorch's own code is the fast path")
    if device_type != "cuda":
        return Choice("reference", f"no kernel for {device_type}")
    try:
        version = metadata.version("triton")
    except metadata.PackageNotFoundError:
        return Choice("reference", "Triton is not installed: pip install 'sparqle-stream[gpu]'")
    return Choice("triton", f"CUDA and Triton {version} are here")


def choose(op: str, *tensors: Tensor) -> Choice:
    """What runs for these tensors, which lie on one device; integer tensors are not looked at."""
    choice = on_device(op, tensors[0].device.type)
    if choice.implementation != "triton":
        return choice
    dtypes = {x.dtype for x in tensors if x.is_floating_point()}
    if len(dtypes) > 1 or not dtypes <= set(DTYPES):
        return Choice("reference", f"no kernel for {', '.join(sorted(map(str, dtypes)))}")
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        return Choice("reference", "gradients are wanted")
    return choice
