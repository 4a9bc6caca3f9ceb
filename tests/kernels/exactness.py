"""How exact a kernel has to be."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor


def rms(x: Tensor) -> float:
    return x.double().square().mean().sqrt().item()


def assert_as_exact_as_pytorch(got: Tensor, pytorch: Tensor, truth: Tensor) -> None:
    """The error against float64 is at most twice PyTorch's own in the same precision.

    As a root mean square, and some units in the last place more: half a one, because PyTorch is
    sometimes exact by luck where there are only a few numbers, and four in float32, in which
    everybody sums: we one after another, PyTorch now and then in a tree, whose error was 2.9 times
    less on an H100. One product in TF32 would be a thousand units.
    """
    assert (got.shape, got.dtype) == (pytorch.shape, pytorch.dtype)
    got, pytorch, truth = got.detach().cpu(), pytorch.detach().cpu(), truth.detach().cpu()
    assert got.isfinite().all(), "something was read that nobody wrote"
    units = 4 if got.dtype == torch.float32 else 0.5
    luck = units * torch.finfo(got.dtype).eps * rms(truth)
    ours, theirs = rms(got.double() - truth), rms(pytorch.double() - truth)
    assert ours <= 2 * theirs + luck, f"error {ours:.3g}, PyTorch's {theirs:.3g}"
