"""Sources: which packs a run draws from, how often, and which of their clips.

Contract: the same sources, seed and share give the same streams again.
"""

from __future__ import annotations

import logging
import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from sparqle_stream.errors import ConfigError
from training.align import poor_ids
from training.corpus import Pack
from training.data import Augmenter, StreamSampler
from training.text import is_plain, is_spelled_out

if TYPE_CHECKING:
    from training.corpus import Clip
    from training.data import AugmentConfig

logger = logging.getLogger(__name__)

LONGEST_CLIP_S = 20.0
PLAIN_SHARE = 0.5  # of a pack's transcripts, from which on it is told
SHARE_SEED = 1_000_003  # apart from the seeds of neighbouring steps


@dataclass(frozen=True, slots=True)
class Source:
    """A pack, how often it is drawn, and whether its transcripts are used."""

    pack: str
    weight: float = 1.0
    transcribed: bool = True
    skip_poor: bool = False  # leave out what training.align marked
    share: float = 1.0  # of the clips, evenly spread: less to see what more would bring


@dataclass(slots=True)
class Feed:
    """The random choices and the clips of one share of every batch."""

    rng: random.Random
    sampler: StreamSampler


def usable(clip: Clip) -> bool:
    return clip.seconds < LONGEST_CLIP_S and is_spelled_out(clip.text)


def clips_of(source: Source, pack: Pack) -> list[Clip]:
    """What may be drawn. Raises ConfigError for `skip_poor` where nothing was aligned."""
    if not 0 < source.share <= 1:
        raise ConfigError(f"share = {source.share} of {source.pack}", hint="above 0, at most 1")
    n = max(1, round(len(pack.clips) * source.share))
    clips = [pack.clips[i * len(pack.clips) // n] for i in range(n)]
    if not source.transcribed:
        return [replace(c, text="", targets={}) for c in clips]
    poor = poor_ids(pack.folder) if source.skip_poor else set()
    if poor is None:
        raise ConfigError(
            f"skip_poor: {pack.folder} has no words.jsonl", hint="run python -m training.align"
        )
    return [c for c in clips if usable(c) and c.id not in poor]


def warn_of_plain(sources: tuple[Source, ...]) -> None:
    """Tells of packs whose transcripts would teach an LLM to leave out capitals and marks."""
    for source in sources:
        texts = [clip.text for clip in Pack(Path(source.pack)).clips if clip.text]
        n_plain = sum(map(is_plain, texts)) if source.transcribed else 0
        if n_plain > PLAIN_SHARE * len(texts):
            logger.warning(
                "%s: %d of %d transcripts have no capitals or punctuation of their own; captions"
                " will do without names' capitals and commas. Such a pack is for the ear",
                source.pack,
                n_plain,
                len(texts),
            )


class Draws(Protocol):
    """What the config of a run says about its streams."""

    @property
    def sources(self) -> tuple[Source, ...]: ...

    @property
    def noise(self) -> str: ...

    @property
    def augment(self) -> AugmentConfig: ...

    @property
    def stream_s(self) -> float: ...


def make_feed(cfg: Draws, seed: int) -> Feed:
    """Streams of a config's sources, and choices that do not repeat the sampler's."""
    sampler = make_sampler(cfg.sources, cfg.noise, cfg.augment, cfg.stream_s, seed)
    return Feed(random.Random(seed + 1), sampler)


def make_sampler(
    sources: tuple[Source, ...], noise: str, augment: AugmentConfig, stream_s: float, seed: int
) -> StreamSampler:
    rng = random.Random(seed)
    parts = []
    for source in sources:
        pack = Pack(Path(source.pack))
        parts.append((pack, clips_of(source, pack), source.weight))
    augmenter = Augmenter(augment, Pack(Path(noise)) if noise else None, rng)
    return StreamSampler(parts, augmenter, stream_s)
