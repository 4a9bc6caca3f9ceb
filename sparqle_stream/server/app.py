"""The server: routes over one engine, and the process around them.

`create_app` is an ASGI application; `serve` runs it until SIGTERM or Ctrl-C, then drains;
`background` runs it in a thread, for programs that embed it and for tests.
"""

from __future__ import annotations

import contextlib
import logging
import signal
import socket
import threading
from functools import partial
from typing import TYPE_CHECKING

import uvicorn
from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Route, WebSocketRoute

from sparqle_stream import __version__
from sparqle_stream.errors import BusyError, ConfigError, SparqleError
from sparqle_stream.server import request
from sparqle_stream.server.connection import Connection
from sparqle_stream.server.hub import Hub
from sparqle_stream.server.openai_realtime import RealtimeDialect
from sparqle_stream.server.settings import ServerConfig
from sparqle_stream.server.stream import StreamDialect
from sparqle_stream.server.transport import AbortableProtocol

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import FrameType

    from starlette.requests import Request
    from starlette.websockets import WebSocket

    from sparqle_stream.engine import Engine
    from sparqle_stream.server.connection import Dialect

logger = logging.getLogger(__name__)
DIALECTS: dict[str, Callable[[Connection], Dialect]] = {
    "/v1/stream": StreamDialect,
    "/v1/realtime": RealtimeDialect,
}
BACKLOG = 128  # handshakes that may wait
STOP_S = 10.0  # for a thread that runs the server


def create_app(engine: Engine, cfg: ServerConfig) -> Starlette:
    """Routes over one engine; the caller keeps and closes the engine."""
    sockets = [WebSocketRoute(p, partial(_serve_dialect, make)) for p, make in DIALECTS.items()]
    app = Starlette(
        routes=[
            Route("/healthz", _health),
            Route("/readyz", _ready),
            *(Route(path, _needs_upgrade) for path in DIALECTS),
            *sockets,
            WebSocketRoute("/{path:path}", _no_route),
        ]
    )
    app.state.hub = Hub(engine, cfg)
    return app


def serve(engine: Engine, cfg: ServerConfig, on_ready: Callable[[str], None] | None = None) -> None:
    """Serves until SIGTERM or Ctrl-C, then drains. `on_ready` gets the address once it listens.

    Raises ConfigError when the address cannot be used. The engine is not closed.
    """
    listener = _listen(cfg)
    server = _Server(create_app(engine, cfg))
    if on_ready is not None:
        on_ready(address_of(listener))
    try:
        server.run([listener])
    finally:
        listener.close()


@contextlib.contextmanager
def background(engine: Engine, cfg: ServerConfig | None = None) -> Iterator[str]:
    """A running server in a thread; yields its address, such as ws://127.0.0.1:40123."""
    cfg = cfg or ServerConfig(port=0)
    listener = _listen(cfg)
    server = _Server(create_app(engine, cfg))
    thread = threading.Thread(target=server.run, args=([listener],), name="sparqle-server")
    thread.start()
    try:
        yield address_of(listener)
    finally:
        server.stop()
        thread.join(cfg.drain_s + STOP_S)
        listener.close()


def address_of(listener: socket.socket) -> str:
    """ws://HOST:PORT of a bound socket."""
    host, port = listener.getsockname()[:2]
    return f"ws://[{host}]:{port}" if ":" in host else f"ws://{host}:{port}"


class _Server(uvicorn.Server):
    """uvicorn that drains first: by itself it would close every stream with 1012 at once."""

    def __init__(self, app: Starlette) -> None:
        self._hub: Hub = app.state.hub
        super().__init__(
            uvicorn.Config(
                app,
                loop="asyncio",
                http="h11",
                ws=AbortableProtocol,
                ws_max_size=self._hub.cfg.message_bytes,
                ws_per_message_deflate=False,  # audio does not shrink, and it costs latency
                lifespan="off",
                log_config=None,
                log_level="warning",  # at INFO it logs queries, and keys may be in them
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=2,
            )
        )

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal drains, the second one hurries. Afterwards the process goes on."""
        del frame
        logger.info("%s: draining", signal.Signals(sig).name)
        self.force_exit = self.should_exit
        self.should_exit = True

    def stop(self) -> None:
        """From another thread."""
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await self._hub.drain(lambda: self.force_exit)
        await super().shutdown(sockets)


async def _serve_dialect(make: Callable[[Connection], Dialect], websocket: WebSocket) -> None:
    """One connection: refused over HTTP, or accepted and served."""
    hub: Hub = websocket.app.state.hub
    if (answer := request.refusal(websocket, hub.cfg)) is not None:
        await websocket.send_denial_response(answer)
        return
    link = Connection(websocket, hub)
    try:
        with hub.admit(link):
            link.dialect = dialect = make(link)
            try:
                dialect.begin(websocket)
            except BusyError:
                raise
            except SparqleError as err:
                dialect.on_error(err)  # told once the connection is accepted
            is_offered = dialect.SUBPROTOCOL in request.subprotocols(websocket)
            await link.run(dialect.SUBPROTOCOL if is_offered else None)
    except BusyError as err:
        await websocket.send_denial_response(request.error_response(503, err))


async def _no_route(websocket: WebSocket) -> None:
    path = websocket.url.path
    hint = request.did_you_mean(path, DIALECTS) or f"use {' or '.join(DIALECTS)}"
    err = ConfigError(f"no such route: {path[:80]}", hint)
    await websocket.send_denial_response(request.error_response(404, err, "not_found"))


async def _needs_upgrade(http: Request) -> JSONResponse:
    err = ConfigError(f"{http.url.path} speaks websocket only", hint="connect with ws:// or wss://")
    return request.error_response(426, err, "upgrade_required")


async def _health(http: Request) -> JSONResponse:
    """200 while the process can answer, whatever its load."""
    return JSONResponse({"status": "ok", "version": __version__})


async def _ready(http: Request) -> JSONResponse:
    """200 while new streams are welcome; 503 while draining. A full server stays ready."""
    hub: Hub = http.app.state.hub
    n_slots = hub.engine.cfg.n_slots
    state = {
        "ready": not hub.is_draining,
        "model": hub.model,
        "slots": n_slots,
        "slots_free": n_slots - len(hub.connections),
    }
    return JSONResponse(state, 503 if hub.is_draining else 200)


def _listen(cfg: ServerConfig) -> socket.socket:
    """A bound socket. Raises ConfigError with what to do."""
    try:
        infos = socket.getaddrinfo(
            cfg.host, cfg.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
    except OSError as err:
        raise ConfigError(f"--host {cfg.host} is no address: {err}", hint="127.0.0.1") from err
    family, kind, _, _, address = infos[0]
    listener = socket.socket(family, kind)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
        listener.listen(BACKLOG)  # from now on nobody is refused, even before the loop runs
    except OSError as err:
        listener.close()
        raise ConfigError(
            f"cannot listen on {cfg.host}:{cfg.port}: {err.strerror}",
            hint="another port with --port N, or 0 for any free one",
        ) from err
    return listener
