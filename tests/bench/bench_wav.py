"""Files of exact samples for the tests of the benchmarks."""

from __future__ import annotations

import wave
from typing import TYPE_CHECKING

import numpy as np

from sparqle_stream.config import SAMPLE_RATE_HZ

if TYPE_CHECKING:
    from pathlib import Path


def write_wav(path: Path, pcm: np.ndarray) -> None:
    """PCM (S,) as 16-bit WAV; the levels of `testing.say` come back exactly."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(SAMPLE_RATE_HZ)
        file.writeframes(np.rint(pcm * 32768).astype("<i2").tobytes())
