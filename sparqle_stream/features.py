"""Features: PCM (B, S) float32 -> log-mel (B, S / 160, 80) in Whisper's scale.

Contract: strictly causal; S is a multiple of 160 and every step emits exactly S / 160 frames.
Frame i covers samples [160 i - 360, 160 i + 40) and so equals Whisper's centred frame i - 1; that
is the stage's whole latency (12.5 ms from the centre of a frame to its last sample, rounded up to
the hop). Two things differ from Whisper: the maximum over the utterance is a constant, and a slow,
bounded gain lifts quiet speech, both because a stream cannot know its future. What it does know is
how loud a segment began by the time the detector was sure of it (`begin_row`).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from sparqle_kernels import log_mel as spectrum
from sparqle_stream.config import (
    FIRST_PEAK,
    FLOOR_DB8,
    LOOK_BACK_SAMPLES,
    SAMPLE_RATE_HZ,
    FeatureConfig,
)
from sparqle_stream.errors import AudioFormatError
from sparqle_stream.rows import Rows


@dataclass(slots=True)
class FeatureState:
    tail: Tensor  # (B, 360) samples before the next frame's hop
    peak: Tensor  # (B,) slow maximum of the log10 mel spectrum, what the gain looks at


def init_state(
    cfg: FeatureConfig, batch: int, *, device: torch.device | str = "cpu"
) -> FeatureState:
    return FeatureState(
        tail=torch.zeros(batch, LOOK_BACK_SAMPLES, device=device),
        peak=torch.full((batch,), FIRST_PEAK, device=device),
    )


def reset_rows(state: FeatureState, mask: Tensor) -> None:
    """Rows of `mask` (B,) start a new segment; the gain keeps what it learned of the speaker."""
    state.tail[mask] = 0.0


def forget_rows(state: FeatureState, mask: Tensor) -> None:
    """Rows of `mask` (B,) become new streams."""
    state.tail[mask] = 0.0
    state.peak[mask] = FIRST_PEAK


def begin_row(cfg: FeatureConfig, state: FeatureState, row: int, lead: Tensor) -> None:
    """The gain of a row that starts a new segment begins at the level of lead (L,), what has been
    heard of it; a lead of less than a frame says nothing, and the gain stays what it was.
    """
    n_samples = len(lead) // cfg.hop_samples * cfg.hop_samples
    if n_samples:
        wave = F.pad(lead[:n_samples].to(state.tail), (LOOK_BACK_SAMPLES, 0))[None]
        mel, _ = log_mel(cfg, wave, torch.full_like(state.peak[:1], torch.inf))  # without a gain
        state.peak[row] = cfg.first_peak(mel.max().item())


def step(
    cfg: FeatureConfig, state: FeatureState, pcm: Tensor, active: Tensor | Rows
) -> tuple[FeatureState, Tensor]:
    """pcm (B, S), active (B,) -> log-mel (B, S / 160, 80); zeros for inactive rows."""
    rows, n_frames = Rows.of(active), pcm.shape[1] // cfg.hop_samples
    if pcm.shape[1] % cfg.hop_samples:
        raise AudioFormatError(
            f"a step takes a multiple of {cfg.hop_samples} samples, got {pcm.shape[1]}",
            hint="the pipeline cuts audio into chunks; call it instead",
        )
    if len(rows) == 0 or n_frames == 0:
        return state, pcm.new_zeros(rows.n_out, n_frames, cfg.n_mels)
    wave = torch.cat([state.tail[rows.index], rows.take(pcm)], dim=1)
    mel, peak = log_mel(cfg, wave, state.peak[rows.index])
    state.tail[rows.index] = wave[:, -LOOK_BACK_SAMPLES:]
    state.peak[rows.index] = peak
    return state, rows.put(mel)


def log_mel(cfg: FeatureConfig, wave: Tensor, peak: Tensor) -> tuple[Tensor, Tensor]:
    """wave (B, 360 + S), peak (B,) -> log-mel (B, S / 160, 80), new peak (B,).

    Whisper's formula (Radford et al., 2022): power spectrum of a Hann window of 400, Slaney mel
    filters, log10 clamped to maximum - 8, then (x + 4) / 4.
    """
    log = spectrum.log_mel(wave, _transform(cfg.n_mels, cfg.n_fft, wave.device), cfg.hop_samples)
    gain, peak = _slow_gain(cfg, log.amax(dim=2), peak)
    log = (log + gain[:, :, None]).clamp(min=cfg.max_log10 - FLOOR_DB8)
    return (log + 4.0) / 4.0, peak


def _slow_gain(cfg: FeatureConfig, loud: Tensor, peak: Tensor) -> tuple[Tensor, Tensor]:
    """loud (B, F), peak (B,) -> gain (B, F) in log10 units, new peak (B,).

    The peak follows loudness up at once and falls by `gain_decay_per_s`; a running maximum of
    loud_i + decay * i gives all frames at once and the same values for any cut.
    """
    decay = cfg.gain_decay_per_s * cfg.hop_samples / SAMPLE_RATE_HZ
    ramp = decay * torch.arange(1, loud.shape[1] + 1, device=loud.device)
    floor = cfg.gain_target - cfg.gain_max
    slow = torch.maximum((loud + ramp).cummax(dim=1).values, peak[:, None]) - ramp
    slow = slow.clamp(min=floor)
    return (cfg.gain_target - slow).clamp(min=0.0), slow[:, -1]


@functools.cache
def _transform(n_mels: int, n_fft: int, device: torch.device) -> spectrum.Transform:
    with torch.inference_mode(False):  # training may find the one that serving made
        window = torch.hann_window(n_fft, device=device)
        return spectrum.make_transform(window, mel_filters(n_mels, n_fft, device))


@functools.cache
def mel_filters(n_mels: int, n_fft: int, device: torch.device | str = "cpu") -> Tensor:
    """Slaney's mel filter bank (n_fft / 2 + 1, n_mels), 0 .. 8 kHz, area-normalised."""
    low_hz, low_mel, step = 1000.0, 15.0, 200.0 / 3.0
    log_step = np.log(6.4) / 27.0

    def to_hz(mel: np.ndarray) -> np.ndarray:
        return np.where(mel < low_mel, mel * step, low_hz * np.exp((mel - low_mel) * log_step))

    top = low_mel + np.log(SAMPLE_RATE_HZ / 2 / low_hz) / log_step
    edges = to_hz(np.linspace(0.0, top, n_mels + 2))
    bins = np.linspace(0.0, SAMPLE_RATE_HZ / 2, n_fft // 2 + 1)
    rise = (bins[:, None] - edges[:-2]) / (edges[1:-1] - edges[:-2])
    fall = (edges[2:] - bins[:, None]) / (edges[2:] - edges[1:-1])
    bank = np.maximum(0.0, np.minimum(rise, fall)) * (2.0 / (edges[2:] - edges[:-2]))
    return torch.tensor(bank, dtype=torch.float32, device=device)
