"""OpenAI's realtime transcription (GA shape), as a client of any server that speaks it.

The protocol has no word for how much was heard when a delta left, so that lag is counted from the
end of an item's audio (`audio_end_ms` of its speech_stopped, or what had been sent when it was
committed) to its `completed`. The silence that a server waits for before it says that speech has
stopped is in it.
"""

from __future__ import annotations

import base64
import json
from typing import TYPE_CHECKING, Any

from bench.socket_target import s16

if TYPE_CHECKING:
    from bench.reel import Pcm
    from bench.socket_target import Line

EVENT = "conversation.item.input_audio_transcription."
EMPTY = "input_audio_buffer_commit_empty"


class OpenAi:
    """The books of one connection: which items are open, and when the audio of each ended."""

    ROUTE = "/v1/realtime?intent=transcription"
    RATE_HZ = 24_000  # the only one that the protocol has
    LAG_FROM = "the end of an item's audio, as the server says it, to its completed event"
    ENDS_BY_CLOSING = False
    TELLS_AT_ENDS = True

    def __init__(self, line: Line) -> None:
        self._line = line
        self._open: dict[str, float | None] = {}  # item -> second at which its audio ended
        self._is_committed = self._is_answered = False

    def greeting(self) -> list[str | bytes]:
        """Only what every server needs to be told; the rest stays as the server has it."""
        audio_input: dict[str, Any] = {
            "format": {"type": "audio/pcm", "rate": self.RATE_HZ},
            "turn_detection": {"type": "server_vad"},
        }
        if self._line.model:
            audio_input["transcription"] = {"model": self._line.model}
        session = {"type": "transcription", "audio": {"input": audio_input}}
        return [json.dumps({"type": "session.update", "session": session})]

    def packet(self, pcm: Pcm) -> str:
        audio = base64.b64encode(s16(pcm)).decode()
        return json.dumps({"type": "input_audio_buffer.append", "audio": audio})

    def farewell(self) -> list[str | bytes]:
        """Over once the server has answered this commit and no item is open."""
        self._is_committed = True
        return [json.dumps({"type": "input_audio_buffer.commit"})]

    def take(self, event: dict[str, Any], at: float) -> None:
        kind, item = event.get("type", ""), event.get("item_id", "")
        if kind == "session.updated":
            self._line.is_ready.set()
        elif kind == "input_audio_buffer.speech_started":
            self._open.setdefault(item, None)
        elif kind == "input_audio_buffer.speech_stopped":
            self._open[item] = event["audio_end_ms"] / 1000
        elif kind == "input_audio_buffer.committed":
            self._commit(item)
        elif kind == EVENT + "delta":
            self._line.outcome.n_words += len(event["delta"].split())
        elif kind == EVENT + "completed":
            self._complete(item, at)
        elif kind in (EVENT + "failed", "error"):
            self._fail(event.get("error", {}), item)
        if self._is_answered and not self._open and not self._line.is_over.is_set():
            self._line.done()

    def _commit(self, item: str) -> None:
        self._is_answered = self._is_committed
        if self._open.get(item) is None:
            self._open[item] = self._line.outcome.audio_s

    def _complete(self, item: str, at: float) -> None:
        end_s = self._open.pop(item, None)
        if end_s is not None:
            self._line.heard(at, end_s)

    def _fail(self, error: dict[str, Any], item: str) -> None:
        if self._is_committed and error.get("code") == EMPTY:
            self._is_answered = True  # nothing was left after the last item
            return
        self._open.pop(item, None)
        self._line.fail(str(error.get("message", "error")))
