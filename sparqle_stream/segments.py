"""Segments: the audio of detected speech, cut into chunks of one size.

In: where segments begin, pause and end, PCM (S,) between. Out: chunks (S,), the first with the
segment's first sample, the last padded with zeros so that look-ahead and delay are through, as far
as there is no silence at its end. A chunk carries `known_at`, how much of the stream had to be
heard before it was there, which the detector's hesitation makes later than its own end for the
first, and whether somebody speaks then; the first has all that was heard of the segment by then
(`lead`). Latency: a chunk leaves with its last sample.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Chunk:
    pcm: Floats  # (S,) with zeros after the segment's end
    origin: int  # stream sample at which its segment begins
    start: int  # stream sample at which it begins itself
    known_at: int  # stream samples that had to arrive
    segment_end: int | None  # stream sample at which the segment ends; set on its last chunk
    is_paused: bool = False  # nobody speaks at `known_at`
    lead: Floats | None = None  # (L,) heard of its segment when that was known of; on the first

    @property
    def is_first(self) -> bool:
        return self.start == self.origin

    @property
    def end(self) -> int:
        """Stream sample after its last one, padding included."""
        return self.start + len(self.pcm)


@dataclass(slots=True)
class _Segment:
    origin: int
    begun_at: int  # stream samples that had to arrive to know of it
    parts: deque[Floats] = field(default_factory=deque)  # heard, not in a chunk yet
    n_heard: int = 0
    n_taken: int = 0  # padding included
    n_total: int | None = None  # padding included; None while the segment is open
    ended_at: int = 0
    is_paused: bool = False  # at the end of the last chunk
    pauses: deque[tuple[int, bool]] = field(default_factory=deque)  # known later: when, on or off

    @property
    def n_new(self) -> int:
        """Samples that wait, without those that were heard before it was known of."""
        return max(0, self.n_heard - max(self.n_taken, self.begun_at - self.origin))

    def lead(self) -> Floats:
        """(L,) what had been heard of it when it was known of, before anything is taken."""
        nothing = np.zeros(0, np.float32)
        return np.concatenate([nothing, *self.parts])[: self.begun_at - self.origin]

    def take(self, n: int) -> Floats:
        """The next n samples; zeros where nothing was heard."""
        out, filled = np.zeros(n, np.float32), 0
        while filled < n and self.parts:
            part = self.parts.popleft()
            used = min(len(part), n - filled)
            out[filled : filled + used] = part[:used]
            filled += used
            if used < len(part):
                self.parts.appendleft(part[used:])
        self.n_taken += n
        return out

    def known_at(self, n: int) -> int:
        """Stream samples that had to arrive for the first n samples, padding included."""
        if n > self.n_heard:
            return self.ended_at
        return max(self.begun_at, self.origin + n)

    def is_paused_at(self, known_at: int) -> bool:
        """Asked in order."""
        while self.pauses and self.pauses[0][0] <= known_at:
            _, self.is_paused = self.pauses.popleft()
        return self.is_paused


class SegmentQueue:
    """Segments in, chunks out, in order. Holds what is waiting and nothing else."""

    def __init__(self, chunk_samples: int, pad_samples: int) -> None:
        self.chunk_samples = chunk_samples
        self.pad_samples = pad_samples  # look-ahead and delay
        # Heard samples that are in no chunk yet, and those of them that are none of a segment's
        # lead: a count that grows with what is heard and not when it turns out to be speech.
        self.n_waiting = self.n_new = 0  # other threads may read them
        self._segments: deque[_Segment] = deque()

    def begin(self, origin: int, known_at: int) -> None:
        """A segment begins at stream sample `origin`; that was known after `known_at` samples."""
        self._segments.append(_Segment(origin, known_at))

    def append(self, pcm: Floats) -> None:
        """pcm (S,) of the open segment."""
        segment = self._segments[-1]
        n_new = segment.n_new
        segment.parts.append(pcm)
        segment.n_heard += len(pcm)
        self.n_waiting += len(pcm)
        self.n_new += segment.n_new - n_new

    def pause(self, known_at: int, *, is_on: bool) -> None:
        """Whether somebody speaks in the open segment, known after `known_at` samples."""
        self._segments[-1].pauses.append((known_at, is_on))

    def end(self, known_at: int, n_quiet: int = 0) -> None:
        """The open segment's last `n_quiet` samples are as good as padding."""
        segment = self._segments[-1]
        # A sample at least: the last chunk must not be complete before it is known to be the last.
        total = segment.n_heard + max(1, self.pad_samples - n_quiet)
        segment.n_total = total + -total % self.chunk_samples
        segment.ended_at = known_at

    @property
    def is_open(self) -> bool:
        return bool(self._segments) and self._segments[-1].n_total is None

    @property
    def has_chunk(self) -> bool:
        if not self._segments:
            return False
        first = self._segments[0]
        return (first.n_total or first.n_heard) - first.n_taken >= self.chunk_samples

    @property
    def n_missing(self) -> int:
        """Samples that the open segment's next chunk lacks: all of it where none is open."""
        if not self.is_open:
            return self.chunk_samples
        segment = self._segments[-1]
        return self.chunk_samples - (segment.n_heard - segment.n_taken) % self.chunk_samples

    @property
    def first_origin(self) -> int | None:
        """Where the segment begins whose chunks are next; None when there is none."""
        return self._segments[0].origin if self._segments else None

    def next_chunk(self) -> Chunk:
        segment = self._segments[0]
        start, n_new = segment.n_taken, segment.n_new
        lead = None if start else segment.lead()
        pcm = segment.take(self.chunk_samples)
        self.n_waiting -= max(0, min(segment.n_taken, segment.n_heard) - start)
        self.n_new += segment.n_new - n_new
        known_at = segment.known_at(segment.n_taken)
        is_last = segment.n_taken == segment.n_total
        if is_last:
            self._segments.popleft()
        return Chunk(
            pcm=pcm,
            origin=segment.origin,
            start=segment.origin + start,
            known_at=known_at,
            segment_end=segment.origin + segment.n_heard if is_last else None,
            is_paused=segment.is_paused_at(known_at),
            lead=lead,
        )
