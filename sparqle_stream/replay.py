"""What a client has to remember so that a stream survives its connection.

`Replay` holds the audio that the server has not acknowledged, `Progress` what was told already,
`Patience` how long to go on trying. No sockets here.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections import deque
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from sparqle_stream import messages
from sparqle_stream.config import SAMPLE_RATE_HZ
from sparqle_stream.errors import SparqleError

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator

    from sparqle_stream.messages import Event

MAX_KEPT_S = 600.0  # a server that acknowledges nothing must not fill the memory
FIRST_PAUSE_S, MAX_PAUSE_S = 0.05, 2.0


class Mark(Enum):
    """What may stand between blocks of audio."""

    FLUSH = "flush"


FLUSH = Mark.FLUSH
Block = npt.NDArray[np.float32] | Mark


class ReplayError(SparqleError):
    """The audio that the server wants again was not kept."""

    code = "connection"


@dataclass(frozen=True, slots=True)
class _Item:
    start: int  # samples of the stream before it
    block: Block

    @property
    def end(self) -> int:
        return self.start + (0 if isinstance(self.block, Mark) else len(self.block))


class Replay:
    """Blocks of a source, kept until they are acknowledged. Samples at 16 kHz."""

    def __init__(
        self, source: AsyncGenerator[Block, None], max_kept: int = int(MAX_KEPT_S * SAMPLE_RATE_HZ)
    ) -> None:
        self.offset = 0  # acknowledged: the next connection begins here
        self._kept: deque[_Item] = deque()
        self._n_dropped = 0  # items that are not kept any more
        self._n_received = 0  # samples that the source gave
        self._max_kept = max_kept
        self._source = source
        self._pull: asyncio.Task[Block] | None = None
        self._is_over = False

    async def blocks(self) -> AsyncIterator[Block]:
        """Everything from the acknowledged offset on: once for each connection.

        Raises what the source raises, and ReplayError when the beginning is not there any more.
        """
        if self._kept and self._kept[0].start > self.offset:
            raise ReplayError(
                f"{MAX_KEPT_S:g} s of audio were not acknowledged", hint="begin a new stream"
            )
        at = self._n_dropped
        while True:
            at = max(at, self._n_dropped)  # what is acknowledged was sent
            if at < self._n_dropped + len(self._kept):
                item = self._kept[at - self._n_dropped]
                at += 1
                yield self._rest(item)
            elif not await self._receive():
                return

    def _rest(self, item: _Item) -> Block:
        """An item without the samples that are acknowledged."""
        if isinstance(item.block, Mark) or item.start >= self.offset:
            return item.block
        return item.block[self.offset - item.start :]

    async def _receive(self) -> bool:
        """One block of the source joins what is kept; False at its end.

        The task outlives a connection: a block that is under way when one is lost is not.
        """
        if self._is_over:
            return False
        if self._pull is None:
            self._pull = asyncio.ensure_future(anext(self._source))
        await asyncio.wait({self._pull})
        pull, self._pull = self._pull, None
        try:
            block = pull.result()
        except StopAsyncIteration:
            self._is_over = True
            return False
        self._kept.append(_Item(self._n_received, block))
        self._n_received = self._kept[-1].end
        while self._n_received - self._kept[0].start > self._max_kept and len(self._kept) > 1:
            self._drop()
        return True

    def acknowledge(self, offset: int) -> None:
        """The server needs nothing before `offset` again. Flushes stay until they are answered."""
        self.offset = max(self.offset, min(offset, self._n_received))
        while self._kept and self._kept[0].end <= self.offset:
            if isinstance(self._kept[0].block, Mark):
                return
            self._drop()

    def answer_flush(self) -> None:
        """The oldest flush was answered."""
        for i, item in enumerate(self._kept):
            if isinstance(item.block, Mark):
                # An empty block in its place: the positions of the others stay.
                self._kept[i] = _Item(item.start, np.zeros(0, np.float32))
                break
        self.acknowledge(self.offset)

    def _drop(self) -> None:
        self._kept.popleft()
        self._n_dropped += 1

    async def close(self) -> None:
        """Leaves the source."""
        if self._pull is not None:
            self._pull.cancel()
            await asyncio.gather(self._pull, return_exceptions=True)
        with contextlib.suppress(RuntimeError):  # a source in a thread may still be reading
            await self._source.aclose()


class Progress:
    """What the caller was told, so that nothing is told twice."""

    def __init__(self) -> None:
        self.stream_id = ""
        self._after = 0.0  # end of the last word
        self._segment = -1  # of the last utterance
        self._is_speech = False

    def note(self, event: Event, replay: Replay) -> Event | None:
        """An event from the wire -> the event for the caller, if it is news."""
        match event:
            case messages.Ready():
                if self.stream_id:
                    return None
                self.stream_id = event.stream_id
            case messages.Acknowledged():
                replay.acknowledge(event.offset)
                return None
            case messages.Flushed():
                replay.answer_flush()
            case messages.Final():
                self._after = max([self._after, *(word.end for word in event.words)])
                self._segment = max(self._segment, event.segment)  # a long one counts on
            case messages.SpeechStarted() | messages.SpeechStopped():
                is_start = isinstance(event, messages.SpeechStarted)
                if is_start == self._is_speech:
                    return None
                self._is_speech = is_start
                self._segment += is_start
        return event

    def query(self, offset: int) -> dict[str, str | int]:
        """Fields with which the next connection goes on. The replay may come faster than speech."""
        segment = self._segment if self._is_speech else self._segment + 1
        return {
            "stream_id": self.stream_id,
            "offset": offset,
            "after": f"{self._after:.3f}",
            "segment": max(0, segment),
            "pace": "file",
        }


class Patience:
    """How long to go on trying without hearing anything new."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._seconds = seconds
        self._clock = clock
        self._since: float | None = None  # of the first loss after the last news

    def renew(self, event: Event) -> None:
        """Something came that brings the stream forward; a connection alone does not."""
        if isinstance(event, messages.Final | messages.Acknowledged | messages.Flushed):
            self._since = None

    def pauses(self) -> Iterator[float]:
        """Seconds to wait before each attempt: at once, then longer and longer."""
        if self._since is None:
            self._since = self._clock()
        pause_s = 0.0
        while self._clock() + pause_s - self._since < self._seconds:
            yield pause_s * random.uniform(0.5, 1.0)  # clients of one server must not come as one
            pause_s = min(MAX_PAUSE_S, max(FIRST_PAUSE_S, 2 * pause_s))
