"""Aligned: how long after its end a word left, where its end is that of a forced alignment.

In: a recording (S,) with its text, the events of its stream with their arrivals. The text is
aligned with the posteriors of the same encoder in the same segments (training.align), and words
that were written as they were said are timed against it. Unlike the engine's own word times, an
alignment knows what was said and sees all of the audio: no word can end when it leaves.
Out: delays in seconds. Recordings whose text does not fit what was heard are left out and counted.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from difflib import SequenceMatcher
from typing import TYPE_CHECKING, Any

import numpy as np

from bench.delays import percentiles_ms
from bench.heard import posteriors
from sparqle_stream import messages
from sparqle_stream.config import FRAME_SAMPLES, FRAMES_PER_CTC, SAMPLE_RATE_HZ

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from bench.players import Take
    from sparqle_stream.config import StreamOptions
    from sparqle_stream.models import Model
    from sparqle_stream.pieces import CtcPieces

    Floats = npt.NDArray[np.float32]

CTC_SAMPLES = FRAMES_PER_CTC * FRAME_SAMPLES


@dataclass(slots=True)
class Aligned:
    """Seconds from the aligned end of a word to the word; heard, and by the clock."""

    heard: list[float] = field(default_factory=list)
    clock: list[float] = field(default_factory=list)
    n_said: int = 0  # words of the references that were aligned
    n_left_out: int = 0  # recordings

    def summary(self) -> dict[str, Any]:
        return {
            "algorithmic_ms": percentiles_ms(self.heard),
            "with_compute_ms": percentiles_ms(self.clock),
            "words_said": self.n_said,
            "recordings_left_out": self.n_left_out,
        }


def measure(
    model: Model,
    options: StreamOptions,
    recordings: Sequence[tuple[Floats, str, Take]],
) -> Aligned:
    """(PCM, text, take) of recordings -> the delays of all of them."""
    found = Aligned()
    for pcm, text, take in recordings:
        begun = [e.time for e in take.events if isinstance(e, messages.SpeechStarted)]
        starts = [round(seconds * SAMPLE_RATE_HZ) for seconds in begun]
        late = model.cfg.encoder.ahead_frames(options.delay_ms) // FRAMES_PER_CTC
        heard = [row[late:] for row in posteriors(model, options, pcm)]
        ends = word_ends(heard, starts, text, model.pieces)
        if ends is None:
            found.n_left_out += 1
            continue
        found.n_said += len(ends)
        add(found, take, ends)
    return found


def word_ends(
    heard: Sequence[Floats], segments: Sequence[int], text: str, pieces: CtcPieces
) -> list[tuple[str, float]] | None:
    """Log-probs (C, V) of segments that begin at these samples -> each word and its end in seconds.

    None for a text that does not fit.
    """
    from training.align import BAD_ALIGNMENT, align_words

    if not heard:
        return None
    words, score = align_words(np.concatenate(heard), text, pieces)
    if score < BAD_ALIGNMENT:
        return None
    after = [
        begin + CTC_SAMPLES * (frame + 1) - FRAME_SAMPLES
        for begin, log_probs in zip(segments, heard, strict=True)
        for frame in range(len(log_probs))
    ]
    return [(word.text, after[word.end_frame] / SAMPLE_RATE_HZ) for word in words]


def add(found: Aligned, take: Take, ends: Sequence[tuple[str, float]]) -> None:
    """The delays of the words of a take that are in `ends`, in the same order."""
    from training.text import spoken as spelled

    written = [
        (spelled(word.word), event.time, at)
        for at, event in take.arrivals
        if isinstance(event, messages.Final)
        for word in event.words
    ]
    said = [spelled(word) for word, _ in ends]
    matcher = SequenceMatcher(None, [word for word, _, _ in written], said, autojunk=False)
    for of_written, of_said, n in matcher.get_matching_blocks():
        for i in range(n):
            _, heard_at, clock_at = written[of_written + i]
            end = ends[of_said + i][1]
            found.heard.append(heard_at - end)
            found.clock.append(clock_at - end)
