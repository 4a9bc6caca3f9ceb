"""A TCP proxy that breaks connections at random places, in a thread of its own."""

from __future__ import annotations

import asyncio
import contextlib
import random
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


Lives = tuple[float, float]  # bytes to the server, and from it
FOREVER: Lives = (1e12, 1e12)


class Chaos:
    """Forwards to `target()`, a port; each connection dies after `lives()` bytes to the server, or
    from it.

    Odd ones are reset, even ones closed in order. A context manager; `url` is where to connect.
    """

    def __init__(self, target: Callable[[], int], lives: Callable[[random.Random], Lives]) -> None:
        self.n_cut = 0
        self._target = target
        self._lives = lives
        self._random = random.Random(7)
        self._loop = asyncio.new_event_loop()
        self._server: asyncio.Server | None = None
        self._thread = threading.Thread(target=self._loop.run_forever, name="chaos")

    def __enter__(self) -> Chaos:
        self._thread.start()
        start = asyncio.start_server(self._serve, "127.0.0.1", 0)
        self._server = asyncio.run_coroutine_threadsafe(start, self._loop).result()
        return self

    def __exit__(self, *_: object) -> None:
        async def stop() -> None:
            self._server.close()
            tasks = asyncio.all_tasks() - {asyncio.current_task()}
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        asyncio.run_coroutine_threadsafe(stop(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    @property
    def url(self) -> str:
        return f"ws://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        left = list(self._lives(self._random))
        try:
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._target())
        except OSError:
            writer.transport.abort()
            return
        ways = [self._pump(reader, far_writer, left, 0), self._pump(far_reader, writer, left, 1)]
        tasks = [asyncio.ensure_future(way) for way in ways]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if min(left) <= 0:
                self.n_cut += 1
            elif tasks[1].done():  # the server is done: what it said has to arrive
                writer.close()
        finally:
            for task in tasks:
                task.cancel()
            for end in (writer, far_writer):
                end.transport.abort() if self.n_cut % 2 else end.close()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _pump(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        left: list[float],
        way: int,
    ) -> None:
        with contextlib.suppress(OSError):
            while left[way] > 0 and (data := await reader.read(8192)):
                part = data[: int(max(0, min(len(data), left[way])))]
                left[way] -= len(data)
                writer.write(part)
                await writer.drain()
