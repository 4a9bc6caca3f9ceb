"""What all connections of one server share: the engine, the settings, who is connected, draining.

Everything here runs in the event loop's thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import TYPE_CHECKING

from sparqle_stream.errors import BusyError
from sparqle_stream.server.settings import Close, UnknownModelError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sparqle_stream.engine import Engine
    from sparqle_stream.server.connection import Connection
    from sparqle_stream.server.settings import ServerConfig

logger = logging.getLogger(__name__)
POLL_S = 0.05
FLUSH_S = 5.0  # for the last words of streams that a drain ends
CLOSE_S = 1.0  # for the close frame of those that had none


class Hub:
    """One per server."""

    def __init__(self, engine: Engine, cfg: ServerConfig) -> None:
        self.engine = engine
        self.cfg = cfg
        self.connections: set[Connection] = set()
        self.is_draining = False

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
    def admit(self, connection: Connection) -> Iterator[None]:
        """Counts a connection while it lasts. Raises BusyError when there is no slot for it.

        Slots are counted here and not only in the engine: a connection keeps its own while it
        replaces its stream, whoever else is waiting.
        """
        if self.is_draining:
            raise BusyError("the server is shutting down", hint="try again, or another server")
        if len(self.connections) >= self.engine.cfg.n_slots:
            raise BusyError(
                f"all {self.engine.cfg.n_slots} slots are taken", hint="try again in a while"
            )
        self.connections.add(connection)
        try:
            yield
        finally:
            self.connections.discard(connection)

    async def drain(self, is_hurried: Callable[[], bool]) -> None:
        """No new streams; running ones may end by themselves, the rest is flushed and closed 1012.

        `is_hurried` says that somebody asked a second time.
        """
        self.is_draining = True
        logger.info("draining: %d streams, up to %g s", len(self.connections), self.cfg.drain_s)
        for connection in list(self.connections):
            connection.dialect.on_draining()
        await self._wait_empty(self.cfg.drain_s, is_hurried)
        for connection in list(self.connections):
            connection.restart()
        await self._wait_empty(FLUSH_S, is_hurried)
        for connection in list(self.connections):
            connection.close(Close.RESTART, "the server stops")
        await self._wait_empty(CLOSE_S)
        for connection in list(self.connections):
            connection.cut("the server stops")

    async def _wait_empty(
        self, seconds: float, is_hurried: Callable[[], bool] = lambda: False
    ) -> None:
        for _ in range(int(seconds / POLL_S)):
            if not self.connections or is_hurried():
                return
            await asyncio.sleep(POLL_S)
