"""Log-mel spectrum of overlapping frames: window, Fourier transform, filter bank and log."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sparqle_kernels.choice import choose
from sparqle_kernels.log_mel import reference
from sparqle_kernels.log_mel.reference import Transform, make_transform

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Transform", "log_mel", "make_transform"]


def log_mel(wave: Tensor, transform: Transform, hop_samples: int) -> Tensor:
    """wave (B, S) float32 -> log10 of the mel power (B, F, M), at least -10.

    Frame i covers samples [hop i, hop i + n_fft); F is as many as fit, 0 when S is shorter.
    """
    if choose("log_mel", wave).implementation == "triton":
        from sparqle_kernels.log_mel import triton

        return triton.log_mel(wave, transform, hop_samples)
    return reference.log_mel(wave, transform, hop_samples)
