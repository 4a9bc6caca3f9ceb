"""Delays: events with the second at which each was there -> how long people waited, in seconds.

Times are seconds of the stream: second t of the stream is spoken t seconds after its start, so a
wall-clock arrival since the start can be compared with it. Given `Event.time` as arrival a delay is
algorithmic (what had to be heard); given a clock's it has the computing in it.

Where a word begins and ends is the engine's own CTC path (`Word.start`, `Word.end`, 40 ms steps),
not an independent aligner's. So the first word of a segment is the first that was written: one that
was missed before it makes the wait look shorter. bench.aligned counts from the first that was said.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from sparqle_stream import messages

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from sparqle_stream.messages import Event

PERCENTILES = (50, 90, 95, 99)
FEWEST = {"p95": 20, "p99": 100}  # values that have one above it; of fewer it is not shown
Percentiles = dict[str, float | int | None]


@dataclass(slots=True)
class Delays:
    """Seconds, one entry a word or a segment of speech."""

    emission: list[float] = field(default_factory=list)  # end of a word -> the word
    first_word: list[float] = field(default_factory=list)  # start of a segment's first word -> it
    end_to_final: list[float] = field(default_factory=list)  # end of its last word -> last final
    n_without_words: int = 0  # segments for which nothing was written: they waited for nothing

    def extend(self, other: Delays) -> None:
        self.emission += other.emission
        self.first_word += other.first_word
        self.end_to_final += other.end_to_final
        self.n_without_words += other.n_without_words

    @property
    def n_unsure(self) -> int:
        """Words that claim to have ended when they left: no ear is so quick, so the end is a guess.

        They make the percentiles look better than they are; many of them make them worthless.
        """
        return sum(delay <= 0.0 for delay in self.emission)

    def summary(self) -> dict[str, Percentiles]:
        return {
            "emission_ms": percentiles_ms(self.emission),
            "first_word_ms": percentiles_ms(self.first_word),
            "end_of_speech_to_final_ms": percentiles_ms(self.end_to_final),
        }


def measure(arrivals: Iterable[tuple[float, Event]]) -> Delays:
    """(arrival, event) of one stream -> its delays. A segment ends with SpeechStopped, or Done."""
    delays = Delays()
    last: tuple[float, float] | None = None  # arrival of the segment's last final, end of its word
    is_open = False  # a segment has begun
    for arrival, event in arrivals:
        if isinstance(event, messages.Final) and event.words:
            delays.emission += [arrival - word.end for word in event.words]
            if last is None:
                delays.first_word.append(arrival - event.words[0].start)
            last = arrival, event.words[-1].end
        elif isinstance(event, messages.SpeechStarted):
            is_open = True
        elif isinstance(event, messages.SpeechStopped | messages.Done):
            if last is not None:
                delays.end_to_final.append(last[0] - last[1])
            elif is_open:
                delays.n_without_words += 1
            last, is_open = None, False
    return delays


def algorithmic(events: Iterable[Event]) -> Delays:
    """Delays of one stream in stream time: what had to be heard, on a machine of any speed."""
    return measure((event.time, event) for event in events)


def percentiles_ms(seconds: Sequence[float]) -> Percentiles:
    """n, p50 .. p99 and max in ms; linear between the two nearest values, None without values."""
    figures: Percentiles = {"n": len(seconds)}
    for p in PERCENTILES:
        value = 1000 * float(np.percentile(seconds, p)) if seconds else None
        figures[f"p{p}"] = None if value is None else round(value, 1)
    figures["max"] = round(1000 * max(seconds), 1) if seconds else None
    return figures
