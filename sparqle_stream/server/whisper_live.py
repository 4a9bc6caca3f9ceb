"""WhisperLive's dialect, at /: JSON first, then float32 audio, END_OF_AUDIO last.

Out: the last N completed segments with the moving one after them. A segment of theirs is an
utterance of ours, or 8 s of one. docs/protocol.md has the table of fields.
"""

from __future__ import annotations

import json
from collections import deque
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from sparqle_stream import messages
from sparqle_stream.audio import AudioFormat
from sparqle_stream.errors import ConfigError, ProtocolError, SparqleError
from sparqle_stream.server import fields, request
from sparqle_stream.server.connection import Connection, Phase
from sparqle_stream.server.utterance import Utterance

if TYPE_CHECKING:
    from starlette.requests import HTTPConnection

    from sparqle_stream.config import StreamOptions

END = b"END_OF_AUDIO"
FORMATS = {"float32": "f32le", "int16": "s16le"}
HONOURED = (
    *("uid", "language", "use_vad", "vad_parameters", "audio_format", "initial_prompt"),
    *("hotwords", "send_last_n_segments", "word_timestamps"),
)
# Answered by a WARNING when they ask for something else than they get, with what they get.
WARNED = {"model": None}
# Dials of Whisper that nothing here corresponds to: a WARNING unless they have their default.
WITHOUT_EFFECT: dict[str, object] = {
    "no_speech_thresh": 0.45,
    "clip_audio": False,
    "same_output_threshold": 10,
    "target_language": "fr",  # of translations
    "max_speakers": 10,
    "known_speakers": [],
    "diarization_threshold": None,
    "hf_token": None,
}
REFUSED = ("enable_translation", "enable_diarization")
VAD_PARAMETERS = ("threshold", "min_silence_duration_ms", "speech_pad_ms")
MAX_SEGMENT_S = 8.0
MAX_SEGMENTS = 100


@dataclass(frozen=True, slots=True)
class Request:
    """The first message of one connection, checked."""

    uid: str
    fmt: AudioFormat
    options: StreamOptions
    n_segments: int = 10
    has_words: bool = False
    warnings: tuple[str, ...] = ()


class WhisperLiveDialect:
    """Translates between one connection's frames and the engine's events."""

    SUBPROTOCOLS = ()

    def __init__(self, link: Connection) -> None:
        self._link = link
        self._request: Request | None = None
        self._uid: object = None
        self._completed: deque[dict[str, Any]] = deque(maxlen=MAX_SEGMENTS)
        self._now = Utterance(0.0)
        self._end_s = 0.0  # of the last completed segment: the stock client sorts by it

    def begin(self, handshake: HTTPConnection) -> None:
        request.query(handshake, ())

    async def on_text(self, text: str) -> None:
        if self._request is not None:
            raise ProtocolError("a second message of text", hint="audio goes in binary frames")
        raw = parse_json(text)
        self._uid = raw.get("uid")
        asked = parse(raw, self._link.hub.model, self._link.hub.cfg.defaults)
        self._request = asked
        self._link.set_format(asked.fmt)
        self._link.open_stream(asked.options)
        for warning in asked.warnings:
            self._send(status="WARNING", message=warning)

    async def on_audio(self, data: bytes) -> None:
        if self._request is None:
            raise ProtocolError("audio before the options", hint="send the JSON message first")
        if self._link.phase is not Phase.OPEN:
            return  # the stock client may send what its microphone still had
        if data == END:
            await self._link.finish()
            return
        await self._link.take(data, waits=True)

    # --- from the engine -------------------------------------------------------------------------

    def on_event(self, event: messages.Event) -> None:
        match event:
            case messages.Ready():
                # The stock client collects segments only for a backend of this name.
                self._send(message="SERVER_READY", backend="faster_whisper")
            case messages.SpeechStarted():
                self._now.start = max(event.time, self._end_s)
            case messages.Final():
                self._now.add(event)
                if self._now.seconds >= MAX_SEGMENT_S:
                    self._complete()
                self._send_segments()
            case messages.Tail():
                self._now.tail = event.text
                self._send_segments(is_tail=True)
            case messages.SpeechStopped():
                self._complete()
                self._send_segments()
            case messages.Error():
                self._send(status="ERROR", message=event.message)
                self._link.close_for(event.code, event.message)
            case messages.Done():
                self._on_done()

    def _on_done(self) -> None:
        if self._now.settled:
            self._complete()
            self._send_segments()
        if self._link.is_stopping:
            self._send(message="DISCONNECT")
        self._link.close_done()

    def on_error(self, err: SparqleError) -> None:
        self._send(status="ERROR", message=str(err))
        self._link.close_for(err.code, err.message)

    def on_notice(self, code: str, message: str) -> None:
        del code
        self._send(status="WARNING", message=message)

    # --- to the client ---------------------------------------------------------------------------

    def _complete(self) -> None:
        if self._now.settled:
            segment = self._segment(self._now.settled, self._now.end, is_completed=True)
            self._completed.append(segment)
            self._end_s = float(segment["end"])
        self._now = Utterance(self._end_s)

    def _segment(self, text: str, end: float, *, is_completed: bool) -> dict[str, Any]:
        start = max(self._now.start, self._end_s)
        end = max(start, end)
        segment: dict[str, Any] = {"start": f"{start:.3f}", "end": f"{end:.3f}", "text": f" {text}"}
        segment["completed"] = is_completed
        if self._request is not None and self._request.has_words:
            segment["words"] = [
                {"word": w.word, "start": w.start, "end": w.end, "probability": 1.0}
                for w in self._now.words
            ]
        return segment

    def _send_segments(self, *, is_tail: bool = False) -> None:
        assert self._request is not None
        segments = list(self._completed)[-self._request.n_segments :]
        if self._now.moving:
            segments.append(self._segment(self._now.moving, self._now.end, is_completed=False))
        if segments:
            self._send(segments=segments, is_tail=is_tail)

    def _send(self, *, is_tail: bool = False, **values: Any) -> None:  # noqa: ANN401 - JSON
        frame = json.dumps({"uid": self._uid} | values, ensure_ascii=False)
        self._link.send(frame, is_tail=is_tail)


def parse_json(text: str) -> dict[str, Any]:
    """The first message. Raises ProtocolError."""
    try:
        raw = json.loads(text)
    except (ValueError, RecursionError) as err:
        raise ProtocolError(f"not JSON: {text[:40]!r}", hint=str(err)[:80]) from err
    if not isinstance(raw, dict):
        raise ProtocolError("not a JSON object", hint='{"uid": ..., "language": "en"}')
    return raw


def parse(raw: dict[str, Any], model: str, defaults: StreamOptions) -> Request:
    """Options of a client -> what they ask for. Raises ConfigError."""
    if not isinstance(raw.get("uid"), str):
        raise ConfigError("uid is missing", hint="a string that every answer repeats")
    if raw.get("task", "transcribe") != "transcribe":
        raise ConfigError("task must be transcribe", hint="this server does not translate")
    known = (*HONOURED, *WARNED, *WITHOUT_EFFECT, *REFUSED, "task")
    for name, value in raw.items():
        if name in REFUSED:
            fields.refuse(name, value)
        elif name not in known:
            hint = request.did_you_mean(name, known) or f"known: {', '.join(sorted(known))}"
            raise ConfigError(f"unknown option {name[:40]!r}", hint=hint)
    fields.check_language(model, fields.text("language", raw.get("language")))
    prompt = fields.text("initial_prompt", raw.get("initial_prompt"))
    prompt = f"{prompt} {fields.text('hotwords', raw.get('hotwords'))}".strip()
    wire_format = raw.get("audio_format") or "float32"
    if not isinstance(wire_format, str) or wire_format not in FORMATS:
        hint = f"use {' or '.join(FORMATS)}"
        raise ConfigError(f"audio_format {str(wire_format)[:40]!r} is not supported", hint=hint)
    return Request(
        uid=raw["uid"],
        fmt=AudioFormat(FORMATS[wire_format]),
        options=_detector(fields.with_prompt(defaults, prompt), raw),
        n_segments=fields.whole(
            "send_last_n_segments", raw.get("send_last_n_segments", 10), 1, MAX_SEGMENTS
        ),
        has_words=fields.truth("word_timestamps", raw.get("word_timestamps") or False),
        warnings=tuple(_warnings(raw, model)),
    )


def _warnings(raw: dict[str, Any], model: str) -> list[str]:
    found = [
        f"{name} has no effect on this server"
        for name, default in WITHOUT_EFFECT.items()
        if name in raw and raw[name] not in (default, None)
    ]
    if raw.get("model") not in (None, model):
        found.append(f"this server runs {model}, whatever the client asks for")
    return found


def _detector(options: StreamOptions, raw: dict[str, Any]) -> StreamOptions:
    vad = options.vad
    wanted = raw.get("vad_parameters")
    if wanted is not None and not isinstance(wanted, dict):
        raise ConfigError("vad_parameters must be an object", hint=", ".join(VAD_PARAMETERS))
    for name, value in (wanted or {}).items():
        if value is None:
            continue
        if name == "threshold":
            level = fields.share(name, value)
            vad = replace(vad, threshold=level, threshold_off=max(0.01, level - 0.15))
        elif name == "min_silence_duration_ms":
            vad = replace(vad, stop_ms=fields.whole(name, value, 32, 5000))
        elif name == "speech_pad_ms":
            vad = replace(vad, preroll_ms=fields.whole(name, value, 0, 1000))
        else:
            hint = f"known: {', '.join(VAD_PARAMETERS)}"
            raise ConfigError(f"vad_parameters.{name[:40]} is not supported", hint=hint)
    if "use_vad" in raw and raw["use_vad"] is not None:
        if not fields.truth("use_vad", raw["use_vad"]):
            vad = replace(vad, kind="off")
        elif vad.kind == "off":
            vad = replace(vad, kind="silero")
    return replace(options, vad=vad)
