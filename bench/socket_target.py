"""One stream to a server of any dialect: what all websockets of live captions have in common.

In: packets of PCM (N,) float32 at 16 kHz, sent at the speed of speech. Out: an `Outcome`. What goes
over the wire, and what an answer says about lag, is the business of a `Dialect`: they are in
bench.openai_target and bench.dialects.
"""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import urlunsplit

import numpy as np

from bench.targets import DONE_TIMEOUT_S, End, Outcome, paced
from sparqle_stream.client import server_address
from sparqle_stream.config import SAMPLE_RATE_HZ

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from bench.reel import Pcm


@dataclass(slots=True)
class Line:
    """One connection, as its dialect sees it."""

    outcome: Outcome
    model: str  # what the client asks for
    is_ready: asyncio.Event = field(default_factory=asyncio.Event)  # audio may be sent
    is_over: asyncio.Event = field(default_factory=asyncio.Event)
    is_said: bool = False  # all audio and the farewell were sent

    def done(self) -> None:
        self.outcome.end = End.DONE
        self.is_over.set()

    def fail(self, why: str) -> None:
        self.outcome.why = why
        self.is_ready.set()
        self.is_over.set()

    def heard(self, at: float, until_s: float) -> None:
        """An event that arrived when the clock said `at` is about audio until that second."""
        self.outcome.lags.append((at, at - self.outcome.began_at - until_s))


class Dialect(Protocol):
    """What is said over one connection."""

    ROUTE: str  # with its query; a user's own path or query takes its place
    RATE_HZ: int
    LAG_FROM: str
    ENDS_BY_CLOSING: bool  # after the last answer the server says nothing, it closes
    TELLS_AT_ENDS: bool  # of a stream or an utterance: until then nobody knows the lag

    def __init__(self, line: Line) -> None: ...

    def greeting(self) -> list[str | bytes]:
        """What is sent first; `line.is_ready` is set where no answer is waited for."""
        ...

    def packet(self, pcm: Pcm) -> str | bytes: ...

    def farewell(self) -> list[str | bytes]:
        """What ends the audio; the line is over once everything was answered."""
        ...

    def take(self, event: dict[str, Any], at: float) -> None:
        """A frame of the server that arrived when the clock said `at`."""
        ...


class SocketTarget:
    """Connections to a server, each with books of its own."""

    def __init__(
        self, url: str, dialect: type[Dialect], model: str = "", api_key: str = ""
    ) -> None:
        self.lag_from, self.is_told_at_ends = dialect.LAG_FROM, dialect.TELLS_AT_ENDS
        self._url, self._make = full_url(url, dialect.ROUTE), dialect
        self._model, self._api_key = model, api_key

    async def play(self, packets: Iterable[Pcm], seconds: float) -> Outcome:
        from websockets.asyncio.client import connect
        from websockets.exceptions import ConnectionClosed, InvalidHandshake

        headers = {"Authorization": f"Bearer {self._api_key}"} if self._api_key else None
        outcome = Outcome(model=self._model)
        line = Line(outcome, self._model)
        dialect = self._make(line)
        try:
            async with asyncio.timeout(seconds + DONE_TIMEOUT_S):
                async with connect(
                    self._url, additional_headers=headers, max_size=None, compression=None
                ) as socket:
                    await _talk(socket, packets, line, dialect)
        except TimeoutError:
            outcome.end, outcome.why = End.DROPPED, "no end in time"
        except (InvalidHandshake, OSError) as err:
            _lose(outcome, str(err))
        except ConnectionClosed as err:
            if dialect.ENDS_BY_CLOSING and line.is_said:
                line.done()
            else:
                _lose(outcome, str(err))
        except Exception as err:  # noqa: BLE001 - an answer that its dialect does not have
            _lose(outcome, f"{type(err).__name__}: {err}")
        outcome.ended_at = time.perf_counter()
        return outcome


def _lose(outcome: Outcome, why: str) -> None:
    outcome.end = End.DROPPED if outcome.audio_s else End.REFUSED
    outcome.why = outcome.why or why


async def _talk(socket: Any, packets: Iterable[Pcm], line: Line, dialect: Dialect) -> None:  # noqa: ANN401 - a websocket
    """One whole stream over an open connection. Raises ConnectionClosed when it ends too soon."""
    listener = asyncio.create_task(_listen(socket, dialect))
    try:
        for frame in dialect.greeting():
            await socket.send(frame)
        await _until(line.is_ready, listener)
        resample = _resampler(dialect.RATE_HZ)
        async for packet in paced(packets, line.outcome):
            if line.is_over.is_set():
                return
            if listener.done():  # nobody hears the answers any more: it says why
                listener.result()
            await _send(socket, dialect, resample(packet, False))
        await _send(socket, dialect, resample(np.zeros(0, np.float32), True))
        for frame in dialect.farewell():
            await socket.send(frame)
        line.is_said = True
        await _until(line.is_over, listener)
    finally:
        listener.cancel()
        await asyncio.gather(listener, return_exceptions=True)


async def _until(event: asyncio.Event, listener: asyncio.Task[None]) -> None:
    """Waits for it; what ended the listener before is raised."""
    wait = asyncio.create_task(event.wait())
    try:
        await asyncio.wait([wait, listener], return_when=asyncio.FIRST_COMPLETED)
        if not event.is_set():
            listener.result()
    finally:
        wait.cancel()


async def _listen(socket: Any, dialect: Dialect) -> None:  # noqa: ANN401 - a websocket
    while True:
        frame = await socket.recv()
        if isinstance(frame, str):
            dialect.take(json.loads(frame), time.perf_counter())


async def _send(socket: Any, dialect: Dialect, pcm: Pcm) -> None:  # noqa: ANN401 - a websocket
    if len(pcm):
        await socket.send(dialect.packet(pcm))


def _resampler(rate_hz: int) -> Callable[[Pcm, bool], Pcm]:
    """(packet, is it the last) -> the same at another rate."""
    if rate_hz == SAMPLE_RATE_HZ:
        return lambda packet, is_last: packet
    import soxr

    stream = soxr.ResampleStream(SAMPLE_RATE_HZ, rate_hz, 1, dtype="float32")
    return lambda packet, is_last: stream.resample_chunk(packet, last=is_last)


def s16(pcm: Pcm) -> bytes:
    """PCM (N,) as little-endian 16-bit samples."""
    return np.rint(pcm * 32_767).clip(-32_768, 32_767).astype("<i2").tobytes()


def full_url(url: str, route: str) -> str:
    """ws://HOST:PORT, http://..., HOST:PORT, with or without a path -> the whole URL."""
    path, _, query = route.partition("?")
    parts = server_address(url, path)
    return urlunsplit(parts._replace(query=parts.query or query))
