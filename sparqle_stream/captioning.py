"""Captioning: one source through one stream, from the first packet to the last event.

Contract: when it returns, every event up to Done was handed on; what was heard before a source
broke or somebody stopped is captioned to its last word. A source that can wait (a file) waits for
the engine; one that cannot (a microphone) loses what the engine has no room for, and is told.
Events are handed on in the caller's thread, with the wall-clock second at which they arrived.
"""

from __future__ import annotations

import queue
import signal
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from sparqle_stream import messages
from sparqle_stream.config import SAMPLE_RATE_HZ
from sparqle_stream.errors import SparqleError

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType

    from sparqle_stream.messages import Event
    from sparqle_stream.sources import Source

    OnEvent = Callable[[Event], None]

Pcm = npt.NDArray[np.float32]
POLL_S = 0.05


class CaptionStream(Protocol):
    """A stream of the engine, or of a client's connection to a server."""

    def feed(self, pcm: Pcm) -> None: ...

    def finish(self) -> None: ...

    def cancel(self) -> None: ...

    def wait_for_room(self, seconds: float, timeout: float | None = None) -> bool: ...


class EngineFailedError(RuntimeError):
    """A bug in the engine ended the stream: not the user's to mend, so not a SparqleError."""


@dataclass(slots=True)
class Listener:
    """What happens with each event (and its arrival), each packet, and between them."""

    on_event: Callable[[Event, float], None]
    on_audio: Callable[[Pcm], None] = lambda pcm: None
    on_tick: Callable[[], None] = lambda: None


@dataclass(slots=True)
class Captioning:
    """One run: `open_stream` makes the stream that reports to the function it is given."""

    open_stream: Callable[[OnEvent], CaptionStream]
    source: Source
    listener: Listener
    is_stopped: Callable[[], bool] = lambda: False
    room_s: float = 0.0  # wait until the stream has so much room: keeps a stop short
    can_wait: bool = True  # False: the source goes on whether or not there is room
    clock: Callable[[], float] = time.perf_counter
    dropped_s: float = 0.0
    _n_owed: int = 0  # dropped samples for which no silence was fed yet
    _events: queue.SimpleQueue[tuple[float, Event]] = field(default_factory=queue.SimpleQueue)
    _error: messages.Error | None = None
    _is_done: bool = False

    def run(self) -> None:
        """Raises what broke the source or the stream, after the last event."""
        stream = self.open_stream(lambda event: self._events.put((self.clock(), event)))
        try:
            broken = self._listen(stream)
            if not self._is_done:
                stream.finish()
            while not self._is_done:
                self._hand_on(POLL_S)
        except BaseException:
            stream.cancel()
            raise
        if self._error is not None:
            raise _as_exception(self._error)
        if broken is not None:
            raise broken

    def _listen(self, stream: CaptionStream) -> SparqleError | None:
        """Feeds until the source ends, somebody stops it, or the source breaks (returned)."""
        is_last = False
        while not (self.source.is_finished or self._is_done or is_last):
            if self.is_stopped():
                if self.can_wait:
                    return None
                is_last = True  # what was spoken before the stop is heard
            try:
                pcm = self.source.read(0.0 if is_last else POLL_S)
            except SparqleError as err:
                return err
            if pcm is not None and len(pcm):
                self.listener.on_audio(pcm)
                self._feed(stream, pcm)
            self._hand_on(0.0)
        return None

    def _feed(self, stream: CaptionStream, pcm: Pcm) -> None:
        """In pieces that fit: the reader may have been held up for longer than a backlog is."""
        for start in range(0, len(pcm), SAMPLE_RATE_HZ):
            piece = pcm[start : start + SAMPLE_RATE_HZ]
            seconds = len(piece) / SAMPLE_RATE_HZ
            if self.can_wait:
                while not stream.wait_for_room(max(seconds, self.room_s), timeout=POLL_S):
                    self._hand_on(0.0)
                    if self.is_stopped():
                        return
            elif not self._is_caught_up(stream) or not stream.wait_for_room(seconds, timeout=0.0):
                self.dropped_s += seconds
                self._n_owed += len(piece)
                continue
            stream.feed(piece)

    def _is_caught_up(self, stream: CaptionStream) -> bool:
        """Silence for what was dropped, as far as there is room, so that later times are right."""
        while self._n_owed:
            n = min(self._n_owed, SAMPLE_RATE_HZ)
            if not stream.wait_for_room(n / SAMPLE_RATE_HZ, timeout=0.0):
                return False
            stream.feed(np.zeros(n, np.float32))
            self._n_owed -= n
        return True

    def _hand_on(self, timeout_s: float) -> None:
        """All events that are there; waits for the first one for `timeout_s`."""
        try:
            while True:
                arrived, event = self._events.get(timeout=timeout_s)
                timeout_s = 0.0
                self.listener.on_event(event, arrived)
                if isinstance(event, messages.Error):
                    self._error = event
                self._is_done = isinstance(event, messages.Done | messages.Error)
        except queue.Empty:
            pass
        self.listener.on_tick()


def _as_exception(error: messages.Error) -> Exception:
    """The exception that an Error event stands for."""
    if error.code == "internal":
        return EngineFailedError(error.message)
    for kind in SparqleError.__subclasses__():
        # Those that a server has for itself take other arguments.
        is_public = kind.__module__ == SparqleError.__module__
        if is_public and kind.code == error.code:
            return kind(error.message, hint=error.hint)
    return SparqleError(error.message, hint=error.hint)


class StopSignals:
    """Ctrl-C, SIGTERM and SIGHUP as a wish to stop; a context manager, callable as the question.

    The second Ctrl-C is meant: it raises KeyboardInterrupt.
    """

    def __init__(self) -> None:
        self.is_set = False
        self._saved: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for name in ("SIGINT", "SIGTERM", "SIGHUP"):
                number = getattr(signal, name, None)
                is_nohup = (
                    name == "SIGHUP" and number and signal.getsignal(number) == signal.SIG_IGN
                )
                if number and not is_nohup:
                    self._saved[number] = signal.signal(number, self._heard)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._saved.items():
            signal.signal(number, handler)
        self._saved.clear()

    def __call__(self) -> bool:
        return self.is_set

    def _heard(self, number: int, _frame: FrameType | None) -> None:
        if self.is_set and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.is_set = True
