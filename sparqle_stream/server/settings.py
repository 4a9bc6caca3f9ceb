"""Settings of one server: where it listens, who may connect, every limit, every close code.

The tables in docs/protocol.md repeat these names and numbers; tests/server/test_protocol_page.py
compares.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path

from sparqle_stream.config import StreamOptions
from sparqle_stream.errors import ConfigError, SparqleError

MIB = 1 << 20
MAX_PROMPT_CHARS = 2000  # the model keeps the last 48 tokens of it


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """What `serve` needs beside an engine. Times in seconds, sizes in bytes."""

    host: str = "127.0.0.1"
    port: int = 8765  # 0: any free port
    api_key: str = ""  # empty, and no api_keys: no key is asked for
    api_keys: tuple[str, ...] = ()  # more keys, one per customer: they share the limits below
    insecure: bool = False  # allow an address beyond this machine without a key
    allow_origins: tuple[str, ...] = ()  # web pages of other hosts that may connect; "*" for all
    tls_cert: str = ""  # PEM files; both or none
    tls_key: str = ""
    wyoming_port: int | None = None  # Home Assistant's protocol over TCP; 0: any free port
    streams_per_key: int = 0  # at a time, of one key (or address, without keys); 0: no limit
    max_stream_s: float = 86_400.0  # of one connection, in audio or on the clock
    frames_per_s: float = 1000.0  # of one connection; the rest is read later
    idle_s: float = 300.0  # a client that sends nothing for so long is closed
    ping_s: float = 20.0  # a ping so often; who does not answer in as long again is closed
    drain_s: float = 30.0  # after SIGTERM, running streams may go on for so long
    send_s: float = 10.0  # a client that takes no byte for so long is cut
    outbox_events: int = 256  # events waiting for a slow reader
    frame_bytes: int = MIB  # largest audio frame of /v1/stream
    append_bytes: int = 15 * MIB  # largest audio of one input_audio_buffer.append
    message_bytes: int = 21 * MIB  # largest websocket message of all: 15 MiB as base64, and JSON
    upload_bytes: int = 256 * MIB  # largest file of /v1/audio/transcriptions
    defaults: StreamOptions = field(default_factory=StreamOptions)  # where a client says nothing

    def __post_init__(self) -> None:
        for option, port in (("--port", self.port), ("--wyoming-port", self.wyoming_port or 0)):
            if not 0 <= port <= 65_535:
                raise ConfigError(f"{option} {port} is out of range", hint="use 1 to 65535")
        times = (self.idle_s, self.send_s, self.ping_s, self.max_stream_s)
        if not (self.drain_s >= 0 and all(seconds > 0 for seconds in times)):  # NaN is neither
            raise ConfigError("idle, send, stream and drain times must be above 0", hint="seconds")
        if self.streams_per_key < 0 or not self.frames_per_s > 0:
            raise ConfigError("a limit on streams or frames is below 0", hint="use a number above")
        if bool(self.tls_cert) != bool(self.tls_key):
            raise ConfigError("TLS needs two files", hint="give --tls-cert and --tls-key")
        self._check_access()

    def _check_access(self) -> None:
        if not (self.keys or self.insecure or is_loopback(self.host)):
            raise ConfigError(
                f"refusing to listen on {self.host} without a key",
                hint="give --api-key KEY, or --insecure if the network is trusted",
            )
        if self.wyoming_port is not None and not (self.insecure or is_loopback(self.host)):
            raise ConfigError(
                f"Wyoming has no keys: refusing to speak it on {self.host}",
                hint="listen on this machine, or give --insecure if the network is trusted",
            )

    @property
    def keys(self) -> tuple[str, ...]:
        """All keys that open the door."""
        return tuple(key for key in (self.api_key, *self.api_keys) if key)


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def keys_of(name: str) -> tuple[str, ...]:
    """The keys in a file, one a line. Raises ConfigError."""
    if not name:
        return ()
    try:
        lines = [line.strip() for line in Path(name).read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as err:
        raise ConfigError(f"--key-file {name} cannot be read: {err}", "one key a line") from err
    keys = tuple(line for line in lines if line and not line.startswith("#"))
    if not keys:
        raise ConfigError(f"--key-file {name} has no key in it", hint="one key a line")
    return keys


class Close(IntEnum):
    """Websocket close codes that this server sends itself, and the one that it sees."""

    NORMAL = 1000
    WRONG_FRAME = 1003  # text where audio is expected, or the reverse
    LOST = 1006  # never sent: the connection ended without a close frame
    INVALID = 1007  # a message that cannot be read
    POLICY = 1008  # the request cannot be served as it is: do not retry
    TOO_BIG = 1009
    INTERNAL = 1011
    RESTART = 1012  # retry: another process will answer
    TRY_LATER = 1013  # retry after a while


class FrameTypeError(SparqleError):
    """A text frame where audio is expected, or audio where JSON is."""

    code = "wrong_frame_type"


class FrameSizeError(SparqleError):
    """One frame is larger than the limit."""

    code = "frame_too_big"


class UnknownModelError(SparqleError):
    """The client names a model that this server does not run."""

    code = "unknown_model"


class TooManyStreamsError(SparqleError):
    """One key, or one address, has as many streams open as it may."""

    code = "too_many_streams"


class IdleError(SparqleError):
    """Nothing was heard from the client for `idle_s`."""

    code = "idle_timeout"


class InternalError(SparqleError):
    """A bug; the details are in the server's log."""

    code = "internal"


CLOSE_OF = {
    "invalid_message": Close.INVALID,
    "invalid_audio": Close.INVALID,
    "invalid_option": Close.POLICY,
    "unknown_model": Close.POLICY,
    "idle_timeout": Close.POLICY,
    "wrong_frame_type": Close.WRONG_FRAME,
    "frame_too_big": Close.TOO_BIG,
    "busy": Close.TRY_LATER,
    "backlog": Close.TRY_LATER,
    "internal": Close.INTERNAL,
}


def close_code(error_code: str) -> Close:
    """The close code that follows an error event; what is not listed is the server's fault."""
    return CLOSE_OF.get(error_code, Close.INTERNAL)
