"""Captioned: recordings -> what the engine wrote of each, every one as a stream of its own.

Contract: texts and delays do not depend on the machine's load. Progress goes to stderr.
"""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from bench import scoring
from sparqle_stream import messages
from sparqle_stream.config import SAMPLE_RATE_HZ

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from bench.manifests import Recording, RecordingSet
    from bench.settings import Settings
    from sparqle_stream.engine import Engine
    from sparqle_stream.models import Model

T = TypeVar("T")


@dataclass(slots=True)
class Captioned:
    """One recording after its stream has ended."""

    recording: Recording
    events: list[messages.Event]
    heard: str = ""  # greedy CTC text

    @property
    def text(self) -> str:
        return scoring.text_of(self.events)

    @property
    def done(self) -> messages.Done:
        """A stream that failed has captioned nothing of its duration."""
        last = self.events[-1]
        return last if isinstance(last, messages.Done) else messages.Done(0.0, 0.0, 0.0)

    @property
    def has_failed(self) -> bool:
        return not isinstance(self.events[-1], messages.Done)


def warm_up(engine: Engine, wanted: Settings, sets: Sequence[RecordingSet]) -> None:
    """Two seconds that do not count: the first steps allocate and read weights from disk."""
    pcm = sets[0].recordings[0].pcm()[: 2 * SAMPLE_RATE_HZ]
    engine.transcribe(pcm, wanted.stream_options())


def caption(engine: Engine, wanted: Settings, recordings: RecordingSet) -> Iterator[Captioned]:
    """Every recording through the engine, as many at once as it has slots, in the given order.

    Who stops taking them waits for nobody: closing the engine ends what streams then.
    """
    options = wanted.stream_options()

    def one(recording: Recording) -> Captioned:
        events = engine.transcribe(recording.pcm(), options)
        return Captioned(recording, [e for e in events if not isinstance(e, messages.Tail)])

    pool = ThreadPoolExecutor(wanted.n_streams)
    try:
        results = pool.map(one, recordings.recordings)
        yield from with_bar(results, f"captions {recordings.label}", len(recordings.recordings))
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def hear(model: Model, wanted: Settings, captioned: Sequence[Captioned]) -> None:
    """Fills in what the CTC head hears in the same segments."""
    from bench.heard import greedy_text

    options = wanted.stream_options()
    wanted_ones = [one for one in captioned if one.recording.text and not one.has_failed]
    for one in with_bar(wanted_ones, "CTC", len(wanted_ones)):
        one.heard = greedy_text(model, options, one.recording.pcm())


def timing(captioned: Sequence[Captioned]) -> dict[str, Any]:
    """Audio, and the computing that it took, as JSON."""
    audio_s = sum(c.done.duration for c in captioned)
    compute_s = sum(c.done.compute_seconds for c in captioned)
    return {
        "audio_seconds": round(audio_s, 2),
        "compute_seconds": round(compute_s, 2),
        "rtf": round(compute_s / audio_s, 4) if audio_s else None,
    }


def with_bar(items: Iterable[T], name: str, n: int) -> Iterable[T]:
    """Progress on stderr: a bar for people, a line now and then for logs."""
    from tqdm import tqdm

    every_s = 0.2 if sys.stderr.isatty() else 60.0
    return tqdm(items, desc=name, total=n, unit="file", file=sys.stderr, mininterval=every_s)
