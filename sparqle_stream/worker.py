"""Worker: one thread, a batch of its own, and the streams whose audio it makes events of.

It runs the detector of every stream, batches all streams that have a whole chunk, steps the
pipeline once and hands out events. Only this file knows wall-clock time. Contract: a stream's words
and their times depend on its own audio and options alone, not on packet sizes, neighbours or speed;
`lag` and `compute_seconds` tell how the machine is doing. All workers of an engine share a lock,
which guards streams, inboxes, phases and metrics; nobody computes while holding it.

Times of events are stream seconds: `speech_started` where the segment's audio begins (pre-roll
included), `speech_stopped` where it ends, all others the stream time that had to be heard.
"""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from sparqle_stream import messages, vad
from sparqle_stream.config import SAMPLE_RATE_HZ, EngineConfig
from sparqle_stream.errors import (
    BacklogError,
    BusyError,
    ProtocolError,
    SparqleError,
    StepError,
)
from sparqle_stream.metrics import EngineMetrics, Histogram
from sparqle_stream.session import Session
from sparqle_stream.stream import Floats, Inbox, Mark, Phase, Stream
from sparqle_stream.vad import SegmentStart

if TYPE_CHECKING:
    from collections.abc import Mapping
    from contextlib import AbstractContextManager

    from sparqle_stream.config import StreamOptions
    from sparqle_stream.models import Model
    from sparqle_stream.stages import StepResult
    from sparqle_stream.stream import OnEvent

log = logging.getLogger(__name__)


class Slots(Protocol):
    """What a worker needs of `Batch`; `testing.OracleBatch` has it too."""

    def state_bytes(self) -> int: ...

    def working(self, threads: int) -> AbstractContextManager[Any]: ...

    def wipe(self, row: int) -> None: ...

    def run(self, sessions: Mapping[int, Session]) -> StepResult: ...


class Worker:
    """`n_rows` streams at a time."""

    def __init__(
        self,
        model: Model,
        cfg: EngineConfig,
        batch: Slots,
        n_rows: int,
        lock: threading.RLock,
        metrics: EngineMetrics,
    ) -> None:
        self.cfg = cfg
        self.batch = batch  # used by the thread only
        self.streams: dict[int, Stream] = {}  # by row
        self.free_rows = list(range(n_rows))[::-1]
        self._model = model
        self._metrics = metrics  # of all workers
        self._change = threading.Condition(lock)
        self._is_closing = False
        self._thread = threading.Thread(target=self._run, name="sparqle-worker", daemon=True)
        self._thread.start()

    # --- callers' side ---------------------------------------------------------------------------

    def open(self, options: StreamOptions, on_event: OnEvent | None) -> Stream:
        """A stream on one of the free rows; under the lock."""
        stream = Stream(self, self.free_rows.pop(), options, on_event)
        self.streams[stream.row] = stream
        self._change.notify_all()
        return stream

    def stop(self) -> None:
        """The thread will end every stream and itself."""
        with self._change:
            self._is_closing = True
            self._change.notify_all()

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def is_current(self) -> bool:
        """Whether it is its thread that asks."""
        return threading.current_thread() is self._thread

    def join(self) -> None:
        self._thread.join()

    def feed(self, stream: Stream, pcm: Floats) -> None:
        """For `Stream.feed`; pcm has been checked."""
        with self._change:
            if stream.phase is Phase.DRAINING:
                raise ProtocolError("audio after the end of the stream", hint="open a new stream")
            if stream.phase is not Phase.OPEN or len(pcm) == 0:
                return
            waiting_s = stream.taken_s + len(pcm) / SAMPLE_RATE_HZ
            if waiting_s <= self.cfg.backlog_s:
                stream.put(pcm)
                self._metrics.audio_seconds += len(pcm) / SAMPLE_RATE_HZ
                if stream.has_work:
                    self._change.notify_all()
                return
            self._metrics.backlogs += 1
            stream.phase = Phase.FAILED
            stream.failure = BacklogError(
                f"{waiting_s:.1f} s of audio are waiting, the limit is {self.cfg.backlog_s:g} s",
                hint="send audio no faster than it is spoken, or wait for room (wait_for_room)",
            )
            self._change.notify_all()
            raise stream.failure

    def mark(self, stream: Stream, mark: Mark) -> None:
        """For `Stream.flush` and `Stream.finish`."""
        with self._change:
            if stream.phase is not Phase.OPEN:
                return
            # In this order: who runs beside us takes a draining stream without anything for heard.
            stream.put(mark)
            if mark is Mark.FINISH:
                stream.phase = Phase.DRAINING
            self._change.notify_all()

    def cancel(self, stream: Stream) -> None:
        """For `Stream.cancel`."""
        if self._close_stream(stream):
            stream.end_events()

    def wait_for_room(self, stream: Stream, seconds: float, timeout: float | None) -> bool:
        """For `Stream.wait_for_room`."""
        wanted = min(seconds, self.cfg.backlog_s)

        def is_there() -> bool:
            if stream.phase is Phase.CLOSED or stream.room_s >= wanted:
                return True
            if stream.n_patient:  # what waits in the inbox is in the way
                stream.n_patient = 0
                self._change.notify_all()
            return False

        with self._change:
            return self._change.wait_for(is_there, timeout)

    def _close_stream(self, stream: Stream, *, is_failure: bool = False) -> bool:
        """Frees the slot; False when that was done before. The row is wiped at its next start."""
        with self._change:
            if stream.phase is Phase.CLOSED:
                return False
            stream.phase = Phase.CLOSED
            stream.drop_inbox()
            del self.streams[stream.row]
            self.free_rows.append(stream.row)
            self._metrics.n_streams -= 1
            self._metrics.streams_failed += is_failure
            self._change.notify_all()
        self._log_end(stream)
        return True

    def _log_end(self, stream: Stream) -> None:
        """One record per stream; no text and no audio in it."""
        steps = stream.session.step_seconds if stream.session else Histogram()
        log.info(
            "stream %s ended: audio %.2f s, %d chunks, compute %.2f s, step p50 %.1f p99 %.1f ms",
            stream.id,
            stream.n_received / SAMPLE_RATE_HZ,
            steps.n,
            stream.compute_seconds,
            1e3 * steps.quantile(0.5),
            1e3 * steps.quantile(0.99),
        )

    # --- the thread ------------------------------------------------------------------------------

    def _run(self) -> None:
        """The worker: until closing, take what came in, step, hand out events."""
        try:
            with self.batch.working(self.cfg.threads):
                while (work := self._wait_for_work()) is not None:
                    try:
                        self._tick(work)
                    except Exception as err:
                        log.exception("the worker failed between streams")
                        for stream, _ in work:
                            self._fail(stream, err)
        finally:  # whatever ends the thread: nobody waits for it for ever
            for stream in list(self.streams.values()):
                self._fail(stream, BusyError("the engine was closed", hint="open a new stream"))

    def _wait_for_work(self) -> list[tuple[Stream, Inbox]] | None:
        """All streams with what is in their inboxes; None when the engine closes."""
        with self._change:
            self._change.wait_for(
                lambda: self._is_closing or any(s.has_work for s in self.streams.values())
            )
            if self._is_closing:
                return None
            return [(stream, stream.take_inbox()) for stream in self.streams.values()]

    def _tick(self, work: list[tuple[Stream, Inbox]]) -> None:
        """Detectors of all streams, then at most one chunk of each, batched by shape."""
        sessions = self._admit(work)
        self._listen([(stream, items) for stream, items in work if stream in sessions], sessions)
        ready = [s for s in sessions if sessions[s].has_chunk and s.phase is not Phase.CLOSED]
        for shape in sorted({sessions[s].shape for s in ready}):
            self._step({s: sessions[s] for s in ready if sessions[s].shape == shape})
        for stream, session in sessions.items():
            if stream.is_all_heard and not session.has_chunk:
                self._finish(stream)

    def _admit(self, work: list[tuple[Stream, Inbox]]) -> dict[Stream, Session]:
        """The sessions of all streams that have not failed; new ones begin."""
        sessions: dict[Stream, Session] = {}
        for stream, _ in work:
            try:
                if stream.failure is not None:
                    raise stream.failure
                sessions[stream] = stream.session or self._begin(stream)
            except Exception as err:  # noqa: BLE001 - one stream's failure is its own
                self._fail(stream, err)
        return sessions

    def _begin(self, stream: Stream) -> Session:
        self._wipe(stream.row)
        options = stream.options
        stream.session = Session(self._model, options, self.cfg.context_words)
        ready = messages.Ready(
            stream.id, self._model.name, SAMPLE_RATE_HZ, options.chunk_ms, options.delay_ms
        )
        self._emit(stream, ready)
        return stream.session

    def _listen(self, work: list[tuple[Stream, Inbox]], sessions: dict[Stream, Session]) -> None:
        """Runs the detectors over what was received; those that fail leave `sessions`."""
        start = time.perf_counter()
        received = {
            stream: np.concatenate(parts)
            for stream, items in work
            if (parts := [item for item in items if not isinstance(item, Mark)])
        }
        try:
            vad.foresee([sessions[stream].asked(pcm) for stream, pcm in received.items()])
        except Exception:  # whose it is shows below, where each stream is judged alone
            log.debug("detectors failed together", exc_info=True)
        for stream, items in work:
            try:
                self._hear(stream, sessions[stream], items)
            except Exception as err:  # noqa: BLE001 - one stream's failure is its own
                del sessions[stream]
                self._fail(stream, err)
        if received:
            heard = {stream: sessions[stream] for stream in received if stream in sessions}
            self.account({"vad": time.perf_counter() - start}, heard)

    def _hear(self, stream: Stream, session: Session, items: Inbox) -> None:
        """What was received of one stream joins its queue."""
        for item in items:
            found = session.flush() if isinstance(item, Mark) else session.listen(item)
            with self._change:  # what leaves the inbox joins the queue in one go: room is exact
                session.enqueue(found)
                stream.n_inbox -= 0 if isinstance(item, Mark) else len(item)
                stream.n_patient = session.patience
                self._change.notify_all()  # silence makes room without a step
            stream.n_begun += sum(isinstance(event, SegmentStart) for event in found)
            if item is Mark.FLUSH:
                stream.flushes.append((stream.n_begun, stream.n_received - stream.n_inbox))
        for event in session.announce():
            self._emit(stream, event)
        self._tell_flushed(stream)

    def _step(self, sessions: dict[Stream, Session]) -> None:
        """One batched step for streams that have a chunk of the same shape."""
        start = time.perf_counter()
        try:
            result = self.batch.run({s.row: session for s, session in sessions.items()})
        except Exception as err:  # noqa: BLE001 - `Batch` knows which failures are one row's own
            self._fail_step(list(sessions), err)
            return
        for stream, session in sessions.items():
            try:
                if (own := result.failed.get(stream.row)) is not None:
                    raise own
                for event in session.take(result.tokens[stream.row]):
                    self._emit(stream, event)
            except Exception as err:  # noqa: BLE001 - one stream's failure is its own
                self._fail(stream, err)
        seconds = time.perf_counter() - start
        stages = result.seconds | {"captions": seconds - sum(result.seconds.values())}
        stages["captions"] += result.seconds.get("captions", 0.0)
        self.account(stages, sessions)
        with self._change:
            self._metrics.steps += 1
            self._metrics.failing_steps = 0
            self._metrics.chunks += len(sessions)
            self._metrics.step_seconds.add(seconds)
            for session in sessions.values():
                session.step_seconds.add(seconds)
                self._metrics.add_counts(session.counts)
            self._change.notify_all()  # there is room for more audio

    def _wipe(self, row: int) -> None:
        try:
            self.batch.wipe(row)
        except Exception:  # the device itself: whoever comes next will not fare better
            self._count_failure()
            raise

    def _fail_step(self, streams: list[Stream], err: Exception) -> None:
        """Ends all streams of a step. State is written in place: no row may be heard again."""
        self._count_failure()
        if not isinstance(err, SparqleError):
            log.error("a step of %d streams failed", len(streams), exc_info=err)
            err = StepError(
                f"a step of {len(streams)} streams failed: {type(err).__name__}: {err}",
                hint="open a new stream; if it happens again, please report it",
            )
        for stream in streams:
            self._fail(stream, err)

    def _count_failure(self) -> None:
        with self._change:
            self._metrics.steps_failed += 1
            self._metrics.failing_steps += 1

    def account(self, seconds: dict[str, float], sessions: dict[Stream, Session]) -> None:
        """Wall clock per stage, shared evenly by the streams it was spent on."""
        with self._change:
            self._metrics.add_stages(seconds)
            for stream in sessions:
                stream.compute_seconds += sum(seconds.values()) / len(sessions)

    def _finish(self, stream: Stream) -> None:
        duration = stream.n_received / SAMPLE_RATE_HZ
        done = messages.Done(duration, stream.compute_seconds, duration)
        if self._close_stream(stream):  # first: who hears of it may open the next stream at once
            self._hand_out(stream, done)

    def _fail(self, stream: Stream, err: Exception) -> None:
        """Ends a stream with an Error event; a SparqleError speaks for itself, others are bugs."""
        if isinstance(err, SparqleError):
            code, message, hint = err.code, err.message, err.hint
        else:
            log.error("stream %s failed", stream.id, exc_info=err)
            code, message, hint = "internal", f"{type(err).__name__}: {err}", "please report it"
        if self._close_stream(stream, is_failure=True):
            now = stream.n_received / SAMPLE_RATE_HZ
            self._hand_out(stream, messages.Error(code, message, hint, now))

    def _emit(self, stream: Stream, event: messages.Event) -> None:
        """Hands an event out with the stream's lag; what a closed stream would say is dropped."""
        if stream.phase is Phase.CLOSED:
            return
        heard = stream.session.position if stream.session else 0
        lag = 0.0 if stream.is_idle else max(0, stream.n_received - heard) / SAMPLE_RATE_HZ
        self._hand_out(stream, replace(event, lag=lag))
        if isinstance(event, messages.SpeechStopped):
            stream.n_complete += 1
            self._tell_flushed(stream)

    def _tell_flushed(self, stream: Stream) -> None:
        """Answers every flush before which no segment is left that has words to give."""
        while stream.flushes and stream.flushes[0][0] <= stream.n_complete:
            n_heard = stream.flushes.popleft()[1]
            self._emit(stream, messages.Flushed(n_heard / SAMPLE_RATE_HZ))

    def _hand_out(self, stream: Stream, event: messages.Event) -> None:
        try:
            stream.hand_out(event)
        except BaseException:  # sys.exit() too: the thread is that of other streams as well
            log.exception("on_event of stream %s failed; the stream is cancelled", stream.id)
            self.cancel(stream)
