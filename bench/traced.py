"""Traced: an engine that writes where its chunks spend their time into a `Trace`.

Of the detector a span for each turn; of each step of the batch: `begin` (segments begin, the LLM
reads their prefixes), every stage, and `words` (tokens become events). Contract: captions are those
of an engine without it; a span costs some microseconds.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from sparqle_stream.batch import Batch
from sparqle_stream.engine import Engine

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from contextlib import AbstractContextManager
    from typing import Any

    from bench.trace import Trace
    from sparqle_stream.config import EngineConfig
    from sparqle_stream.engine import Slots, Stream
    from sparqle_stream.models import Model
    from sparqle_stream.session import Session
    from sparqle_stream.stages import StepResult


def traced_engine(
    model: Model,
    cfg: EngineConfig,
    trace: Trace,
    make_slots: Callable[[Model, int], Slots] = Batch,
) -> Engine:
    """An engine whose worker writes into `trace`."""
    made: list[_TracedSlots] = []

    def make(model: Model, n_slots: int) -> Slots:
        made.append(_TracedSlots(make_slots(model, n_slots), trace))
        return made[0]

    return _TracedEngine(model, cfg, make, trace, made)


class _TracedSlots:
    """Slots whose steps are recorded. `began_at`, `ended_at`: the last one's."""

    def __init__(self, slots: Slots, trace: Trace) -> None:
        self._slots, self._trace = slots, trace
        self.began_at = self.ended_at = 0.0

    def working(self, threads: int) -> AbstractContextManager[Any]:
        return self._slots.working(threads)

    def state_bytes(self) -> int:
        return self._slots.state_bytes()

    def wipe(self, row: int) -> None:
        self._slots.wipe(row)

    def run(self, sessions: Mapping[int, Session]) -> StepResult:
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
        model: Model,
        cfg: EngineConfig,
        make_slots: Callable[[Model, int], Slots],
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
