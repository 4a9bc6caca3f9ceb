"""Sources: which packs a run draws from, how often, and which of their clips.

Contract: the same sources, seed, share and number of workers give the same streams again.
"""

from __future__ import annotations

import atexit
import logging
import os
import random
import signal
from collections import Counter
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from sparqle_stream.errors import ConfigError
from training.align import poor_ids
from training.corpus import Pack
from training.data import Augmenter, Batch, StreamSampler, fits, side_by_side
from training.text import is_plain, is_spelled_out

if TYPE_CHECKING:
    from collections.abc import Iterator

    from training.corpus import Clip
    from training.data import AugmentConfig

logger = logging.getLogger(__name__)

LONGEST_CLIP_S = 20.0
TOO_LONG = f"of {LONGEST_CLIP_S:.0f} s or more"
NO_TEXT, NOT_SPELLED = "without a text", "with digits, dotted abbreviations or letters beyond ASCII"
POOR = "marked as poor"
PLAIN_SHARE = 0.5  # of a pack's transcripts, from which on it is told
SHARE_SEED = 1_000_003  # apart from the seeds of neighbouring steps
WORKER_SEED = 7_000_003
BATCHES_AHEAD = 4  # of each worker


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
    batches: Iterator[Batch]


@dataclass(frozen=True, slots=True)
class Choice:
    """The clips of a source that may be drawn, and how many others may not, by reason."""

    clips: list[Clip]
    left_out: Counter[str]


def _why_not(clip: Clip, poor: set[str]) -> str:
    """Why nothing is learned from a clip's transcript; '' if something is."""
    if clip.seconds >= LONGEST_CLIP_S:
        return TOO_LONG
    if not clip.text.strip():
        return NO_TEXT
    if not is_spelled_out(clip.text):
        return NOT_SPELLED
    return POOR if clip.id in poor else ""


def clips_of(source: Source, pack: Pack) -> list[Clip]:
    """`choose` without the reasons."""
    return choose(source, pack).clips


def choose(source: Source, pack: Pack) -> Choice:
    """What may be drawn. Raises ConfigError for `skip_poor` where nothing was aligned."""
    if not 0 < source.share <= 1:
        raise ConfigError(f"share = {source.share} of {source.pack}", hint="above 0, at most 1")
    n = max(1, round(len(pack.clips) * source.share))
    clips = [pack.clips[i * len(pack.clips) // n] for i in range(n)]
    if not source.transcribed:
        return Choice([replace(c, text="", targets={}) for c in clips], Counter())
    poor = poor_ids(pack.folder) if source.skip_poor else set()
    if poor is None:
        raise ConfigError(
            f"skip_poor: {pack.folder} has no words.jsonl", hint="run python -m training.align"
        )
    reasons = [_why_not(clip, poor) for clip in clips]
    used = [clip for clip, why in zip(clips, reasons, strict=True) if not why]
    return Choice(used, Counter(filter(None, reasons)))


def _tell_of(choice: Choice, pack: Pack, longest_s: float) -> None:
    """Says how many clips streams of `longest_s` have room for, and why others are not used.

    Raises ConfigError where none is left.
    """
    n_used = sum(fits(clip, longest_s) for clip in choice.clips)
    left_out = choice.left_out.copy()
    n_short = sum(clip.seconds < 0.1 for clip in choice.clips)
    left_out["shorter than 0.1 s"] = n_short
    left_out[f"too long for a stream of {longest_s} s"] = len(choice.clips) - n_used - n_short
    why = ", ".join(f"{n} {reason}" for reason, n in left_out.most_common() if n)
    if not n_used:
        is_text = left_out.most_common(1)[0][0] in (NO_TEXT, NOT_SPELLED)
        on_text = (
            "spell numbers out, or say transcribed = false where training.distill needs no text"
        )
        raise ConfigError(
            f"no clip of {pack.folder} can be used: {why}",
            hint=on_text if is_text else "raise stream_s, cut the clips, or leave the pack out",
        )
    if get_worker_info() is None:  # once, not from each worker
        _tell(f"{pack.folder}: {n_used} of {left_out.total() + n_used} clips are used", why)


@cache
def _tell(used: str, why: str) -> None:
    """Once for all feeds of a run."""
    if why:
        logger.warning("%s; left out: %s", used, why)
    else:
        logger.info("%s", used)


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

    @property
    def lengths_s(self) -> tuple[float, ...]: ...

    @property
    def streams(self) -> int: ...

    @property
    def p_empty(self) -> float: ...

    @property
    def workers(self) -> int: ...


@dataclass(frozen=True, slots=True)
class Batches(IterableDataset[Batch]):
    """Batches without end of a config's sources; each worker of a DataLoader draws its own."""

    cfg: Draws
    seed: int
    with_clean: bool

    def sampler(self, worker: int = 0) -> StreamSampler:
        cfg, seed = self.cfg, self.seed + WORKER_SEED * worker
        lengths = cfg.p_empty, cfg.lengths_s
        return make_sampler(cfg.sources, cfg.noise, cfg.augment, cfg.stream_s, seed, *lengths)

    def drawn(self, sampler: StreamSampler) -> Iterator[Batch]:
        while True:
            streams = sampler.batch(self.cfg.streams, self.cfg.lengths_s)
            yield side_by_side(streams, with_clean=self.with_clean)

    def __iter__(self) -> Iterator[Batch]:
        me = get_worker_info()
        return self.drawn(self.sampler(me.id if me else 0))


def make_feed(cfg: Draws, seed: int, *, with_clean: bool = False) -> Feed:
    """Streams of a config's sources, and choices that do not repeat the sampler's.

    With `workers` other processes make batches ahead of time, in turns: their order is known.
    """
    made = Batches(cfg, seed, with_clean)
    sampler = made.sampler()
    if not cfg.workers:
        return Feed(random.Random(seed + 1), sampler, made.drawn(sampler))
    _forget_shared_memory_at_exit()
    loader = DataLoader(
        made,
        batch_size=None,
        num_workers=cfg.workers,
        collate_fn=_as_it_is,
        prefetch_factor=BATCHES_AHEAD,
        worker_init_fn=_keep_working,
        pin_memory=torch.cuda.is_available(),
    )
    return Feed(random.Random(seed + 1), sampler, iter(loader))


def _keep_working(worker: int) -> None:
    """Ctrl-C and `timeout` signal a whole group of processes. The main one ends its step and saves,
    for which it needs its workers; it ends them itself."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(os, "setpgid"):
        os.setpgid(0, 0)


@cache
def _forget_shared_memory_at_exit() -> None:
    """torch lets go of what workers sent when half of torch is gone, and says so for each batch."""
    from torch.multiprocessing import reductions

    atexit.register(reductions.shared_cache.clear)


def _as_it_is(batch: Any) -> Any:  # noqa: ANN401 - DataLoader believes in lists
    return batch


def make_sampler(
    sources: tuple[Source, ...],
    noise: str,
    augment: AugmentConfig,
    stream_s: float,
    seed: int,
    p_empty: float = 0.0,
    lengths_s: tuple[float, ...] = (),
) -> StreamSampler:
    """Streams of `sources`, of `stream_s` or `lengths_s` seconds.

    Raises ConfigError for a source of which no clip can be used.
    """
    rng = random.Random(seed)
    longest_s = max((stream_s, *lengths_s))
    parts = []
    for source in sources:
        pack = Pack(Path(source.pack))
        clips = choose(source, pack)
        _tell_of(clips, pack, longest_s)
        parts.append((pack, clips.clips, source.weight))
    augmenter = Augmenter(augment, Pack(Path(noise)) if noise else None, rng)
    return StreamSampler(parts, augmenter, stream_s, p_empty, lengths_s)
