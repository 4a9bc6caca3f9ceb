"""Reel: recordings on an endless tape, with pauses between them -> packets for any stream.

In: clips of PCM (S,). Out: packets (N,) float32 that are views of the one tape, so that a hundred
streams need no more memory than one. Seeded: the same tape and the same packets every time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from sparqle_stream.config import SAMPLE_RATE_HZ
from sparqle_stream.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from bench.manifests import RecordingSet

Pcm = npt.NDArray[np.float32]
TAPE_S = 900.0  # longer sets are drawn from


class Reel:
    """Clips in a random order, each followed by a pause of half to one and a half `pause_s`."""

    def __init__(self, clips: Sequence[Pcm], pause_s: float, seed: int) -> None:
        rng = np.random.default_rng(seed)
        parts: list[Pcm] = []
        for i in rng.permutation(len(clips)):
            n_pause = int(pause_s * rng.uniform(0.5, 1.5) * SAMPLE_RATE_HZ)
            parts += [clips[i], np.zeros(n_pause, np.float32)]
        self.tape = np.concatenate(parts) if parts else np.zeros(0, np.float32)
        if not len(self.tape):
            raise ConfigError("the recordings are empty", hint="name others")

    @property
    def seconds(self) -> float:
        return len(self.tape) / SAMPLE_RATE_HZ

    def packets(self, start: int, n_samples: int, n_packet: int) -> Iterator[Pcm]:
        """`n_samples` from sample `start` of the endless tape on, in packets of `n_packet`."""
        for done in range(0, n_samples, n_packet):
            begin = (start + done) % len(self.tape)
            end = begin + min(n_packet, n_samples - done)
            if end <= len(self.tape):
                yield self.tape[begin:end]
            else:
                yield np.take(self.tape, range(begin, end), mode="wrap")


def load(sets: Sequence[RecordingSet], pause_s: float, seed: int) -> Reel:
    """A reel of the recordings of all sets, of TAPE_S seconds of them at most."""
    recordings = [r for of_set in sets for r in of_set.recordings]
    clips: list[Pcm] = []
    n_left = int(TAPE_S * SAMPLE_RATE_HZ)
    for i in np.random.default_rng(seed).permutation(len(recordings)):
        clips.append(recordings[i].pcm()[:n_left])
        n_left -= len(clips[-1])
        if n_left <= 0:
            break
    return Reel(clips, pause_s, seed)
