"""What waits for a client, and how fast a client may talk. Everything runs in one event loop."""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from sparqle_stream.server.settings import Close


@dataclass(frozen=True, slots=True)
class CloseFrame:
    code: Close
    reason: str  # for the client; may repeat what it sent
    why: str = ""  # for the log; may not


@dataclass(slots=True)
class Frame:
    text: str
    is_tail: bool


class Outbox:
    """Frames waiting for the client: bounded, a provisional tail replaces an older one."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._frames: deque[Frame] = deque()
        self._close: CloseFrame | None = None
        self._wake = asyncio.Event()

    def put(self, text: str, *, is_tail: bool = False) -> bool:
        """False when the client is too far behind."""
        if is_tail and self._frames and self._frames[-1].is_tail:
            self._frames[-1].text = text
        elif len(self._frames) < self._limit:
            self._frames.append(Frame(text, is_tail))
        else:
            return False
        self._wake.set()
        return True

    def close(self, frame: CloseFrame) -> None:
        """Goes out after everything that waits."""
        self._close = self._close or frame
        self._wake.set()

    async def get(self) -> str | CloseFrame:
        while not self._frames:
            if self._close is not None:
                return self._close
            self._wake.clear()
            await self._wake.wait()
        return self._frames.popleft().text


class Pace:
    """How long frames of one connection have to wait: `per_s` of them a second, and as many at
    once after a rest."""

    def __init__(self, per_s: float, clock: Callable[[], float]) -> None:
        self._per_s = per_s
        self._clock = clock
        self._free_at = clock() - 1.0  # when the frames so far are paid for

    def take(self) -> float:
        """One frame more -> seconds that the next one has to wait."""
        now = self._clock()
        self._free_at = max(self._free_at, now - 1.0) + 1.0 / self._per_s
        return max(0.0, self._free_at - now)
