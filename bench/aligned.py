"""Aligned: how long after its end a word left, where its end is that of a forced alignment.

In: a recording (S,) with its text, the events of its stream with their arrivals. The text is
aligned with the posteriors of the same encoder in the same segments (training.align), and words
that were written as they were said are timed against it; a segment's first caption is timed against
the beginning of the first word that was said in it, written or missed. Unlike the engine's own word
times, an alignment knows what was said and sees all of the audio: no word can end when it leaves.
Out: delays in seconds. Recordings whose text does not fit what was heard are left out and counted.

The aligner is the CTC head of the model under test, not another's, and its peaks come early: every
end is taken to be one frame (40 ms, CTC_EARLY_FRAMES) after the last piece, which makes delays that
much shorter, and every beginning `lead_ms` (40 ms) before the first, as the engine takes it.
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
    """Seconds from the aligned end of a word to the word; heard, and by the clock.

    `first_*`: from the aligned beginning of a segment's first word to the segment's first caption.
    """

    heard: list[float] = field(default_factory=list)
    clock: list[float] = field(default_factory=list)
    n_said: int = 0  # words of the references that were aligned
    n_left_out: int = 0  # recordings
    first_heard: list[float] = field(default_factory=list)
    first_clock: list[float] = field(default_factory=list)

    def summary(self) -> dict[str, Any]:
        return {
            "algorithmic_ms": percentiles_ms(self.heard),
            "with_compute_ms": percentiles_ms(self.clock),
            "first_word_algorithmic_ms": percentiles_ms(self.first_heard),
            "first_word_with_compute_ms": percentiles_ms(self.first_clock),
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
        lead = model.cfg.captions.lead_ms * SAMPLE_RATE_HZ // 1000
        add_first(found, take, first_starts(heard, starts, text, model.pieces, lead))
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


def first_starts(
    heard: Sequence[Floats], segments: Sequence[int], text: str, pieces: CtcPieces, lead: int = 0
) -> list[float | None]:
    """As `word_ends`, of a text that fits -> per segment the second at which the first word that
    was said in it begins: `lead` samples before its first frame. None where no word begins."""
    from training.align import viterbi
    from training.text import spoken as spelled

    said = [pieces.encode(spelled(word)) for word in text.split() if spelled(word)]
    flat = [piece for word in said for piece in word]
    log_probs = np.concatenate(heard)
    # The first frame of a piece is the last one where time goes backwards.
    last, _ = viterbi(np.ascontiguousarray(log_probs[::-1]), flat[::-1])
    first = len(log_probs) - 1 - last[::-1]
    of_words = first[np.cumsum([0, *map(len, said[:-1])])]
    starts: list[float | None] = []
    n_before = 0
    for begin, rows in zip(segments, heard, strict=True):
        inside = of_words[(of_words >= n_before) & (of_words < n_before + len(rows))] - n_before
        n_before += len(rows)
        if not len(inside):
            starts.append(None)
            continue
        sample = begin + CTC_SAMPLES * int(inside[0]) - FRAME_SAMPLES - lead
        starts.append(max(sample, begin) / SAMPLE_RATE_HZ)
    return starts


def add_first(found: Aligned, take: Take, starts: Sequence[float | None]) -> None:
    """The delays of the first captions of segments that begin to be spoken at these seconds."""
    segment, is_written = -1, False
    for at, event in take.arrivals:
        if isinstance(event, messages.SpeechStarted):
            segment, is_written = segment + 1, False
        elif isinstance(event, messages.Final) and event.words and not is_written:
            is_written, start = True, starts[segment]
            if start is not None:
                found.first_heard.append(event.time - start)
                found.first_clock.append(at - start)


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
