"""The server: routes over one engine, and the process around them.

`create_app` is an ASGI application; `serve` runs it until SIGTERM or Ctrl-C, then drains;
`background` runs it in a thread, for programs that embed it and for tests.
"""

from __future__ import annotations

import contextlib
import logging
import signal
import socket
import ssl
import threading
from functools import partial
from typing import TYPE_CHECKING

import uvicorn
from starlette.applications import Starlette
from starlette.routing import Route, WebSocketRoute

from sparqle_stream.errors import BusyError, ConfigError, SparqleError
from sparqle_stream.server import page, probes, request, uploads
from sparqle_stream.server.connection import Connection
from sparqle_stream.server.deepgram import ListenDialect
from sparqle_stream.server.hub import Hub
from sparqle_stream.server.settings import ServerConfig, TooManyStreamsError
from sparqle_stream.server.stream import StreamDialect
from sparqle_stream.server.transport import AbortableProtocol, HastyProtocol
from sparqle_stream.server.vllm_realtime import RealtimeRoute
from sparqle_stream.server.whisper_live import WhisperLiveDialect
from sparqle_stream.server.whisper_live_kit import AsrDialect
from sparqle_stream.server.wyoming import WyomingServer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import FrameType

    from starlette.requests import Request
    from starlette.responses import JSONResponse
    from starlette.websockets import WebSocket

    from sparqle_stream.engine import Engine
    from sparqle_stream.server.connection import Dialect

logger = logging.getLogger(__name__)
DIALECTS: dict[str, Callable[[Connection], Dialect]] = {
    "/v1/stream": StreamDialect,
    "/v1/realtime": RealtimeRoute,
    "/v1/listen": ListenDialect,
    "/asr": AsrDialect,
    "/": WhisperLiveDialect,
}
BACKLOG = 128  # handshakes that may wait
STOP_S = 10.0  # for a thread that runs the server


def create_app(engine: Engine, cfg: ServerConfig) -> Starlette:
    """Routes over one engine; the caller keeps and closes the engine."""
    sockets = [WebSocketRoute(path, partial(_serve_dialect, path)) for path in DIALECTS]
    app = Starlette(
        routes=[
            *probes.routes(),
            *page.routes(),
            Route(uploads.ROUTE, uploads.transcribe, methods=["POST"]),
            *(Route(path, _needs_upgrade) for path in DIALECTS if path != "/"),
            *sockets,
            WebSocketRoute("/{path:path}", _no_route),
        ]
    )
    app.state.hub = Hub(engine, cfg)
    return app


def check(cfg: ServerConfig) -> None:
    """Raises ConfigError for addresses and files that `serve` could not use.

    For who has a model to load first, which takes its time.
    """
    _check_tls(cfg)
    for port in (cfg.port, cfg.wyoming_port):
        if port is not None:
            _listen(cfg.host, port).close()


def serve(engine: Engine, cfg: ServerConfig, on_ready: Callable[[str], None] | None = None) -> None:
    """Serves until SIGTERM or Ctrl-C, then drains. `on_ready` gets the address once it listens.

    Raises ConfigError when the address cannot be used. The engine is not closed.
    """
    _check_tls(cfg)
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(_listen(cfg.host, cfg.port))
        server = _Server(create_app(engine, cfg), _listen_wyoming(cfg, stack))
        if on_ready is not None:
            on_ready(address_of(listener, is_tls=bool(cfg.tls_cert)))
        server.run([listener])


@contextlib.contextmanager
def background(engine: Engine, cfg: ServerConfig | None = None) -> Iterator[str]:
    """A running server in a thread; yields its address, such as ws://127.0.0.1:40123."""
    cfg = cfg or ServerConfig(port=0)
    _check_tls(cfg)
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(_listen(cfg.host, cfg.port))
        server = _Server(create_app(engine, cfg), _listen_wyoming(cfg, stack))
        thread = threading.Thread(target=server.run, args=([listener],), name="sparqle-server")
        thread.start()
        try:
            yield address_of(listener, is_tls=bool(cfg.tls_cert))
        finally:
            server.stop()
            thread.join(min(cfg.drain_s + STOP_S, threading.TIMEOUT_MAX))


def address_of(listener: socket.socket, *, is_tls: bool = False) -> str:
    """ws://HOST:PORT of a bound socket."""
    host, port = listener.getsockname()[:2]
    scheme = "wss" if is_tls else "ws"
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


class _Server(uvicorn.Server):
    """uvicorn that drains first: by itself it would close every stream with 1012 at once."""

    def __init__(self, app: Starlette, wyoming: socket.socket | None) -> None:
        self._hub: Hub = app.state.hub
        self._wyoming = WyomingServer(self._hub)
        self._wyoming_listener = wyoming
        cfg = self._hub.cfg
        super().__init__(
            uvicorn.Config(
                app,
                loop="asyncio",
                http=HastyProtocol,
                ws=AbortableProtocol,
                ws_max_size=cfg.message_bytes,
                ssl_certfile=cfg.tls_cert or None,
                ssl_keyfile=cfg.tls_key or None,
                ws_ping_interval=cfg.ping_s,
                ws_ping_timeout=cfg.ping_s,
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

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self._wyoming_listener is not None:
            await self._wyoming.start(self._wyoming_listener)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await self._hub.drain(lambda: self.force_exit)
        await self._wyoming.stop()
        await super().shutdown(sockets)


async def _serve_dialect(path: str, websocket: WebSocket) -> None:
    """One connection: refused over HTTP, or accepted and served."""
    hub: Hub = websocket.app.state.hub
    link = Connection(websocket, hub, path)
    try:
        caller = request.check(websocket, hub.cfg)
        with hub.admit(link, caller):
            link.dialect = dialect = DIALECTS[path](link)
            try:
                dialect.begin(websocket)
            except BusyError:
                raise
            except SparqleError as err:
                dialect.on_error(err)  # told once the connection is accepted
            offered = request.subprotocols(websocket)
            chosen = (name for name in offered if name in dialect.SUBPROTOCOLS)
            await link.run(next(chosen, None))
    except (request.RefusedError, BusyError, TooManyStreamsError) as err:
        hub.metrics.refusals.labels(err.code).inc()
        await websocket.send_denial_response(request.refused(err))


async def _no_route(websocket: WebSocket) -> None:
    path = websocket.url.path
    hint = request.did_you_mean(path, DIALECTS) or f"use {' or '.join(DIALECTS)}"
    err = ConfigError(f"no such route: {path[:80]}", hint)
    await websocket.send_denial_response(request.error_response(404, err, "not_found"))


async def _needs_upgrade(http: Request) -> JSONResponse:
    err = ConfigError(f"{http.url.path} speaks websocket only", hint="connect with ws:// or wss://")
    return request.error_response(426, err, "upgrade_required")


def _check_tls(cfg: ServerConfig) -> None:
    """Raises ConfigError for files that are no certificate and key, before anything listens."""
    if not cfg.tls_cert:
        return
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(cfg.tls_cert, cfg.tls_key)
    except (OSError, ValueError) as err:  # ssl.SSLError is an OSError
        raise ConfigError(
            f"--tls-cert {cfg.tls_cert} and --tls-key {cfg.tls_key} cannot be used: {err}",
            hint="PEM files: the certificate with its chain, and its private key",
        ) from err


def _listen_wyoming(cfg: ServerConfig, stack: contextlib.ExitStack) -> socket.socket | None:
    if cfg.wyoming_port is None:
        return None
    listener = stack.enter_context(_listen(cfg.host, cfg.wyoming_port))
    logger.info("Wyoming listens on port %d", listener.getsockname()[1])
    return listener


def _listen(host: str, port: int) -> socket.socket:
    """A bound socket. Raises ConfigError with what to do."""
    try:
        infos = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as err:
        raise ConfigError(f"--host {host} is no address: {err}", hint="127.0.0.1") from err
    family, kind, _, _, address = infos[0]
    listener = socket.socket(family, kind)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
        listener.listen(BACKLOG)  # from now on nobody is refused, even before the loop runs
    except OSError as err:
        listener.close()
        raise ConfigError(
            f"cannot listen on {host}:{port}: {err.strerror}",
            hint="another port with --port N, or 0 for any free one",
        ) from err
    return listener
