"""Traced: an engine that writes where its chunks spend their time into a `Trace`.

Of the detector a span for each turn; of each step of the batch: `begin` (segments begin, the LLM
reads their prefixes), every stage, and `words` (tokens become events). Contract: captions are those
of an engine without it; a span costs some microseconds.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from sparqle_stream.batch import Batch
from sparqle_stream.engine import Engine
from sparqle_stream.worker import Worker

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from contextlib import AbstractContextManager

    from bench.trace import Trace
    from sparqle_stream.config import EngineConfig
    from sparqle_stream.engine import Stream
    from sparqle_stream.models import Model
    from sparqle_stream.session import Session
    from sparqle_stream.stages import StepResult
    from sparqle_stream.worker import Slots


def traced_engine(
    model: Model,
    cfg: EngineConfig,
    trace: Trace,
    make_slots: Callable[[Model, int], Slots] = Batch,
) -> Engine:
    """An engine whose workers write into `trace`."""
    return _TracedEngine(model, cfg, lambda *which: _TracedSlots(make_slots(*which), trace), trace)


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


class _TracedWorker(Worker):
    """Takes the times that a worker accounts for anyway; nothing in it is another worker's."""

    def __init__(self, trace: Trace, step: _TracedSlots, *given: Any) -> None:  # noqa: ANN401 - a worker's
        self._trace, self._step_times = trace, step
        super().__init__(*given)

    def account(self, seconds: dict[str, float], sessions: dict[Stream, Session]) -> None:
        now = time.perf_counter()
        if set(seconds) == {"vad"}:
            self._trace.span("vad", now - seconds["vad"], seconds["vad"])
        else:
            rows, step = sorted(stream.row for stream in sessions), self._step_times
            self._trace.span("chunk", step.began_at, now - step.began_at, rows=rows)
            self._trace.span("words", step.ended_at, now - step.ended_at)
        super().account(seconds, sessions)


class _TracedEngine(Engine):
    def __init__(
        self,
        model: Model,
        cfg: EngineConfig,
        make_slots: Callable[[Model, int], _TracedSlots],
        trace: Trace,
    ) -> None:
        self._trace = trace
        super().__init__(model, cfg, make_slots)

    def _make_worker(self, batch: Slots, n_rows: int) -> Worker:
        assert isinstance(batch, _TracedSlots)
        given = (self.model, self.cfg, batch, n_rows, self._lock, self._metrics)
        return _TracedWorker(self._trace, batch, *given)
