"""Stream: one caller's side of the engine; audio in from any thread, events out in order.

Holds what was received and not heard yet, and where events go. What happens to it is decided by
its `worker.Worker`, under whose lock the methods of the worker's side are called.
"""

from __future__ import annotations

import queue
import uuid
from collections import deque
from enum import Enum
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from sparqle_stream import messages
from sparqle_stream.config import SAMPLE_RATE_HZ
from sparqle_stream.errors import AudioFormatError, ProtocolError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sparqle_stream.config import StreamOptions
    from sparqle_stream.errors import SparqleError
    from sparqle_stream.session import Session
    from sparqle_stream.worker import Worker

    OnEvent = Callable[[messages.Event], None]

Floats = npt.NDArray[np.float32]
TURN_SAMPLES = SAMPLE_RATE_HZ  # of one stream that the worker hears at a time


class Phase(Enum):
    OPEN = "open"  # takes audio
    DRAINING = "draining"  # finish() was called: what was sent is still captioned
    FAILED = "failed"  # audio was refused; the worker will say so
    CLOSED = "closed"  # Done, Error or cancelled: the slot is free


class Mark(Enum):
    """What travels between packets in a stream's inbox."""

    FLUSH = "flush"
    FINISH = "finish"


Inbox = list[Floats | Mark]


class Stream:
    """One caller's stream; made by `Engine.open`. Its methods may be called from any thread."""

    def __init__(
        self, worker: Worker, row: int, options: StreamOptions, on_event: OnEvent | None
    ) -> None:
        self.id = uuid.uuid4().hex[:12]
        self.options = options
        self.row = row
        self.phase = Phase.OPEN
        self.n_received = 0
        self.compute_seconds = 0.0
        self.session: Session | None = None  # made and used by the worker
        self.failure: SparqleError | None = None
        self._worker = worker
        self._inbox: deque[Floats | Mark] = deque()
        self._n_marks = 0  # in there
        self.n_inbox = 0  # samples that the detector has not heard
        self.n_patient = 0  # so few of them may wait: nothing that follows from them is due
        self.n_begun = 0  # segments that the detector has found
        self.n_complete = 0  # of these, whose words are all out
        self.flushes: deque[tuple[int, int]] = deque()  # n_begun and samples heard at each flush
        self._on_event = on_event
        self._queue: queue.SimpleQueue[messages.Event | None] = queue.SimpleQueue()

    def feed(self, pcm: Floats) -> None:
        """Takes PCM (S,) at 16 kHz. Raises BacklogError when too much is waiting, and only once:
        the stream then ends with an Error event.

        Audio for a stream that the engine has ended is dropped: its last event said why.
        """
        self._worker.feed(self, checked(pcm))

    def flush(self) -> None:
        """Ends the open segment now, so that its last words come out, then `Flushed`; the stream
        goes on."""
        self._worker.mark(self, Mark.FLUSH)

    def finish(self) -> None:
        """No more audio: what was sent is captioned, then `Done` frees the slot."""
        self._worker.mark(self, Mark.FINISH)

    def cancel(self) -> None:
        """Frees the slot at once. No event follows, not even for audio that was sent, but for one
        that is being handed out."""
        self._worker.cancel(self)

    def events(self, timeout: float | None = None) -> Iterator[messages.Event]:
        """Events in order, up to and including Done or Error.

        Ends early when the stream is cancelled or nothing came for `timeout` seconds; calling it
        again goes on from there. Not for streams that were opened with `on_event`.
        """
        if self._on_event is not None:
            raise ProtocolError("this stream reports to on_event", hint="open it without on_event")
        while True:
            try:
                event = self._queue.get(timeout=timeout)
            except queue.Empty:
                return
            if event is None:
                self._queue.put(None)  # for the next call
                return
            yield event

    def wait_for_room(self, seconds: float, timeout: float | None = None) -> bool:
        """Blocks until `seconds` of audio fit or the stream has ended; False on timeout."""
        return self._worker.wait_for_room(self, seconds, timeout)

    @property
    def backlog_s(self) -> float:
        """Seconds of audio that were received and are not captioned yet; at most, for who asks
        without the lock."""
        n_inbox = self.n_inbox  # first: the worker moves audio from there to the session
        return (n_inbox + (self.session.n_waiting if self.session else 0)) / SAMPLE_RATE_HZ

    @property
    def taken_s(self) -> float:
        """Seconds of the backlog's room that are taken; at most, likewise."""
        n_inbox = self.n_inbox
        return (n_inbox + (self.session.n_new if self.session else 0)) / SAMPLE_RATE_HZ

    @property
    def room_s(self) -> float:
        """Seconds of audio that `feed` would take now; less only after `feed`."""
        return max(0.0, self._worker.cfg.backlog_s - self.taken_s)

    # --- the worker's side, under its lock -------------------------------------------------------

    @property
    def has_work(self) -> bool:
        session = self.session
        return session is None or bool(self.failure) or session.has_chunk or self._is_due

    @property
    def _is_due(self) -> bool:
        """Something can follow from what was received, or was asked for.

        A detector that is called for ten frames at a time costs half of one called for each.
        """
        if self.n_inbox >= self.n_patient:
            return bool(self._inbox)
        return self._n_marks > 0

    @property
    def is_idle(self) -> bool:
        """Everything that was received was captioned or is no speech."""
        return not self.n_inbox and self.session is not None and not self.session.n_waiting

    @property
    def is_all_heard(self) -> bool:
        return self.phase is Phase.DRAINING and not self._inbox

    def put(self, item: Floats | Mark) -> None:
        if isinstance(item, Mark):
            self._inbox.append(item)
            self._n_marks += 1
            return
        self._inbox.extend(item[i : i + TURN_SAMPLES] for i in range(0, len(item), TURN_SAMPLES))
        self.n_inbox += len(item)
        self.n_received += len(item)

    def take_inbox(self) -> Inbox:
        """What the worker hears in one round: about a second, so that nobody waits for long."""
        items: Inbox = []
        n = 0
        while self._inbox and n < TURN_SAMPLES:
            items.append(item := self._inbox.popleft())
            if isinstance(item, Mark):
                self._n_marks -= 1
            else:
                n += len(item)
        return items

    def drop_inbox(self) -> None:
        self._inbox.clear()
        self.n_inbox = self._n_marks = 0

    def hand_out(self, event: messages.Event) -> None:
        if self._on_event is not None:
            self._on_event(event)
            return
        self._queue.put(event)
        if isinstance(event, messages.Done | messages.Error):
            self.end_events()

    def end_events(self) -> None:
        self._queue.put(None)


def checked(pcm: Floats) -> Floats:
    """PCM (S,) as float32 of our own; anything that cannot be audio is refused."""
    if pcm.ndim != 1:
        raise AudioFormatError(
            f"expected mono audio of shape (S,), got {pcm.shape}",
            hint="mix down first: pcm.mean(axis=-1)",
        )
    pcm = np.array(pcm, dtype=np.float32)  # the caller may use its buffer again
    if not np.isfinite(pcm).all():
        raise AudioFormatError("audio with NaN or infinity in it", hint="check the source's format")
    return pcm
