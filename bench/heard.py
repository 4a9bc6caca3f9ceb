"""What the ear alone would have written: greedy CTC text of the segments that a stream captioned.

In: a recording (S,) and the events of its stream. Out: the text on the CTC head's best path, in the
chunks, with the padding and the gain that the engine used, so that it is the same path. What LLM
and Q-Former add to it or take from it is then one subtraction in one run.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from sparqle_stream import encoder, features, messages
from sparqle_stream.config import SAMPLE_RATE_HZ
from sparqle_stream.ctc import greedy_path
from sparqle_stream.segments import SegmentQueue
from sparqle_stream.session import FLUSH_SAMPLES

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import numpy as np
    import numpy.typing as npt

    from sparqle_stream.config import StreamOptions
    from sparqle_stream.models import SparqleModel


def greedy_text(
    model: SparqleModel,
    options: StreamOptions,
    pcm: npt.NDArray[np.float32],
    events: Sequence[messages.Event],
) -> str:
    """pcm (S,) -> text of all segments, joined by spaces."""
    texts = [
        model.pieces.decode([piece for _, piece in greedy_path(log_probs)])
        for log_probs in posteriors(model, options, pcm, events)
    ]
    return " ".join(text for text in texts if text)


def posteriors(
    model: SparqleModel,
    options: StreamOptions,
    pcm: npt.NDArray[np.float32],
    events: Sequence[messages.Event],
) -> Iterator[torch.Tensor]:
    """pcm (S,) -> CTC log-probabilities (C, V) of every segment, padding included."""
    hear = _Ear(model)
    for start, end in spoken(events):
        yield torch.cat([hear(chunk) for chunk in _chunks(pcm[start:end], options)])
        hear.end_segment()


def spoken(events: Sequence[messages.Event]) -> list[tuple[int, int]]:
    """Samples at which the segments of a stream begin and end."""
    starts = [e.time for e in events if isinstance(e, messages.SpeechStarted)]
    ends = [e.time for e in events if isinstance(e, messages.SpeechStopped)]
    return [
        (round(start * SAMPLE_RATE_HZ), round(end * SAMPLE_RATE_HZ))
        for start, end in zip(starts, ends, strict=True)
    ]


class _Ear:
    """Features, encoder and CTC head of one stream: chunks of PCM (S,) -> log-probs (C, V)."""

    def __init__(self, model: SparqleModel) -> None:
        dtype = model.encoder.ln_post.weight.dtype
        self._model = model
        self._everyone = torch.ones(1, dtype=torch.bool, device=model.device)
        self._features = features.init_state(model.cfg.features, 1, device=model.device)
        self._encoder = encoder.init_state(model.cfg.encoder, 1, dtype=dtype, device=model.device)

    def __call__(self, pcm: npt.NDArray[np.float32]) -> torch.Tensor:
        model, row = self._model, torch.from_numpy(pcm)[None].to(self._model.device)
        with torch.inference_mode():
            self._features, mel = features.step(
                model.cfg.features, self._features, row, self._everyone
            )
            self._encoder, frames = encoder.step(model.encoder, self._encoder, mel, self._everyone)
            log_probs: torch.Tensor = model.ctc(frames)[0]
        return log_probs

    def end_segment(self) -> None:
        """The gain stays: it belongs to the speaker."""
        features.reset_rows(self._features, self._everyone)
        encoder.reset_rows(self._encoder, self._everyone)


def _chunks(
    pcm: npt.NDArray[np.float32], options: StreamOptions
) -> Iterator[npt.NDArray[np.float32]]:
    """One segment (S,) on its chunk grid, silence through look-ahead and delay after it."""
    delay_samples = options.delay_ms * SAMPLE_RATE_HZ // 1000
    queue = SegmentQueue(options.chunk_samples, FLUSH_SAMPLES + delay_samples)
    queue.begin(0, known_at=0)
    queue.append(pcm)
    queue.end(known_at=len(pcm))
    while queue.has_chunk:
        yield queue.next_chunk().pcm
