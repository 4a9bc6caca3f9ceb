"""WhisperLiveKit's dialect, /asr: s16le at 16 kHz in, lines and a moving buffer out.

mode=full repeats all lines every time; mode=diff sends one snapshot and then what changed. Both
keep the last 200 lines. An empty binary frame ends the audio; ready_to_stop is the last answer.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from sparqle_stream import messages
from sparqle_stream.audio import AudioFormat
from sparqle_stream.errors import ConfigError, ProtocolError, SparqleError
from sparqle_stream.server import fields, request
from sparqle_stream.server.connection import Connection, Phase
from sparqle_stream.server.settings import FrameTypeError
from sparqle_stream.server.utterance import Utterance

if TYPE_CHECKING:
    from starlette.requests import HTTPConnection

QUERY_FIELDS = ("language", "target_language", "mode")
MODES = ("full", "diff")
MAX_LINES = 200
MAX_LINE_S = 5.0  # of speech without a pause


class AsrDialect:
    """Translates between one connection's frames and the engine's events."""

    SUBPROTOCOLS = ()

    def __init__(self, link: Connection) -> None:
        self._link = link
        self._is_diff = False
        self._lines: list[dict[str, Any]] = []
        self._n_sent = 0  # lines that the client of mode=diff has
        self._n_pruned = 0  # lines dropped since the last message
        self._n_messages = 0
        self._now = Utterance(0.0)
        self._is_speech = False

    def begin(self, handshake: HTTPConnection) -> None:
        query = request.query(handshake, QUERY_FIELDS)
        mode = query.get("mode", "full")
        if mode not in MODES:
            raise ConfigError(f"mode={mode[:20]!r} is unknown", hint=f"use {' or '.join(MODES)}")
        fields.refuse("target_language", query.get("target_language"), "it does not translate")
        fields.check_language(self._link.hub.model, query.get("language", "").replace("auto", ""))
        self._is_diff = mode == "diff"
        self._send(type="config", useAudioWorklet=True, mode=mode)
        self._link.set_format(AudioFormat())
        self._link.open_stream(self._link.hub.cfg.defaults)

    async def on_text(self, text: str) -> None:
        raise FrameTypeError(f"text: {text[:40]!r}", hint="audio goes in binary frames, s16le")

    async def on_audio(self, data: bytes) -> None:
        if self._link.phase is not Phase.OPEN:
            if data:
                raise ProtocolError("audio after the end", hint="the empty frame is the last one")
            return
        if data:
            await self._link.take(data, waits=True)
            return
        await self._link.finish()

    # --- from the engine -------------------------------------------------------------------------

    def on_event(self, event: messages.Event) -> None:
        match event:
            case messages.SpeechStarted():
                self._is_speech = True
                self._now.start = event.time
                self._send_state(event.lag)
            case messages.Final():
                self._now.add(event)
                if self._now.seconds >= MAX_LINE_S:
                    self._end_line()
                self._send_state(event.lag)
            case messages.Tail():
                self._now.tail = event.text
                self._send_state(event.lag, is_tail=True)
            case messages.SpeechStopped():
                self._is_speech = False
                self._end_line()
                self._send_state(event.lag)
            case messages.Error():
                self._send(type="error", error=event.message)
                self._link.close_for(event.code, event.message)
            case messages.Done():
                self._end_line()
                self._send_state(0.0)
                self._send(type="ready_to_stop")
                self._link.close_done()

    def on_error(self, err: SparqleError) -> None:
        self._send(type="error", error=str(err))
        self._link.close_for(err.code, err.message)

    def on_notice(self, code: str, message: str) -> None:
        """The dialect has no word for it: the close code tells."""

    # --- to the client ---------------------------------------------------------------------------

    def _end_line(self) -> None:
        if self._now.settled:
            self._lines.append(self._line())
        if len(self._lines) > MAX_LINES:
            n_old = len(self._lines) - MAX_LINES
            del self._lines[:n_old]
            self._n_sent = max(0, self._n_sent - n_old)
            self._n_pruned += n_old
        self._now = Utterance(self._now.end)

    def _line(self) -> dict[str, Any]:
        now = self._now
        text = now.settled
        return {"speaker": 1, "text": text, "start": clock(now.start), "end": clock(now.end)}

    def _send_state(self, lag_s: float, *, is_tail: bool = False) -> None:
        """Settled words of the open utterance are its last line; the tail is the buffer."""
        has_any = bool(self._lines) or self._is_speech
        state: dict[str, Any] = {
            "status": "active_transcription" if has_any else "no_audio_detected",
            "buffer_transcription": self._now.tail.strip(),
            "buffer_diarization": "",
            "buffer_translation": "",
            "remaining_time_transcription": round(lag_s, 3),
            "remaining_time_diarization": 0,
        }
        if self._is_diff:
            self._send_diff(state)
            return
        open_line = [self._line()] if self._now.settled else []
        self._send(**state, lines=self._lines + open_line, is_tail=is_tail)

    def _send_diff(self, state: dict[str, Any]) -> None:
        """Only complete lines: a line that was sent cannot be changed in this mode, so the open
        utterance is in the buffer as a whole."""
        self._n_messages += 1
        state["buffer_transcription"] = self._now.moving
        state["seq"] = self._n_messages
        if self._n_messages == 1:
            self._send(type="snapshot", **state, lines=self._lines)
        else:
            changes: dict[str, Any] = {"n_lines": len(self._lines)}
            if self._n_pruned:
                changes["lines_pruned"] = self._n_pruned
            if new_lines := self._lines[self._n_sent :]:
                changes["new_lines"] = new_lines
            self._send(type="diff", **state, **changes)
        self._n_sent, self._n_pruned = len(self._lines), 0

    def _send(self, *, is_tail: bool = False, **values: Any) -> None:  # noqa: ANN401 - JSON
        self._link.send(json.dumps(values, ensure_ascii=False), is_tail=is_tail)


def clock(seconds: float) -> str:
    """0:00:00, as the lines carry times.

    >>> clock(3725.9)
    '1:02:05'
    """
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"
