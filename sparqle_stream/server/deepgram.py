"""Deepgram's live dialect, /v1/listen: binary frames of audio in, Results out.

A final of ours is settled at once; Deepgram's `is_final` comes at the end of an utterance, at
Finalize, or when 5 s of speech have gathered. Until then, with interim_results, the settled words
and the provisional tail go out as an interim result whose words say which of them are final.
docs/protocol.md has the table of fields.
"""

from __future__ import annotations

import json
import string
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from sparqle_stream import messages
from sparqle_stream.audio import AudioFormat
from sparqle_stream.errors import AudioFormatError, ConfigError, ProtocolError, SparqleError
from sparqle_stream.server import fields, request
from sparqle_stream.server.connection import Connection, Phase
from sparqle_stream.server.settings import FrameTypeError
from sparqle_stream.server.utterance import Utterance

if TYPE_CHECKING:
    from collections.abc import Iterable

    from starlette.requests import HTTPConnection

    from sparqle_stream.config import StreamOptions

ENCODINGS = {"linear16": "s16le", "mulaw": "mulaw", "alaw": "alaw"}
HONOURED = (
    *("encoding", "sample_rate", "channels", "language", "interim_results", "endpointing"),
    *("utterance_end_ms", "vad_events", "punctuate", "smart_format", "keyterm"),
)
# Taken without an effect, for the reason that docs/protocol.md gives for each.
ACCEPTED = ("model", "version", "mip_opt_out", "tag", "no_delay")
REFUSED = (
    *("callback", "callback_method", "detect_entities", "diarize", "diarize_model", "dictation"),
    *("extra", "filler_words", "keywords", "language_hint", "multichannel", "numerals"),
    *("profanity_filter", "redact", "replace", "search"),
)
COMMANDS = ("KeepAlive", "Finalize", "CloseStream", "Configure")
MIN_STOP_MS = 32  # shorter endpointing is raised to it
MAX_FINAL_S = 5.0  # of speech without a pause
PUNCTUATION = string.punctuation.replace("'", "")


@dataclass(frozen=True, slots=True)
class Request:
    """The query of one connection, checked."""

    fmt: AudioFormat
    options: StreamOptions
    has_interim: bool = False
    has_endpoints: bool = True
    has_vad_events: bool = False
    is_punctuated: bool = False
    utterance_end_ms: int = 0  # 0: no UtteranceEnd


class ListenDialect:
    """Translates between one connection's frames and the engine's events."""

    SUBPROTOCOLS = ("token", "bearer")

    def __init__(self, link: Connection) -> None:
        self._link = link
        self._request: Request
        self._now = Utterance(0.0)
        self._done_s = 0.0  # settled and sent up to here
        self._n_finalize = 0  # asked and not answered
        self._last_word_end: float | None = None  # that no UtteranceEnd was sent for
        self._is_speech = False

    def begin(self, handshake: HTTPConnection) -> None:
        defaults = self._link.hub.cfg.defaults
        self._request = parse(handshake.query_params.multi_items(), self._link.hub.model, defaults)
        self._link.set_format(self._request.fmt)
        self._link.open_stream(self._request.options)

    async def on_audio(self, data: bytes) -> None:
        if self._link.phase is not Phase.OPEN:
            raise ProtocolError("audio after CloseStream", hint="open a new connection")
        if not data:  # how older clients end
            await self._end()
            return
        await self._link.take(data, waits=True)
        self._check_gap(self._link.time_s - self._link.lag_s)

    async def on_text(self, text: str) -> None:
        command = parse_command(text)
        if command == "Finalize":
            await self._link.take_rest(waits=True)
            if self._link.stream is not None:
                self._n_finalize += 1
                self._link.stream.flush()
        elif command == "CloseStream":
            await self._end()
        elif command == "Configure":
            why = "nothing can be changed in a running stream"
            self._send("ConfigureFailure", code="NOT_SUPPORTED", description=why)

    async def _end(self) -> None:
        await self._link.finish()

    # --- from the engine -------------------------------------------------------------------------

    def on_event(self, event: messages.Event) -> None:
        match event:
            case messages.SpeechStarted():
                self._is_speech = True
                self._now.start = event.time
                if self._request.has_vad_events:
                    self._send("SpeechStarted", channel=[0], timestamp=event.time)
            case messages.Final():
                self._on_final(event)
            case messages.Tail():
                self._now.tail = event.text
                self._send_interim(event.time)
            case messages.SpeechStopped():
                self._is_speech = False
                if not self._n_finalize:  # else the answer to it carries these words
                    self._settle(is_end=True)
                self._check_gap(event.time)
            case messages.Flushed():
                self._n_finalize = max(0, self._n_finalize - 1)
                self._settle(is_end=True, from_finalize=True)
            case messages.Error():
                self._send_error(event.code, event.message, event.hint)
                self._link.close_for(event.code, event.message)
            case messages.Done():
                self._on_done(event)

    def _on_final(self, event: messages.Final) -> None:
        self._now.add(event)
        if event.words:
            self._last_word_end = event.words[-1].end
        if self._now.seconds >= MAX_FINAL_S:
            self._settle()
        else:
            self._send_interim(event.time)

    def on_error(self, err: SparqleError) -> None:
        self._send_error(err.code, err.message, err.hint)
        self._link.close_for(err.code, err.message)

    def on_notice(self, code: str, message: str) -> None:
        """The dialect has no word for it: the close code tells."""

    def _on_done(self, event: messages.Done) -> None:
        if self._now.words:
            self._settle()
        created = datetime.now(UTC).isoformat(timespec="milliseconds")
        self._send(
            "Metadata",
            transaction_key="deprecated",
            request_id=self._link.stream_id,
            sha256="",
            created=created,
            duration=event.duration,
            channels=1,
        )
        self._link.close_done()

    def _check_gap(self, heard_s: float) -> None:
        """UtteranceEnd, once the words are as long ago as the client asked for."""
        end, gap_ms = self._last_word_end, self._request.utterance_end_ms
        if not gap_ms or end is None or self._is_speech:
            return
        if heard_s - end >= gap_ms / 1000:
            self._last_word_end = None
            self._send("UtteranceEnd", channel=[0, 1], last_word_end=round(end, 3))

    # --- to the client ---------------------------------------------------------------------------

    def _send_interim(self, time_s: float) -> None:
        if not self._request.has_interim or not self._now.moving:
            return
        tail = [self._word(word, time_s, time_s, 0.0) for word in self._now.tail.split()]
        for word in tail:
            word["final"] = False
        self._send_results(self._now.moving, tail, max(time_s, self._now.end), is_tail=True)

    def _settle(self, *, is_end: bool = False, from_finalize: bool = False) -> None:
        """What was gathered goes out as final."""
        end = self._now.end
        flags: dict[str, Any] = {"is_final": True}
        flags["speech_final"] = is_end and self._request.has_endpoints
        if from_finalize:
            flags["from_finalize"] = True
        self._send_results(self._now.settled, [], end, **flags)
        self._done_s = end
        self._now = Utterance(end)

    def _send_results(
        self,
        transcript: str,
        tail: list[dict[str, Any]],
        end: float,
        *,
        is_tail: bool = False,
        **flags: bool,
    ) -> None:
        words = [self._word(w.word, w.start, w.end, 1.0) for w in self._now.words]
        if not self._request.is_punctuated:
            transcript = " ".join(bare(word) for word in transcript.split())
        confidence = 1.0 if words else 0.0
        best = {"transcript": transcript, "confidence": confidence, "words": words + tail}
        model = {"name": self._link.hub.model, "version": "", "arch": "sparqle"}
        start = min(self._now.start, end)
        self._send(
            "Results",
            is_tail=is_tail,
            channel_index=[0, 1],
            start=round(start, 3),
            duration=round(end - start, 3),
            **({"is_final": False, "speech_final": False} | flags),
            channel={"alternatives": [best]},
            metadata={
                "request_id": self._link.stream_id,
                "model_info": model,
                "model_uuid": self._link.hub.engine.model.weights_hash,
            },
        )

    def _word(self, word: str, start: float, end: float, confidence: float) -> dict[str, Any]:
        wire: dict[str, Any] = {
            "word": bare(word),
            "start": round(start, 3),
            "end": round(end, 3),
            "confidence": confidence,
            "final": True,
        }
        if self._request.is_punctuated:
            wire["punctuated_word"] = word.strip()
        return wire

    def _send_error(self, code: str, message: str, hint: str) -> None:
        text = f"{message}; {hint}" if hint else message
        self._send("Error", variant=code, code=code, description=text, message=text)

    def _send(self, kind: str, *, is_tail: bool = False, **values: Any) -> None:  # noqa: ANN401 - JSON
        self._link.send(json.dumps({"type": kind} | values, ensure_ascii=False), is_tail=is_tail)


def bare(word: str) -> str:
    """A word as Deepgram writes it without `punctuate`: small letters, no punctuation."""
    return word.strip().strip(PUNCTUATION).lower()


def parse(query: Iterable[tuple[str, str]], model: str, defaults: StreamOptions) -> Request:
    """Query fields -> what they ask for. Raises ConfigError."""
    given: dict[str, str] = {}
    terms: list[str] = []
    for name, value in query:
        if name in REFUSED:
            fields.refuse(name, value)
        elif name == "keyterm":
            terms.append(value)
        elif name in (*HONOURED, *ACCEPTED):
            if name in given and name != "tag":
                raise ConfigError(f"query field {name!r} is given twice", hint="give it once")
            given[name] = value
        elif name not in request.KEY_FIELDS:
            known = (*HONOURED, *ACCEPTED)
            hint = request.did_you_mean(name, known) or f"known: {', '.join(sorted(known))}"
            raise ConfigError(f"unknown query field {name[:40]!r}", hint=hint)
    fields.check_language(model, given.get("language", ""))
    flags = {
        name: fields.truth(name, given.get(name, "false"))
        for name in ("interim_results", "vad_events", "punctuate", "smart_format")
    }
    gap_ms = given.get("utterance_end_ms")
    if gap_ms and not flags["interim_results"]:
        raise ConfigError("utterance_end_ms needs interim_results", hint="interim_results=true")
    options = fields.with_prompt(defaults, ", ".join(terms))
    return Request(
        fmt=_format(given),
        options=_endpointing(options, given.get("endpointing")),
        has_interim=flags["interim_results"],
        has_endpoints=given.get("endpointing") != "false",
        has_vad_events=flags["vad_events"],
        is_punctuated=flags["punctuate"] or flags["smart_format"],
        utterance_end_ms=fields.whole("utterance_end_ms", gap_ms, 1000, 5000) if gap_ms else 0,
    )


def _format(given: dict[str, str]) -> AudioFormat:
    encoding = given.get("encoding", "")
    if encoding not in ENCODINGS:
        what = f"encoding={encoding[:40]!r} is not supported" if encoding else "no encoding given"
        hint = f"raw audio with encoding={'|'.join(ENCODINGS)}&sample_rate=HZ"
        raise ConfigError(what, hint=hint)
    rate_hz = fields.whole("sample_rate", given.get("sample_rate", ""), 8_000, 48_000)
    channels = fields.whole("channels", given.get("channels", "1"), 1, 64)
    try:
        return AudioFormat(ENCODINGS[encoding], rate_hz, channels)
    except AudioFormatError as err:
        raise ConfigError(err.message, err.hint) from err


def _endpointing(options: StreamOptions, value: str | None) -> StreamOptions:
    """Milliseconds of silence that end an utterance; true and false leave the server's."""
    if value is None or value in ("true", "false"):
        return options
    stop_ms = max(MIN_STOP_MS, fields.whole("endpointing", value, 0, 5000))
    return replace(options, vad=replace(options.vad, stop_ms=stop_ms))


def parse_command(text: str) -> str:
    """A text frame -> one of COMMANDS. Raises FrameTypeError or ProtocolError."""
    if not text.lstrip().startswith("{"):
        raise FrameTypeError(f"not JSON: {text[:40]!r}", hint="audio goes in binary frames")
    try:
        command = json.loads(text).get("type")
    except (ValueError, RecursionError) as err:
        raise ProtocolError(f"not JSON: {text[:40]!r}", hint=str(err)[:80]) from err
    if command not in COMMANDS:
        hint = request.did_you_mean(str(command), COMMANDS) or f"known: {', '.join(COMMANDS)}"
        raise ProtocolError(f"unknown type {str(command)[:40]!r}", hint=hint)
    return str(command)
