"""OpenAI's realtime protocol, transcription only, in its GA shape: /v1/realtime.

In: JSON text frames with base64 audio. Out: JSON text frames. With server_vad a segment of the
engine is one item; without, what lies between two commits is. Deltas are final words and are never
taken back; their concatenation is the item's transcript. Errors of a message leave the connection
open, errors of the stream close it.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
import secrets
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sparqle_stream import messages
from sparqle_stream.errors import ConfigError, ProtocolError, SparqleError
from sparqle_stream.server import openai_session, request
from sparqle_stream.server.connection import Connection, Phase
from sparqle_stream.server.openai_session import FieldError, SessionConfig
from sparqle_stream.server.settings import Close, FrameTypeError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from starlette.requests import HTTPConnection

QUERY_FIELDS = ("intent", "model")
CLIENT_EVENTS = (
    "session.update",
    "input_audio_buffer.append",
    "input_audio_buffer.commit",
    "input_audio_buffer.clear",
)
TRANSCRIPTION = "conversation.item.input_audio_transcription"
# These end the connection; every other error is about one message.
FATAL = ("busy", "backlog", "idle_timeout", "internal", "model")
SERVER_FAULTS = ("busy", "backlog", "internal", "model")


@dataclass(slots=True)
class Item:
    """One utterance on the wire."""

    id: str
    start: float  # seconds since the first audio of the connection
    transcript: str = ""


class RealtimeDialect:
    """Translates between one connection's frames and the engine's events."""

    SUBPROTOCOLS = ("realtime",)

    def __init__(self, link: Connection) -> None:
        self._link = link
        self._defaults = link.hub.cfg.defaults
        self._session = SessionConfig.default(link.hub.model, self._defaults)
        self._tag = secrets.token_hex(8)
        self._n_events = 0
        self._n_items = 0
        self._n_completed = 0
        self._item: Item | None = None
        self._previous_id: str | None = None
        self._has_audio = False  # since the last commit or clear
        self._offset_s = 0.0  # where the engine's present stream began
        self._committed_s = 0.0
        self._drained = asyncio.Event()

    def begin(self, handshake: HTTPConnection) -> None:
        # `id` and `created` are vLLM's: its dialect is told apart only by the client's first event.
        created = {"id": f"sess-{self._tag}", "created": int(time.time())}
        self._send("session.created", session=self._wire_session(), **created)
        fields = request.query(handshake, QUERY_FIELDS)
        if fields.get("intent", "transcription") != "transcription":
            raise ConfigError(
                f"intent={fields['intent'][:40]!r} is not served", hint="use intent=transcription"
            )
        if "model" in fields:
            openai_session.check_model(fields["model"], self._link.hub.model, "model")
        self._open()

    async def on_audio(self, data: bytes) -> None:
        raise FrameTypeError("a binary frame", hint="audio goes into input_audio_buffer.append")

    async def on_text(self, text: str) -> None:
        event_id: str | None = None
        try:
            raw = _parse(text)
            event_id = raw["event_id"] if isinstance(raw.get("event_id"), str) else None
            await self._handle(raw)
        except SparqleError as err:
            self._report(err, event_id)

    def on_error(self, err: SparqleError) -> None:
        self._report(err, None)

    def on_notice(self, code: str, message: str) -> None:
        """The protocol has no word for it: the close code 1012 tells."""

    # --- from the client -------------------------------------------------------------------------

    async def _handle(self, raw: Mapping[str, Any]) -> None:
        kind = raw["type"]
        if kind == "session.update":
            openai_session.as_object(raw, kind, ("type", "event_id", "session"))
            await self._update(raw.get("session"))
        elif kind == "input_audio_buffer.append":
            openai_session.as_object(raw, kind, ("type", "event_id", "audio"))
            await self._append(raw)
        elif kind == "input_audio_buffer.commit":
            openai_session.as_object(raw, kind, ("type", "event_id"))
            await self._commit()
        elif kind == "input_audio_buffer.clear":
            openai_session.as_object(raw, kind, ("type", "event_id"))
            self._clear()
        else:
            hint = request.did_you_mean(kind, CLIENT_EVENTS) or "a transcription session has none"
            raise FieldError("type", f"event {kind[:60]!r} is not supported", hint, "invalid_value")

    async def _update(self, raw: object) -> None:
        if raw is None:
            raise FieldError("session", "session is missing", code="missing_required_parameter")
        old, new = self._session, openai_session.update(self._session, raw, self._defaults)
        if new.stream_options(self._defaults) != old.stream_options(self._defaults):
            if self._link.time_s > self._offset_s:
                await self._link.take_rest(waits=True)
                await self._drain()
                if self._link.stream is None:
                    return  # ended meanwhile, and told
            if self._item is not None and new.turn_detection is not None:
                self._commit_item(self._item)
                self._complete_item(self._item)
            self._session = new
            self._open()
        elif new.fmt != old.fmt:
            await self._link.take_rest(waits=True)
            self._link.set_format(new.fmt)
        self._session = new
        self._send("session.updated", session=self._wire_session())

    async def _append(self, raw: Mapping[str, Any]) -> None:
        if not isinstance(raw.get("audio"), str):
            raise FieldError("audio", "audio must be a base64 string", code="invalid_type")
        limit = self._link.hub.cfg.append_bytes
        try:
            data = base64.b64decode(raw["audio"], validate=True)
        except (binascii.Error, ValueError) as err:
            raise FieldError("audio", f"audio is not base64: {err}") from err
        if len(data) > limit:
            raise FieldError("audio", f"{len(data)} bytes of audio", f"at most {limit} at once")
        self._has_audio = self._has_audio or bool(data)
        await self._link.take(data, waits=True)

    async def _commit(self) -> None:
        if not self._has_audio:
            raise FieldError(
                "input_audio_buffer",
                "the buffer is empty",
                hint="append audio before commit",
                code="input_audio_buffer_commit_empty",
            )
        self._has_audio = False
        await self._link.take_rest(waits=True)
        n_before = self._n_completed
        if self._session.turn_detection is None:
            item = self._item or self._new_item(self._committed_s)
            self._commit_item(item)
        await self._drain()
        if self._link.stream is None:
            return  # ended meanwhile, and told
        if self._n_completed == n_before:
            item = self._item or self._new_item(self._committed_s)
            if self._session.turn_detection is not None:
                self._commit_item(item)
            self._complete_item(item)
        self._open()
        self._committed_s = self._offset_s

    def _clear(self) -> None:
        self._has_audio = False
        self._item = None
        self._open()
        self._committed_s = self._offset_s
        self._send("input_audio_buffer.cleared")

    def _open(self) -> None:
        """A fresh stream of the engine; what the old one had not captioned is gone."""
        self._link.set_format(self._session.fmt)
        self._link.open_stream(self._session.stream_options(self._defaults))
        self._offset_s = self._link.time_s

    async def _drain(self) -> None:
        """Everything received becomes words; the engine's stream has ended afterwards."""
        self._drained.clear()
        if self._link.stream is not None:
            self._link.stream.finish()
            await self._link.wait_for(self._drained)

    # --- from the engine -------------------------------------------------------------------------

    def on_event(self, event: messages.Event) -> None:
        has_turns = self._session.turn_detection is not None
        match event:
            case messages.SpeechStarted() if has_turns:
                self._on_speech_started(self._offset_s + event.time)
            case messages.SpeechStopped() if has_turns:
                self._on_speech_stopped(self._offset_s + event.time)
            case messages.Final():
                self._on_text_final(event)
            case messages.Error():
                self._on_stream_error(event)
            case messages.Done():
                self._on_done()

    def _on_speech_started(self, time_s: float) -> None:
        item = self._new_item(time_s)
        self._send(
            "input_audio_buffer.speech_started",
            audio_start_ms=round(1000 * time_s),
            item_id=item.id,
        )

    def _on_speech_stopped(self, time_s: float) -> None:
        item = self._item or self._new_item(time_s)
        self._send(
            "input_audio_buffer.speech_stopped", audio_end_ms=round(1000 * time_s), item_id=item.id
        )
        self._commit_item(item)
        self._complete_item(item, time_s)

    def _on_text_final(self, event: messages.Final) -> None:
        item = self._item or self._new_item(self._committed_s)
        delta = event.text if item.transcript else event.text.lstrip()
        if delta:
            item.transcript += delta
            self._send(f"{TRANSCRIPTION}.delta", item_id=item.id, content_index=0, delta=delta)

    def _on_stream_error(self, event: messages.Error) -> None:
        if self._item is not None:
            error = {"type": "server_error", "code": event.code, "message": event.message}
            self._send(
                f"{TRANSCRIPTION}.failed", item_id=self._item.id, content_index=0, error=error
            )
            self._item = None
        self._send_error(event.code, event.message, event.hint)
        self._link.close_for(event.code, event.message)

    def _on_done(self) -> None:
        self._drained.set()
        if self._link.is_stopping:
            if self._item is not None:
                self._commit_item(self._item)
                self._complete_item(self._item)
            self._link.close_done()

    # --- to the client ---------------------------------------------------------------------------

    def _new_item(self, start: float) -> Item:
        self._n_items += 1
        self._item = Item(f"item_{self._tag}_{self._n_items}", start)
        return self._item

    def _commit_item(self, item: Item) -> None:
        if item.id == self._previous_id:
            return
        before = self._previous_id
        self._previous_id = item.id
        content = [{"type": "input_audio", "transcript": None}]
        wire = {"id": item.id, "object": "realtime.item", "type": "message", "role": "user"}
        whole: dict[str, Any] = wire | {"status": "completed", "content": content}
        self._send("input_audio_buffer.committed", item_id=item.id, previous_item_id=before)
        self._send("conversation.item.added", item=whole, previous_item_id=before)
        self._send("conversation.item.done", item=whole, previous_item_id=before)

    def _complete_item(self, item: Item, end: float | None = None) -> None:
        seconds = (self._link.time_s if end is None else end) - item.start
        self._send(
            f"{TRANSCRIPTION}.completed",
            item_id=item.id,
            content_index=0,
            transcript=item.transcript,
            usage={"type": "duration", "seconds": round(max(0.0, seconds), 3)},
        )
        self._n_completed += 1
        self._item = None

    def _report(self, err: SparqleError, event_id: str | None) -> None:
        param = err.param if isinstance(err, FieldError) else None
        self._send_error(err.code, err.message, err.hint, param, event_id)
        if self._link.phase is Phase.CONNECTING:
            self._link.close(Close.POLICY, err.message, err.code)
        elif err.code in FATAL:
            self._link.close_for(err.code, err.message)

    def _send_error(
        self,
        code: str,
        message: str,
        hint: str,
        param: str | None = None,
        event_id: str | None = None,
    ) -> None:
        kind = "server_error" if code in SERVER_FAULTS else "invalid_request_error"
        text = f"{message}; {hint}" if hint else message
        error = {"type": kind, "code": code, "message": text, "param": param, "event_id": event_id}
        self._send("error", error=error)

    def _send(self, kind: str, **fields: Any) -> None:  # noqa: ANN401 - JSON
        self._n_events += 1
        event = {"type": kind, "event_id": f"event_{self._tag}_{self._n_events}"} | fields
        self._link.send(json.dumps(event, ensure_ascii=False))

    def _wire_session(self) -> dict[str, Any]:
        return openai_session.to_wire(f"sess_{self._tag}", self._session)


def _parse(text: str) -> Mapping[str, Any]:
    """One client event. Raises ProtocolError."""
    try:
        raw = json.loads(text)
    except (ValueError, RecursionError) as err:
        raise ProtocolError(f"not JSON: {text[:40]!r}", hint=str(err)[:80]) from err
    if not isinstance(raw, dict) or not isinstance(raw.get("type"), str):
        raise ProtocolError("not an event", hint="an event is a JSON object with a type")
    return raw
