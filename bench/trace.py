"""Trace: where each chunk's milliseconds go, for chrome://tracing or ui.perfetto.dev.

In: spans of seconds on one clock. Out: JSON in Chrome's trace event format. `traced_engine` is an
engine that records them: the detector; then, of each step of the batch, `begin` (segments begin,
the LLM reads their prefixes), every stage, and `words` (tokens become events). Contract: captions
are those of an engine without it; a span costs some microseconds.
"""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any

from sparqle_stream.batch import Batch
from sparqle_stream.engine import Engine

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from sparqle_stream.config import EngineConfig
    from sparqle_stream.engine import Slots, Stream
    from sparqle_stream.models import SparqleModel
    from sparqle_stream.pipeline import ChunkResult
    from sparqle_stream.session import Session

PROCESS, THREAD = 1, 1


class Trace:
    """Spans on one thread; they nest by their times."""

    def __init__(self, origin: float | None = None) -> None:
        """`origin` is the clock's second that becomes 0; now, if none is given."""
        self._origin = time.perf_counter() if origin is None else origin
        self._events: list[dict[str, Any]] = []

    def span(self, name: str, start: float, seconds: float, **facts: object) -> None:
        """Something that began when the clock said `start`."""
        self._add(name, start, facts, ph="X", dur=_microseconds(seconds))

    def mark(self, name: str, at: float, **facts: object) -> None:
        """A moment, such as that at which words left."""
        self._add(name, at, facts, ph="i", s="t")

    def stages(self, end: float, seconds: Mapping[str, float]) -> float:
        """Spans of stages that ran one after the other until `end` -> when the first began."""
        start = first = end - sum(seconds.values())
        for name, spent in seconds.items():
            self.span(name, start, spent)
            start += spent
        return first

    def write(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.as_json()) + "\n")

    def as_json(self) -> dict[str, Any]:
        """The document; events in the order of their beginnings, as viewers want them."""
        name = {"name": "thread_name", "ph": "M", "pid": PROCESS, "tid": THREAD}
        named = name | {"args": {"name": "sparqle-engine"}}
        events = sorted(self._events, key=lambda event: (event["ts"], -event.get("dur", 0.0)))
        return {"displayTimeUnit": "ms", "traceEvents": [named, *events]}

    def _add(self, name: str, start: float, facts: Mapping[str, object], **fields: object) -> None:
        event = {"name": name, "ts": _microseconds(start - self._origin)}
        self._events.append(event | {"pid": PROCESS, "tid": THREAD, "args": dict(facts)} | fields)


def _microseconds(seconds: float) -> float:
    return round(1e6 * seconds, 1)


def traced_engine(
    model: SparqleModel,
    cfg: EngineConfig,
    trace: Trace,
    make_slots: Callable[[SparqleModel, int], Slots] = Batch,
) -> Engine:
    """An engine whose worker writes into `trace`."""
    made: list[_TracedSlots] = []

    def make(model: SparqleModel, n_slots: int) -> Slots:
        made.append(_TracedSlots(make_slots(model, n_slots), trace))
        return made[0]

    return _TracedEngine(model, cfg, make, trace, made)


class _TracedSlots:
    """Slots whose steps are recorded. `began_at`, `ended_at`: the last one's."""

    def __init__(self, slots: Slots, trace: Trace) -> None:
        self._slots, self._trace = slots, trace
        self.began_at = self.ended_at = 0.0

    def wipe(self, row: int) -> None:
        self._slots.wipe(row)

    def run(self, sessions: Mapping[int, Session]) -> ChunkResult:
        self.began_at = time.perf_counter()
        result = self._slots.run(sessions)
        self.ended_at = time.perf_counter()
        first = self._trace.stages(self.ended_at, result.seconds)
        self._trace.span("begin", self.began_at, first - self.began_at)
        return result


class _TracedEngine(Engine):
    """Takes the times that the engine accounts for anyway; nothing in it is another engine's."""

    def __init__(
        self,
        model: SparqleModel,
        cfg: EngineConfig,
        make_slots: Callable[[SparqleModel, int], Slots],
        trace: Trace,
        made: list[_TracedSlots],
    ) -> None:
        self._trace, self._made = trace, made
        super().__init__(model, cfg, make_slots)

    def _account(self, seconds: dict[str, float], sessions: dict[Stream, Session]) -> None:
        now = time.perf_counter()
        if set(seconds) == {"vad"}:
            self._trace.span("vad", now - seconds["vad"], seconds["vad"])
        else:
            rows, step = sorted(stream.row for stream in sessions), self._made[0]
            self._trace.span("chunk", step.began_at, now - step.began_at, rows=rows)
            self._trace.span("words", step.ended_at, now - step.ended_at)
        super()._account(seconds, sessions)
