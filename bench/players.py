"""Players: a recording in 20 ms packets through the engine -> what came out when, what it cost.

`play` keeps to the clock: packet n is fed once its last sample is spoken, and events are stamped
with the wall clock by the engine's own thread. `play_virtual` runs the same session and batch in
one thread, as fast as they go, and keeps the books of the queue that a live engine would have: a
chunk begins when it is heard and the one before is done. Words and stream times are the same, and
so is the compute per chunk; what is missing are the delays that the operating system adds.
`play_remote` speaks to a server's /v1/stream and stamps events when they arrive here.
"""

from __future__ import annotations

import asyncio
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from sparqle_stream import messages
from sparqle_stream.batch import Batch
from sparqle_stream.config import SAMPLE_RATE_HZ
from sparqle_stream.errors import SparqleError
from sparqle_stream.session import Session

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping

    import numpy as np
    import numpy.typing as npt

    from bench.trace import Trace
    from sparqle_stream.config import EngineConfig, StreamOptions
    from sparqle_stream.engine import Engine
    from sparqle_stream.metrics import EngineMetrics
    from sparqle_stream.models import Model

    Pcm = npt.NDArray[np.float32]
    Progress = Callable[[float], None]  # takes seconds of audio that were played

PACKET_SAMPLES = SAMPLE_RATE_HZ // 50
DONE_TIMEOUT_S = 120.0
VAD = "vad"  # the stage that runs outside of chunks


class TakeError(SparqleError):
    """A stream failed or never ended: its recording was not played."""

    code = "internal"


@dataclass(slots=True)
class Take:
    """One recording, played. Times are seconds since the stream began."""

    arrivals: list[tuple[float, messages.Event]] = field(default_factory=list)
    chunk_seconds: list[float] = field(default_factory=list)  # wall clock of each step
    stage_seconds: dict[str, float] = field(default_factory=dict)  # wall clock of all steps
    stage_chunks: dict[str, list[float]] = field(default_factory=dict)  # and of each, but the vad's
    duration: float = 0.0
    compute_seconds: float = 0.0
    late_s: float = 0.0  # how late the latest packet was fed; a busy machine's fault

    @property
    def events(self) -> list[messages.Event]:
        return [event for _, event in self.arrivals]


def packets(pcm: Pcm) -> Iterator[Pcm]:
    for start in range(0, len(pcm), PACKET_SAMPLES):
        yield pcm[start : start + PACKET_SAMPLES]


class StepMeter:
    """Wall clock of single steps, from the engine's counters.

    Read it at least once a chunk: of steps that ended between two readings it knows the mean only.
    """

    def __init__(self, metrics: Callable[[], EngineMetrics]) -> None:
        self._metrics = metrics
        self._last = self._first = metrics()
        self.chunk_seconds: list[float] = []
        self.stage_chunks: dict[str, list[float]] = {}

    def read(self) -> None:
        now = self._metrics()
        if n := now.steps - self._last.steps:
            spent = now.step_seconds.total_s - self._last.step_seconds.total_s
            self.chunk_seconds += [spent / n] * n
            for stage, total in now.stage_seconds.items():
                if stage != VAD:  # it hears packets, not chunks
                    mean = (total - self._last.stage_seconds.get(stage, 0.0)) / n
                    self.stage_chunks.setdefault(stage, []).extend([mean] * n)
            self._last = now

    def fill(self, take: Take) -> None:
        """Everything that was read goes into a take."""
        take.chunk_seconds, take.stage_chunks = self.chunk_seconds, self.stage_chunks
        take.stage_seconds = self.stages()

    def stages(self) -> dict[str, float]:
        """Seconds per stage since the meter was made."""
        before = self._first.stage_seconds
        return {
            name: s - before.get(name, 0.0) for name, s in self._metrics().stage_seconds.items()
        }


def play(
    engine: Engine,
    pcm: Pcm,
    options: StreamOptions,
    progress: Progress = lambda seconds: None,
    clock: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], None] = time.sleep,
) -> Take:
    """pcm (S,) at the speed of speech through an engine that has no other stream.

    Raises TakeError for a stream that fails, or is not done in time; its slot is free then.
    """
    take, is_done, meter = Take(), threading.Event(), StepMeter(engine.metrics)
    start = clock()

    def on_event(event: messages.Event) -> None:
        take.arrivals.append((clock() - start, event))
        if isinstance(event, messages.Done | messages.Error):
            is_done.set()

    stream = engine.open(options, on_event)
    n_fed = 0
    try:
        for packet in packets(pcm):
            n_fed += len(packet)
            wait_s = start + n_fed / SAMPLE_RATE_HZ - clock()
            if wait_s > 0:
                sleep(wait_s)
            take.late_s = max(take.late_s, -wait_s)
            stream.feed(packet)
            progress(len(packet) / SAMPLE_RATE_HZ)
            meter.read()
        stream.finish()
        while not is_done.wait(PACKET_SAMPLES / SAMPLE_RATE_HZ):
            meter.read()
            if clock() - start > n_fed / SAMPLE_RATE_HZ + DONE_TIMEOUT_S:
                raise TakeError(f"not done {DONE_TIMEOUT_S:g} s after the last packet")
    finally:
        stream.cancel()  # whatever happened, the next recording needs the slot
    meter.read()
    meter.fill(take)
    return _ended(take)


def _ended(take: Take) -> Take:
    """With what its last event says. Raises TakeError for a stream that failed."""
    last = take.arrivals[-1][1] if take.arrivals else None
    if not isinstance(last, messages.Done):
        raise TakeError(f"the stream failed: {last}")
    take.duration, take.compute_seconds = last.duration, last.compute_seconds
    return take


def play_remote(
    url: str,
    pcm: Pcm,
    query: Mapping[str, str | int],
    api_key: str = "",
    progress: Progress = lambda seconds: None,
    metrics: Callable[[], EngineMetrics] | None = None,
) -> Take:
    """pcm (S,) at the speed of speech to a server; `metrics` if its engine is in this process.

    Raises ServerError for a server that is not there, or refuses; TakeError for a failed stream.
    """
    return asyncio.run(_play_remote(url, pcm, query, api_key, progress, metrics))


async def _play_remote(
    url: str,
    pcm: Pcm,
    query: Mapping[str, str | int],
    api_key: str,
    progress: Progress,
    metrics: Callable[[], EngineMetrics] | None,
) -> Take:
    from bench.targets import Outcome, paced
    from sparqle_stream import client

    take, pace, meter = Take(), Outcome(), metrics and StepMeter(metrics)

    async def blocks() -> AsyncIterator[Pcm]:
        async for packet in paced(packets(pcm), pace):
            yield packet
            progress(len(packet) / SAMPLE_RATE_HZ)
            if meter:
                meter.read()

    async for event in client.stream(url, blocks(), options=query, api_key=api_key):
        since = pace.began_at or time.perf_counter()  # nothing was spoken before the first packet
        take.arrivals.append((time.perf_counter() - since, event))
    if meter:
        meter.read()
        meter.fill(take)
    take.late_s = pace.late_s
    return _ended(take)


class VirtualEngine:
    """One stream at a time in the caller's thread, on a clock that only computing moves."""

    def __init__(self, model: Model, cfg: EngineConfig, trace: Trace | None = None) -> None:
        """`trace` gets the spans of all streams, one stream after the other, from second 0 on."""
        self._model, self._cfg = model, cfg
        self._trace, self._trace_end = trace, 0.0
        self._batch = Batch(model, 1)

    def play(
        self,
        pcm: Pcm,
        options: StreamOptions,
        progress: Progress = lambda seconds: None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> Take:
        """pcm (S,) -> what `play` would give on a machine with nothing else to do."""
        session = Session(self._model, options, self._cfg.context_words)
        run = _VirtualRun(self._batch, session, clock)
        try:
            with self._batch.working(self._cfg.threads):
                self._batch.wipe(0)
                for packet in packets(pcm):
                    run.hear(packet)
                    progress(len(packet) / SAMPLE_RATE_HZ)
                run.finish()
        except RuntimeError as err:  # of a step; a live engine says it with an event
            raise TakeError(f"the stream failed: {err}") from err
        if self._trace is not None:
            run.write(self._trace, self._trace_end)
            self._trace_end += run.take.arrivals[-1][0]
        return run.take


class _VirtualRun:
    """The books of one virtual stream. `_free_at`: when the one worker is free again."""

    def __init__(self, batch: Batch, session: Session, clock: Callable[[], float]) -> None:
        self.take = Take()
        self._batch, self._session, self._clock = batch, session, clock
        self._n_heard = 0
        self._free_at = 0.0
        self._events: list[messages.Event] = []  # of the last chunk
        self._parts: dict[str, float] = {}  # seconds of the last chunk, in their order
        self._spans: list[tuple[str, float, float, dict[str, float]]] = []

    def hear(self, packet: Pcm) -> None:
        """The packet arrives with its last sample; the detector and full chunks run."""
        self._n_heard += len(packet)
        self.take.duration = self._n_heard / SAMPLE_RATE_HZ
        self._do(VAD, lambda: self._session.enqueue(self._session.listen(packet)))
        self._work()

    def finish(self) -> None:
        self._do(VAD, lambda: self._session.enqueue(self._session.flush()))
        self._work()
        duration = self.take.duration
        done = messages.Done(duration, self.take.compute_seconds, duration)
        self.take.arrivals.append((self._free_at, done))

    def write(self, trace: Trace, origin: float) -> None:
        """All spans, with the stages of each chunk; second 0 of the stream is `origin`."""
        for what, start, spent, parts in self._spans:
            trace.span(what, origin + start, spent)
            trace.stages(origin + start + spent, parts)

    def _work(self) -> None:
        self._arrive(self._session.announce())
        while self._session.has_chunk:
            spent = self._do("chunk", self._step)
            self.take.chunk_seconds.append(spent)
            self._arrive(self._events)

    def _step(self) -> None:
        begin = self._clock()
        result = self._batch.run({0: self._session})
        ran = self._clock()
        self._events = list(self._session.take(result.tokens[0]))
        end, inside = self._clock(), sum(result.seconds.values())
        outside = end - begin - inside
        self._parts = {"begin": ran - begin - inside} | result.seconds | {"words": end - ran}
        of_chunk = result.seconds | {"captions": result.seconds.get("captions", 0.0) + outside}
        stages, chunks = self.take.stage_seconds, self.take.stage_chunks
        for stage, seconds in of_chunk.items():
            stages[stage] = stages.get(stage, 0.0) + seconds
            chunks.setdefault(stage, []).append(seconds)

    def _do(self, what: str, work: Callable[[], object]) -> float:
        """Runs work at the stream second at which a live engine would: seconds it took."""
        begin = self._clock()
        work()
        spent = self._clock() - begin
        start = max(self._free_at, self.take.duration)
        self._free_at = start + spent
        self._spans.append((what, start, spent, self._parts if what == "chunk" else {}))
        self.take.compute_seconds += spent
        if what == VAD:
            stages = self.take.stage_seconds
            stages[VAD] = stages.get(VAD, 0.0) + spent
        return spent

    def _arrive(self, events: Iterable[messages.Event]) -> None:
        self.take.arrivals += [(self._free_at, event) for event in events]
