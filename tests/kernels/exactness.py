"""How exact a kernel has to be."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bench.kernels import errors

if TYPE_CHECKING:
    from torch import Tensor


def assert_as_exact_as_pytorch(got: Tensor, pytorch: Tensor, truth: Tensor) -> None:
    """The error against float64 is at most twice PyTorch's own in the same precision, and by what
    PyTorch may be better more: the benchmark's rule, `bench.kernels.errors`."""
    assert (got.shape, got.dtype) == (pytorch.shape, pytorch.dtype)
    got, pytorch, truth = got.detach().cpu(), pytorch.detach().cpu(), truth.detach().cpu()
    assert got.isfinite().all(), "something was read that nobody wrote"
    ours, theirs, luck = errors(got, pytorch, truth)
    assert ours <= 2 * theirs + luck, f"error {ours:.3g}, PyTorch's {theirs:.3g}"
