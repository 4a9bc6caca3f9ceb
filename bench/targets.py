"""Targets: one stream at the speed of speech, into the engine or to a server -> how far behind.

In: packets of PCM (N,) float32 at 16 kHz. Out: an `Outcome`. All streams of a run share one event
loop. `EngineTarget` feeds an engine in this process; `StreamTarget` speaks /v1/stream;
bench.openai_target speaks /v1/realtime. Lag is counted by the client's clock: from the moment at
which the last sample that an event needed was due, to the arrival of the event. So transport,
queueing and computing are in it, the detector's and the model's own delay are not.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Protocol
from urllib.request import urlopen

from sparqle_stream import messages
from sparqle_stream.config import SAMPLE_RATE_HZ
from sparqle_stream.errors import BacklogError, BusyError, SparqleError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable, Mapping

    from bench.reel import Pcm
    from sparqle_stream.config import StreamOptions
    from sparqle_stream.engine import Engine

DONE_TIMEOUT_S = 60.0  # after the last packet; whoever is later has dropped the stream
FREE_TIMEOUT_S = 10.0


class End(Enum):
    DONE = "done"
    REFUSED = "refused"  # before any audio was taken
    DROPPED = "dropped"  # after that: an error, a lost connection, or no end in time


@dataclass(slots=True)
class Outcome:
    """What a client saw of one stream. Times in seconds; `at` is the clock's."""

    began_at: float = 0.0  # clock when the first packet began to be spoken
    ended_at: float = 0.0
    lags: list[tuple[float, float]] = field(default_factory=list)  # (at, lag) of each event
    n_words: int = 0
    audio_s: float = 0.0  # that was sent
    compute_s: float | None = None  # where the other end says so
    late_s: float = 0.0  # how late the latest packet was sent; a busy client's fault
    end: End = End.DROPPED
    why: str = ""
    model: str = ""  # as the other end names it

    def note(self, event: messages.Event, at: float) -> None:
        """Takes an event of our own protocol that arrived when the clock said `at`."""
        match event:
            case messages.Ready():
                self.model = event.model
            case messages.Final() | messages.Tail():
                self.lags.append((at, at - self.began_at - event.time))
                self.n_words += len(event.words) if isinstance(event, messages.Final) else 0
            case messages.Done():
                self.end, self.compute_s = End.DONE, event.compute_seconds
            case messages.Error():
                is_busy = event.code == BusyError.code
                self.end = End.REFUSED if is_busy else End.DROPPED
                self.why = event.message


class Target(Protocol):
    lag_from: str  # for people: what lag is counted from
    is_told_at_ends: bool  # lag is known at the ends of what was said alone, not as it goes

    async def play(self, packets: Iterable[Pcm], seconds: float) -> Outcome:
        """Packets of so many seconds in all; returns when the stream has ended."""
        ...


async def paced(packets: Iterable[Pcm], outcome: Outcome) -> AsyncIterator[Pcm]:
    """Each packet once its last sample has been spoken."""
    outcome.began_at = time.perf_counter()
    n_sent = 0
    for packet in packets:
        n_sent += len(packet)
        due = outcome.began_at + n_sent / SAMPLE_RATE_HZ
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        outcome.late_s = max(outcome.late_s, time.perf_counter() - due)
        outcome.audio_s = n_sent / SAMPLE_RATE_HZ
        yield packet


STREAM_TIME = "the second of the stream that an event needed"


class EngineTarget:
    """Streams of an engine in this process."""

    lag_from = STREAM_TIME
    is_told_at_ends = False

    def __init__(self, engine: Engine, options: StreamOptions) -> None:
        self._engine, self._options = engine, options

    async def play(self, packets: Iterable[Pcm], seconds: float) -> Outcome:
        del seconds  # an engine takes packets at once: only its end may be late
        outcome, is_done, loop = Outcome(), asyncio.Event(), asyncio.get_running_loop()

        def on_event(event: messages.Event) -> None:  # on the engine's thread
            outcome.note(event, time.perf_counter())
            if isinstance(event, messages.Done | messages.Error):
                loop.call_soon_threadsafe(is_done.set)

        try:
            stream = self._engine.open(self._options, on_event)
        except BusyError as err:
            return Outcome(end=End.REFUSED, why=err.message)
        try:
            with contextlib.suppress(BacklogError):  # the Error event says so, too
                async for packet in paced(packets, outcome):
                    if is_done.is_set():
                        break
                    stream.feed(packet)
                stream.finish()
            await asyncio.wait_for(is_done.wait(), DONE_TIMEOUT_S)
        except TimeoutError:
            outcome.why = "no end in time"
        finally:
            stream.cancel()  # whatever happened: the slot is the next level's
        outcome.ended_at = time.perf_counter()
        return outcome


class StreamTarget:
    """Connections to a server's /v1/stream; one that is lost is not made again, but dropped."""

    lag_from = STREAM_TIME
    is_told_at_ends = False

    def __init__(
        self, url: str, options: Mapping[str, str | int] | None = None, api_key: str = ""
    ) -> None:
        self._url, self._options, self._api_key = url, options, api_key

    async def play(self, packets: Iterable[Pcm], seconds: float) -> Outcome:
        from sparqle_stream import client

        outcome = Outcome()
        events = client.stream(
            self._url,
            paced(packets, outcome),
            options=self._options,
            api_key=self._api_key,
            resume_s=0.0,
        )
        has_begun = False
        try:
            async with asyncio.timeout(seconds + DONE_TIMEOUT_S):
                async for event in events:
                    outcome.note(event, time.perf_counter())
                    has_begun = has_begun or isinstance(event, messages.Ready)
        except TimeoutError:
            outcome.end, outcome.why = End.DROPPED, "no end in time"
        except SparqleError as err:
            outcome.end, outcome.why = End.DROPPED if has_begun else End.REFUSED, err.message
        finally:
            await events.aclose()
        outcome.ended_at = time.perf_counter()
        return outcome


def until_free(url: str) -> None:
    """Waits for our server at ws://HOST:PORT to have freed all of its slots, which it does a moment
    after a client is gone: who comes sooner may be refused. Gives up after FREE_TIMEOUT_S, since
    whoever is refused then will say so.
    """
    address, until = f"http{url.removeprefix('ws')}/readyz", time.monotonic() + FREE_TIMEOUT_S
    while time.monotonic() < until:
        # 503 while it is full: an HTTPError, which is an OSError
        with contextlib.suppress(OSError), urlopen(address, timeout=FREE_TIMEOUT_S) as told:
            state = json.load(told)
            if state["slots_free"] == state["slots"]:
                return
        time.sleep(0.02)
