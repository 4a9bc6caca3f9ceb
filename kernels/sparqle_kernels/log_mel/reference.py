"""Reference of `log_mel`: plain PyTorch, the truth that other implementations answer to."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

POWER_FLOOR = 1e-10


class Transform(NamedTuple):
    """Constants of one window and filter bank, on one device."""

    window: Tensor  # (n_fft,)
    bank: Tensor  # (n_fft / 2 + 1, M) mel filters
    cos: Tensor  # (n_fft / 2 + 1, n_fft / 2 + 1) windowed basis of the real part, by sample, bin
    sin: Tensor  # the same of the imaginary part


def make_transform(window: Tensor, bank: Tensor) -> Transform:
    """window (n_fft,), bank (n_fft / 2 + 1, M), n_fft even and window[n] = window[n_fft - n].

    With such a window (Hann's and all of its kin) samples n and n_fft - n share their factors, so
    that their sum and their difference are transformed with half of the basis.
    """
    n_fft = len(window)
    if n_fft % 2 or not window.is_meta and (window[1:] - window[1:].flip(0)).abs().max() > 1e-6:
        raise ValueError("the window must be periodic, of even length and symmetric")
    half = torch.arange(n_fft // 2 + 1, device=window.device)
    turn = torch.outer(half, half) % n_fft  # reduced before it is rounded
    angle = turn.double() * (2 * math.pi / n_fft)
    side = window.double()[: n_fft // 2 + 1, None]
    cos, sin = angle.cos() * side, angle.sin() * side
    return Transform(window, bank, cos.to(window.dtype), sin.to(window.dtype))


def log_mel(wave: Tensor, transform: Transform, hop_samples: int) -> Tensor:
    """wave (B, S) -> log10 mel power (B, F, M)."""
    n_fft = len(transform.window)
    if wave.shape[1] < n_fft:
        return wave.new_empty(len(wave), 0, transform.bank.shape[1])
    spectrum = torch.fft.rfft(wave.unfold(1, n_fft, hop_samples) * transform.window)
    power = spectrum.real.square() + spectrum.imag.square()
    mel: Tensor = power @ transform.bank
    return mel.clamp(min=POWER_FLOOR).log10()
