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
    from collections.abc import Sequence

    from training.corpus import Clip, Pack

Floats = NDArray[np.float32]
LONGEST_CHUNK_SAMPLES = 64 * FRAME_SAMPLES
FFT_SAMPLES = 8192  # lengths of few and small factors: others take thirty times as long
DRAWS, FIRST_DRAWS = 6, 600  # of clips for the rest of a stream, and for an empty one
SPEEDS = 0.88, 1.14  # slowest and fastest
SHORTEST_SAMPLES = 1600  # of a clip
FIRST_PAUSE_S = 0.05, 0.5  # before the first clip of a stream


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


@dataclass(slots=True)
class Batch:
    """Streams side by side: PCM (B, S) int16 of whole 1280 ms chunks, and what each says."""

    noisy: Tensor
    clean: Tensor | None  # where somebody asked for it
    said: list[list[Utterance]]
    audio_s: float

    def pin_memory(self) -> Batch:
        """For torch's DataLoader: copies to a GPU that do not wait."""
        clean = None if self.clean is None else self.clean.pin_memory()
        return Batch(self.noisy.pin_memory(), clean, self.said, self.audio_s)

    def transcribed(self) -> list[int]:
        """Rows in which all that is said is known; nothing is said in noise."""
        return [i for i, said in enumerate(self.said) if all(u.text for u in said)]


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
    spec_bands: int = 2  # of at most `spec_band` of the 80 mel bands
    spec_band: int = 16
    spec_spans: int = 4  # at most, of at most `spec_span` mel frames of 10 ms
    spec_span: int = 30
    codec: float = 0.0  # mu-law, MP3 or Opus at a low rate (training.codecs)
    offset: float = 1.0  # of streams: their positions begin anywhere, not at 0 as a segment's do


class Augmenter:
    """Makes the noisy half of a stream from the clean one."""

    def __init__(self, cfg: AugmentConfig, noise: Pack | None, rng: random.Random) -> None:
        self.cfg, self.noise, self.rng = cfg, noise, rng

    def speed(self, pcm: Floats) -> Floats:
        """Speaks 10 % faster or slower (Ko et al., 2015)."""
        if self.rng.random() > self.cfg.speed:
            return pcm
        factor = self.rng.uniform(*SPEEDS)
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
        size = -(-(len(pcm) + n) // FFT_SAMPLES) * FFT_SAMPLES
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


def fits(clip: Clip, seconds: float) -> bool:
    """Whether an empty stream of `seconds` has room for a clip, spoken no faster than it is."""
    most = (seconds - FIRST_PAUSE_S[0]) * SAMPLE_RATE_HZ
    return SHORTEST_SAMPLES <= clip.length <= most


class Queue:
    """Clips in a random order, each once a pass; what a stream had no room for comes again."""

    def __init__(self, clips: list[Clip], rng: random.Random) -> None:
        self.clips, self.rng = clips, rng
        self._left: list[int] = []
        self._late: list[int] = []  # drawn for this stream in vain

    def draw(self) -> int:
        """The number of the next clip. What is late holds nobody up: a new pass begins without it,
        as it has its turn still."""
        if not self._left:
            late = set(self._late)
            fresh = [i for i in range(len(self.clips)) if i not in late]
            if not fresh:
                fresh, self._late = self._late, []
            self._left = self.rng.sample(fresh, len(fresh))
        return self._left.pop()

    def put_back(self, number: int) -> None:
        """For the next streams."""
        self._late.append(number)

    def next_stream(self) -> None:
        """Late clips get any place of what is left: at its end only long ones would be left."""
        for number in self._late:
            self._left.insert(self.rng.randint(0, len(self._left)), number)
        self._late = []


class StreamSampler:
    """Draws clips from weighted packs without repeats (per pass) and joins them into streams.

    Clips that no stream has room for are not kept. Streams of each length draw from those that
    they have room for, in passes of their own, so that a source is drawn as its weight says.
    """

    def __init__(
        self,
        sources: list[tuple[Pack, list[Clip], float]],
        augment: Augmenter,
        seconds: float,
        p_empty: float = 0.0,
        lengths_s: tuple[float, ...] = (),
    ) -> None:
        """`seconds` is the length of streams, or `lengths_s` are; p_empty: share of streams that
        are noise without words, if the augmenter has noise.

        Raises ConfigError for a source without a clip for one of the lengths.
        """
        self.augment, self.rng, self.seconds = augment, augment.rng, seconds
        self.p_empty = p_empty if augment.noise else 0.0
        self.all_texts = [[c for c in clips if c.text.split()] for _, clips, _ in sources]
        longest_s = max((seconds, *lengths_s))
        self.sources = [(p, [c for c in clips if fits(c, longest_s)]) for p, clips, _ in sources]
        self.weights = [weight for _, _, weight in sources]
        self._queues: dict[float, list[Queue]] = {}
        self._texts: list[Queue] = []
        for length_s in lengths_s or (seconds,):
            self._queues_of(length_s)

    def _queues_of(self, seconds: float) -> list[Queue]:
        """Of each source what a stream of `seconds` has room for. Raises ConfigError for none."""
        if seconds not in self._queues:
            made = []
            for pack, clips in self.sources:
                fitting = [clip for clip in clips if fits(clip, seconds)]
                if not fitting:
                    raise ConfigError(
                        f"no clip of {pack.folder} fits into a stream of {seconds} s",
                        hint="raise stream_s (lengths_s, if there are some) or leave the pack out",
                    )
                made.append(Queue(fitting, self.rng))
            self._queues[seconds] = made
        return self._queues[seconds]

    def _source(self, weights: Sequence[float]) -> int:
        return self.rng.choices(range(len(weights)), weights)[0]

    def _fitting(
        self, queues: list[Queue], n_left: int, n_draws: int
    ) -> tuple[Clip, Floats] | None:
        """A clip of at most `n_left` samples, if one is drawn; longer ones come again."""
        for _ in range(n_draws):
            i = self._source(self.weights)
            number = queues[i].draw()
            clip = queues[i].clips[number]
            if clip.length <= n_left * SPEEDS[1]:  # else no speed helps
                pcm = self.augment.speed(self.sources[i][0].pcm(clip))
                if SHORTEST_SAMPLES <= len(pcm) <= n_left:
                    return clip, pcm
            queues[i].put_back(number)
        return None

    def stream(self, seconds: float = 0.0) -> Stream:
        """Whole clips with pauses of 10 ms .. 1 s between them, mostly short ones, together of
        `seconds` (0: the sampler's own), or noise. Raises ConfigError if no clip is that short."""
        queues = self._queues_of(seconds or self.seconds)
        rng, said = self.rng, list[Utterance]()
        limit = round((seconds or self.seconds) * SAMPLE_RATE_HZ)
        if self.p_empty and rng.random() < self.p_empty:
            return self._empty(limit)
        for queue in queues:
            queue.next_stream()
        first, at = (
            round(s * SAMPLE_RATE_HZ) for s in (FIRST_PAUSE_S[0], rng.uniform(*FIRST_PAUSE_S))
        )
        parts = [np.zeros(at, np.float32)]
        while at < limit * 0.75:
            n_left, n_draws = (limit - at, DRAWS) if said else (limit - first, FIRST_DRAWS)
            found = self._fitting(queues, n_left, n_draws)
            if found is None:
                break
            clip, pcm = found
            if not said:  # a clip as long as the stream has a shorter pause before it
                at = min(at, limit - len(pcm))
                parts = [parts[0][:at]]
            said.append(Utterance(at, at + len(pcm), clip.text, clip.id, clip.targets))
            pause = np.zeros(round(rng.uniform(0.1, 1.0) ** 2 * SAMPLE_RATE_HZ), np.float32)
            parts += [pcm, pause]
            at += len(pcm) + len(pause)
        clean = _fit(np.concatenate(parts), limit)
        return Stream(clean, self.augment.distort(clean), said)

    def _empty(self, n: int) -> Stream:
        """Noise of any loudness, in which nothing is said."""
        noise, rng = self.augment.noise, self.rng
        assert noise is not None
        pcm = np.resize(noise.pcm(rng.choice(noise.clips)), n)
        return Stream(pcm, pcm * np.float32(10 ** (rng.uniform(-30, 0) / 20)), [])

    def texts(self, n_words: int) -> list[str]:
        """Transcripts without their audio, `n_words` or a little more together.

        Raises ConfigError where no source has any.
        """
        self._texts = self._texts or [Queue(clips, self.rng) for clips in self.all_texts]
        weights = [w if q.clips else 0.0 for w, q in zip(self.weights, self._texts, strict=True)]
        if not any(weights):
            raise ConfigError(
                "no source has a transcript to read",
                hint="add one with transcripts, or text = with p_sentence = 1.0",
            )
        out: list[str] = []
        while sum(len(text.split()) for text in out) < n_words:
            queue = self._texts[self._source(weights)]
            out.append(queue.clips[queue.draw()].text)
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


def stack(recordings: Sequence[Floats]) -> Tensor:
    """PCM (S,) each -> (B, S), padded to whole 1280 ms chunks."""
    longest = max(map(len, recordings))
    n = -(-longest // LONGEST_CHUNK_SAMPLES) * LONGEST_CHUNK_SAMPLES
    return torch.from_numpy(np.stack([_fit(pcm, n) for pcm in recordings]))


def side_by_side(streams: list[Stream], *, with_clean: bool) -> Batch:
    """A batch in 16 bits, which is what the engine hears, and a quarter of what would be moved."""
    audio_s = sum(len(s.noisy) for s in streams) / SAMPLE_RATE_HZ
    noisy = _int16(stack([s.noisy for s in streams]))
    clean = _int16(stack([s.clean for s in streams])) if with_clean else None
    return Batch(noisy, clean, [s.utterances for s in streams], audio_s)


def _int16(pcm: Tensor) -> Tensor:
    return (pcm * 32767).round_().clamp_(-32768, 32767).to(torch.int16)


def spec_augment(mel: Tensor, rng: random.Random, fill: float, cfg: AugmentConfig) -> Tensor:
    """Bands and time spans of every row of mel (B, T, M) are blanked (Park et al., 2019)."""
    b, n_frames, n_bands = mel.shape
    spans, bands = torch.zeros(b, n_frames, 1, dtype=torch.bool), torch.zeros(b, 1, n_bands)
    for i in range(b):
        for _ in range(cfg.spec_bands):
            width = rng.randint(0, cfg.spec_band)
            low = rng.randint(0, n_bands - width)
            bands[i, 0, low : low + width] = 1
        for _ in range(rng.randint(0, cfg.spec_spans)):
            width = min(n_frames, rng.randint(0, cfg.spec_span))
            low = rng.randint(0, n_frames - width)
            spans[i, low : low + width] = True
    return mel.masked_fill(spans.to(mel.device) | bands.bool().to(mel.device), fill)
