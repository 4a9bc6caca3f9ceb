"""uvicorn's protocols, a little politer, with two things that ASGI does not offer.

`sparqle.abort`: cut the connection at once; a close frame cannot reach a client that reads
nothing, and asyncio would wait for it for ever.
`sparqle.is_gone`: whether the peer hung up, without reading. While reading is paused for
backpressure nobody else would notice.
"""

from __future__ import annotations

import select
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.utils import ClientDisconnected
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

    from starlette.types import ASGIApp, Receive, Scope, Send
    from uvicorn._types import ASGISendEvent

    from sparqle_stream.server.connection import Wire

ABORT = "sparqle.abort"
IS_GONE = "sparqle.is_gone"
LINGER_S = 5.0  # at most, for a client that goes on sending
QUIET_S = 0.3
REQUEST_S = 10.0  # for the head of a request


class HastyProtocol(H11Protocol):
    """A client that opens a connection and does not say what for is cut, and so is one that begins
    another request on it and does not go on."""

    _unfinished: asyncio.TimerHandle | None = None  # while the head of a request is awaited

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.app = partial(self._serve, self.app)
        self._await_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.conn.their_state is h11.IDLE:
            self._await_head()
        else:
            self._forget()

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget()
        super().connection_lost(exc)

    async def _serve(self, app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
        scope.setdefault("extensions", {})[ABORT] = self.transport.abort
        await app(scope, receive, send)

    def _await_head(self) -> None:
        if self._unfinished is None:
            self._unfinished = self.loop.call_later(REQUEST_S, self.transport.abort)

    def _forget(self) -> None:
        if self._unfinished is not None:
            self._unfinished.cancel()
            self._unfinished = None


class AbortableProtocol(WebSocketsSansIOProtocol):
    """Puts both functions into the scope's extensions."""

    _linger_until: float | None = None
    _is_app_done = False  # it has sent a close itself

    async def run_asgi(self) -> None:
        extensions = cast("dict[str, Any]", self.scope["extensions"])
        extensions[ABORT] = self.transport.abort
        extensions[IS_GONE] = self._is_gone
        await super().run_asgi()
        # asyncio would flush to a client that reads nothing for ever.
        self.loop.call_later(self.close_timeout + 1, self.transport.abort)

    async def send(self, message: ASGISendEvent) -> None:
        """Raises ClientDisconnected where uvicorn has closed (a frame that is refused, a lost ping,
        a shutdown) and the application cannot know of it yet; it would say that this is a bug."""
        if message["type"] in ("websocket.send", "websocket.close"):
            if self.close_sent and not self._is_app_done:
                raise ClientDisconnected
            self._is_app_done = message["type"] == "websocket.close"
        await super().send(message)
        if message["type"] == "websocket.http.response.body":
            # A refusal is an answer; uvicorn would log that the handshake was never completed.
            self.handshake_complete = True

    def send_receive_event_to_app(self) -> None:
        """Text that is not UTF-8 is the client's fault: 1007, and no traceback in the log."""
        if self.curr_msg_data_type == "text" and not self.close_sent:
            try:
                b"".join(self.frames).decode()
            except UnicodeDecodeError:
                self.frames = []
                self.conn.send_close(1007, "not UTF-8")
                self.handle_parser_exception()
                return
        super().send_receive_event_to_app()

    def handle_parser_exception(self) -> None:
        """The close frame at once, the close when the client has nothing more to send.

        To close a socket with unread data is to reset it, and a client in the middle of a frame
        that is too big would never see the close code. Called again for whatever else arrives.
        """
        if self._linger_until is None:
            self._linger_until = self.loop.time() + LINGER_S
        if self.close_timer is None:
            sent = self.conn.close_sent
            code, reason = (sent.code, sent.reason) if sent is not None else (1002, "")
            self.queue.put_nowait({"type": "websocket.disconnect", "code": code, "reason": reason})
            self.transport.write(b"".join(self.conn.data_to_send()))
            self.close_sent = True
        else:
            self.close_timer.cancel()
        if self.read_paused:
            self.read_paused = False
            self.transport.resume_reading()
        delay_s = min(QUIET_S, self._linger_until - self.loop.time())
        self.close_timer = self.loop.call_later(delay_s, self.transport.close)

    def _is_gone(self) -> bool:
        return is_hung_up(self.transport)


def is_hung_up(transport: asyncio.BaseTransport) -> bool:
    """Whether the peer of a socket has closed or reset it, without reading."""
    if transport.is_closing():
        return True
    if not hasattr(select, "poll"):  # Windows: noticed at the next write or ping instead
        return False
    # Only Linux has POLLRDHUP, a peer that closed in order; a reset is seen everywhere.
    hung_up = select.POLLERR | select.POLLHUP | getattr(select, "POLLRDHUP", 0)
    poll = select.poll()
    poll.register(transport.get_extra_info("socket").fileno(), hung_up)
    return bool(poll.poll(0))


def abort(websocket: Wire) -> None:
    """Cut the connection now, without a close frame."""
    abort_request(websocket.scope)


def abort_request(scope: Scope) -> None:
    """The same for a request over HTTP."""
    cast("Callable[[], None]", scope["extensions"][ABORT])()


def is_gone(websocket: Wire) -> bool:
    """Whether the peer has hung up."""
    return cast("Callable[[], bool]", websocket.scope["extensions"][IS_GONE])()
