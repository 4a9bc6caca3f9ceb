"""log_mel against float64, and against the features stage that has the same formula."""

from __future__ import annotations

import pytest
import torch

from sparqle_kernels.log_mel import log_mel, make_transform, reference
from sparqle_stream import features
from tests.kernels.exactness import assert_as_exact_as_pytorch

# (B, frames, n_fft, hop, mels): the shipped transform; a bin count past a tile; single entries
SHAPES = [(1, 17, 400, 160, 80), (2, 3, 140, 60, 17), (1, 1, 2, 1, 1), (2, 16, 30, 7, 3)]


def inputs(shape, scale=0.1):
    """wave (B, S) with a tail that fills no frame, and the transform."""
    b, n_frames, n_fft, hop, n_mels = shape
    gen = torch.Generator().manual_seed(sum(shape))
    wave = torch.randn(b, n_fft + hop * (n_frames - 1) + hop - 1, generator=gen) * scale
    bank = torch.rand(n_fft // 2 + 1, n_mels, generator=gen) / n_fft
    return wave, make_transform(torch.hann_window(n_fft), bank), hop


def exact(wave, transform, hop):
    """The transform written out in float64; the window and the bank as they are in float32."""
    window, bank = transform.window.double(), transform.bank.double()
    frames = wave.double().unfold(1, len(window), hop) * window
    power = torch.fft.rfft(frames).abs().square()
    return (power @ bank).clamp(min=1e-10).log10()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_basis_is_the_fourier_transform(shape):
    wave, transform, hop = inputs(shape)
    frames = wave.double().unfold(1, len(transform.window), hop)
    half = frames[..., : frames.shape[2] // 2 + 1].clone()
    mirrored = torch.zeros_like(half)
    mirrored[..., 1:-1] = frames.flip(2)[..., : half.shape[2] - 2]
    re = (half + mirrored) @ transform.cos.double()
    im = (half - mirrored) @ transform.sin.double()
    power = re**2 + im**2
    got = (power @ transform.bank.double()).clamp(min=1e-10).log10()
    torch.testing.assert_close(got, exact(wave, transform, hop), atol=1e-5, rtol=0)


def test_it_is_what_the_features_stage_computes():
    """Without the gain: one frame of level 0 dB, where the tracker asks for none."""
    cfg = features.FeatureConfig(gain_max=0.0, max_log10=1.5)
    gen = torch.Generator().manual_seed(0)
    wave = torch.randn(2, 360 + 4 * 160, generator=gen)
    transform = make_transform(torch.hann_window(400), features.mel_filters(80, 400))
    expected, _ = features.log_mel(cfg, wave, torch.full((2,), 1.0))
    got = log_mel(wave, transform, 160).clamp(min=1.5 - 8.0)
    torch.testing.assert_close((got + 4.0) / 4.0, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_triton(place, shape):
    from sparqle_kernels.log_mel import triton

    wave, transform, hop = inputs(shape)
    (gpu_wave,) = place.put(wave)
    out = triton.log_mel(gpu_wave, type(transform)(*place.put(*transform)), hop)
    pytorch = reference.log_mel(wave, transform, hop)
    assert_as_exact_as_pytorch(out, pytorch, exact(wave, transform, hop))


def test_triton_in_silence_and_beyond_the_end(place):
    """Zeros give the floor, and a wave shorter than a window gives no frame."""
    from sparqle_kernels.log_mel import triton

    _, transform, _ = inputs((1, 1, 30, 7, 3))
    transform = type(transform)(*place.put(*transform))
    (silence,) = place.put(torch.zeros(1, 50))
    out = triton.log_mel(silence, transform, 7).cpu()
    torch.testing.assert_close(out, torch.full((1, 3, 3), -10.0))
    assert triton.log_mel(silence[:, :29], transform, 7).shape == (1, 0, 3)
    assert log_mel(torch.zeros(1, 29), make_transform(torch.ones(30), torch.ones(16, 3)), 7).shape


def test_a_window_that_is_not_symmetric_is_refused():
    """Half of the basis would be silently wrong for it; so would the other end of a frame."""
    for window in (torch.rand(30), torch.hann_window(30, periodic=False), torch.ones(31)):
        with pytest.raises(ValueError, match="symmetric"):
            make_transform(window, torch.ones(16, 3))
