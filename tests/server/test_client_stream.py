"""Our own client: the same words as the engine, and errors that say what to do."""

from __future__ import annotations

import asyncio
import http.server
import socket
import threading
import time

import numpy as np
import pytest
from server_harness import rounded, serving, wait_until, words
from websockets.sync.server import serve

from sparqle_stream import client, messages
from sparqle_stream.config import EngineConfig, StreamOptions
from sparqle_stream.engine import Engine
from sparqle_stream.errors import ConfigError, ProtocolError, SparqleError


def blocks(pcm, size=1_600):
    return [pcm[start : start + size] for start in range(0, len(pcm), size)]


def test_the_client_hears_what_the_engine_says(engine, url, speech):
    options = {"pace": "file", "delay_ms": 80, "chunk_ms": 160}
    events = list(client.stream_sync(url, blocks(speech), options=options))
    expected = engine.transcribe(speech, StreamOptions(chunk_ms=160, delay_ms=80))
    assert isinstance(events[0], messages.Ready)
    assert isinstance(events[-1], messages.Done)
    assert rounded(words(events)) == rounded(words(expected))
    assert len(words(events)) >= 5


def test_audio_that_comes_as_an_async_iterator(engine, url, speech):
    async def microphone():
        for block in blocks(speech, 50_000):  # longer than a frame may be
            yield block
            await asyncio.sleep(0)

    async def run():
        return [e async for e in client.stream(url, microphone(), options={"pace": "file"})]

    assert rounded(words(asyncio.run(run()))) == rounded(words(engine.transcribe(speech)))


def test_events_come_while_audio_is_still_being_sent(url, speech):
    """A live client must not wait for its own end."""
    first_word = threading.Event()
    in_time = []

    def microphone():
        yield from blocks(speech)
        in_time.append(first_word.wait(20))

    for event in client.stream_sync(url, microphone()):
        if isinstance(event, messages.Final):
            first_word.set()
    assert in_time == [True]


def test_giving_up_early_frees_the_slot(engine, url, speech):
    for event in client.stream_sync(url, blocks(speech)):
        assert isinstance(event, messages.Ready)
        break
    wait_until(lambda: engine.metrics().n_streams == 0)


@pytest.mark.parametrize("waits_for_ready", [False, True])
def test_a_microphone_that_fails_is_not_hidden(url, waits_for_ready):
    """It may fail while nobody waits for it, an event being handed out: seen all the same."""
    ready = threading.Event()

    def microphone():
        yield np.zeros(1_600, np.float32)
        if waits_for_ready:
            ready.wait(20)
        raise OSError("unplugged")

    def listen():
        for _ in client.stream_sync(url, microphone()):
            ready.set()
            time.sleep(0.2)

    with pytest.raises(OSError, match="unplugged"):
        listen()


@pytest.mark.parametrize("ending", ["error", "lost"])
def test_a_source_that_is_quiet_holds_nobody(ending):
    """The end is told, and the loop closes, while the source still waits for a sound."""
    is_quiet, let_go = threading.Event(), threading.Event()

    def quiet():
        yield np.zeros(1_600, np.float32)
        is_quiet.set()
        let_go.wait()

    def ends(websocket):
        websocket.send(messages.to_json(messages.Ready("x", "m", 16_000, 320, 240)))
        is_quiet.wait(10)  # sooner, and the client would never ask its source again
        if ending == "error":
            websocket.send(messages.to_json(messages.Error("idle_timeout", "no", "", time=0.0)))
        websocket.close(1003, "no")

    ended = []

    def run():
        try:
            ended.append(list(client.stream_sync(url, quiet()))[-1])
        except SparqleError as err:
            ended.append(err)

    with serve(ends, "127.0.0.1", 0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"ws://127.0.0.1:{server.socket.getsockname()[1]}"
        client_thread = threading.Thread(target=run, daemon=True)
        client_thread.start()
        client_thread.join(10)
        server.shutdown()
    is_held = client_thread.is_alive()
    let_go.set()
    assert not is_held
    assert isinstance(ended[0], messages.Error if ending == "error" else SparqleError)


def test_an_error_event_is_the_last_one(url):
    events = list(client.stream_sync(url, [], options={"chunk_ms": 100}))
    assert [type(e) for e in events] == [messages.Error]
    assert events[0].code == "invalid_option"


def refused(url, **options):
    with pytest.raises(client.ServerError) as error:
        list(client.stream_sync(url, [], **options))
    return error.value


def test_nobody_there():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"ws://127.0.0.1:{free.getsockname()[1]}"
    error = refused(url)
    assert error.message == f"cannot connect to {url}/v1/stream: Connection refused"
    assert "sparqle-stream serve" in error.hint


def test_a_name_that_does_not_exist():
    assert "cannot connect to ws://no.such.host.invalid" in refused("no.such.host.invalid").message


def test_somebody_else_is_there():
    """A web server that knows nothing of websockets."""
    with http.server.HTTPServer(("127.0.0.1", 0), Silent) as web:
        thread = threading.Thread(target=web.handle_request)
        thread.start()
        error = refused(f"http://127.0.0.1:{web.server_port}")
        thread.join()
    assert error.message.endswith("refused with HTTP 404")
    assert error.hint == "the path is /v1/stream"


class Silent(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.send_error(404)

    def log_message(self, *_):
        pass


def test_the_wrong_key_and_the_right_one(engine):
    with serving(engine, api_key="k") as url:
        error = refused(url, api_key="x")
        assert "missing or wrong API key" in error.message
        assert error.hint
        assert isinstance(list(client.stream_sync(url, [], api_key="k"))[-1], messages.Done)


def test_a_full_server(tiny):
    with Engine(tiny, EngineConfig(n_slots=1, threads=1)) as engine:
        with serving(engine) as url:
            engine_stream = engine.open()
            error = refused(url)
            engine_stream.cancel()
        assert "all 1 slots are taken" in error.message


def test_a_server_that_dies():
    """It accepts, then the connection is gone without a word."""
    with serve(lambda w: w.socket.shutdown(socket.SHUT_RDWR), "127.0.0.1", 0) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        error = refused(f"ws://127.0.0.1:{server.socket.getsockname()[1]}")
        server.shutdown()
        thread.join()
    assert error.message.startswith("the connection was lost before the end")
    assert "(1006)" in error.message


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("ws://h:1", "ws://h:1/v1/stream?"),
        ("http://h:1/", "ws://h:1/v1/stream?"),
        ("https://h", "wss://h/v1/stream?"),
        ("h:1", "ws://h:1/v1/stream?"),
        ("[::1]:80", "ws://[::1]:80/v1/stream?"),
        ("ws://h/captions/v1/stream", "ws://h/captions/v1/stream?"),
    ],
)
def test_addresses(given, expected):
    assert client.stream_url(given) == f"{expected}sample_rate=16000&format=f32le"


def test_fields_of_the_address_and_options_are_joined():
    # What others send, as in a URL of the documentation, is not what this client sends.
    others = "ws://h/v1/stream?sample_rate=8000&format=s16le&channels=2"
    assert client.stream_url(others) == "ws://h/v1/stream?sample_rate=16000&format=f32le"
    url = client.stream_url("ws://h?vad=off&chunk_ms=80", {"chunk_ms": 160, "prompt": "a b&c"})
    query = url.partition("?")[2].split("&")
    assert query[2:] == ["vad=off", "chunk_ms=160", "prompt=a+b%26c"]


@pytest.mark.parametrize(
    "bad", ["", "ws://", "ftp://h", "ws://h:port", "ws://h:99999", "ws://[::1:80", "file.wav/x"]
)
def test_what_is_no_address(bad):
    if bad == "file.wav/x":  # might be a host: told when it cannot be found
        assert client.stream_url(bad).startswith("ws://file.wav/x?")
        return
    with pytest.raises(ConfigError, match="is not the address of a server"):
        client.stream_url(bad)


@pytest.mark.parametrize("frame", ["", "[]", "{}", '{"type": "final"}', "[" * 200_000])
def test_a_frame_that_is_no_event(frame):
    with pytest.raises(ProtocolError, match="not an event"):
        messages.from_json(frame)


@pytest.mark.parametrize("blocks_or_none", ["breaks", None])
def test_a_source_that_cannot_begin_is_told(url, blocks_or_none):
    """At once, not by waiting for what its thread will never read."""

    class Breaks:
        def __iter__(self):
            raise OSError("no such device")

    source = Breaks() if blocks_or_none else None
    told = []

    def run():
        try:
            list(client.stream_sync(url, source))
        except (OSError, TypeError) as err:
            told.append(err)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(10)
    assert isinstance(told[0], OSError if blocks_or_none else TypeError)
