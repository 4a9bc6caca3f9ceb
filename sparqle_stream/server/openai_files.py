"""OpenAI's file route, /v1/audio/transcriptions: a multipart form in, text or subtitles out.

The fields of the form, checked, and the shapes of the answers; `uploads.py` has the plumbing.
docs/protocol.md has the table of fields.
"""

from __future__ import annotations

import io
import json
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from sparqle_stream import formats, messages
from sparqle_stream.errors import ConfigError, SparqleError
from sparqle_stream.server import fields, request
from sparqle_stream.server.openai_session import OPENAI_NAMES, language_of

if TYPE_CHECKING:
    from collections.abc import Iterable

    from sparqle_stream.config import StreamOptions

FORMATS = ("json", "text", "srt", "vtt", "verbose_json")
GRANULARITIES = ("segment", "word")
HONOURED = (
    *("file", "model", "language", "prompt", "response_format", "temperature"),
    *("timestamp_granularities", "stream", "chunking_strategy"),
)
REFUSED = (
    *("include", "keywords", "languages", "known_speaker_names", "known_speaker_references"),
)
TURN_FIELDS = ("type", "threshold", "prefix_padding_ms", "silence_duration_ms")


@dataclass(frozen=True, slots=True)
class Request:
    """The form without its file, checked."""

    options: StreamOptions
    response_format: str = "json"
    granularities: tuple[str, ...] = ()
    is_streamed: bool = False


@dataclass(slots=True)
class Result:
    """Events of one file, gathered, and the answer made of them."""

    asked: Request
    language: str
    transcript: formats.Transcript = field(default_factory=lambda: formats.Transcript("file"))
    _out: io.StringIO = field(default_factory=io.StringIO)
    _writer: formats.Writer | None = None

    def __post_init__(self) -> None:
        if self.asked.response_format in ("srt", "vtt"):
            self._writer = formats.open_writer(self.asked.response_format, self._out, "file")

    def add(self, event: messages.Event) -> None:
        self.transcript.add(event)
        if self._writer is not None:
            self._writer.add(event)

    def usage(self) -> dict[str, Any]:
        return {"type": "duration", "seconds": round(self.transcript.duration, 3)}

    def body(self) -> tuple[str, str]:
        """The whole answer and its media type."""
        self.transcript.finish()
        text = self.transcript.text
        match self.asked.response_format:
            case "json":
                return _json({"text": text, "usage": self.usage()}), "application/json"
            case "verbose_json":
                return _json(self._verbose()), "application/json"
            case "text":
                return f"{text}\n", "text/plain; charset=utf-8"
        assert self._writer is not None
        self._writer.finish()
        kind = "text/vtt" if self.asked.response_format == "vtt" else "application/x-subrip"
        return self._out.getvalue(), f"{kind}; charset=utf-8"

    def _verbose(self) -> dict[str, Any]:
        whole = self.transcript
        answer: dict[str, Any] = {
            "task": "transcribe",
            "language": self.language,
            "duration": round(whole.duration, 3),
            "text": whole.text,
            "usage": self.usage(),
        }
        wanted = self.asked.granularities or ("segment",)
        if "segment" in wanted:
            # Their types want Whisper's figures, which this model does not have: zeros.
            blank = {"seek": 0, "tokens": [], "temperature": 0.0, "avg_logprob": 0.0}
            blank |= {"compression_ratio": 0.0, "no_speech_prob": 0.0}
            answer["segments"] = [
                {"id": i} | _rounded(asdict(segment)) | blank
                for i, segment in enumerate(whole.segments)
            ]
        if "word" in wanted:
            answer["words"] = [
                _rounded({"word": w.word, "start": w.start, "end": w.end}) for w in whole.words
            ]
        return answer

    def delta(self, event: messages.Final, *, is_first: bool) -> str:
        """One server-sent event."""
        text = event.text.lstrip() if is_first else event.text
        return _sse({"type": "transcript.text.delta", "delta": text})

    def done(self) -> str:
        """The last server-sent event."""
        text = self.transcript.text
        return _sse({"type": "transcript.text.done", "text": text, "usage": self.usage()})


def parse(form: Iterable[tuple[str, object]], model: str, defaults: StreamOptions) -> Request:
    """Form fields without the file -> what they ask for. Raises ConfigError."""
    given: dict[str, str] = {}
    granularities: list[str] = []
    for raw_name, value in form:
        name = raw_name.removesuffix("[]")
        if name in REFUSED:
            fields.refuse(name, value)
            continue
        if name not in HONOURED:
            hint = request.did_you_mean(name, HONOURED) or f"known: {', '.join(HONOURED)}"
            raise ConfigError(f"unknown field {name[:40]!r}", hint=hint)
        text = fields.text(name, value)
        if name == "timestamp_granularities":
            if text not in GRANULARITIES:
                raise ConfigError(f"{name}={text[:20]!r} is unknown", hint="segment or word")
            granularities.append(text)
        elif name in given:
            raise ConfigError(f"field {name!r} is given twice", hint="give it once")
        else:
            given[name] = text
    kind = given.get("response_format") or "json"
    if kind not in FORMATS:
        hint = f"use {', '.join(FORMATS)}"
        raise ConfigError(f"response_format={kind[:20]!r} is not supported", hint=hint)
    if granularities and kind != "verbose_json":
        hint = "response_format=verbose_json"
        raise ConfigError("timestamp_granularities needs verbose_json", hint=hint)
    is_streamed = fields.truth("stream", given.get("stream") or "false")
    if is_streamed and kind not in ("json", "text"):
        raise ConfigError(f"stream goes with json and text, not with {kind}", hint="stream=false")
    _check(given, model)
    options = fields.with_prompt(defaults, given.get("prompt", ""))
    options = _chunking(options, given.get("chunking_strategy", ""))
    return Request(options, kind, tuple(granularities), is_streamed)


def _check(given: dict[str, str], model: str) -> None:
    """Fields that can only have one value here."""
    name = given.get("model", model)
    if name != model and not OPENAI_NAMES.fullmatch(name):
        raise UnknownModelError(f"unknown model {name[:60]!r}", f"it runs {model!r}")
    fields.check_language(model, given.get("language", ""))
    try:
        is_greedy = float(given.get("temperature") or 0) == 0
    except ValueError:
        is_greedy = False
    if not is_greedy:
        raise ConfigError("temperature must be 0", hint="captions are not sampled")


class UnknownModelError(SparqleError):
    """The form names a model that this server does not run."""

    code = "model_not_found"


def _chunking(options: StreamOptions, raw: str) -> StreamOptions:
    """`auto`, or server_vad with its dials as JSON."""
    if raw in ("", "auto"):
        return options
    try:
        given = json.loads(raw)
    except (ValueError, RecursionError):
        given = None
    if not isinstance(given, dict) or given.get("type") != "server_vad":
        raise ConfigError("chunking_strategy cannot be used", hint='auto or {"type": "server_vad"}')
    vad = replace(options.vad, kind="silero") if options.vad.kind == "off" else options.vad
    for name, value in given.items():
        if name not in TURN_FIELDS:
            raise ConfigError(f"unknown chunking_strategy.{name[:40]}", hint=", ".join(TURN_FIELDS))
        if name == "threshold":
            level = fields.share(name, value)
            vad = replace(vad, threshold=level, threshold_off=max(0.01, level - 0.15))
        elif name == "prefix_padding_ms":
            vad = replace(vad, preroll_ms=fields.whole(name, value, 0, 1000))
        elif name == "silence_duration_ms":
            vad = replace(vad, stop_ms=fields.whole(name, value, 32, 5000))
    return replace(options, vad=vad)


def result(asked: Request, model: str) -> Result:
    """An empty result for a request."""
    return Result(asked, language_of(model) or "en")


def error_body(err: SparqleError, kind: str = "invalid_request_error") -> dict[str, Any]:
    """An error in OpenAI's envelope."""
    return {"error": {"message": str(err), "type": kind, "param": None, "code": err.code}}


def _rounded(values: dict[str, Any]) -> dict[str, Any]:
    return {k: round(v, 3) if isinstance(v, float) else v for k, v in values.items()}


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


def _sse(event: dict[str, Any]) -> str:
    return f"data: {_json(event)}\n\n"
