"""Codecs as distortions: speech as a telephone, a podcast or a conference would bring it.

PCM (S,) at 16 kHz -> the same samples after a real encoder and decoder, at the same places in time:
what an encoder adds in front is cut off again, because words are placed by the clean audio's times.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import numpy as np

from sparqle_stream.config import SAMPLE_RATE_HZ
from training.corpus import decode_file

if TYPE_CHECKING:
    import random

    from av.audio.stream import AudioStream
    from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Codec:
    """FFmpeg's name, a container that remembers the delay, and bit rates that are in use."""

    name: str
    container: str
    rate_hz: int
    bits_per_s: tuple[int, ...]


CODECS = (
    Codec("pcm_mulaw", "wav", 8_000, (64_000,)),
    Codec("libmp3lame", "mp3", 16_000, (16_000, 24_000, 32_000, 64_000)),
    Codec("libopus", "ogg", 16_000, (8_000, 12_000, 16_000, 24_000)),
)


def through(pcm: NDArray[np.float32], codec: Codec, bits_per_s: int) -> NDArray[np.float32]:
    """PCM (S,) encoded and decoded -> (S,)."""
    import av

    buffer = io.BytesIO()
    ints = np.clip(np.rint(pcm * 32767), -32768, 32767).astype(np.int16)
    with av.open(buffer, "w", format=codec.container) as container:
        stream = cast("AudioStream", container.add_stream(codec.name, rate=codec.rate_hz))
        stream.layout = "mono"
        if codec.name != "pcm_mulaw":
            stream.bit_rate = bits_per_s
        frame = av.AudioFrame.from_ndarray(ints[None], format="s16", layout="mono")
        frame.sample_rate = SAMPLE_RATE_HZ
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    buffer.seek(0)
    back = decode_file(buffer)[: len(pcm)].astype(np.float32) / 32768.0
    return np.pad(back, (0, len(pcm) - len(back)))


def any_codec(pcm: NDArray[np.float32], rng: random.Random) -> NDArray[np.float32]:
    """One of them at one of its rates."""
    codec = rng.choice(CODECS)
    return through(pcm, codec, rng.choice(codec.bits_per_s))
