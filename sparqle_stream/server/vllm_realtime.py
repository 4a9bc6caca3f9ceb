"""vLLM's realtime dialect, on the same route as OpenAI's: /v1/realtime.

`RealtimeRoute` begins as OpenAI's dialect and looks at the first event of the client: a
session.update with a flat `model`, or a commit with `final`, is vLLM's. Then a commit starts an
utterance, appends bring 16 kHz s16le in base64, deltas go out, and a commit with `final` ends it.
"""

from __future__ import annotations

import base64
import binascii
import json
from typing import TYPE_CHECKING, Any

from sparqle_stream import messages
from sparqle_stream.audio import AudioFormat
from sparqle_stream.config import QUERY_MS
from sparqle_stream.errors import SparqleError
from sparqle_stream.server.openai_realtime import FATAL, RealtimeDialect

if TYPE_CHECKING:
    from collections.abc import Mapping

    from starlette.requests import HTTPConnection

    from sparqle_stream.server.connection import Connection, Dialect

# Fields of each client event; anything else is refused.
CLIENT_EVENTS = {
    "session.update": ("model",),
    "input_audio_buffer.append": ("audio",),
    "input_audio_buffer.commit": ("final",),
}


class EventError(SparqleError):
    """One event that cannot be served; the connection stays open."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class RealtimeRoute:
    """OpenAI's dialect until the first event says that it is vLLM's."""

    SUBPROTOCOLS = RealtimeDialect.SUBPROTOCOLS

    def __init__(self, link: Connection) -> None:
        self._link = link
        self._dialect: Dialect = RealtimeDialect(link)
        self._is_chosen = False

    def begin(self, handshake: HTTPConnection) -> None:
        self._dialect.begin(handshake)

    async def on_text(self, text: str) -> None:
        if not self._is_chosen:
            self._is_chosen = True
            if is_vllm(text):
                self._link.cancel_stream()
                self._dialect = VllmDialect(self._link)
        await self._dialect.on_text(text)

    async def on_audio(self, data: bytes) -> None:
        await self._dialect.on_audio(data)

    def on_event(self, event: messages.Event) -> None:
        self._dialect.on_event(event)

    def on_error(self, err: SparqleError) -> None:
        self._dialect.on_error(err)

    def on_notice(self, code: str, message: str) -> None:
        self._dialect.on_notice(code, message)


def is_vllm(text: str) -> bool:
    """Whether a connection's first event is vLLM's."""
    try:
        raw = json.loads(text)
    except (ValueError, RecursionError):
        return False
    if not isinstance(raw, dict):
        return False
    if raw.get("type") == "session.update":
        return "model" in raw and "session" not in raw
    return raw.get("type") == "input_audio_buffer.commit" and "final" in raw


class VllmDialect:
    """Translates between one connection's frames and the engine's events."""

    SUBPROTOCOLS = RealtimeDialect.SUBPROTOCOLS

    def __init__(self, link: Connection) -> None:
        self._link = link
        self._is_validated = False
        self._text = ""

    def begin(self, handshake: HTTPConnection) -> None:
        """Nothing: the handshake was answered before the dialect was known."""

    async def on_audio(self, data: bytes) -> None:
        del data
        self.on_error(EventError("invalid_json", "a binary frame; audio goes into append"))

    async def on_text(self, text: str) -> None:
        try:
            await self._handle(parse(text))
        except SparqleError as err:
            self.on_error(err)

    async def _handle(self, raw: Mapping[str, Any]) -> None:
        kind = raw["type"]
        if kind == "session.update":
            if raw.get("model") != self._link.hub.model:
                message = f"unknown model; this server runs {self._link.hub.model!r}"
                raise EventError("model_not_found", message)
            self._is_validated = True
            return
        if not self._is_validated:
            raise EventError("model_not_validated", "send session.update with a model first")
        if kind == "input_audio_buffer.append":
            await self._append(raw.get("audio"))
        elif raw.get("final") is True:
            await self._finish()
        elif raw.get("final", False) is False:
            self._start()
        else:
            raise EventError("invalid_json", "final is neither true nor false")

    def _start(self) -> None:
        if self._link.stream is None:
            self._text = ""
            self._link.set_format(AudioFormat())
            self._link.open_stream(self._link.hub.cfg.defaults)

    async def _append(self, audio: object) -> None:
        if not isinstance(audio, str):
            raise EventError("invalid_audio", "audio must be a base64 string")
        try:
            data = base64.b64decode(audio, validate=True)
        except (binascii.Error, ValueError) as err:
            raise EventError("invalid_audio", f"audio is not base64: {err}") from err
        if len(data) > self._link.hub.cfg.append_bytes:
            raise EventError("invalid_audio", f"{len(data)} bytes of audio are too many at once")
        self._start()
        await self._link.take(data, waits=True)

    async def _finish(self) -> None:
        self._start()
        await self._link.take_rest(waits=True)
        if self._link.stream is not None:
            self._link.stream.finish()

    # --- from the engine -------------------------------------------------------------------------

    def on_event(self, event: messages.Event) -> None:
        match event:
            case messages.Final():
                delta = event.text if self._text else event.text.lstrip()
                self._text += delta
                self._send("transcription.delta", delta=delta)
            case messages.Error():
                self._send("error", error=event.message, code="processing_error")
                self._link.close_for(event.code, event.message)
            case messages.Done():
                self._on_done(event)

    def _on_done(self, event: messages.Done) -> None:
        n_text = len(self._link.hub.engine.model.tokenizer.encode(self._text))
        n_audio = round(event.duration * 1000 / QUERY_MS)
        usage = {"prompt_tokens": n_audio, "completion_tokens": n_text}
        usage["total_tokens"] = n_audio + n_text
        self._send("transcription.done", text=self._text, usage=usage)
        self._link.cancel_stream()  # the next commit or append opens another
        if self._link.is_stopping:
            self._link.close_done()

    def on_error(self, err: SparqleError) -> None:
        is_fatal = err.code in FATAL
        code = "processing_error" if is_fatal else err.code
        self._send("error", error=str(err), code=code)
        if is_fatal:
            self._link.close_for(err.code, err.message)

    def on_notice(self, code: str, message: str) -> None:
        """The dialect has no word for it: the close code tells."""

    def _send(self, kind: str, **values: Any) -> None:  # noqa: ANN401 - JSON
        self._link.send(json.dumps({"type": kind} | values, ensure_ascii=False))


def parse(text: str) -> Mapping[str, Any]:
    """One client event. Raises EventError."""
    try:
        raw: Any = json.loads(text)
    except (ValueError, RecursionError) as err:
        raise EventError("invalid_json", f"not JSON: {err}") from err
    kind = raw.get("type") if isinstance(raw, dict) else None
    if not isinstance(kind, str) or kind not in CLIENT_EVENTS:
        raise EventError("unknown_event", f"known: {', '.join(CLIENT_EVENTS)}")
    for name in raw:
        if name not in ("type", "event_id", *CLIENT_EVENTS[kind]):
            raise EventError("unknown_event", f"{kind} has no field {name[:40]!r}")
    return dict(raw)
