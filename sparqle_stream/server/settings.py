"""Settings of one server: where it listens, who may connect, every limit, every close code.

The tables in docs/protocol.md repeat these names and numbers; tests/server/test_docs.py compares.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field
from enum import IntEnum

from sparqle_stream.config import StreamOptions
from sparqle_stream.errors import ConfigError, SparqleError

MIB = 1 << 20
MAX_PROMPT_CHARS = 2000  # the model keeps the last 48 tokens of it


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """What `serve` needs beside an engine. Times in seconds, sizes in bytes."""

    host: str = "127.0.0.1"
    port: int = 8765  # 0: any free port
    api_key: str = ""  # empty: no key is asked for
    insecure: bool = False  # allow an address beyond this machine without a key
    allow_origins: tuple[str, ...] = ()  # web pages of other hosts that may connect; "*" for all
    idle_s: float = 300.0  # a client that sends nothing for so long is closed
    drain_s: float = 30.0  # after SIGTERM, running streams may go on for so long
    send_s: float = 10.0  # a client that takes no byte for so long is cut
    outbox_events: int = 256  # events waiting for a slow reader
    frame_bytes: int = MIB  # largest audio frame of /v1/stream
    append_bytes: int = 15 * MIB  # largest audio of one input_audio_buffer.append
    message_bytes: int = 21 * MIB  # largest websocket message of all: 15 MiB as base64, and JSON
    defaults: StreamOptions = field(default_factory=StreamOptions)  # where a client says nothing

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65_535:
            raise ConfigError(f"--port {self.port} is out of range", hint="use 1 to 65535")
        if self.drain_s < 0 or min(self.idle_s, self.send_s) <= 0:
            raise ConfigError("idle, send and drain times must be above 0", hint="seconds")
        if not (self.api_key or self.insecure or is_loopback(self.host)):
            raise ConfigError(
                f"refusing to listen on {self.host} without a key",
                hint="give --api-key KEY, or --insecure if the network is trusted",
            )


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class Close(IntEnum):
    """Websocket close codes that this server sends itself."""

    NORMAL = 1000
    WRONG_FRAME = 1003  # text where audio is expected, or the reverse
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
