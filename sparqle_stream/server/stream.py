"""Our own dialect, /v1/stream: binary frames of audio in, JSON events out.

The query says what the audio is and how it is to be captioned. Text frames: {"type": "flush"},
{"type": "end"}, {"type": "keepalive"}. Events are messages.py as they are; docs/protocol.md has
the tables. An error is told once and ends the connection.
"""

from __future__ import annotations

import asyncio
import json
import re
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from sparqle_stream import messages
from sparqle_stream.audio import AudioFormat
from sparqle_stream.errors import AudioFormatError, ConfigError, ProtocolError, SparqleError
from sparqle_stream.server import request
from sparqle_stream.server.connection import Connection, Phase
from sparqle_stream.server.resume import Ledger
from sparqle_stream.server.settings import (
    MAX_PROMPT_CHARS,
    FrameTypeError,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from starlette.requests import HTTPConnection

    from sparqle_stream.config import StreamOptions

COMMANDS = ("flush", "end", "keepalive")
QUERY_FIELDS = (
    *("sample_rate", "format", "channels", "pace"),
    *("chunk_ms", "delay_ms", "vad", "vad_stop_ms", "prompt", "model", "tail"),
    *("ack", "stream_id", "offset", "after", "segment"),
)


@dataclass(frozen=True, slots=True)
class Request:
    """The query of one connection, checked."""

    fmt: AudioFormat
    options: StreamOptions
    waits: bool  # pace=file: a full backlog stops the reading
    has_tail: bool
    has_acks: bool = False
    stream_id: str = ""  # of the stream that goes on; empty: a new one
    ledger: Ledger = field(default_factory=Ledger)


class StreamDialect:
    """Translates between one connection's frames and the engine's events."""

    SUBPROTOCOLS = ("sparqle-stream",)

    def __init__(self, link: Connection) -> None:
        self._link = link
        self._request: Request

    def begin(self, handshake: HTTPConnection) -> None:
        fields = request.query(handshake, QUERY_FIELDS)
        if "model" in fields:
            self._link.hub.check_model(fields["model"])
        self._request = parse(fields, self._link.hub.cfg.defaults)
        self._link.is_resumable = self._request.has_acks
        self._link.set_format(self._request.fmt)
        self._link.open_stream(self._request.options)
        if self._request.stream_id:
            self._link.stream_id = self._request.stream_id

    async def on_audio(self, data: bytes) -> None:
        if self._link.phase is not Phase.OPEN:
            raise ProtocolError("audio after the end", hint="send end after the last audio")
        await self._link.take(data, waits=self._request.waits)
        self._look_how_far()

    def _look_how_far(self) -> None:
        """Acknowledges what was heard by now; as it lies in the past, its words go out first."""
        stream = self._link.stream
        if self._request.has_acks and stream is not None:
            options = stream.options
            late_s = (options.delay_ms + options.chunk_ms) / 1000  # a chunk may be under way
            heard_s = self._link.heard_s
            asyncio.get_running_loop().call_soon(self._settle_heard, heard_s, late_s)

    def _settle_heard(self, heard_s: float, late_s: float) -> None:
        self._acknowledge(self._request.ledger.settle_heard(heard_s, late_s))

    def _acknowledge(self, seconds: float | None) -> None:
        if seconds is not None and self._request.has_acks:
            offset = int(seconds * self._request.fmt.rate_hz + 0.5)
            event = messages.Acknowledged(offset, seconds, self._link.lag_s)
            self._link.send(messages.to_json(event))

    async def on_text(self, text: str) -> None:
        command = parse_command(text)
        if command == "flush":
            await self._link.take_rest(waits=self._request.waits)
            if self._link.stream is not None:
                self._link.stream.flush()
        elif command == "end":
            self._link.end_audio()
            n_odd = await self._link.take_rest(waits=self._request.waits)
            if n_odd:
                self._warn("odd_bytes", f"{n_odd} bytes at the end were not a whole sample")
            if self._link.stream is not None:
                self._link.stream.finish()

    def on_event(self, event: messages.Event) -> None:
        told = self._request.ledger.translate(event)
        if told is not None:
            self._tell(told)
            self._acknowledge(self._request.ledger.settle(told))
            self._look_how_far()

    def _tell(self, event: messages.Event) -> None:
        match event:
            case messages.Ready():
                stream_id = self._request.stream_id or event.stream_id
                event = replace(event, sample_rate=self._request.fmt.rate_hz, stream_id=stream_id)
                self._link.send(messages.to_json(event))
            case messages.Tail():
                if self._request.has_tail:
                    self._link.send(messages.to_json(event), is_tail=True)
            case messages.Error():
                self._link.send(messages.to_json(event))
                self._link.close_for(event.code, event.message)
            case messages.Done():
                self._link.send(messages.to_json(event))
                self._link.close_done()
            case _:
                self._link.send(messages.to_json(event))

    def on_error(self, err: SparqleError) -> None:
        link = self._link
        event = messages.Error(err.code, err.message, err.hint, self._time_s, link.lag_s)
        link.send(messages.to_json(event))
        link.close_for(err.code, err.message)

    def on_notice(self, code: str, message: str) -> None:
        self._warn(code, message)

    def _warn(self, code: str, message: str) -> None:
        event = messages.Warning(code, message, self._time_s, self._link.lag_s)
        self._link.send(messages.to_json(event))

    @property
    def _time_s(self) -> float:
        """Seconds of the stream that were received."""
        ledger = getattr(self, "_request", None)
        return self._link.time_s + (ledger.ledger.origin if ledger else 0.0)


def parse(fields: Mapping[str, str], defaults: StreamOptions) -> Request:
    """Query fields -> what they ask for. Raises ConfigError."""
    try:
        fmt = AudioFormat(
            encoding=fields.get("format", "s16le"),
            rate_hz=_integer(fields, "sample_rate", 16_000),
            channels=_integer(fields, "channels", 1),
        )
    except AudioFormatError as err:  # of the request, not of the audio
        raise ConfigError(err.message, err.hint) from err
    vad = replace(
        defaults.vad,
        kind=fields.get("vad", defaults.vad.kind),
        stop_ms=_integer(fields, "vad_stop_ms", defaults.vad.stop_ms),
    )
    prompt = fields.get("prompt", defaults.prompt)
    if len(prompt) > MAX_PROMPT_CHARS:
        hint = f"at most {MAX_PROMPT_CHARS}"
        raise ConfigError(f"a prompt of {len(prompt)} characters is too long", hint)
    options = replace(
        defaults,
        chunk_ms=_integer(fields, "chunk_ms", defaults.chunk_ms),
        delay_ms=_integer(fields, "delay_ms", defaults.delay_ms),
        prompt=prompt,
        vad=vad,
    )
    return Request(
        fmt=fmt,
        options=options,
        waits=_choice(fields, "pace", ("live", "file")) == "file",
        has_tail=_choice(fields, "tail", ("on", "off")) == "on",
        has_acks=_choice(fields, "ack", ("off", "on")) == "on",
        stream_id=fields.get("stream_id", ""),
        ledger=_ledger(fields, fmt.rate_hz),
    )


def _ledger(fields: Mapping[str, str], rate_hz: int) -> Ledger:
    """Where a stream goes on."""
    stream_id = fields.get("stream_id")
    if stream_id is None:
        if extra := {"offset", "after", "segment"} & fields.keys():
            raise ConfigError(f"{min(extra)} without stream_id", hint="the one that ready told")
        return Ledger()
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", stream_id):
        raise ConfigError("stream_id is not one of ours", hint="send the one that ready told")
    return Ledger(
        origin=_integer(fields, "offset", 0, 15) / rate_hz,
        after=_seconds(fields, "after"),
        first_segment=_integer(fields, "segment", 0),
    )


def _seconds(fields: Mapping[str, str], name: str) -> float:
    text = fields.get(name, "0")
    if not re.fullmatch(r"\d{1,9}(\.\d{1,9})?", text, re.ASCII):
        raise ConfigError(f"{name}={text[:40]!r} is no number of seconds", hint="for example 1.25")
    return float(text)


def parse_command(text: str) -> str:
    """A text frame -> one of COMMANDS. Raises FrameTypeError or ProtocolError."""
    if not text.lstrip().startswith("{"):
        raise FrameTypeError(f"not JSON: {text[:40]!r}", hint="audio goes in binary frames")
    try:
        raw = json.loads(text)
    except (ValueError, RecursionError) as err:
        raise ProtocolError(f"not JSON: {text[:40]!r}", hint=str(err)[:80]) from err
    command = raw.pop("type", None)
    if command not in COMMANDS:
        hint = request.did_you_mean(str(command), COMMANDS) or f"known: {', '.join(COMMANDS)}"
        raise ProtocolError(f"unknown type {str(command)[:40]!r}", hint=hint)
    if raw:
        raise ProtocolError(f"{command} has no field {next(iter(raw))[:40]!r}", hint="send it bare")
    return str(command)


def _integer(fields: Mapping[str, str], name: str, default: int, n_digits: int = 9) -> int:
    text = fields.get(name)
    if text is None:
        return default
    if not (text.isascii() and text.isdigit() and len(text) <= n_digits):
        raise ConfigError(f"{name}={text[:40]!r} is not a number", hint=f"for example {default}")
    return int(text)


def _choice(fields: Mapping[str, str], name: str, choices: tuple[str, ...]) -> str:
    """One of `choices`; the first is the default."""
    value = fields.get(name, choices[0])
    if value not in choices:
        raise ConfigError(f"{name}={value[:40]!r} is unknown", hint=f"use {' or '.join(choices)}")
    return value
