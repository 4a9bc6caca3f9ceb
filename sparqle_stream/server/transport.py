"""uvicorn's websocket protocol with two things an application needs and ASGI does not offer.

`sparqle.abort`: cut the connection at once; a close frame cannot reach a client that reads
nothing, and asyncio would wait for it for ever.
`sparqle.is_gone`: whether the peer hung up, without reading. While reading is paused for
backpressure nobody else would notice.
"""

from __future__ import annotations

import select
from typing import TYPE_CHECKING, Any, cast

from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

if TYPE_CHECKING:
    from collections.abc import Callable

    from starlette.websockets import WebSocket

ABORT = "sparqle.abort"
IS_GONE = "sparqle.is_gone"


class AbortableProtocol(WebSocketsSansIOProtocol):
    """Puts both functions into the scope's extensions."""

    async def run_asgi(self) -> None:
        extensions = cast("dict[str, Any]", self.scope["extensions"])
        extensions[ABORT] = self.transport.abort
        extensions[IS_GONE] = self._is_gone
        await super().run_asgi()
        # asyncio would flush to a client that reads nothing for ever.
        self.loop.call_later(self.close_timeout + 1, self.transport.abort)

    def _is_gone(self) -> bool:
        if self.transport.is_closing():
            return True
        if not hasattr(select, "poll"):  # Windows: noticed at the next write or ping instead
            return False
        # Only Linux has POLLRDHUP, a peer that closed in order; a reset is seen everywhere.
        hung_up = select.POLLERR | select.POLLHUP | getattr(select, "POLLRDHUP", 0)
        poll = select.poll()
        poll.register(self.transport.get_extra_info("socket").fileno(), hung_up)
        return bool(poll.poll(0))


def abort(websocket: WebSocket) -> None:
    """Cut the connection now, without a close frame."""
    cast("Callable[[], None]", websocket.scope["extensions"][ABORT])()


def is_gone(websocket: WebSocket) -> bool:
    """Whether the peer has hung up."""
    return cast("Callable[[], bool]", websocket.scope["extensions"][IS_GONE])()
