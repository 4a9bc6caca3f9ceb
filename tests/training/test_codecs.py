"""codecs.py: real encoders and decoders that leave speech where it was."""

from __future__ import annotations

import random

import numpy as np
import pytest

from training.codecs import CODECS, any_codec, through
from training.data import AugmentConfig, Augmenter


@pytest.mark.parametrize("codec", CODECS, ids=lambda c: c.name)
def test_speech_stays_where_it_was(codec, clip):
    """The best match lies within 1 ms, and it is speech still, with something lost."""
    clean = clip[:48_000]
    for bits_per_s in (codec.bits_per_s[0], codec.bits_per_s[-1]):
        coded = through(clean, codec, bits_per_s)
        assert coded.shape == clean.shape
        assert coded.dtype == np.float32
        spectrum = np.fft.rfft(clean, 131_072).conj() * np.fft.rfft(coded, 131_072)
        match = np.fft.irfft(spectrum)
        lag = int(match.argmax())
        assert min(lag, 131_072 - lag) <= 16
        likeness = match.max() / (np.linalg.norm(clean) * np.linalg.norm(coded))
        assert 0.7 < likeness < 0.9999


def test_an_augmenter_uses_them_when_it_is_asked_to(clip):
    quiet = {"speed": 0, "noise": 0, "telephone": 0, "room": 0, "gain_low_db": 0}
    cfg = AugmentConfig(**quiet, gain_high_db=0, codec=1.0)
    coded = Augmenter(cfg, None, random.Random(3)).distort(clip[:16_000])
    assert not np.array_equal(coded, clip[:16_000])
    again = Augmenter(cfg, None, random.Random(3)).distort(clip[:16_000])
    np.testing.assert_array_equal(coded, again)


def test_nothing_and_noise_pass_through():
    rng = random.Random(0)
    for pcm in (np.zeros(100, np.float32), np.ones(5_001, np.float32)):
        for _ in range(6):
            assert any_codec(pcm, rng).shape == pcm.shape
