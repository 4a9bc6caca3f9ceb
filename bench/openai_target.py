"""One stream to any server that speaks OpenAI's realtime transcription (GA shape).

In: packets of PCM (N,) float32 at 16 kHz, sent at the speed of speech as s16le at 24 kHz. Out: an
`Outcome`. The protocol has no word for how much was heard when a delta left, so that lag is counted
from the end of an item's audio (`audio_end_ms` of its speech_stopped, or what had been sent when it
was committed) to its `completed`. The silence that a server waits for before it says that speech
has stopped is in it.
"""

from __future__ import annotations

import asyncio
import base64
import json
import time
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit, urlunsplit

import numpy as np

from bench.targets import DONE_TIMEOUT_S, End, Outcome, paced
from sparqle_stream.config import SAMPLE_RATE_HZ
from sparqle_stream.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from bench.reel import Pcm

ROUTE = "/v1/realtime"
RATE_HZ = 24_000  # the only one that the protocol has
SCHEMES = {"ws": "ws", "wss": "wss", "http": "ws", "https": "wss"}
EVENT = "conversation.item.input_audio_transcription."
EMPTY = "input_audio_buffer_commit_empty"


class OpenAiTarget:
    """Connections to a server's /v1/realtime."""

    lag_from = "the end of an item's audio, as the server says it, to its completed event"

    def __init__(self, url: str, model: str = "", api_key: str = "") -> None:
        self._url, self._model, self._api_key = realtime_url(url), model, api_key

    async def play(self, packets: Iterable[Pcm], seconds: float) -> Outcome:
        from websockets.asyncio.client import connect
        from websockets.exceptions import ConnectionClosed, InvalidHandshake

        headers = {"Authorization": f"Bearer {self._api_key}"} if self._api_key else None
        outcome = Outcome(model=self._model)
        items = Items(outcome)
        try:
            async with asyncio.timeout(seconds + DONE_TIMEOUT_S):
                async with connect(
                    self._url, additional_headers=headers, max_size=None, compression=None
                ) as socket:
                    await _talk(socket, packets, items, self._model)
        except TimeoutError:
            outcome.end, outcome.why = End.DROPPED, "no end in time"
        except (InvalidHandshake, OSError) as err:
            outcome.end, outcome.why = End.REFUSED, str(err)
        except ConnectionClosed as err:
            outcome.end = End.DROPPED if outcome.audio_s else End.REFUSED
            outcome.why = outcome.why or str(err)
        outcome.ended_at = time.perf_counter()
        return outcome


class Items:
    """The books of one connection: which items are open, and when the audio of each ended."""

    def __init__(self, outcome: Outcome) -> None:
        self.outcome = outcome
        self.is_ready = asyncio.Event()
        self.is_over = asyncio.Event()
        self._open: dict[str, float | None] = {}  # item -> second at which its audio ended
        self._is_committed = self._is_answered = False

    def commit(self) -> None:
        """No more audio: over once the server has answered and no item is open."""
        self._is_committed = True

    def take(self, event: dict[str, Any], at: float) -> None:
        """An event of the server that arrived when the clock said `at`."""
        kind, item = event.get("type", ""), event.get("item_id", "")
        if kind == "session.updated":
            self.is_ready.set()
        elif kind == "input_audio_buffer.speech_started":
            self._open.setdefault(item, None)
        elif kind == "input_audio_buffer.speech_stopped":
            self._open[item] = event["audio_end_ms"] / 1000
        elif kind == "input_audio_buffer.committed":
            self._commit(item)
        elif kind == EVENT + "delta":
            self.outcome.n_words += len(event["delta"].split())
        elif kind == EVENT + "completed":
            self._complete(item, at)
        elif kind in (EVENT + "failed", "error"):
            self._fail(event.get("error", {}), item)
        self._end()

    def _commit(self, item: str) -> None:
        self._is_answered = self._is_committed
        if self._open.get(item) is None:
            self._open[item] = self.outcome.audio_s

    def _complete(self, item: str, at: float) -> None:
        end_s = self._open.pop(item, None)
        if end_s is not None:
            self.outcome.lags.append((at, at - self.outcome.began_at - end_s))

    def _fail(self, error: dict[str, Any], item: str) -> None:
        if self._is_committed and error.get("code") == EMPTY:
            self._is_answered = True  # nothing was left after the last item
            return
        self._open.pop(item, None)
        self.outcome.why = str(error.get("message", "error"))
        self.is_over.set()
        self.is_ready.set()

    def _end(self) -> None:
        if self._is_answered and not self._open and not self.is_over.is_set():
            self.outcome.end = End.DONE
            self.is_over.set()


async def _talk(socket: Any, packets: Iterable[Pcm], items: Items, model: str) -> None:  # noqa: ANN401 - a websocket
    """One whole stream over an open connection."""
    listener = asyncio.create_task(_listen(socket, items))
    waits = [asyncio.create_task(items.is_ready.wait())]
    try:
        await socket.send(json.dumps({"type": "session.update", "session": _session(model)}))
        await asyncio.wait([*waits, listener], return_when=asyncio.FIRST_COMPLETED)
        if listener.done():
            listener.result()
        resample = _resampler()
        async for packet in paced(packets, items.outcome):
            if items.is_over.is_set():
                return
            await _append(socket, resample.resample_chunk(packet))
        await _append(socket, resample.resample_chunk(np.zeros(0, np.float32), last=True))
        items.commit()
        await socket.send(json.dumps({"type": "input_audio_buffer.commit"}))
        waits.append(asyncio.create_task(items.is_over.wait()))
        await asyncio.wait([waits[-1], listener], return_when=asyncio.FIRST_COMPLETED)
        if not items.is_over.is_set():
            listener.result()
    finally:
        for task in (*waits, listener):
            task.cancel()
        await asyncio.gather(*waits, listener, return_exceptions=True)


async def _listen(socket: Any, items: Items) -> None:  # noqa: ANN401 - a websocket
    while True:
        frame = await socket.recv()
        items.take(json.loads(frame), time.perf_counter())


async def _append(socket: Any, pcm: Pcm) -> None:  # noqa: ANN401 - a websocket
    if len(pcm):
        data = np.rint(pcm * 32_767).clip(-32_768, 32_767).astype("<i2").tobytes()
        event = {"type": "input_audio_buffer.append", "audio": base64.b64encode(data).decode()}
        await socket.send(json.dumps(event))


def _session(model: str) -> dict[str, Any]:
    """Only what every server needs to be told; the rest stays as the server has it."""
    audio_input: dict[str, Any] = {
        "format": {"type": "audio/pcm", "rate": RATE_HZ},
        "turn_detection": {"type": "server_vad"},
    }
    if model:
        audio_input["transcription"] = {"model": model}
    return {"type": "transcription", "audio": {"input": audio_input}}


def _resampler() -> Any:  # noqa: ANN401 - soxr has no types
    import soxr

    return soxr.ResampleStream(SAMPLE_RATE_HZ, RATE_HZ, 1, dtype="float32")


def realtime_url(url: str) -> str:
    """ws://HOST:PORT, http://..., HOST:PORT, with or without a path -> the whole URL."""
    parts = urlsplit(url if "://" in url else f"ws://{url}")
    if parts.scheme not in SCHEMES or not parts.hostname:
        raise ConfigError(f"{url!r} is not the address of a server", hint="ws://HOST:PORT")
    path = parts.path if parts.path.strip("/") else ROUTE
    query = parts.query or "intent=transcription"
    return urlunsplit((SCHEMES[parts.scheme], parts.netloc, path, query, ""))
