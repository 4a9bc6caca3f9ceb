"""The `session` object of OpenAI's realtime transcription (GA): what a client may set, and to what.

In: the object of a `session.update`. Out: a new SessionConfig, or FieldError for the first field
that cannot be honoured; then nothing is changed. Only fields that are present change something,
null brings the default back. The table in docs/protocol.md says the same, field by field.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from sparqle_stream.audio import AudioFormat
from sparqle_stream.errors import SparqleError
from sparqle_stream.server.request import did_you_mean
from sparqle_stream.server.settings import MAX_PROMPT_CHARS

if TYPE_CHECKING:
    from collections.abc import Collection

    from sparqle_stream.config import StreamOptions

Json = dict[str, Any]

# How long the words are held back; the names are OpenAI's, the numbers ours.
DELAY_MS = {"minimal": 80, "low": 240, "medium": 400, "high": 640, "xhigh": 960}
ENCODINGS = {"audio/pcm": "s16le", "audio/pcmu": "mulaw", "audio/pcma": "alaw"}
DEFAULT_FORMAT = AudioFormat("s16le", 24_000)
MAX_PREFIX_MS = 1000
MIN_THRESHOLD = 0.01
THRESHOLD_GAP = 0.15  # speech ends this much below the threshold at which it begins

# OpenAI's own models. A client that was only given another address asks for one of them: it gets
# the one that runs here, and session.updated says so.
OPENAI_NAMES = re.compile(r"whisper-1|gpt-[a-z0-9.-]*(?:transcribe|whisper)[a-z0-9.-]*")
# Those of them that have no turn detection: whoever names one commits, unless they say otherwise.
CLIENT_COMMITS = ("gpt-realtime-whisper", "gpt-live-transcribe")

# Known to OpenAI's clients, refused here: a value other than null is an error.
REFUSED = {
    "session": (
        *("model", "voice", "instructions", "tools", "tool_choice", "output_modalities", "prompt"),
        *("tracing", "truncation", "max_output_tokens", "reasoning", "parallel_tool_calls"),
    ),
    "session.audio": ("output",),
    "session.audio.input.transcription": ("keywords",),
    "session.audio.input.turn_detection": ("idle_timeout_ms", "eagerness"),
}


class FieldError(SparqleError):
    """A field that cannot be honoured; `param` is its path."""

    code = "invalid_value"

    def __init__(self, param: str, message: str, hint: str = "", code: str = "") -> None:
        super().__init__(message, hint)
        self.param = param
        self.code = code or type(self).code


@dataclass(frozen=True, slots=True)
class TurnDetection:
    """server_vad."""

    threshold: float
    prefix_padding_ms: int
    silence_duration_ms: int


@dataclass(frozen=True, slots=True)
class SessionConfig:
    """What is in force. `turn_detection` None: the client commits."""

    model: str
    prompt: str
    turn_detection: TurnDetection | None
    fmt: AudioFormat = DEFAULT_FORMAT
    language: str = ""
    delay: str = ""  # empty: the server's default

    @classmethod
    def default(cls, model: str, options: StreamOptions) -> SessionConfig:
        has_turns = options.vad.kind != "off"
        return cls(model, options.prompt, _default_turns(options) if has_turns else None)

    def stream_options(self, defaults: StreamOptions) -> StreamOptions:
        """What the engine is asked for."""
        vad = defaults.vad
        if (turns := self.turn_detection) is not None:
            vad = replace(
                vad,
                kind="silero" if vad.kind == "off" else vad.kind,
                stop_ms=turns.silence_duration_ms,
                preroll_ms=turns.prefix_padding_ms,
                threshold=turns.threshold,
                threshold_off=max(MIN_THRESHOLD, turns.threshold - THRESHOLD_GAP),
            )
        delay_ms = DELAY_MS[self.delay] if self.delay else defaults.delay_ms
        return replace(defaults, prompt=self.prompt, delay_ms=delay_ms, vad=vad)


def to_wire(session_id: str, cfg: SessionConfig) -> Json:
    """The effective configuration, as session.created and session.updated carry it."""
    wire_type = next(name for name, code in ENCODINGS.items() if code == cfg.fmt.encoding)
    fmt: Json = {"type": wire_type}
    if wire_type == "audio/pcm":
        fmt["rate"] = cfg.fmt.rate_hz
    transcription: Json = {"model": cfg.model, "prompt": cfg.prompt}
    transcription |= {"language": cfg.language} if cfg.language else {}
    transcription |= {"delay": cfg.delay} if cfg.delay else {}
    turns: Json | None = None
    if cfg.turn_detection is not None:
        turns = {
            "type": "server_vad",
            "threshold": cfg.turn_detection.threshold,
            "prefix_padding_ms": cfg.turn_detection.prefix_padding_ms,
            "silence_duration_ms": cfg.turn_detection.silence_duration_ms,
        }
    return {
        "id": session_id,
        "object": "realtime.transcription_session",
        "type": "transcription",
        "audio": {
            "input": {
                "format": fmt,
                "transcription": transcription,
                "noise_reduction": None,
                "turn_detection": turns,
            }
        },
        "include": [],
    }


def update(cfg: SessionConfig, raw: object, defaults: StreamOptions) -> SessionConfig:
    """The configuration after one session.update. Raises FieldError."""
    fields = as_object(raw, "session", ("type", "audio", "include", "id", "object", "expires_at"))
    if fields.get("type") != "transcription":
        raise FieldError(
            "session.type",
            f"session.type is {fields.get('type')!r}",
            hint="this server transcribes only: use 'transcription'",
            code="invalid_value" if "type" in fields else "missing_required_parameter",
        )
    if fields.get("include"):
        raise _unsupported("session.include", "log probabilities are not available")
    path = "session.audio"
    audio = as_object(fields.get("audio"), path, ("input",))
    path += ".input"
    known = ("format", "transcription", "noise_reduction", "turn_detection")
    given = as_object(audio.get("input"), path, known)
    if "format" in given:
        cfg = replace(cfg, fmt=_format(given["format"], f"{path}.format"))
    if "transcription" in given:
        cfg = _transcription(cfg, given["transcription"], f"{path}.transcription", defaults)
    asked = given.get("transcription") or {}
    if "turn_detection" in given:
        turns = _turns(cfg, given["turn_detection"], f"{path}.turn_detection", defaults)
        cfg = replace(cfg, turn_detection=turns)
    elif str(asked.get("model")).startswith(CLIENT_COMMITS):
        cfg = replace(cfg, turn_detection=None)
    # noise_reduction: there is none; session.updated answers null.
    try:
        cfg.stream_options(defaults)
    except SparqleError as err:
        raise FieldError("session.audio.input", err.message, err.hint) from err
    return cfg


def as_object(raw: object, path: str, known: Collection[str]) -> Mapping[str, Any]:
    """A JSON object without unknown or refused fields; null is an empty one."""
    if raw is None:
        return {}
    if not isinstance(raw, Mapping):
        raise FieldError(path, f"{path} must be an object", code="invalid_type")
    refused = REFUSED.get(path, ())
    for name, value in raw.items():
        param = f"{path}.{name[:60]}"
        if name in refused:
            if value is not None and value != []:  # an empty list asks for nothing
                raise _unsupported(param, "this server does not have it")
        elif name not in known:
            hint = did_you_mean(name, known) or f"known: {', '.join(sorted(known))}"
            raise FieldError(param, f"unknown field {param}", hint, code="unknown_parameter")
    return raw


def text_field(fields: Mapping[str, Any], name: str, path: str) -> str:
    """A string, or '' when it is absent or null."""
    value = fields.get(name)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise FieldError(f"{path}.{name}", f"{name} must be a string", code="invalid_type")
    if not value.isprintable() and any("\ud800" <= char <= "\udfff" for char in value):
        raise FieldError(f"{path}.{name}", f"{name} is not Unicode text", "send whole characters")
    return value


def check_model(name: str, model: str, param: str) -> None:
    """Raises FieldError unless `name` is the model that runs here, or one of OpenAI's."""
    if name != model and not OPENAI_NAMES.fullmatch(name):
        hint = f"this server runs {model!r}"
        raise FieldError(param, f"unknown model {name[:60]!r}", hint, "invalid_model")


def language_of(model: str) -> str:
    """'en' for 'sparqle-base-en'; '' when the name does not tell."""
    suffix = model.rpartition("-")[2]
    return suffix if len(suffix) == 2 and suffix.isalpha() and "-" in model else ""


def _unsupported(param: str, why: str) -> FieldError:
    return FieldError(param, f"{param} is not supported", hint=why, code="unsupported_value")


def _default_turns(options: StreamOptions) -> TurnDetection:
    vad = options.vad
    return TurnDetection(vad.threshold, vad.preroll_ms, vad.stop_ms)


def _format(raw: object, path: str) -> AudioFormat:
    fields = as_object(raw, path, ("type", "rate"))
    wire_type = text_field(fields, "type", path) or "audio/pcm"
    if wire_type not in ENCODINGS:
        hint = f"use {', '.join(ENCODINGS)}"
        raise FieldError(f"{path}.type", f"unknown audio format {wire_type[:40]!r}", hint)
    natural_hz = 24_000 if wire_type == "audio/pcm" else 8_000
    rate_hz = _number(fields, "rate", path, natural_hz, (8_000, 48_000))
    if wire_type != "audio/pcm" and rate_hz != natural_hz:
        raise FieldError(f"{path}.rate", f"{wire_type} is at 8000 Hz", hint="leave rate out")
    return AudioFormat(ENCODINGS[wire_type], int(rate_hz))


def _transcription(
    cfg: SessionConfig, raw: object, path: str, defaults: StreamOptions
) -> SessionConfig:
    if raw is None:
        raise _unsupported(path, "transcription cannot be switched off here")
    fields = as_object(raw, path, ("model", "language", "languages", "prompt", "delay"))
    model, language, delay = (text_field(fields, n, path) for n in ("model", "language", "delay"))
    if model:
        check_model(model, cfg.model, f"{path}.model")
    _check_language(cfg.model, language, f"{path}.language")
    languages = _languages(fields, path)
    for one in languages:
        _check_language(cfg.model, one, f"{path}.languages")
    if delay and delay not in DELAY_MS:
        hint = f"use {', '.join(DELAY_MS)}"
        raise FieldError(f"{path}.delay", f"unknown delay {delay[:20]!r}", hint)
    if languages or "language" in fields:
        cfg = replace(cfg, language=language or next(iter(languages), ""))
    if "delay" in fields:
        cfg = replace(cfg, delay=delay)
    if "prompt" in fields:
        is_default = fields["prompt"] is None
        prompt = defaults.prompt if is_default else text_field(fields, "prompt", path)
        if len(prompt) > MAX_PROMPT_CHARS:
            hint = f"at most {MAX_PROMPT_CHARS} characters"
            raise FieldError(f"{path}.prompt", f"a prompt of {len(prompt)} characters", hint)
        cfg = replace(cfg, prompt=prompt)
    return cfg


def _check_language(model: str, language: str, param: str) -> None:
    spoken = language_of(model)
    if language and language.partition("-")[0].lower() != spoken:
        hint = f"{model} knows {spoken!r} only" if spoken else "the model's language is fixed"
        raise FieldError(param, f"language {language[:20]!r} is unknown", hint)


def _languages(fields: Mapping[str, Any], path: str) -> list[str]:
    """Codes of a list; the newer of OpenAI's models take one instead of `language`."""
    value = fields.get("languages")
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(code, str) for code in value):
        raise FieldError(f"{path}.languages", "languages must be a list", code="invalid_type")
    return value


def _turns(
    cfg: SessionConfig, raw: object, path: str, defaults: StreamOptions
) -> TurnDetection | None:
    if raw is None:
        return None
    # create_response and interrupt_response speak of answers, which transcription never gives.
    known = ("type", "threshold", "prefix_padding_ms", "silence_duration_ms")
    fields = as_object(raw, path, (*known, "create_response", "interrupt_response"))
    kind = text_field(fields, "type", path) or "server_vad"
    if kind != "server_vad":
        raise FieldError(f"{path}.type", f"{kind[:40]!r} is not supported", "use 'server_vad'")
    default = _default_turns(defaults)
    now = cfg.turn_detection or default

    def number(name: str, span: tuple[float, float]) -> float:
        return _number(fields, name, path, getattr(default if name in fields else now, name), span)

    return TurnDetection(
        threshold=float(number("threshold", (MIN_THRESHOLD, 1))),
        prefix_padding_ms=int(number("prefix_padding_ms", (0, MAX_PREFIX_MS))),
        silence_duration_ms=int(number("silence_duration_ms", (32, 5000))),
    )


def _number(
    fields: Mapping[str, Any], name: str, path: str, default: float, span: tuple[float, float]
) -> float:
    """A number in `span`; a whole one where the default is one."""
    value = fields.get(name)
    if value is None:
        return default
    low, high = span
    kinds = (int,) if isinstance(default, int) else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds):
        wanted = "a whole number" if isinstance(default, int) else "a number"
        raise FieldError(f"{path}.{name}", f"{name} must be {wanted}", code="invalid_type")
    if not low <= value <= high:
        hint = f"use {low:g} to {high:g}"
        raise FieldError(f"{path}.{name}", f"{name} {str(value)[:20]} is out of range", hint)
    return value
