"""What all connections of one server share: the engine, the settings, who is connected, draining.

Everything here runs in the event loop's thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import Counter
from typing import TYPE_CHECKING, Protocol

from sparqle_stream.errors import BusyError
from sparqle_stream.server.metrics import ServerMetrics
from sparqle_stream.server.settings import Close, TooManyStreamsError, UnknownModelError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sparqle_stream.engine import Engine
    from sparqle_stream.server.settings import ServerConfig

logger = logging.getLogger(__name__)
POLL_S = 0.05
FLUSH_S = 5.0  # for the last words of streams that a drain ends
FAILING_STEPS = 3  # in a row: what a broken device does, and hardly any input
CLOSE_S = 1.0  # for the close frame of those that had none


class Member(Protocol):
    """What counts as a stream: a websocket connection, an upload, a Wyoming connection."""

    @property
    def lag_s(self) -> float: ...  # audio received and not captioned

    def notify(self, code: str, message: str) -> None: ...

    def stop(self, code: Close, reason: str) -> None: ...

    def close(self, code: Close, reason: str = "", why: str = "") -> None: ...

    def cut(self, why: str) -> None: ...


class Hub:
    """One per server."""

    def __init__(self, engine: Engine, cfg: ServerConfig) -> None:
        self.engine = engine
        self.cfg = cfg
        self.connections: set[Member] = set()
        self.is_draining = False
        self.metrics = ServerMetrics(engine)
        self.metrics.backlog.set_function(lambda: sum(c.lag_s for c in self.connections))
        self._callers: Counter[str] = Counter()  # streams of each that are open

    @property
    def is_full(self) -> bool:
        return len(self.connections) >= self.engine.cfg.n_slots

    @property
    def is_failing(self) -> bool:
        """No step succeeds any more: only a new process can help."""
        return self.engine.metrics().failing_steps >= FAILING_STEPS

    @property
    def model(self) -> str:
        return self.engine.model.name

    def check_model(self, name: str) -> None:
        """Raises UnknownModelError unless this server runs `name`."""
        if name != self.model:
            raise UnknownModelError(
                f"unknown model {name!r}", hint=f"this server runs {self.model!r}"
            )

    @contextlib.contextmanager
    def admit(self, connection: Member, caller: str) -> Iterator[None]:
        """Counts a connection while it lasts. Raises BusyError when there is no slot for it,
        TooManyStreamsError when `caller` has enough of them.

        Slots are counted here and not only in the engine: a connection keeps its own while it
        replaces its stream, whoever else is waiting.
        """
        self._check_room(caller)
        self.connections.add(connection)
        self._callers[caller] += 1
        try:
            yield
        finally:
            self.connections.discard(connection)
            self._callers[caller] -= 1
            if not self._callers[caller]:
                del self._callers[caller]

    def _check_room(self, caller: str) -> None:
        if self.is_draining:
            raise BusyError("the server is shutting down", hint="try again, or another server")
        if self.is_full:
            raise BusyError(
                f"all {self.engine.cfg.n_slots} slots are taken", hint="try again in a while"
            )
        limit = self.cfg.streams_per_key
        if limit and self._callers[caller] >= limit:
            hint = "end one of them, or ask the operator for more"
            raise TooManyStreamsError(f"{limit} streams of yours are open already", hint)

    async def drain(self, is_hurried: Callable[[], bool]) -> None:
        """No new streams; running ones may end by themselves, the rest is flushed and closed 1012.

        `is_hurried` says that somebody asked a second time.
        """
        self.is_draining = True
        logger.info("draining: %d streams, up to %g s", len(self.connections), self.cfg.drain_s)
        for connection in list(self.connections):
            connection.notify("draining", f"the server stops in {self.cfg.drain_s:g} s")
        await self._wait_empty(self.cfg.drain_s, is_hurried)
        for connection in list(self.connections):
            connection.stop(Close.RESTART, "the server restarts")
        await self._wait_empty(FLUSH_S, is_hurried)
        for connection in list(self.connections):
            connection.close(Close.RESTART, "the server stops")
        await self._wait_empty(CLOSE_S)
        for connection in list(self.connections):
            connection.cut("the server stops")

    async def _wait_empty(
        self, seconds: float, is_hurried: Callable[[], bool] = lambda: False
    ) -> None:
        end = asyncio.get_running_loop().time() + seconds
        while self.connections and not is_hurried():
            if asyncio.get_running_loop().time() >= end:
                return
            await asyncio.sleep(POLL_S)
