"""Batches for training: clips joined into streams, distorted, and cut to whole chunks.

A batch is made on the fly from packs. Every random choice comes from one seeded generator, so a
run can be repeated; torchaudio is not needed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import soxr
import torch
from numpy.typing import NDArray
from torch import Tensor

from sparqle_stream.config import FRAME_SAMPLES, SAMPLE_RATE_HZ
from sparqle_stream.errors import ConfigError
from training.codecs import any_codec

if TYPE_CHECKING:
    import random

    from training.corpus import Clip, Pack

Floats = NDArray[np.float32]
LONGEST_CHUNK_SAMPLES = 64 * FRAME_SAMPLES
DRAWS, FIRST_DRAWS = 6, 600  # of clips for the rest of a stream, and for an empty one


@dataclass(frozen=True, slots=True)
class Utterance:
    """A clip inside a stream: where its audio lies (samples) and what it says ("": unknown)."""

    start: int
    end: int
    text: str
    clip_id: str
    targets: dict[str, str] = field(default_factory=dict)  # by task (training.tasks)


@dataclass(slots=True)
class Stream:
    """One row of a batch: clean and distorted audio of the same length."""

    clean: Floats
    noisy: Floats
    utterances: list[Utterance]

    @property
    def is_transcribed(self) -> bool:
        """Whether all that is said in it is known; nothing is said in noise."""
        return all(u.text for u in self.utterances)


@dataclass(frozen=True, slots=True)
class AugmentConfig:
    """Chances and ranges of the distortions; gains in dB as DESIGN 4 asks."""

    speed: float = 0.4
    gain_low_db: float = -26.0
    gain_high_db: float = 8.0
    noise: float = 0.5
    snr_low_db: float = 3.0
    snr_high_db: float = 30.0
    telephone: float = 0.1
    room: float = 0.2
    spec: float = 0.3  # SpecAugment, of batches
    codec: float = 0.0  # mu-law, MP3 or Opus at a low rate (training.codecs)


class Augmenter:
    """Makes the noisy half of a stream from the clean one."""

    def __init__(self, cfg: AugmentConfig, noise: Pack | None, rng: random.Random) -> None:
        self.cfg, self.noise, self.rng = cfg, noise, rng

    def speed(self, pcm: Floats) -> Floats:
        """Speaks 10 % faster or slower (Ko et al., 2015)."""
        if self.rng.random() > self.cfg.speed:
            return pcm
        factor = self.rng.uniform(0.88, 1.14)
        out: Floats = soxr.resample(pcm, SAMPLE_RATE_HZ * factor, SAMPLE_RATE_HZ, quality="LQ")
        return out

    def distort(self, pcm: Floats) -> Floats:
        rng, cfg = self.rng, self.cfg
        out = pcm
        if rng.random() < cfg.room:
            out = self._room(out)
        if self.noise is not None and rng.random() < cfg.noise:
            out = self._add_noise(out)
        if rng.random() < cfg.telephone:
            low = soxr.resample(out, SAMPLE_RATE_HZ, 8_000, quality="LQ")
            out = _fit(soxr.resample(low, 8_000, SAMPLE_RATE_HZ, quality="LQ"), len(pcm))
        if cfg.codec and rng.random() < cfg.codec:  # no draw where there is none: old seeds hold
            out = any_codec(np.clip(out, -1.0, 1.0), rng)
        # Half of the streams near full level, the rest anywhere in the range.
        low_db = cfg.gain_low_db if rng.random() < 0.5 else -6.0
        gain = 10 ** (rng.uniform(low_db, cfg.gain_high_db) / 20)
        loud: Floats = np.clip(out * np.float32(gain), -1.0, 1.0)
        return loud.astype(np.float32)

    def _room(self, pcm: Floats) -> Floats:
        """A short exponential tail of noise as impulse response: a small room."""
        seconds = self.rng.uniform(0.08, 0.35)
        n = int(seconds * SAMPLE_RATE_HZ)
        gen = np.random.default_rng(self.rng.getrandbits(32))
        tail = gen.standard_normal(n) * np.exp(-6.9 * np.arange(n) / n)
        tail *= self.rng.uniform(0.1, 0.5) / np.sqrt(np.sum(tail**2))
        tail[0] += 1.0
        size = len(pcm) + n
        wet = np.fft.irfft(np.fft.rfft(pcm, size) * np.fft.rfft(tail, size), size)
        return wet[: len(pcm)].astype(np.float32)

    def _add_noise(self, pcm: Floats) -> Floats:
        assert self.noise is not None
        clip = self.rng.choice(self.noise.clips)
        noise = self.noise.pcm(clip)
        if len(noise) < 1600:
            return pcm
        start = self.rng.randrange(len(noise))
        noise = np.resize(np.roll(noise, -start), len(pcm))
        snr = self.rng.uniform(self.cfg.snr_low_db, self.cfg.snr_high_db)
        power = float(np.mean(pcm**2)) / max(float(np.mean(noise**2)), 1e-10)
        return pcm + noise * np.float32(np.sqrt(power / 10 ** (snr / 10)))


def _fit(pcm: Floats, n: int) -> Floats:
    return np.pad(pcm, (0, max(0, n - len(pcm))))[:n]


class StreamSampler:
    """Draws clips from weighted packs without repeats (per pass) and joins them into streams."""

    def __init__(
        self, sources: list[tuple[Pack, list[Clip], float]], augment: Augmenter, seconds: float
    ) -> None:
        for pack, clips, _ in sources:
            if not any(clip.seconds <= seconds for clip in clips):
                raise ConfigError(
                    f"no clip of {pack.folder} fits into a stream of {seconds} s",
                    hint="raise stream_s or leave the pack out",
                )
        self.augment, self.rng, self.seconds = augment, augment.rng, seconds
        self.shortest_s = max(min(clip.seconds for clip in clips) for _, clips, _ in sources)
        self.sources = [(pack, clips) for pack, clips, _ in sources]
        self.weights = [weight for _, _, weight in sources]
        self.queues: list[list[Clip]] = [[] for _ in sources]

    def _next_clip(self) -> tuple[int, Clip]:
        """A source's number and its next clip."""
        i = self.rng.choices(range(len(self.sources)), self.weights)[0]
        _, clips = self.sources[i]
        if not self.queues[i]:
            self.queues[i] = self.rng.sample(clips, len(clips))
        return i, self.queues[i].pop()

    def _fitting(self, n_left: int, n_draws: int) -> tuple[Clip, Floats] | None:
        """A clip of at most `n_left` samples, if one is drawn; longer ones come again."""
        found = None
        waiting: list[tuple[int, Clip]] = []
        while found is None and len(waiting) < n_draws:
            i, clip = self._next_clip()
            pcm = self.augment.speed(self.sources[i][0].pcm(clip))
            if 1600 <= len(pcm) <= n_left:
                found = clip, pcm
            else:
                waiting.append((i, clip))
        for i, clip in waiting:
            self.queues[i].insert(0, clip)
        return found

    def stream(self, seconds: float = 0.0) -> Stream:
        """Whole clips with pauses of 10 ms .. 1 s between them, mostly short ones, together of
        `seconds` (0: the sampler's own). Raises ConfigError where no clip is that short."""
        if 0 < seconds < self.shortest_s:
            raise ConfigError(
                f"no clip of a source fits into a stream of {seconds} s",
                hint=f"let lengths_s begin at {self.shortest_s:.1f} or more",
            )
        rng, said = self.rng, list[Utterance]()
        at = round(rng.uniform(0.05, 0.5) * SAMPLE_RATE_HZ)
        parts = [np.zeros(at, np.float32)]
        limit = round((seconds or self.seconds) * SAMPLE_RATE_HZ)
        while at < limit * 0.75:
            found = self._fitting(limit - at, DRAWS if said else FIRST_DRAWS)
            if found is None:
                break
            clip, pcm = found
            said.append(Utterance(at, at + len(pcm), clip.text, clip.id, clip.targets))
            pause = np.zeros(round(rng.uniform(0.1, 1.0) ** 2 * SAMPLE_RATE_HZ), np.float32)
            parts += [pcm, pause]
            at += len(pcm) + len(pause)
        clean = _fit(np.concatenate(parts), limit)
        return Stream(clean, self.augment.distort(clean), said)

    def texts(self, n_words: int) -> list[str]:
        """Transcripts without their audio, `n_words` or a little more together."""
        out: list[str] = []
        while sum(len(text.split()) for text in out) < n_words:
            out.append(self._next_clip()[1].text)
        return out

    def batch(self, n_streams: int, lengths_s: tuple[float, ...] = ()) -> list[Stream]:
        """`n_streams` of the sampler's seconds or, of a length drawn from `lengths_s`, as many as
        make the same seconds of audio together: long streams cost no more memory than short ones.
        """
        if not lengths_s:
            return [self.stream() for _ in range(n_streams)]
        seconds = self.rng.choice(lengths_s)
        return [self.stream(seconds) for _ in range(n_fitting(n_streams * self.seconds, seconds))]


def n_fitting(total_s: float, seconds: float) -> int:
    """How many streams of `seconds` make `total_s` of audio, one at least."""
    return max(1, int(total_s / seconds + 1e-6))


def stack(streams: list[Stream], which: str) -> Tensor:
    """PCM (B, S) of `clean` or `noisy`, padded to whole 1280 ms chunks."""
    longest = max(len(s.clean) for s in streams)
    n = -(-longest // LONGEST_CHUNK_SAMPLES) * LONGEST_CHUNK_SAMPLES
    return torch.from_numpy(np.stack([_fit(getattr(s, which), n) for s in streams]))


def spec_augment(mel: Tensor, rng: random.Random, fill: float) -> Tensor:
    """Two bands and up to four time spans of every row are blanked (Park et al., 2019)."""
    mel = mel.clone()
    for row in mel:
        for _ in range(2):
            width = rng.randint(0, 16)
            low = rng.randint(0, mel.shape[2] - width)
            row[:, low : low + width] = fill
        for _ in range(rng.randint(0, 4)):
            width = rng.randint(0, 30)
            low = rng.randint(0, mel.shape[1] - width)
            row[low : low + width] = fill
    return mel
