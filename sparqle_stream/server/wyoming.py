"""Wyoming, Home Assistant's protocol over TCP: describe, then transcribe and audio, as often as one
likes.

A request takes a slot with its audio-start (or first audio-chunk) and gives it back with its
transcript, so that a client that only asks or waits holds none. Words go out as transcript-chunk
as soon as they are final, the whole as transcript, which is the last answer of a request.
docs/protocol.md has the table of fields.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from sparqle_stream import __version__, messages
from sparqle_stream.audio import AudioFormat
from sparqle_stream.errors import (
    AudioFormatError,
    BusyError,
    ConfigError,
    ProtocolError,
    SparqleError,
)
from sparqle_stream.server import fields
from sparqle_stream.server.connection import Connection
from sparqle_stream.server.openai_session import language_of
from sparqle_stream.server.settings import TooManyStreamsError
from sparqle_stream.server.wyoming_wire import LINE_BYTES, WyomingWire

if TYPE_CHECKING:
    import socket

    from starlette.requests import HTTPConnection

    from sparqle_stream.config import StreamOptions
    from sparqle_stream.server.hub import Hub

logger = logging.getLogger(__name__)
NAME = "wyoming"
# Client events that mean something here; others are ignored, as the protocol asks.
CLIENT_EVENTS = ("describe", "ping", "transcribe", "audio-start", "audio-chunk", "audio-stop")
STOP_MS = {"default": 0, "relaxed": 800, "aggressive": 100}  # 0: the server's own
MAX_CONNECTIONS = 64  # beside the streams: asking and waiting hold no slot
FLUSH_S = 1.0  # what was said last may take so long to reach its reader
RETRY = (BusyError, TooManyStreamsError)


@dataclass(frozen=True, slots=True)
class Chunk:
    """What the next payload is."""

    fmt: AudioFormat


class WyomingDialect:
    """Translates between one connection's events and the engine's."""

    SUBPROTOCOLS = ()

    def __init__(self, link: Connection, caller: str) -> None:
        self._link = link
        self._caller = caller
        self._options = link.hub.cfg.defaults
        self._slot: contextlib.ExitStack | None = None  # held while a request runs
        self._chunk: Chunk | None = None
        self._fmt: AudioFormat | None = None
        self._text = ""
        self._is_done = asyncio.Event()  # the engine has ended the request's stream
        self._is_failed = False  # the rest of a request that failed is dropped

    def begin(self, handshake: HTTPConnection) -> None:
        """Nothing: TCP has no handshake."""

    async def on_text(self, text: str) -> None:
        raw = json.loads(text)
        kind, data = raw.get("type"), raw["data"]
        if not isinstance(kind, str) or not isinstance(data, dict):
            raise ProtocolError("not an event", hint="a type, and data that is an object")
        try:
            await self._handle(kind, data)
        except (ConfigError, *RETRY) as err:
            self._fail(err.code, str(err))

    async def _handle(self, kind: str, data: dict[str, Any]) -> None:
        match kind:
            case "describe":
                self._send("info", info(self._link.hub))
            case "ping":
                self._send("pong", {"text": data["text"]} if "text" in data else {})
            case "transcribe":
                self._is_failed = False
                self._options = parse(data, self._link.hub)
            case "audio-start":
                self._begin(data)
            case "audio-chunk":
                self._chunk = Chunk(audio_format(data))
            case "audio-stop":
                await self._stop()

    async def on_audio(self, data: bytes) -> None:
        chunk, self._chunk = self._chunk, None
        if chunk is None or self._is_failed:
            return  # the payload of an event that means nothing here
        try:
            if self._slot is None:
                self._open()
            if chunk.fmt != self._fmt:  # each chunk may have another
                await self._link.take_rest(waits=True)
                self._fmt = chunk.fmt
                self._link.set_format(chunk.fmt)
            await self._link.take(data, waits=True)
        except RETRY as err:
            self._fail(err.code, str(err))

    def _begin(self, data: dict[str, Any]) -> None:
        """audio-start: a new request, whatever the old one was at."""
        fmt = audio_format(data)
        self._is_failed = False
        self._release()
        self._open()
        self._fmt = fmt
        self._link.set_format(fmt)

    def _open(self) -> None:
        stack = contextlib.ExitStack()
        stack.enter_context(self._link.hub.admit(self._link, self._caller))
        try:
            self._link.open_stream(self._options)
        except SparqleError:
            stack.close()
            raise
        self._slot = stack
        self._text = ""
        language = language_of(self._link.hub.model)
        self._send("transcript-start", {"language": language} if language else {})

    async def _stop(self) -> None:
        if self._is_failed:
            self._is_failed = False
            return
        if self._slot is None:  # no audio at all: the answer is an empty one
            self._answer()
            return
        await self._link.take_rest(waits=True)
        self._is_done.clear()
        if self._link.stream is not None:
            self._link.stream.finish()
            await self._link.wait_for(self._is_done)  # the next request waits for its turn

    # --- from the engine -------------------------------------------------------------------------

    def on_event(self, event: messages.Event) -> None:
        match event:
            case messages.Final():
                text = event.text if self._text else event.text.lstrip()
                self._text += text
                self._send("transcript-chunk", {"text": text})
            case messages.Error():
                self._fail(event.code, event.message)
            case messages.Done():
                self._is_done.set()
                self._send("transcript-stop", {})
                self._answer()
                self.release()
                if self._link.is_stopping:
                    self._link.close_done()

    def _answer(self) -> None:
        language = language_of(self._link.hub.model)
        data = {"text": self._text.strip()} | ({"language": language} if language else {})
        self._send("transcript", data)
        self._text = ""

    def _fail(self, code: str, message: str) -> None:
        """The request is over, the connection goes on."""
        self._send("error", {"text": message, "code": code})
        self._is_failed = True
        self.release()

    def on_error(self, err: SparqleError) -> None:
        self._send("error", {"text": str(err), "code": err.code})
        self._link.close_for(err.code, err.message)

    def on_notice(self, code: str, message: str) -> None:
        """The protocol has no word for it."""

    def release(self) -> None:
        """Gives the slot back; also when the connection ends."""
        self._release()
        self._options = self._link.hub.cfg.defaults

    def _release(self) -> None:
        self._link.cancel_stream()
        self._fmt = None
        if self._slot is not None:
            self._slot.close()
            self._slot = None

    def _send(self, kind: str, data: dict[str, Any]) -> None:
        self._link.send(json.dumps({"type": kind, "data": data}, ensure_ascii=False))


def parse(data: dict[str, Any], hub: Hub) -> StreamOptions:
    """The data of a transcribe event -> what it asks for. Raises ConfigError."""
    name = fields.text("name", data.get("name"))
    if name and name != hub.model:
        hint = f"this server runs {hub.model!r}"
        raise ConfigError(f"unknown model {name[:40]!r}", hint=hint)
    fields.check_language(hub.model, fields.text("language", data.get("language")))
    terms: list[str] = []
    for field in ("transcript_names", "transcript_terms"):
        given = data.get(field) or []
        if not isinstance(given, list):
            raise ConfigError(f"{field} must be a list of text", hint='["Anna", "Berta"]')
        terms += [fields.text(field, term) for term in given]
    options = fields.with_prompt(hub.cfg.defaults, ", ".join(terms))
    patience = fields.text("vad_sensitivity", data.get("vad_sensitivity")) or "default"
    if patience not in STOP_MS:
        hint = f"use {', '.join(STOP_MS)}"
        raise ConfigError(f"vad_sensitivity={patience[:20]!r} is unknown", hint=hint)
    return _patient(options, STOP_MS[patience])


def _patient(options: StreamOptions, stop_ms: int) -> StreamOptions:
    return replace(options, vad=replace(options.vad, stop_ms=stop_ms)) if stop_ms else options


def audio_format(data: dict[str, Any]) -> AudioFormat:
    """rate, width and channels of audio-start or audio-chunk. Raises ConfigError."""
    if fields.whole("width", data.get("width"), 1, 8) != 2:
        raise ConfigError("samples must be two bytes wide", hint="16-bit PCM, width 2")
    rate_hz = fields.whole("rate", data.get("rate"), 8_000, 48_000)
    try:
        return AudioFormat("s16le", rate_hz, fields.whole("channels", data.get("channels"), 1, 64))
    except AudioFormatError as err:
        raise ConfigError(err.message, err.hint) from err


def info(hub: Hub) -> dict[str, Any]:
    """The answer to describe."""
    source = {"attribution": {"name": "sparqle-stream", "url": ""}, "installed": True}
    source |= {"version": __version__}
    languages = [language_of(hub.model) or "en"]
    model = {"name": hub.model, "description": "live captions", "languages": languages}
    program = {
        "name": "sparqle-stream",
        "description": "live captions, append-only",
        "models": [model | source],
        "supports_transcript_streaming": True,
        "requires_external_vad": True,
    }
    empty: dict[str, Any] = {name: [] for name in ("tts", "handle", "intent", "wake", "mic", "snd")}
    return {"asr": [program | source], **empty}


class WyomingServer:
    """Accepts TCP connections for the hub; in the event loop of the websocket server."""

    def __init__(self, hub: Hub) -> None:
        self._hub = hub
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self, listener: socket.socket) -> None:
        """Accepts from a socket that listens; `stop` closes it."""
        self._server = await asyncio.start_server(self._accept, sock=listener, limit=LINE_BYTES)

    async def stop(self) -> None:
        """Ends what is left after a drain."""
        if self._server is not None:
            self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        if task is None or len(self._tasks) >= MAX_CONNECTIONS or self._hub.is_draining:
            self._hub.metrics.refusals.labels("busy").inc()
            writer.close()
            return
        self._tasks.add(task)
        wire = WyomingWire(reader, writer, self._hub.cfg.frame_bytes)
        link = Connection(wire, self._hub, NAME)
        dialect = WyomingDialect(link, writer.get_extra_info("peername")[0])
        link.dialect = dialect
        try:
            await link.run()
        except asyncio.CancelledError:
            pass  # by `stop`; Python 3.11 logs a traceback for a task of streams that is cancelled
        finally:
            dialect.release()
            self._tasks.discard(task)
            writer.close()
            try:
                await asyncio.wait_for(writer.wait_closed(), FLUSH_S)
            except (OSError, TimeoutError):  # asyncio would flush for ever to who reads nothing
                writer.transport.abort()
