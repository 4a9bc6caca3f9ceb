"""Events of a stream: what the engine says and every front end (terminal, server, files) shows.

Times are samples at 16 kHz since the start of the stream inside, seconds on the wire.
`emitted` is the stream time (not wall clock) at which a word left the engine.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from typing import Any

from sparqle_stream.errors import ProtocolError


@dataclass(frozen=True, slots=True)
class Word:
    """One final word with its punctuation; seconds of stream time."""

    word: str
    start: float
    end: float
    emitted: float


@dataclass(frozen=True, slots=True)
class Ready:
    """The stream has a slot. `time` 0."""

    stream_id: str
    model: str
    sample_rate: int
    chunk_ms: int
    delay_ms: int
    time: float = 0.0
    lag: float = 0.0


@dataclass(frozen=True, slots=True)
class SpeechStarted:
    time: float
    lag: float = 0.0


@dataclass(frozen=True, slots=True)
class SpeechStopped:
    """A segment is complete: all its words are out."""

    time: float
    lag: float = 0.0


@dataclass(frozen=True, slots=True)
class Flushed:
    """The answer to a flush: all words of what was received before it are out."""

    time: float
    lag: float = 0.0


@dataclass(frozen=True, slots=True)
class Acknowledged:
    """A client that lost its connection has to send audio again only from `offset` on: samples at
    the rate that it sends. Only servers say it, and only when asked."""

    offset: int
    time: float
    lag: float = 0.0


@dataclass(frozen=True, slots=True)
class Final:
    """Words that will never change. `text` is what to append to the transcript, spaces included."""

    text: str
    words: tuple[Word, ...]
    segment: int
    time: float
    lag: float = 0.0


@dataclass(frozen=True, slots=True)
class Tail:
    """Provisional text after the last final word; the next tail or final replaces it."""

    text: str
    time: float
    lag: float = 0.0


@dataclass(frozen=True, slots=True)
class Warning:  # the wire name; modules say messages.Warning
    """Something a user may want to know: `code` is stable, `message` is for people."""

    code: str
    message: str
    time: float
    lag: float = 0.0


@dataclass(frozen=True, slots=True)
class Error:
    """The stream ends after this."""

    code: str
    message: str
    hint: str
    time: float
    lag: float = 0.0


@dataclass(frozen=True, slots=True)
class Done:
    """Last event: everything sent was captioned. `duration` in seconds of audio."""

    duration: float
    compute_seconds: float
    time: float
    lag: float = 0.0


Event = (
    Ready
    | SpeechStarted
    | SpeechStopped
    | Flushed
    | Acknowledged
    | Final
    | Tail
    | Warning
    | Error
    | Done
)

_NAMES: dict[str, type[Event]] = {
    "ready": Ready,
    "speech_started": SpeechStarted,
    "speech_stopped": SpeechStopped,
    "flushed": Flushed,
    "acknowledged": Acknowledged,
    "final": Final,
    "tail": Tail,
    "warning": Warning,
    "error": Error,
    "done": Done,
}
_TYPES = {cls: name for name, cls in _NAMES.items()}


def to_json(event: Event) -> str:
    """An event as one JSON object with its `type`; seconds rounded to milliseconds."""
    return json.dumps({"type": _TYPES[type(event)]} | _rounded(asdict(event)), ensure_ascii=False)


def from_json(text: str) -> Event:
    """The inverse of `to_json`. Raises ProtocolError for anything else."""
    try:
        raw = json.loads(text)
        cls = _NAMES[raw.pop("type")]
        if cls is Final:
            raw["words"] = tuple(Word(**word) for word in raw["words"])
        return cls(**{f.name: raw[f.name] for f in fields(cls)})
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as err:
        raise ProtocolError(f"not an event: {text[:80]!r}", hint="see docs/protocol.md") from err


def _rounded(value: Any) -> Any:  # noqa: ANN401 - walks plain JSON
    if isinstance(value, float):
        return round(value, 3)
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    return value
