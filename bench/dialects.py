"""Dialects of live captions, as clients: vLLM, Deepgram, WhisperLive, WhisperLiveKit; all of them.

Each counts lag from what its server says about time, which is not the same in any two of them
(`LAG_FROM`): compare a server with itself under load, not one dialect with another.
"""

from __future__ import annotations

import base64
import json
import uuid
from typing import TYPE_CHECKING, Any

from bench.openai_target import OpenAi
from bench.socket_target import s16
from sparqle_stream.config import SAMPLE_RATE_HZ

if TYPE_CHECKING:
    from bench.reel import Pcm
    from bench.socket_target import Dialect, Line


class Vllm:
    """vLLM's realtime: one utterance a connection, deltas without times."""

    ROUTE = "/v1/realtime"
    RATE_HZ = SAMPLE_RATE_HZ
    LAG_FROM = "the end of the audio to transcription.done"
    ENDS_BY_CLOSING = False
    TELLS_AT_ENDS = True

    def __init__(self, line: Line) -> None:
        self._line = line
        line.is_ready.set()  # it answers a session.update with an error or not at all

    def greeting(self) -> list[str | bytes]:
        update = {"type": "session.update", "model": self._line.model}
        start = {"type": "input_audio_buffer.commit", "final": False}
        return [json.dumps(update), json.dumps(start)]

    def packet(self, pcm: Pcm) -> str:
        audio = base64.b64encode(s16(pcm)).decode()
        return json.dumps({"type": "input_audio_buffer.append", "audio": audio})

    def farewell(self) -> list[str | bytes]:
        return [json.dumps({"type": "input_audio_buffer.commit", "final": True})]

    def take(self, event: dict[str, Any], at: float) -> None:
        if event["type"] == "transcription.done":
            self._line.outcome.n_words = len(event["text"].split())
            self._line.heard(at, self._line.outcome.audio_s)
            self._line.done()
        elif event["type"] == "error":
            self._line.fail(str(event.get("error", "error")))


class Deepgram:
    """Deepgram live: each Results says which audio it covers."""

    ROUTE = f"/v1/listen?encoding=linear16&sample_rate={SAMPLE_RATE_HZ}&interim_results=true"
    RATE_HZ = SAMPLE_RATE_HZ
    LAG_FROM = "the end of the audio that a Results with words covers"
    ENDS_BY_CLOSING = False
    TELLS_AT_ENDS = False

    def __init__(self, line: Line) -> None:
        self._line = line
        line.is_ready.set()  # audio may come at once

    def greeting(self) -> list[str | bytes]:
        return []

    def packet(self, pcm: Pcm) -> bytes:
        return s16(pcm)

    def farewell(self) -> list[str | bytes]:
        return [json.dumps({"type": "CloseStream"})]

    def take(self, event: dict[str, Any], at: float) -> None:
        if event["type"] == "Results":
            words = event["channel"]["alternatives"][0]["transcript"].split()
            if words:
                self._line.heard(at, event["start"] + event["duration"])
            self._line.outcome.n_words += len(words) if event["is_final"] else 0
        elif event["type"] == "Metadata":
            self._line.done()
        elif event["type"] == "Error":
            self._line.fail(str(event.get("description", "error")))


class WhisperLive:
    """WhisperLive: the last segments again and again, the latest of them still moving."""

    ROUTE = "/"
    RATE_HZ = SAMPLE_RATE_HZ
    LAG_FROM = "the end of the latest segment, each time that its text or end has changed"
    ENDS_BY_CLOSING = True
    TELLS_AT_ENDS = False

    def __init__(self, line: Line) -> None:
        self._line = line
        self._uid = uuid.uuid4().hex
        self._latest: tuple[str, str] | None = None  # end and text of the latest segment
        self._counted: set[str] = set()  # starts of completed segments

    def greeting(self) -> list[str | bytes]:
        first = {"uid": self._uid, "language": "en", "task": "transcribe", "use_vad": True}
        return [json.dumps(first | {"model": self._line.model or "base"})]

    def packet(self, pcm: Pcm) -> bytes:
        return pcm.astype("<f4").tobytes()

    def farewell(self) -> list[str | bytes]:
        return [b"END_OF_AUDIO"]

    def take(self, event: dict[str, Any], at: float) -> None:
        if event.get("message") == "SERVER_READY":
            self._line.is_ready.set()
        elif event.get("status") in ("WAIT", "ERROR"):
            self._line.fail(f"{event['status']}: {event.get('message', '')}")
        for segment in event.get("segments", []):
            if segment["completed"] and segment["start"] not in self._counted:
                self._counted.add(segment["start"])
                self._line.outcome.n_words += len(segment["text"].split())
        if event.get("segments"):
            last = event["segments"][-1]
            if (last["end"], last["text"]) != self._latest:
                self._latest = last["end"], last["text"]
                self._line.heard(at, float(last["end"]))


class WhisperLiveKit:
    """WhisperLiveKit: the whole text each time, and how far behind the server says it is."""

    ROUTE = "/asr"
    RATE_HZ = SAMPLE_RATE_HZ
    LAG_FROM = "nothing: it is what the server itself calls remaining_time_transcription"
    ENDS_BY_CLOSING = False
    TELLS_AT_ENDS = False

    def __init__(self, line: Line) -> None:
        self._line = line

    def greeting(self) -> list[str | bytes]:
        return []

    def packet(self, pcm: Pcm) -> bytes:
        return s16(pcm)

    def farewell(self) -> list[str | bytes]:
        return [b""]

    def take(self, event: dict[str, Any], at: float) -> None:
        outcome = self._line.outcome
        if event.get("type") == "config":
            self._line.is_ready.set()
        elif event.get("type") == "ready_to_stop":
            self._line.done()
        elif event.get("error"):
            self._line.fail(str(event["error"]))
        elif "remaining_time_transcription" in event:
            outcome.lags.append((at, float(event["remaining_time_transcription"])))
            lines = event.get("lines", [])
            outcome.n_words = sum(len((line["text"] or "").split()) for line in lines)


DIALECTS: dict[str, type[Dialect]] = {
    "openai": OpenAi,
    "vllm": Vllm,
    "deepgram": Deepgram,
    "whisperlive": WhisperLive,
    "whisperlivekit": WhisperLiveKit,
}
