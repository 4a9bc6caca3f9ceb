"""Wyoming's frames over TCP, in the shape of a websocket: what a `Connection` reads and writes.

An event is one line of JSON, then `data_length` bytes of more JSON, then `payload_length` bytes.
Here it becomes a text frame (the event as one JSON object) and, for a payload, a binary frame.
Sizes are checked before anything is read.
"""

from __future__ import annotations

import asyncio
import json
from collections import deque
from typing import TYPE_CHECKING, Any

from sparqle_stream.server.transport import ABORT, IS_GONE, is_hung_up

if TYPE_CHECKING:
    from collections.abc import MutableMapping

    from starlette.types import Message

LINE_BYTES = 1 << 16
DATA_BYTES = 1 << 20
VERSION = "1.8.0"  # of the protocol's package that this was written against


class BadFrameError(Exception):
    """Bytes that are no event; nothing after them can be understood."""


ENDINGS = (BadFrameError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, OSError)


class WyomingWire:
    """One TCP connection. `receive` never raises for what a client sends: it ends instead."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, payload_bytes: int
    ) -> None:
        transport = writer.transport
        self.scope: MutableMapping[str, Any] = {
            "extensions": {ABORT: transport.abort, IS_GONE: lambda: is_hung_up(transport)}
        }
        self._reader = reader
        self._writer = writer
        self._payload_bytes = payload_bytes
        self._frames: deque[Message] = deque()

    async def accept(self, subprotocol: str | None = None) -> None:
        """TCP has no handshake."""

    async def receive(self) -> Message:
        """The next frame, or the end."""
        while not self._frames:
            try:
                await self._read_event()
            except ENDINGS:
                return {"type": "websocket.disconnect", "code": 1006}
        return self._frames.popleft()

    async def _read_event(self) -> None:
        line = await self._reader.readuntil(b"\n")
        try:
            event = json.loads(line)
        except (ValueError, RecursionError) as err:
            raise BadFrameError from err
        if not isinstance(event, dict):
            raise BadFrameError
        data = event.get("data") or {}
        more = await self._read_part(event.pop("data_length", None), DATA_BYTES)
        if more:
            try:
                data = {**data, **json.loads(more)}
            except (ValueError, RecursionError, TypeError) as err:
                raise BadFrameError from err
        payload = await self._read_part(event.pop("payload_length", None), self._payload_bytes)
        event["data"] = data
        self._frames.append({"type": "websocket.receive", "text": json.dumps(event)})
        if payload:
            self._frames.append({"type": "websocket.receive", "bytes": payload})

    async def _read_part(self, length: object, limit: int) -> bytes:
        if length is None or length == 0:
            return b""
        if isinstance(length, bool) or not isinstance(length, int) or not 0 < length <= limit:
            raise BadFrameError
        return await self._reader.readexactly(length)

    async def send_text(self, data: str) -> None:
        """One event as JSON; its `data` goes after the line, as the protocol's package does."""
        event = json.loads(data)
        body = json.dumps(event.pop("data", {}), ensure_ascii=False).encode()
        event |= {"version": VERSION, "data_length": len(body)}
        self._writer.write(json.dumps(event).encode() + b"\n" + body)
        await self._writer.drain()

    async def close(self, code: int = 1000, reason: str | None = None) -> None:
        """Everything that was written goes out first."""
        del code, reason
        self._writer.close()
