"""Engine: audio of many streams in, events out; slots, workers, admission.

A caller opens a `Stream`, feeds PCM (S,) float32 at 16 kHz in packets of any size and reads events.
Where several threads may run the model at once, as on a CPU, there is a `Worker` for each of them
with an equal share of the slots, and a stream stays with the one that got it: threads inside of a
step of this size win little (docs/cpu-engine.md). Else one worker has them all.
"""

from __future__ import annotations

import sys
import threading
from typing import TYPE_CHECKING

from sparqle_stream.batch import Batch
from sparqle_stream.config import SAMPLE_RATE_HZ, EngineConfig, StreamOptions, n_cores
from sparqle_stream.errors import BusyError, ConfigError
from sparqle_stream.metrics import EngineMetrics
from sparqle_stream.stream import TURN_SAMPLES, Floats, Phase, Stream
from sparqle_stream.worker import Worker

if TYPE_CHECKING:
    from collections.abc import Callable

    from sparqle_stream import messages
    from sparqle_stream.models import Model
    from sparqle_stream.stream import OnEvent
    from sparqle_stream.worker import Slots

__all__ = ["Engine", "Phase", "Stream"]

# Of Python's threads in this process. A worker that comes back from a graph waits so long for one
# that computes in Python; with the default of 5 ms two cores held 6 live streams, with this 10.
SWITCH_S = 0.0005


class Engine:
    """One model, `cfg.n_slots` streams at a time."""

    def __init__(
        self,
        model: Model,
        cfg: EngineConfig | None = None,
        make_slots: Callable[[Model, int], Slots] = Batch,
    ) -> None:
        """`make_slots` is another `Batch` for tests: see `testing.oracle_engine`."""
        self.model = model
        self.cfg = cfg or EngineConfig()
        self._lock = threading.RLock()
        self._metrics = EngineMetrics(self.cfg.n_slots)
        self._is_closing = False
        n_workers = min(self.cfg.threads or n_cores(), self.cfg.n_slots)
        if model.is_shared and n_workers > 1:
            sys.setswitchinterval(min(SWITCH_S, sys.getswitchinterval()))
        shares = _shares(self.cfg.n_slots, n_workers if model.is_shared else 1)
        batches = [make_slots(model, n) for n in shares]  # all, before the first thread runs
        self.workers = [self._make_worker(b, n) for b, n in zip(batches, shares, strict=True)]

    def _make_worker(self, batch: Slots, n_rows: int) -> Worker:
        return Worker(self.model, self.cfg, batch, n_rows, self._lock, self._metrics)

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- callers' side ---------------------------------------------------------------------------

    def open(self, options: StreamOptions | None = None, on_event: OnEvent | None = None) -> Stream:
        """A stream with a slot of its own, `Ready` as first event. Raises BusyError.

        `on_event` is called from a worker's thread and must return quickly; without it events wait
        in `Stream.events`.
        """
        options = options or StreamOptions()
        if options.chunk_ms > 500 * self.cfg.backlog_s:  # a chunk could never become whole
            raise ConfigError(
                f"a backlog of {self.cfg.backlog_s:g} s is too short for chunks of "
                f"{options.chunk_ms} ms",
                hint="allow at least two chunks",
            )
        with self._lock:
            free = [worker for worker in self.workers if worker.free_rows]
            if self._is_closing or not free:
                self._metrics.streams_refused += 1
                raise BusyError(
                    "the engine is shutting down"
                    if self._is_closing
                    else f"all {self.cfg.n_slots} slots are taken",
                    hint="try again later, or start the engine with more slots",
                )
            self._metrics.streams_opened += 1
            self._metrics.n_streams += 1
            return min(free, key=lambda worker: len(worker.streams)).open(options, on_event)

    def transcribe(self, pcm: Floats, options: StreamOptions | None = None) -> list[messages.Event]:
        """All events of a whole recording (S,), as fast as the machine goes.

        Raises BusyError, and AudioFormatError for what is no PCM (S,); an Error event is the last
        of a stream that failed.
        """
        stream = self.open(options)
        n_packet = min(TURN_SAMPLES, int(self.cfg.backlog_s * SAMPLE_RATE_HZ) // 2)
        try:
            for start in range(0, len(pcm), n_packet):
                packet = pcm[start : start + n_packet]
                stream.wait_for_room(len(packet) / SAMPLE_RATE_HZ)
                stream.feed(packet)
            stream.finish()
            return list(stream.events())
        finally:
            stream.cancel()  # audio that was refused must not keep the slot

    def metrics(self) -> EngineMetrics:
        """A snapshot of the counters."""
        with self._lock:
            return self._metrics.copy()

    def close(self) -> None:
        """Ends every stream with an Error event and stops the workers. May be called twice.

        Waits for their threads, except in `on_event`, where one would wait for itself.
        """
        with self._lock:
            self._is_closing = True
        for worker in self.workers:
            worker.stop()
        if not any(worker.is_current for worker in self.workers):
            for worker in self.workers:
                worker.join()


def _shares(n_slots: int, n_workers: int) -> list[int]:
    """Slots of each worker: as equal as they can be."""
    return [(n_slots + i) // n_workers for i in range(n_workers)][::-1]
