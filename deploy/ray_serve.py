"""Ray Serve: several engines behind one address.

    serve run deploy.ray_serve:app slots=16 max_replicas=4 key_file=keys.txt

In: options of `sparqle-stream serve` and of `Scale`, as NAME=VALUE. Out: Ray's proxies speak what
`serve` speaks over HTTP and websockets; each replica is one engine. A websocket stays with the
replica that took it. One that loses its replica is connected again by its client, and any other
replica goes on with it (docs/protocol.md, Resuming): nothing about a stream is kept in the cluster.
Latency: two hops between processes, some milliseconds.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from ray import serve

from sparqle_stream import arguments, cli, server
from sparqle_stream.errors import ConfigError
from sparqle_stream.server.settings import Close
from sparqle_stream.server.transport import ABORT, IS_GONE

if TYPE_CHECKING:
    from argparse import Namespace
    from collections.abc import Callable, Mapping

    from ray.serve import Application
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from sparqle_stream.engine import Engine

NAME = "captions"  # of the deployment
INBOX_BYTES = 64 << 20  # of one websocket; 17 minutes of float32
WAIT_LOOP_S = 1.0  # how often Ray looks whether the streams of a replica that stops have ended
# Ray's proxies listen, not the replicas; Wyoming is TCP, which they do not speak.
NOT_HERE = {
    *("host", "port", "tls_cert", "tls_key", "wyoming_port", "log"),
    *("help", "version", "debug", "print_config"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """How many replicas, and what each takes of the cluster. One open stream is one slot in use."""

    min_replicas: int = 1
    max_replicas: int = 4
    slots_in_use: float = 0.7  # on average, of all slots; above it replicas are added
    num_cpus: float = 2.0  # of one replica
    num_gpus: float = 0.0

    def __post_init__(self) -> None:
        if not 1 <= self.min_replicas <= self.max_replicas:
            raise ConfigError(
                f"min_replicas={self.min_replicas} and max_replicas={self.max_replicas} do not fit",
                hint="use 1 <= min_replicas <= max_replicas",
            )
        if not 0 < self.slots_in_use <= 1 or self.num_cpus <= 0 or self.num_gpus < 0:
            raise ConfigError(
                "slots_in_use must be above 0 and at most 1, num_cpus above 0",
                hint="for example slots_in_use=0.7 num_cpus=2",
            )


def app(options: Mapping[str, str]) -> Application:
    """What `serve run` builds: options as text -> the application. Raises ConfigError."""
    args, scale = parse(options)
    make_engine = partial(cli.load_engine, args, args.slots)
    return application(make_engine, server_config(args), args.slots, scale)


def parse(options: Mapping[str, str]) -> tuple[Namespace, Scale]:
    """NAME=VALUE as given -> options of `serve`, and the scale. Raises ConfigError."""
    kinds: dict[str, Callable[[str], float]] = {
        f.name: int if f.name.endswith("_replicas") else float for f in fields(Scale)
    }
    scale: dict[str, Any] = {}
    argv: list[str] = []
    parser = arguments.parser_for("serve")
    flags = {a.dest: a for a in parser._actions if a.dest not in NOT_HERE}
    for name, text in options.items():
        if name in kinds:
            scale[name] = _number(kinds[name], name, text)
        elif name not in flags:
            near = arguments.did_you_mean(name, [*kinds, *flags])
            raise ConfigError(
                f"unknown option {name!r}", hint=near or "Ray's own: --http-options and serve start"
            )
        elif flags[name].nargs == 0:
            if text.lower() not in ("true", "false"):
                raise ConfigError(
                    f"{name}={text!r} is neither true nor false", hint="true or false"
                )
            argv += [flags[name].option_strings[0]] if text.lower() == "true" else []
        else:
            argv.append(f"{flags[name].option_strings[0]}={text}")
    return parser.parse(argv, {}), Scale(**scale)


def server_config(args: Namespace) -> server.ServerConfig:
    """Ray's proxies listen for others than this machine: that needs a key, or `insecure=true`."""
    return replace(cli.server_config(args), host="0.0.0.0")


def application(
    make_engine: Callable[[], Engine], cfg: server.ServerConfig, slots: int, scale: Scale
) -> Application:
    """The application for any engine; `make_engine` is called in each replica."""

    def build() -> Captions:
        return Captions(make_engine(), cfg)

    # A stream is a request that goes on for long. A replica gets as many as it has slots; others
    # wait for one that is being started, as many again, and the rest is told 503 by the proxy.
    deployment = serve.deployment(
        name=NAME,
        max_ongoing_requests=slots,
        max_queued_requests=slots,
        autoscaling_config={
            "min_replicas": scale.min_replicas,
            "initial_replicas": scale.min_replicas,
            "max_replicas": scale.max_replicas,
            "target_ongoing_requests": max(1.0, slots * scale.slots_in_use),
        },
        ray_actor_options={"num_cpus": scale.num_cpus, "num_gpus": scale.num_gpus},
        graceful_shutdown_timeout_s=cfg.drain_s,
        graceful_shutdown_wait_loop_s=WAIT_LOOP_S,
    )
    replica = deployment(serve.ingress(build)(Replica))
    return cast("Application", replica.bind())


class Replica:
    """One engine with its server; Ray adds the rest."""

    app: Captions  # what `build` made; put here by Ray

    def state(self) -> dict[str, int]:
        """Which process this is, its slots, and how many of them are in use."""
        return {"pid": os.getpid()} | self.app.state()


class Captions:
    """The server as an ASGI application for Ray: closes its engine at the end."""

    def __init__(self, engine: Engine, cfg: server.ServerConfig) -> None:
        self._engine = engine
        self._app: ASGIApp = server.create_app(engine, cfg)

    def state(self) -> dict[str, int]:
        """Slots, and streams that hold one."""
        return {"slots": self._engine.cfg.n_slots, "streams": self._engine.metrics().n_streams}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await Wire(receive, send).run(self._app, scope)
        else:
            await self._app(scope, receive, send)
        if scope["type"] == "lifespan":
            await asyncio.to_thread(self._engine.close)


class Wire:
    """One websocket between the server and Ray's proxy, which differs from uvicorn in two ways.

    The proxy reads a client as fast as it sends, whoever has to wait for it: what waits is counted
    here, and a client that is too far ahead is closed with 1013. And nobody can ask it whether a
    client is gone: frames are taken at once, so the end is seen though others are before it.
    """

    def __init__(self, receive: Receive, send: Send, max_bytes: int = INBOX_BYTES) -> None:
        self._receive = receive
        self._send = send
        self._max_bytes = max_bytes
        self._frames: asyncio.Queue[Message] = asyncio.Queue()
        self._n_bytes = 0  # in _frames
        self._is_over = False  # gone, or closed by us

    async def run(self, app: ASGIApp, scope: Scope) -> None:
        """`app` over this wire, until it returns."""
        own = {ABORT: self._abort, IS_GONE: lambda: self._is_over}
        extended = {**scope, "extensions": {**scope.get("extensions", {}), **own}}
        pump = asyncio.create_task(self._pump())
        try:
            await app(extended, self._next, self._tell)
        finally:
            pump.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await pump

    async def _pump(self) -> None:
        try:
            while not self._is_over:
                message = await self._receive()
                self._n_bytes += _size(message)
                if message["type"] == "websocket.disconnect":
                    self._is_over = True
                elif self._n_bytes > self._max_bytes:
                    await self._refuse()
                    return
                self._frames.put_nowait(message)
        finally:
            if not self._is_over:  # the proxy has died: nobody else tells the server
                self._abort()

    async def _refuse(self) -> None:
        reason = "audio came faster than it could be captioned for too long"
        await self._send(
            {"type": "websocket.close", "code": int(Close.TRY_LATER), "reason": reason}
        )
        self._abort()

    def _abort(self) -> None:
        """What waits is dropped; the proxy closes once the application has returned."""
        self._is_over = True
        while not self._frames.empty():
            self._frames.get_nowait()
        self._frames.put_nowait({"type": "websocket.disconnect", "code": int(Close.LOST)})

    async def _next(self) -> Message:
        message = await self._frames.get()
        self._n_bytes -= _size(message)
        return message

    async def _tell(self, message: Message) -> None:
        if not self._is_over:
            await self._send(message)


def _size(message: Message) -> int:
    return len(message.get("bytes") or b"") + len(message.get("text") or "")


def _number(kind: Callable[[str], float], name: str, text: str) -> float:
    try:
        return kind(text)
    except ValueError as err:
        raise ConfigError(f"{name}={text!r} is no number", hint="see deploy/README.md") from err
