"""Counters of an engine and the histogram behind its percentiles; fixed size however long it runs.

`EngineMetrics` is a snapshot: `Engine.metrics()` hands out copies, nothing in it is live.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections import Counter

# Upper edges of the buckets, seconds: 0.25 ms .. 16 s, a factor of sqrt(2) apart; one more is open.
BUCKET_EDGES_S = tuple(0.00025 * 2 ** (i / 2) for i in range(33))


@dataclass(slots=True)
class Histogram:
    """Durations in buckets of constant relative width."""

    counts: list[int] = field(default_factory=lambda: [0] * (len(BUCKET_EDGES_S) + 1))
    total_s: float = 0.0
    max_s: float = 0.0

    def add(self, seconds: float) -> None:
        self.counts[_bucket(seconds)] += 1
        self.total_s += seconds
        self.max_s = max(self.max_s, seconds)

    @property
    def n(self) -> int:
        return sum(self.counts)

    def quantile(self, share: float) -> float:
        """Upper edge of the bucket in which the quantile lies, at most the maximum; 0 if empty."""
        wanted, seen = share * self.n, 0
        for count, edge in zip(self.counts, BUCKET_EDGES_S, strict=False):
            seen += count
            if count and seen >= wanted:
                return min(edge, self.max_s)
        return self.max_s

    def copy(self) -> Histogram:
        return Histogram(list(self.counts), self.total_s, self.max_s)


def _bucket(seconds: float) -> int:
    for i, edge in enumerate(BUCKET_EDGES_S):
        if seconds <= edge:
            return i
    return len(BUCKET_EDGES_S)


@dataclass(slots=True)
class EngineMetrics:
    """What an engine did since it was made."""

    n_slots: int
    n_streams: int = 0  # open now
    streams_opened: int = 0
    streams_refused: int = 0  # no slot was free
    streams_failed: int = 0  # ended by an Error event
    backlogs: int = 0  # of these, because the backlog was full
    steps: int = 0  # batched steps
    steps_failed: int = 0  # ended by an error that was nobody's own: all their streams failed
    failing_steps: int = 0  # of these, since the last one that went well
    chunks: int = 0  # rows of all steps
    seams: int = 0  # long segments cut without a pause
    loops_stopped: int = 0  # repeated n-grams that ended a segment's text
    speech_without_text: int = 0  # warnings of that kind
    audio_seconds: float = 0.0  # received
    step_seconds: Histogram = field(default_factory=Histogram)
    stage_seconds: dict[str, float] = field(default_factory=dict)  # total per stage

    def add_stages(self, seconds: dict[str, float]) -> None:
        for stage, spent in seconds.items():
            self.stage_seconds[stage] = self.stage_seconds.get(stage, 0.0) + spent

    def add_counts(self, counts: Counter[str]) -> None:
        """Adds what a session counted and empties its counter."""
        self.seams += counts.pop("seams", 0)
        self.loops_stopped += counts.pop("loops_stopped", 0)
        self.speech_without_text += counts.pop("speech_without_text", 0)

    def copy(self) -> EngineMetrics:
        fields = {name: getattr(self, name) for name in self.__slots__}
        fields["step_seconds"] = self.step_seconds.copy()
        fields["stage_seconds"] = dict(self.stage_seconds)
        return EngineMetrics(**fields)
