"""Conditions: clean PCM (S,) at 16 kHz -> the same speech as a worse place would bring it, (S,).

`noise10` has noise added, 10 dB under the speech (mean power of the whole recording over that of
the noise), drawn from recordings in which nobody speaks, or pink. `telephone` is what a server gets
from one: resampled to 8 kHz, 300 to 3 400 Hz of it, mu-law bytes, and back through `audio.step`.
`quiet` is 30 dB lower, in 16 bits as a client would send it.

Contract: as long as the clean one and at the same places in time; what is drawn depends on the
seed and the recording's id and on nothing else. Joined recordings are changed part by part: they
are the samples of their utterances, and the pauses between stay silent.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import soxr

from bench.manifests import Recording
from sparqle_stream import audio
from sparqle_stream.config import SAMPLE_RATE_HZ
from sparqle_stream.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from bench.manifests import RecordingSet

Pcm = npt.NDArray[np.float32]

CLEAN = "clean"
NAMES = (CLEAN, "noise10", "telephone", "quiet")
SEED = 20250101
SNR_DB = 10.0
QUIET_DB = -30.0
TELEPHONE = audio.AudioFormat("mulaw", 8_000)
TELEPHONE_HZ = (300.0, 3_400.0)
FILTER_TAPS = 401  # at 8 kHz: edges of about 60 Hz
SILENCE_POWER = 1e-6  # -60 dB: recordings below it are no noise that could be made louder


@dataclass(frozen=True, slots=True)
class Condition:
    """`change`: PCM (S,) and a recording's id -> PCM (S,)."""

    name: str
    facts: tuple[tuple[str, Any], ...]
    change: Callable[[Pcm, str], Pcm]


@dataclass(frozen=True, slots=True)
class Changed(Recording):
    """A recording under a condition."""

    condition: Condition | None = None

    def pcm(self) -> Pcm:
        pcm = Recording.pcm(self)
        return self.condition.change(pcm, self.id) if self.condition else pcm


def parse(names: Sequence[str]) -> list[str]:
    """Names, also with commas -> each once; of several the clean one first, asked for or not."""
    wanted = [name for one in names for name in one.split(",") if name] or [CLEAN]
    for name in wanted:
        if name not in NAMES:
            raise ConfigError(f"unknown condition {name!r}", hint=", ".join(NAMES))
    first = [CLEAN] if len(set(wanted)) > 1 else []
    return list(dict.fromkeys([*first, *wanted]))


def make(name: str, noise: RecordingSet | None = None) -> Condition:
    """One of NAMES; `noise` is what noise is drawn from, pink noise is made without it."""
    if name == "noise10":
        source = noise.name if noise else "pink, made here"
        facts = {"snr_db": SNR_DB, "noise": source, "seed": SEED}
        if noise:
            facts["noise_manifest_sha256"] = noise.fingerprint
        return Condition(name, tuple(facts.items()), _Noisy(noise))
    if name == "telephone":
        facts = {"rate_hz": TELEPHONE.rate_hz, "band_hz": TELEPHONE_HZ, "encoding": "mulaw"}
        return Condition(name, tuple(facts.items()), lambda pcm, _: telephone(pcm))
    if name == "quiet":
        return Condition(name, (("gain_db", QUIET_DB), ("bits", 16)), lambda pcm, _: quiet(pcm))
    return Condition(CLEAN, (), lambda pcm, _: pcm)


def under(recordings: RecordingSet, condition: Condition) -> RecordingSet:
    """The same recordings under a condition."""
    if condition.name == CLEAN:
        return recordings
    changed = tuple(_changed(one, condition) for one in recordings.recordings)
    return replace(recordings, recordings=changed, condition=condition.name)


def facts_of(sets: Sequence[RecordingSet]) -> dict[str, dict[str, Any]]:
    """What the conditions of these sets are, as JSON."""
    first = [one.parts[0] if one.parts else one for of_set in sets for one in of_set.recordings[:1]]
    changes = [one.condition for one in first if isinstance(one, Changed) and one.condition]
    return {change.name: dict(change.facts) for change in changes}


def _changed(one: Recording, condition: Condition) -> Changed:
    fields = {name: getattr(one, name) for name in Recording.__dataclass_fields__}
    return Changed(**fields, condition=condition)


# --- what is done to the samples ---------------------------------------------------------------


def quiet(pcm: Pcm) -> Pcm:
    """(S,) -> (S,), QUIET_DB lower and rounded to 16 bits."""
    low = np.rint(pcm * 10 ** (QUIET_DB / 20) * 32_768) / 32_768
    out: Pcm = low.astype(np.float32)
    return out


def telephone(pcm: Pcm) -> Pcm:
    """(S,) -> (S,) through 8 kHz, the band of a telephone line, and mu-law."""
    if not len(pcm):
        return pcm
    low = soxr.resample(pcm, SAMPLE_RATE_HZ, TELEPHONE.rate_hz, "HQ")
    low = np.convolve(low, _band_pass(), "full")[FILTER_TAPS // 2 :][: len(low)]
    state, back = audio.step(TELEPHONE, audio.init_state(TELEPHONE), mulaw_bytes(low))
    back = np.concatenate([back, audio.finish(TELEPHONE, state)])[: len(pcm)]
    return np.pad(back, (0, len(pcm) - len(back)))


def _band_pass() -> npt.NDArray[np.float64]:
    """Taps of a windowed sinc, symmetric: a delay of half of them and no other."""
    t = np.arange(FILTER_TAPS) - FILTER_TAPS // 2
    low, high = (2 * edge / TELEPHONE.rate_hz for edge in TELEPHONE_HZ)
    taps: npt.NDArray[np.float64] = np.hamming(FILTER_TAPS)
    taps *= high * np.sinc(high * t) - low * np.sinc(low * t)
    return taps


def mulaw_bytes(pcm: npt.NDArray[np.floating]) -> bytes:
    """(S,) -> for each sample the byte whose value is nearest."""
    table = audio.mulaw_table()
    order = np.argsort(table, kind="stable")
    values = table[order]
    middles = (values[:-1] + values[1:]) / 2
    return order[np.searchsorted(middles, pcm)].astype(np.uint8).tobytes()


def with_noise(pcm: Pcm, noise: Pcm) -> Pcm:
    """Both (S,), the noise SNR_DB under the speech; all of it lower where it would be clipped."""
    power, of_noise = _power(pcm), _power(noise)
    if not of_noise:
        return pcm
    mixed = pcm + noise * np.sqrt(power / of_noise / 10 ** (SNR_DB / 10))
    out: Pcm = (mixed / max(1.0, float(np.abs(mixed).max()))).astype(np.float32)
    return out


def pink(n_samples: int, rng: np.random.Generator) -> Pcm:
    """(S,) of noise with as much power in each octave, down to 20 Hz."""
    spectrum = np.fft.rfft(rng.standard_normal(n_samples))
    hz = np.fft.rfftfreq(n_samples, 1 / SAMPLE_RATE_HZ)
    pcm = np.fft.irfft(
        np.where(hz < 20.0, 0.0, spectrum / np.sqrt(np.maximum(hz, 20.0))), n_samples
    )
    return pcm.astype(np.float32)


def _power(pcm: Pcm) -> float:
    return float(np.mean(np.square(pcm, dtype=np.float64))) if len(pcm) else 0.0


@dataclass(frozen=True, slots=True)
class _Noisy:
    noise: RecordingSet | None

    def __call__(self, pcm: Pcm, recording_id: str) -> Pcm:
        if not len(pcm):
            return pcm
        digest = hashlib.sha256(f"{SEED} {recording_id}".encode()).digest()
        rng = np.random.default_rng(int.from_bytes(digest[:8], "little"))
        noise = self._drawn(len(pcm), rng) if self.noise else pink(len(pcm), rng)
        return with_noise(pcm, noise)

    def _drawn(self, n_samples: int, rng: np.random.Generator) -> Pcm:
        """A piece from anywhere in any of the recordings, around its end if need be."""
        assert self.noise is not None
        for i in rng.permutation(len(self.noise.recordings)):
            pcm = self.noise.recordings[i].pcm()
            start = int(rng.integers(max(1, len(pcm))))
            piece = (
                np.take(pcm, np.arange(start, start + n_samples), mode="wrap") if len(pcm) else pcm
            )
            if _power(piece) > SILENCE_POWER:
                return piece
        raise ConfigError(f"{self.noise.name} is silent", hint="name other noise with --noise-from")
