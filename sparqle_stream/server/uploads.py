"""Files over HTTP: an upload to disk, its sound through an engine stream, an answer.

An upload counts as a stream from its first byte on: the same slots, keys, drain and metrics.
Whatever ends a request (answer, hang-up, limit, restart), its slot is free afterwards.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response, StreamingResponse

from sparqle_stream import audio, messages
from sparqle_stream.config import SAMPLE_RATE_HZ
from sparqle_stream.errors import FULL_DISK, BusyError, ConfigError, SparqleError
from sparqle_stream.server import openai_files, request, transport
from sparqle_stream.server.settings import (
    FrameSizeError,
    IdleError,
    InternalError,
    TooManyStreamsError,
)

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Iterator

    from starlette.types import Message, Receive, Scope, Send

    from sparqle_stream.engine import Stream
    from sparqle_stream.server.hub import Hub
    from sparqle_stream.server.settings import Close

log = logging.getLogger(__name__)

ROUTE = "/v1/audio/transcriptions"
BLOCK_SAMPLES = SAMPLE_RATE_HZ // 2
COPY_BYTES = 1 << 20
MODEL_HEADER = "openai-model"  # of the answer: which one it was, whatever name was asked for
POLL_S = 0.5
FORM = "multipart/form-data"
FORM_FIELDS = 64
FIELD_BYTES = 64 << 10
STATUS = {
    "busy": 503,
    "internal": 500,
    "model": 500,
    "too_many_streams": 429,
    "frame_too_big": 413,
    "model_not_found": 404,
    "idle_timeout": 408,
}


class Upload:
    """One request; in the hub it stands beside the websocket connections."""

    def __init__(self, hub: Hub) -> None:
        self._hub = hub
        self._stream: Stream | None = None
        self._events: asyncio.Queue[messages.Event | SparqleError] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        self._is_over = threading.Event()
        self._ends_at = self._loop.time() + hub.cfg.max_stream_s

    # --- what the hub calls ----------------------------------------------------------------------

    @property
    def lag_s(self) -> float:
        """Seconds of sound that wait for the engine."""
        return self._stream.backlog_s if self._stream is not None else 0.0

    def notify(self, code: str, message: str) -> None:
        """HTTP has no word for it."""

    def stop(self, code: Close, reason: str) -> None:
        """The server stops: a part of a transcript is no answer."""
        del code
        self._fail(BusyError(reason, hint="send the file again"))

    def close(self, code: Close, reason: str = "", why: str = "") -> None:
        del why
        self.stop(code, reason)

    def cut(self, why: str) -> None:
        """Nothing is left to cut: the answer is an error by now."""

    # --- life ------------------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def in_time(self) -> AsyncGenerator[None, None]:
        """What is inside ends when the request has lasted too long: that is an IdleError."""
        try:
            async with asyncio.timeout_at(self._ends_at):
                yield
        except TimeoutError:
            raise self._late() from None

    async def events(
        self, path: Path, asked: openai_files.Request
    ) -> AsyncGenerator[messages.Event, None]:
        """Events of the file up to Done. Raises the SparqleError that ends it instead."""
        self._stream = self._hub.engine.open(asked.options, on_event=self._from_worker)
        # A thread of its own: the loop has few for all, and this one is needed for the whole file.
        thread = ThreadPoolExecutor(1, "upload")
        pump = self._loop.run_in_executor(thread, self._pump, self._stream, path)
        clock = self._loop.call_at(self._ends_at, self._end_late)
        try:
            while True:
                event = await self._events.get()
                if isinstance(event, SparqleError):
                    raise event
                self._hub.metrics.observe(event)
                if isinstance(event, messages.Error):
                    raise _as_exception(event)
                yield event
                if isinstance(event, messages.Done):
                    return
        finally:
            clock.cancel()
            self._is_over.set()
            self._stream.cancel()
            await asyncio.gather(pump, return_exceptions=True)
            thread.shutdown(wait=False)

    def _pump(self, stream: Stream, path: Path) -> None:
        """The file into the stream, as fast as there is room; in a thread of its own."""
        try:
            for pcm in audio.stream_file(path, BLOCK_SAMPLES):
                while not stream.wait_for_room(len(pcm) / SAMPLE_RATE_HZ, timeout=POLL_S):
                    if self._is_over.is_set():
                        return
                if self._is_over.is_set():
                    return
                stream.feed(pcm)
                if stream.n_received > self._hub.cfg.max_stream_s * SAMPLE_RATE_HZ:
                    limit = f"at most {self._hub.cfg.max_stream_s:g} s"
                    raise FrameSizeError("the recording is too long", hint=limit)
            stream.finish()
        except SparqleError as err:
            told = SparqleError(err.message.replace(str(path), "the file"), err.hint)
            told.code = err.code
            self._loop.call_soon_threadsafe(self._fail, told)
        except Exception:  # the client waits for an answer: it must not wait for ever
            log.exception("an upload could not be read")
            told = InternalError("the server failed", hint="its log says more")
            self._loop.call_soon_threadsafe(self._fail, told)

    def _from_worker(self, event: messages.Event) -> None:
        self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    def _fail(self, err: SparqleError) -> None:
        self._is_over.set()
        self._events.put_nowait(err)

    def _end_late(self) -> None:
        """A reader that is slow would be told all that waits first, and hold its slot."""
        while not self._events.empty():
            self._events.get_nowait()
        self._fail(self._late())

    def _late(self) -> IdleError:
        limit = f"at most {self._hub.cfg.max_stream_s:g} s"
        return IdleError("the request takes too long", hint=limit)


class EventStream(StreamingResponse):
    """Server-sent events; whatever ends them, also before the first, `stack` is closed after."""

    def __init__(
        self, events: AsyncGenerator[str, None], stack: contextlib.ExitStack, send_s: float
    ) -> None:
        # A proxy that gathers the answer would take its point away.
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._events = events
        self._stack = stack
        self._send_s = send_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_or_cut(message: Message) -> None:
            try:
                async with asyncio.timeout(self._send_s):
                    await send(message)
            except TimeoutError:
                log.warning("connection cut: the client took no byte for too long")
                transport.abort_request(scope)
                await send(message)  # to nobody: it returns once the connection is gone

        with self._stack:
            try:
                await super().__call__(scope, receive, send_or_cut)
            finally:
                await self._events.aclose()


@contextlib.contextmanager
def _room() -> Iterator[None]:
    """A temporary folder that is full is no bug: the client may come again."""
    try:
        yield
    except OSError as err:
        if err.errno not in FULL_DISK:
            raise
        log.warning("no room for an upload in %s: %s", tempfile.gettempdir(), err.strerror)
        raise BusyError("the server has no room for the file", "send it again later") from err


async def transcribe(http: HttpRequest) -> Response:
    """POST of one file."""
    hub: Hub = http.app.state.hub
    upload = Upload(hub)
    stack = contextlib.ExitStack()  # what has to be given back when the answer is out
    try:
        stack.enter_context(hub.admit(upload, request.check(http, hub.cfg)))
        stack.enter_context(hub.metrics.open.labels(ROUTE).track_inprogress())
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="sparqle-upload-"))
        with _room():
            async with upload.in_time():
                path, asked = await _receive(http, hub, Path(folder))
        result = openai_files.result(asked, hub.model)
        hub.metrics.connections.labels(ROUTE).inc()
        events = upload.events(path, asked)
        if asked.is_streamed:
            streamed = EventStream(_stream(events, result), stack, hub.cfg.send_s)
            streamed.headers[MODEL_HEADER] = hub.model
            stack = contextlib.ExitStack()  # the answer gives back
            return streamed
        answer = await _whole(http, events, result)
        answer.headers[MODEL_HEADER] = hub.model
        return answer
    except (request.RefusedError, BusyError, TooManyStreamsError) as err:
        hub.metrics.refusals.labels(err.code).inc()
        return _refusal(err)
    except SparqleError as err:
        return _refusal(err)
    finally:
        stack.close()


async def _receive(http: HttpRequest, hub: Hub, folder: Path) -> tuple[Path, openai_files.Request]:
    """The form's file on disk and its other fields, checked."""
    if _media_type(http) != FORM:  # of other forms every version of Starlette limits something else
        raise ConfigError("not a form with a file", hint=FORM)
    limit = hub.cfg.upload_bytes
    n_bytes = 0

    async def receive() -> Message:
        nonlocal n_bytes
        try:
            async with asyncio.timeout(hub.cfg.idle_s):
                message = await http.receive()
        except TimeoutError:
            raise IdleError(f"no byte came for {hub.cfg.idle_s:g} s", "send it again") from None
        n_bytes += len(message.get("body", b""))
        if n_bytes > limit:
            raise FrameSizeError(f"a file of over {limit >> 20} MiB", hint="send it in parts")
        return message

    try:
        form = await HttpRequest(http.scope, receive).form(
            max_files=1, max_fields=FORM_FIELDS, max_part_size=FIELD_BYTES
        )
    except HTTPException as err:
        raise ConfigError(f"not a form: {err.detail}", hint=FORM) from err
    async with contextlib.AsyncExitStack() as opened:
        opened.push_async_callback(form.close)
        file = form.get("file")
        if not isinstance(file, UploadFile):
            raise ConfigError("there is no file in the form", hint="a part called file")
        rest = [(name, value) for name, value in form.multi_items() if name != "file"]
        asked = openai_files.parse(rest, hub.model, hub.cfg.defaults)
        path = folder / "upload"
        with path.open("wb") as out:
            while data := await file.read(COPY_BYTES):
                await asyncio.to_thread(out.write, data)
    return path, asked


def _media_type(http: HttpRequest) -> str:
    return http.headers.get("content-type", "").partition(";")[0].strip().lower()


async def _whole(
    http: HttpRequest, events: AsyncGenerator[messages.Event, None], result: openai_files.Result
) -> Response:
    """The answer once everything is captioned; a client that hangs up ends it early."""
    gather = asyncio.create_task(_gather(events, result))
    hang_up = asyncio.create_task(_hang_up(http))
    try:
        await asyncio.wait({gather, hang_up}, return_when=asyncio.FIRST_COMPLETED)
        if gather.done():
            gather.result()
            body, media_type = result.body()
            return Response(body, media_type=media_type)
        return Response(status_code=499)  # nobody reads it
    finally:
        for task in (gather, hang_up):
            task.cancel()
        await asyncio.gather(gather, hang_up, return_exceptions=True)


async def _gather(
    events: AsyncGenerator[messages.Event, None], result: openai_files.Result
) -> None:
    async with contextlib.aclosing(events):
        async for event in events:
            result.add(event)


async def _hang_up(http: HttpRequest) -> None:
    """Returns when the client is gone; its body has been read."""
    while (await http.receive())["type"] != "http.disconnect":
        pass


async def _stream(
    events: AsyncGenerator[messages.Event, None],
    result: openai_files.Result,
) -> AsyncGenerator[str, None]:
    """Server-sent events; an error is one, too: the status has been sent."""
    try:
        async with contextlib.aclosing(events):
            async for event in events:
                is_first = not result.transcript.text
                result.add(event)
                if isinstance(event, messages.Final):
                    yield result.delta(event, is_first=is_first)
        result.transcript.finish()
        yield result.done()
    except SparqleError as err:
        body = openai_files.error_body(err, _kind(err))
        yield f"data: {json.dumps({'type': 'error'} | body, ensure_ascii=False)}\n\n"


def _refusal(err: SparqleError) -> Response:
    """An error before anything was answered."""
    status = err.status if isinstance(err, request.RefusedError) else STATUS.get(err.code, 400)
    headers = {"Retry-After": str(request.RETRY_AFTER_S)} if status in (429, 503) else {}
    if status == 408:  # the rest of the body may drip in for ever
        headers["Connection"] = "close"
    return JSONResponse(openai_files.error_body(err, _kind(err)), status, headers)


def _kind(err: SparqleError) -> str:
    return "server_error" if STATUS.get(err.code, 400) >= 500 else "invalid_request_error"


def _as_exception(event: messages.Error) -> SparqleError:
    err = SparqleError(event.message, event.hint)
    err.code = event.code
    return err
