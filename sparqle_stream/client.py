"""Client of a server's /v1/stream: PCM (S,) float32 at 16 kHz in, events out.

    async for event in client.stream("ws://127.0.0.1:8765", blocks):
        if isinstance(event, messages.Final):
            print(event.text, end="")

Contract: everything that `blocks` gave is captioned before the iteration ends with `Done`, each
word once, also over connections that are lost on the way; or it ends with the server's `Error`
event, or raises ServerError. Latency: none of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import queue
import socket
import ssl
import threading
from collections.abc import AsyncIterable
from typing import TYPE_CHECKING, Any
from urllib.parse import SplitResult, parse_qsl, urlencode, urlsplit, urlunsplit

import numpy as np

from sparqle_stream import messages
from sparqle_stream.config import SAMPLE_RATE_HZ
from sparqle_stream.errors import ConfigError, SparqleError
from sparqle_stream.replay import FLUSH, Patience, Progress, Replay

__all__ = ["FLUSH", "LostError", "ServerError", "stream", "stream_sync", "stream_url"]

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Iterable, Iterator, Mapping

    from websockets.asyncio.client import ClientConnection

    from sparqle_stream.messages import Event
    from sparqle_stream.replay import Block

ROUTE = "/v1/stream"
SCHEMES = {"ws": "ws", "wss": "wss", "http": "ws", "https": "wss"}
FRAME_SAMPLES = SAMPLE_RATE_HZ  # longer blocks are cut: a server takes frames of 1 MiB
OPEN_TIMEOUT_S = 10.0
RESUME_S = 30.0
RETRY_CODES = (1001, 1006, 1011, 1012, 1013)


class ServerError(SparqleError):
    """No server there, it refused the connection, or the connection was lost."""

    code = "connection"
    may_retry = True  # the same again may work in a while


class LostError(ServerError):
    """The connection ended before the last event."""


async def stream(
    url: str,
    blocks: Iterable[Block] | AsyncIterable[Block],
    *,
    options: Mapping[str, str | int] | None = None,
    api_key: str = "",
    resume_s: float = RESUME_S,
) -> AsyncGenerator[Event, None]:
    """Sends `blocks` as they come and yields events up to Done or Error.

    `blocks` may wait (a microphone): an iterable is read in a thread of its own. FLUSH among them
    brings the last words out, then `Flushed`. `options` are fields of the query such as chunk_ms or
    prompt; pace="file" for audio that is not live.

    A connection that is lost is made again, for up to `resume_s` seconds of trying, and what the
    server had not acknowledged is sent again: every word comes once, and a Warning `reconnected`
    tells of it. With 0 a lost connection is an error.
    """
    replay = Replay(_each(blocks))
    progress = Progress()
    asked = dict(options or {}) | ({"ack": "on"} if resume_s > 0 else {})
    websocket = await _connect(stream_url(url, asked), api_key)
    patience = Patience(resume_s)
    try:
        while True:
            try:
                async with contextlib.aclosing(_one_connection(websocket, replay)) as events:
                    async for event in events:
                        patience.renew(event)
                        if (told := progress.note(event, replay)) is not None:
                            yield told
                return
            except LostError as err:
                if resume_s <= 0 or not (err.may_retry and progress.stream_id):
                    raise
                again = asked | progress.query(replay.offset)
                websocket = await _reconnect(url, again, api_key, patience, err)
            yield messages.Warning(
                "reconnected", "the connection was lost and is back", replay.offset / SAMPLE_RATE_HZ
            )
    finally:
        await replay.close()


async def _one_connection(
    websocket: ClientConnection, replay: Replay
) -> AsyncGenerator[Event, None]:
    """Sends what is open and yields what comes; closes the connection."""
    sender = asyncio.create_task(_send(websocket, replay))
    try:
        async with contextlib.aclosing(_receive(websocket, sender)) as events:
            async for event in events:
                yield event
    finally:
        sender.cancel()
        await asyncio.gather(sender, return_exceptions=True)
        await websocket.close()


async def _reconnect(
    url: str,
    options: Mapping[str, str | int],
    api_key: str,
    patience: Patience,
    lost: ServerError,
) -> ClientConnection:
    """A new connection. Raises what was wrong last when the patience is at its end."""
    last = lost
    for pause_s in patience.pauses():
        await asyncio.sleep(pause_s)
        try:
            return await _connect(stream_url(url, options), api_key)
        except ServerError as err:
            last = err
            if not err.may_retry:
                break
    raise last


def stream_sync(
    url: str,
    blocks: Iterable[Block],
    *,
    options: Mapping[str, str | int] | None = None,
    api_key: str = "",
    resume_s: float = RESUME_S,
) -> Iterator[Event]:
    """`stream` for programs without an event loop."""
    events = stream(url, blocks, options=options, api_key=api_key, resume_s=resume_s)
    with asyncio.Runner() as runner:
        try:
            while True:
                try:
                    event = runner.run(_next(events))
                except StopAsyncIteration:
                    return
                yield event
        finally:
            runner.run(events.aclose())


async def _next(events: AsyncGenerator[Event, None]) -> Event:
    return await anext(events)


def stream_url(url: str, options: Mapping[str, str | int] | None = None) -> str:
    """ws://HOST:PORT, http://..., HOST:PORT -> the whole URL with its query.

    Whatever the URL says of the audio's format: it says what is sent.
    """
    parts = server_address(url, ROUTE)
    own: dict[str, str | int] = {"sample_rate": SAMPLE_RATE_HZ, "format": "f32le"}
    asked = dict(parse_qsl(parts.query, keep_blank_values=True)) | dict(options or {})
    query = own | asked | own
    query.pop("channels", None)  # one, where nobody says
    return urlunsplit(parts._replace(query=urlencode(query)))


def server_address(url: str, route: str) -> SplitResult:
    """ws://HOST:PORT, http://..., HOST:PORT, with `route` where there is no path -> ws or wss.

    Raises ConfigError for what is no address.
    """
    try:
        parts = urlsplit(url if "://" in url else f"ws://{url}")
        is_address = bool(parts.hostname) and (parts.port is None or parts.port > 0)
        scheme = SCHEMES[parts.scheme]
    except (ValueError, KeyError):  # half a bracket, a port that is no number, another scheme
        is_address = False
    if not is_address:
        raise ConfigError(f"{url!r} is not the address of a server", hint="ws://HOST:PORT")
    path = parts.path if parts.path.strip("/") else route
    return parts._replace(scheme=scheme, path=path, fragment="")


async def _connect(url: str, api_key: str) -> ClientConnection:
    """An open connection. Raises ServerError with the reason in words."""
    from websockets.asyncio.client import connect
    from websockets.exceptions import InvalidHandshake, InvalidStatus, InvalidURI

    headers = {"Authorization": f"Bearer {api_key}"} if api_key else None
    at = urlunsplit(urlsplit(url)._replace(query=""))
    try:
        return await connect(
            url,
            additional_headers=headers,
            compression=None,
            max_size=None,
            open_timeout=OPEN_TIMEOUT_S,
        )
    except InvalidStatus as err:
        raise _refusal(at, err.response.status_code, err.response.body) from err
    except (InvalidHandshake, InvalidURI) as err:
        hint = "is it a sparqle-stream server?"
        raise ServerError(f"{at} does not speak websocket: {err}", hint) from err
    except TimeoutError as err:
        hint = "check the address and the network"
        raise ServerError(f"{at} does not answer within {OPEN_TIMEOUT_S:g} s", hint) from err
    except ssl.SSLError as err:
        raise ServerError(f"no TLS with {at}: {err}", hint="ws:// if it has no TLS") from err
    except OSError as err:
        if err.errno is None or isinstance(err, socket.gaierror):  # its numbers are others
            why = err.strerror or str(err)
        else:
            why = os.strerror(err.errno)
        hint = "is it running? start one with: sparqle-stream serve"
        raise ServerError(f"cannot connect to {at}: {why}", hint) from err


def _refusal(at: str, status: int, body: bytes | bytearray | None) -> ServerError:
    """An HTTP answer instead of an upgrade; our servers explain themselves in JSON."""
    hints = {401: "give --api-key KEY", 403: "is the path right?", 404: f"the path is {ROUTE}"}
    hint = hints.get(status, "try again later")
    err = ServerError(f"{at} refused with HTTP {status}", hint)
    with contextlib.suppress(ValueError, KeyError, TypeError):
        said = json.loads(body or b"")
        err = ServerError(f"{at} refused: {said['message']}", hint=said["hint"])
    err.may_retry = status >= 500 or status == 429
    return err


async def _send(websocket: ClientConnection, replay: Replay) -> None:
    """What is not acknowledged, then all other audio, then the end. A closed connection ends it
    quietly: `_receive` says why."""
    from websockets.exceptions import ConnectionClosed

    with contextlib.suppress(ConnectionClosed):
        async for block in replay.blocks():
            if block is FLUSH:
                await websocket.send(json.dumps({"type": "flush"}))
                continue
            samples = np.ascontiguousarray(block, "<f4")
            for start in range(0, len(samples), FRAME_SAMPLES):
                await websocket.send(samples[start : start + FRAME_SAMPLES].tobytes())
        await websocket.send(json.dumps({"type": "end"}))


async def _each(blocks: Iterable[Block] | AsyncIterable[Block]) -> AsyncGenerator[Block, None]:
    if isinstance(blocks, AsyncIterable):
        async for block in blocks:
            yield block
        return
    reader = _Reader(blocks)
    try:
        while (found := await reader.next()) is not None:
            yield found
    finally:
        reader.wanted.put(None)


class _Reader:
    """Reads an iterable in a thread that nobody waits for: a quiet source never lets go of it."""

    def __init__(self, blocks: Iterable[Block]) -> None:
        self.wanted: queue.SimpleQueue[asyncio.Future[Block | None] | None] = queue.SimpleQueue()
        self._blocks, self._loop = blocks, asyncio.get_running_loop()
        threading.Thread(target=self._run, name="blocks", daemon=True).start()

    async def next(self) -> Block | None:
        """None at the end. Raises what the iterable raises."""
        future: asyncio.Future[Block | None] = self._loop.create_future()
        self.wanted.put(future)
        return await future

    def _run(self) -> None:
        iterator: Iterator[Block] | None = None
        while (future := self.wanted.get()) is not None:
            try:
                if iterator is None:  # here: what it raises is told too
                    iterator = iter(self._blocks)
                found, err = next(iterator, None), None
            except BaseException as raised:  # noqa: BLE001 - it is told where it is awaited
                found, err = None, raised
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits
                self._loop.call_soon_threadsafe(_settle, future, found, err)


def _settle(
    future: asyncio.Future[Block | None], found: Block | None, err: BaseException | None
) -> None:
    if future.done():  # cancelled meanwhile
        return
    if err is None:
        future.set_result(found)
    else:
        future.set_exception(err)


async def _receive(
    websocket: ClientConnection, sender: asyncio.Task[None]
) -> AsyncGenerator[Event, None]:
    """Events up to the last one. Raises ServerError when the connection ends without one."""
    from websockets.exceptions import ConnectionClosed

    incoming = asyncio.create_task(_one(websocket))
    try:
        while True:
            # A microphone that fails must end the stream, not leave it waiting for audio.
            waiting: set[asyncio.Task[Any]] = {incoming}
            if sender.done():
                sender.result()
            else:
                waiting.add(sender)
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            if not incoming.done():
                continue
            event = messages.from_json(incoming.result())
            yield event
            if isinstance(event, messages.Done | messages.Error):
                return
            incoming = asyncio.create_task(_one(websocket))
    except ConnectionClosed as err:
        code = err.rcvd.code if err.rcvd else 1006
        reason = err.rcvd.reason if err.rcvd else "no close frame"
        lost = LostError(
            f"the connection was lost before the end: {reason or 'no reason given'} ({code})",
            hint="try again" if code in RETRY_CODES else "see docs/protocol.md",
        )
        lost.may_retry = code in RETRY_CODES
        raise lost from err
    finally:
        incoming.cancel()
        await asyncio.gather(incoming, return_exceptions=True)


async def _one(websocket: ClientConnection) -> str:
    frame = await websocket.recv()
    return frame if isinstance(frame, str) else ""  # binary: from_json says that it is no event
