"""What the ear alone would have written: greedy CTC text of the segments that a stream captioned.

In: a recording (S,) and the events of its stream. Out: the text on the CTC head's best path, in the
chunks, with the padding and the gain that the engine used, so that it is the same path. What LLM
and Q-Former add to it or take from it is then one subtraction in one run.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from sparqle_stream import messages
from sparqle_stream.config import SAMPLE_RATE_HZ
from sparqle_stream.pieces import greedy_path
from sparqle_stream.segments import SegmentQueue
from sparqle_stream.session import FLUSH_SAMPLES
from sparqle_stream.stages import prefix_ids
from sparqle_stream.writer import Greedy

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from sparqle_stream.config import StreamOptions
    from sparqle_stream.models import Model
    from sparqle_stream.stages import Floats


def greedy_text(
    model: Model,
    options: StreamOptions,
    pcm: Floats,
    events: Sequence[messages.Event],
) -> str:
    """pcm (S,) -> text of all segments, joined by spaces."""
    texts = [
        model.pieces.decode([piece for _, piece in greedy_path(log_probs)])
        for log_probs in posteriors(model, options, pcm, events)
    ]
    return " ".join(text for text in texts if text)


def posteriors(
    model: Model,
    options: StreamOptions,
    pcm: Floats,
    events: Sequence[messages.Event],
) -> Iterator[Floats]:
    """pcm (S,) -> CTC log-probabilities (C, V) of every segment, padding included.

    They come late by the look-ahead, as in the engine.
    """
    hear = _Ear(model, model.cfg.encoder.ahead_frames(options.delay_ms))
    for start, end in spoken(events):
        yield np.concatenate([hear(chunk) for chunk in _chunks(pcm[start:end], options)])
        hear.begin()


def spoken(events: Sequence[messages.Event]) -> list[tuple[int, int]]:
    """Samples at which the segments of a stream begin and end."""
    starts = [e.time for e in events if isinstance(e, messages.SpeechStarted)]
    ends = [e.time for e in events if isinstance(e, messages.SpeechStopped)]
    return [
        (round(start * SAMPLE_RATE_HZ), round(end * SAMPLE_RATE_HZ))
        for start, end in zip(starts, ends, strict=True)
    ]


class _Ear:
    """Stages of one row: chunks of PCM (S,) -> log-probs (C, V); nothing is written."""

    def __init__(self, model: Model, ahead_frames: int) -> None:
        self._ahead_frames = ahead_frames
        self._stages = model.make_stages(1)
        self._stages.wipe(0)
        self._model = model
        self.begin()

    def begin(self) -> None:
        """A segment; the gain stays: it belongs to the speaker."""
        self._stages.begin({0: prefix_ids(self._model.tokenizer, "")})

    def __call__(self, pcm: Floats) -> Floats:
        heard: list[Floats] = []

        def hear(_row: int, log_probs: Floats) -> Greedy:
            heard.append(log_probs)
            return Greedy(n_most=0)

        with self._stages.working(0):
            self._stages.step({0: pcm}, {0: 0}, self._ahead_frames, hear)
        return heard[0]


def _chunks(pcm: Floats, options: StreamOptions) -> Iterator[Floats]:
    """One segment (S,) on its chunk grid, silence through look-ahead and delay after it."""
    delay_samples = options.delay_ms * SAMPLE_RATE_HZ // 1000
    queue = SegmentQueue(options.chunk_samples, FLUSH_SAMPLES + delay_samples)
    queue.begin(0, known_at=0)
    queue.append(pcm)
    queue.end(known_at=len(pcm))
    while queue.has_chunk:
        yield queue.next_chunk().pcm
