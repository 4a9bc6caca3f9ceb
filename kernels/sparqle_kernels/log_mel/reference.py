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
    cos: Tensor  # (n_fft, n_fft / 2 + 1) windowed basis of the real part
    sin: Tensor  # (n_fft, n_fft / 2 + 1) and of the imaginary part


def make_transform(window: Tensor, bank: Tensor) -> Transform:
    """window (n_fft,), bank (n_fft / 2 + 1, M); angles are reduced before they are rounded."""
    n_fft = len(window)
    index = torch.arange(n_fft, device=window.device)
    turn = torch.outer(index, torch.arange(n_fft // 2 + 1, device=window.device)) % n_fft
    angle = turn.double() * (2 * math.pi / n_fft)
    cos, sin = (part * window.double()[:, None] for part in (angle.cos(), angle.sin()))
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
