"""`log_mel` in Triton: the Fourier transform as two matrix products, nothing but mel in memory.

A program owns BF frames of one row. Sums and differences of mirrored samples halve the products:
0.2 MFLOP a frame, less than a thousandth of an encoder step, and the spectrum (1.6 KB a frame,
written and read three times by the unfused op) stays in registers. All of it in float32: TF32
would lose quiet bands beside loud ones.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from sparqle_kernels.launch import Launch, dense, tile
from sparqle_kernels.log_mel.reference import POWER_FLOOR

if TYPE_CHECKING:
    from torch import Tensor

    from sparqle_kernels.log_mel.reference import Transform

LOG10_2 = 0.30102999566398120


@triton.jit
def log_mel_fwd(
    wave, cos, sin, bank, out,
    floor, log10_2, F, M, n_bins, hop, wave_b,
    N_BINS: tl.constexpr,
    BF: tl.constexpr, BK: tl.constexpr, BC: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    i_b = tl.program_id(1).to(tl.int64)
    o_f = tl.program_id(0) * BF + tl.arange(0, BF)
    o_k, o_c, o_m = tl.arange(0, BK), tl.arange(0, BC), tl.arange(0, BM)
    m_f, m_m = o_f < F, o_m < M
    p_wave = wave + i_b * wave_b + o_f[:, None] * hop
    b_mel = tl.zeros((BF, BM), tl.float32)
    for i_c in range(0, N_BINS, BC):
        o_bin = i_c + o_c
        m_c = o_bin < N_BINS
        b_re, b_im = tl.zeros((BF, BC), tl.float32), tl.zeros((BF, BC), tl.float32)
        for i_k in range(0, N_BINS, BK):
            o_s = i_k + o_k  # of its mirror image n_fft - o_s; the ends have none
            m_s, m_pair = o_s < N_BINS, (o_s > 0) & (o_s < N_BINS - 1)
            b_x = tl.load(p_wave + o_s[None, :], mask=m_f[:, None] & m_s[None, :], other=0.0)
            p_pair = p_wave + (2 * (N_BINS - 1) - o_s)[None, :]
            b_y = tl.load(p_pair, mask=m_f[:, None] & m_pair[None, :], other=0.0)
            o_basis = o_s[:, None] * n_bins + o_bin[None, :]
            m_basis = m_s[:, None] & m_c[None, :]
            b_cos = tl.load(cos + o_basis, mask=m_basis, other=0.0)  # (BK, BC)
            b_sin = tl.load(sin + o_basis, mask=m_basis, other=0.0)
            b_re = tl.dot(b_x + b_y, b_cos, acc=b_re, input_precision="ieee")
            b_im = tl.dot(b_x - b_y, b_sin, acc=b_im, input_precision="ieee")
        m_bank = m_c[:, None] & m_m[None, :]
        b_bank = tl.load(bank + o_bin[:, None] * M + o_m[None, :], mask=m_bank, other=0.0)
        b_power = b_re * b_re + b_im * b_im
        b_mel = tl.dot(b_power, b_bank, acc=b_mel, input_precision="ieee")
    b_log = tl.log2(tl.maximum(b_mel, floor)) * log10_2
    p_out = out + (i_b * F + o_f[:, None]) * M + o_m[None, :]
    tl.store(p_out, b_log, mask=m_f[:, None] & m_m[None, :])


def launches(wave: Tensor, transform: Transform, hop_samples: int) -> tuple[list[Launch], Tensor]:
    """The launch, and the (B, F, M) that it fills."""
    wave = dense(wave)
    n_fft, (n_bins, n_mels) = len(transform.window), transform.bank.shape
    n_frames = max(0, (wave.shape[1] - n_fft) // hop_samples + 1)
    out = wave.new_empty(len(wave), n_frames, n_mels)
    launch = Launch(
        log_mel_fwd,
        (triton.cdiv(n_frames, 16), len(wave)),
        {
            **{"wave": wave, "cos": transform.cos, "sin": transform.sin},
            **{"bank": transform.bank, "out": out, "floor": POWER_FLOOR, "log10_2": LOG10_2},
            **{"F": n_frames, "M": n_mels, "n_bins": n_bins},
            **{"hop": hop_samples, "wave_b": wave.stride(0)},
        },
        {
            "N_BINS": n_bins,
            **{"BF": 16, "BK": 16, "BC": 32, "BM": tile(n_mels)},
        },
    )
    return [launch], out


def log_mel(wave: Tensor, transform: Transform, hop_samples: int) -> Tensor:
    """As `reference.log_mel`, for float32; forward only."""
    todo, out = launches(wave, transform, hop_samples)
    for launch in todo:
        launch.run()
    return out
