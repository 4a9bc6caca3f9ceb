"""One client of the server: its phase, its reader and writer, its engine stream.

In: websocket frames, handed to a dialect; events of the engine's worker thread, handed to the same
dialect in the event loop. Out: the dialect's text frames, through a bounded outbox.
Contract: whatever ends a connection (end, error, hang-up, slow reader, silence, restart), its
engine slot is free before `run` returns, and an error is told before the close frame.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from enum import Enum
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from starlette.websockets import WebSocketDisconnect

from sparqle_stream import audio
from sparqle_stream.audio import AudioFormat
from sparqle_stream.config import SAMPLE_RATE_HZ
from sparqle_stream.errors import ProtocolError, SparqleError
from sparqle_stream.server import transport
from sparqle_stream.server.outbox import CloseFrame, Outbox, Pace
from sparqle_stream.server.settings import (
    Close,
    FrameSizeError,
    IdleError,
    InternalError,
    close_code,
)

if TYPE_CHECKING:
    from collections.abc import MutableMapping

    from starlette.requests import HTTPConnection
    from starlette.types import Message

    from sparqle_stream.audio import Pcm
    from sparqle_stream.config import StreamOptions
    from sparqle_stream.engine import Stream
    from sparqle_stream.messages import Event
    from sparqle_stream.server.hub import Hub

logger = logging.getLogger(__name__)
POLL_S = 0.01
MAX_REASON_BYTES = 120  # a close frame holds 125 with its code


class Phase(Enum):
    CONNECTING = "connecting"  # the handshake is not answered
    OPEN = "open"  # takes audio
    DRAINING = "draining"  # the client has ended its audio: the rest is captioned
    CLOSING = "closing"  # the close frame is under way: everything that comes is dropped
    CLOSED = "closed"


class Signal(Enum):
    ACCEPTED = "accepted"
    ENDED = "ended"  # by the client
    CLOSE = "close"  # by us
    LOST = "lost"  # by the network, or complete


_NEXT = {
    (Phase.CONNECTING, Signal.ACCEPTED): Phase.OPEN,
    (Phase.CONNECTING, Signal.CLOSE): Phase.CLOSING,  # accepted only to say why not
    (Phase.OPEN, Signal.ENDED): Phase.DRAINING,
    (Phase.OPEN, Signal.CLOSE): Phase.CLOSING,
    (Phase.DRAINING, Signal.CLOSE): Phase.CLOSING,
}


def advance(phase: Phase, signal: Signal) -> Phase:
    """The only place where a phase follows another. Raises ProtocolError for what cannot be."""
    if signal is Signal.LOST:
        return Phase.CLOSED
    try:
        return _NEXT[phase, signal]
    except KeyError:
        raise ProtocolError(
            f"{signal.value!r} cannot follow in phase {phase.value!r}",
            hint="nothing may be sent after the end of the stream",
        ) from None


class Wire(Protocol):
    """What a connection needs of a websocket; a TCP protocol may look like one."""

    scope: MutableMapping[str, Any]

    async def accept(self, subprotocol: str | None = None) -> None: ...

    async def receive(self) -> Message: ...

    async def send_text(self, data: str) -> None: ...

    async def close(self, code: int = 1000, reason: str | None = None) -> None: ...


class Dialect(Protocol):
    """A thin translator between frames and the engine's events."""

    @property
    def SUBPROTOCOLS(self) -> tuple[str, ...]: ...  # the first that the client offers is chosen

    def begin(self, handshake: HTTPConnection) -> None: ...

    async def on_text(self, text: str) -> None: ...

    async def on_audio(self, data: bytes) -> None: ...

    def on_event(self, event: Event) -> None: ...

    def on_error(self, err: SparqleError) -> None: ...

    def on_notice(self, code: str, message: str) -> None: ...


class Connection:
    """Plumbing that all dialects share. Everything runs in the event loop's thread."""

    def __init__(self, websocket: Wire, hub: Hub, dialect_name: str = "") -> None:
        self.hub = hub
        self.dialect_name = dialect_name
        self.phase = Phase.CONNECTING
        self.stream: Stream | None = None
        self.stream_id = ""  # of the last stream, for logs
        self.is_resumable = False  # the client comes back by itself and sends again what is open
        self.n_fed = 0  # samples at 16 kHz, over all streams of this connection
        self.dialect: Dialect
        self._last: CloseFrame | None = None  # we stop: nothing more is taken
        self.set_format(AudioFormat())
        self._websocket = websocket
        self._loop = asyncio.get_running_loop()
        self._outbox = Outbox(hub.cfg.outbox_events)
        self._heard_at = self._began_at = self._loop.time()
        self._pace = Pace(hub.cfg.frames_per_s, self._loop.time)
        self._stream_token = object()  # events of a stream that was replaced carry an older one
        self._ended_by = CloseFrame(Close.LOST, "", "the client hung up")

    # --- what dialects call ----------------------------------------------------------------------

    def open_stream(self, options: StreamOptions) -> None:
        """A stream of the engine for this connection, instead of the one it had, if any."""
        self.cancel_stream()
        self.stream = self.hub.engine.open(
            options, on_event=partial(self._from_worker, self._stream_token)
        )
        self.stream_id = self.stream.id

    def cancel_stream(self) -> None:
        """Frees the engine's slot at once."""
        self._stream_token = object()
        if self.stream is not None:
            self.stream.cancel()
            self.stream = None

    def send(self, text: str, *, is_tail: bool = False) -> None:
        """Queues one text frame. A client that is too far behind is cut."""
        if self.phase in (Phase.CLOSING, Phase.CLOSED):
            return
        text = text.encode(errors="replace").decode()  # JSON may smuggle half characters in
        if not self._outbox.put(text, is_tail=is_tail):
            self.cut("the client does not read")

    def end_audio(self) -> None:
        """The client says that nothing more comes."""
        self.phase = advance(self.phase, Signal.ENDED)

    async def finish(self) -> None:
        """Nothing more comes: what has come is captioned to its last word."""
        self.end_audio()
        await self.take_rest(waits=True)
        if self.stream is not None:
            self.stream.finish()

    def close_for(self, error_code: str, message: str) -> None:
        """The close after an error event."""
        self.close(close_code(error_code), message, error_code)

    def close(self, code: Close, reason: str = "", why: str = "") -> None:
        """A close frame goes out after what waits; the engine's slot is free from now on."""
        if self.phase in (Phase.CLOSING, Phase.CLOSED):
            return  # the first close frame counts
        self.phase = advance(self.phase, Signal.CLOSE)
        self._ended_by = CloseFrame(code, reason, why)
        self._outbox.close(self._ended_by)
        self.cancel_stream()

    def close_done(self) -> None:
        """Close after `Done`: everything that was sent is captioned."""
        if self._last is not None and self.phase is Phase.OPEN:  # the client had more to say
            self.close(self._last.code, self._last.reason, self._last.why)
        else:
            self.close(Close.NORMAL)

    def cut(self, why: str) -> None:
        """Ends the connection now, without a close frame."""
        logger.warning("connection cut: %s", why)
        self.phase = advance(self.phase, Signal.LOST)
        self._ended_by = CloseFrame(Close.LOST, "", f"cut, {why}")
        self.cancel_stream()
        transport.abort(self._websocket)

    def set_format(self, fmt: AudioFormat) -> None:
        """What the bytes of `take` are from now on."""
        self._fmt = fmt
        self._audio = audio.init_state(fmt)

    async def take(self, data: bytes, *, waits: bool) -> None:
        """Audio bytes to the engine, a second at most so that other clients get their turn.

        With `waits` a full backlog stops the reading of this socket, else it is a BacklogError.
        """
        # Two chunks fit into a backlog and less than one of them waits to become whole: this fits.
        block_s = min(1.0, self.hub.engine.cfg.backlog_s / 4)
        n_block = max(1, int(self._fmt.rate_hz * block_s)) * self._fmt.row_bytes
        for start in range(0, len(data), n_block):
            self._audio, pcm = audio.step(self._fmt, self._audio, data[start : start + n_block])
            await self._feed(pcm, waits=waits)

    async def take_rest(self, *, waits: bool) -> int:
        """What the resampler still holds goes to the engine too; how many odd bytes remain."""
        self._audio, pcm = audio.flush(self._fmt, self._audio)
        await self._feed(pcm, waits=waits)
        return len(self._audio.odd)

    async def _feed(self, pcm: Pcm, *, waits: bool) -> None:
        if waits:
            await self._wait_for_room(len(pcm) / SAMPLE_RATE_HZ)
        if self.stream is None or self.is_stopping:
            return  # ended meanwhile; whoever ended it tells the client
        self.stream.feed(pcm)
        self.n_fed += len(pcm)
        if self.time_s > self.hub.cfg.max_stream_s:
            self._stop_long()
        await asyncio.sleep(0)

    async def wait_for(self, event: asyncio.Event) -> None:
        """Until `event` is set or the stream has ended."""
        while self.stream is not None and not event.is_set():
            await self._pause()

    async def _wait_for_room(self, seconds: float) -> None:
        while self.stream is not None and self.stream.room_s < seconds:
            await self._pause()

    async def _pause(self) -> None:
        """The socket is not read meanwhile, so nobody else would see that the client is gone."""
        if transport.is_gone(self._websocket):
            raise WebSocketDisconnect(1006)
        self._heard_at = self._loop.time()  # it is our turn: the client is not idle
        await asyncio.sleep(POLL_S)

    @property
    def is_stopping(self) -> bool:
        """We end this connection: what was received is captioned, nothing more is taken."""
        return self._last is not None

    @property
    def time_s(self) -> float:
        """Seconds of audio received."""
        return self.n_fed / SAMPLE_RATE_HZ

    @property
    def lag_s(self) -> float:
        """Seconds of audio received and not captioned yet."""
        return self.stream.backlog_s if self.stream is not None else 0.0

    @property
    def heard_s(self) -> float:
        """Seconds of audio received that the model has begun with, or that hold no speech: at
        most, since `backlog_s` never says too little."""
        return max(0.0, self.time_s - self.lag_s)

    # --- life ------------------------------------------------------------------------------------

    async def run(self, subprotocol: str | None = None) -> None:
        """Accepts and serves until either side ends. `dialect` has been set."""
        metrics, name = self.hub.metrics, self.dialect_name
        metrics.connections.labels(name).inc()
        with metrics.open.labels(name).track_inprogress():
            try:
                await self._websocket.accept(subprotocol)
                if self.phase is Phase.CONNECTING:
                    self.phase = advance(self.phase, Signal.ACCEPTED)
                await self._serve()
            except (WebSocketDisconnect, OSError):
                pass  # lost during the handshake
            finally:
                self.phase = advance(self.phase, Signal.LOST)
                self._log_end()
                self.cancel_stream()
        metrics.closes.labels(str(int(self._ended_by.code))).inc()

    def _log_end(self) -> None:
        """One record per connection; nothing that was said is in it."""
        fields = {
            "dialect": self.dialect_name,
            "stream": self.stream_id,
            "audio_s": round(self.time_s, 3),
            "open_s": round(self._loop.time() - self._began_at, 3),
            "code": int(self._ended_by.code),
            "reason": self._ended_by.why,
        }
        logger.info(
            "connection ended: audio %.2f s, %d %s",
            *(fields["audio_s"], fields["code"], fields["reason"]),
            extra=fields,
        )

    def stop(self, code: Close, reason: str) -> None:
        """Takes nothing more, captions what was received, then closes with `code`."""
        self._last = self._last or CloseFrame(code, reason, reason)
        if self.stream is None:
            self.close_done()
        elif self.is_resumable and code is Close.RESTART:
            self.close(code, reason, reason)  # the words of half a word would be in the way
        else:
            self.stream.finish()

    def notify(self, code: str, message: str) -> None:
        """Tells the client what it may want to know, where its dialect has words for it."""
        self.dialect.on_notice(code, message)

    def _stop_long(self) -> None:
        if not self.is_stopping and self.phase is Phase.OPEN:
            limit_s = self.hub.cfg.max_stream_s
            self.notify("stream_too_long", f"a stream may last {limit_s:g} s")
            self.stop(Close.POLICY, f"the limit of {limit_s:g} s is reached")

    async def _serve(self) -> None:
        tasks = [asyncio.create_task(self._read()), asyncio.create_task(self._write())]
        try:
            while True:
                done, _ = await asyncio.wait(
                    tasks, timeout=self._time_left_s(), return_when=asyncio.FIRST_COMPLETED
                )
                if done:
                    return
                if self._loop.time() - self._began_at >= self.hub.cfg.max_stream_s:
                    self._stop_long()
                if self._idle_left_s() == 0:
                    idle_s = self.hub.cfg.idle_s
                    self.dialect.on_error(
                        IdleError(f"nothing was received for {idle_s:g} s", hint="send silence")
                    )
        finally:
            for task in tasks:
                task.cancel()
            for outcome in await asyncio.gather(*tasks, return_exceptions=True):
                if isinstance(outcome, Exception) and not isinstance(outcome, WebSocketDisconnect):
                    logger.error("a connection's task failed", exc_info=outcome)

    def _idle_left_s(self) -> float | None:
        """Seconds that the client may stay silent; None while it is not expected to send."""
        if self.phase is not Phase.OPEN:
            return None
        return max(0.0, self._heard_at + self.hub.cfg.idle_s - self._loop.time())

    def _time_left_s(self) -> float | None:
        """Seconds until something has to be done about a client that is silent, or here too long;
        None while there is nothing to wait for."""
        idle_s = self._idle_left_s()
        if idle_s is None or self.is_stopping:
            return idle_s
        return min(idle_s, max(0.0, self._began_at + self.hub.cfg.max_stream_s - self._loop.time()))

    async def _read(self) -> None:
        """Frames to the dialect, until the client is gone."""
        while True:
            message = await self._websocket.receive()
            if message["type"] == "websocket.disconnect":
                return
            self._heard_at = self._loop.time()
            if self.phase in (Phase.OPEN, Phase.DRAINING) and not self.is_stopping:
                try:
                    await self._dispatch(message)
                except WebSocketDisconnect:
                    return
            if not await self._keep_pace():
                return
            # A burst of frames must not keep the writer from its turn.
            await asyncio.sleep(0)

    async def _keep_pace(self) -> bool:
        """Waits while frames come faster than allowed; False when the client left meanwhile."""
        late_at = self._loop.time() + self._pace.take()
        while self._loop.time() < late_at:
            try:
                await self._pause()
            except WebSocketDisconnect:
                return False
        return True

    async def _dispatch(self, message: Message) -> None:
        try:
            text = message.get("text")
            if text is not None:
                await self.dialect.on_text(text)
            else:
                await self.dialect.on_audio(self._sized(message["bytes"]))
        except SparqleError as err:
            self.dialect.on_error(err)
        except (WebSocketDisconnect, asyncio.CancelledError):
            raise
        except Exception:
            logger.exception("a frame could not be handled")
            self._on_bug()

    def _sized(self, data: bytes) -> bytes:
        limit = self.hub.cfg.frame_bytes
        if len(data) > limit:
            raise FrameSizeError(
                f"a frame of {len(data)} bytes is too big", hint=f"send at most {limit} a frame"
            )
        return data

    async def _write(self) -> None:
        """The outbox to the client, until a close frame is sent."""
        while True:
            frame = await self._outbox.get()
            if self.phase is Phase.CLOSED:  # cut meanwhile: nobody is there
                return
            try:
                async with asyncio.timeout(self.hub.cfg.send_s):
                    if isinstance(frame, CloseFrame):
                        reason = frame.reason.encode()[:MAX_REASON_BYTES].decode(errors="ignore")
                        await self._websocket.close(frame.code, reason)
                        return
                    await self._websocket.send_text(frame)
            except TimeoutError:
                self.cut("the client took no byte for too long")
                return
            except (WebSocketDisconnect, OSError):  # a client of Wyoming that resets
                return

    def _from_worker(self, token: object, event: Event) -> None:
        """Called by the engine's thread."""
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is left to tell
            self._loop.call_soon_threadsafe(self._deliver, token, event)

    def _deliver(self, token: object, event: Event) -> None:
        if token is not self._stream_token:
            return
        self.hub.metrics.observe(event)
        try:
            self.dialect.on_event(event)
        except Exception:
            logger.exception("an event could not be sent")
            self._on_bug()

    def _on_bug(self) -> None:
        self.dialect.on_error(InternalError("the server failed", hint="its log says more"))
