"""Everything a client can do wrong: a clear answer, a free slot, no traceback."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import struct
import threading
import time

import numpy as np
import pytest
import uvicorn
from server_harness import (
    SAMPLE_RATE_HZ,
    WAIT_S,
    RawClient,
    frames,
    get,
    open_stream,
    rest,
    run,
    s16,
    serving,
    wait_until,
)
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from sparqle_stream import messages, server
from sparqle_stream.config import EngineConfig
from sparqle_stream.engine import Engine
from sparqle_stream.errors import ConfigError
from sparqle_stream.server.transport import AbortableProtocol

KEY = "s3cret-key"


pytestmark = pytest.mark.usefixtures("no_traceback")


def is_free(engine) -> bool:
    return engine.metrics().n_streams == 0


def last_words(websocket) -> tuple[messages.Event, int | None]:
    """The last event before the close, and the close code."""
    return rest(websocket)[-1], websocket.close_code


@pytest.mark.parametrize(
    ("query", "code", "part", "hint"),
    [
        ({"sample_rat": 16000}, "invalid_option", "'sample_rat'", "did you mean sample_rate?"),
        ({"zzz": 1}, "invalid_option", "'zzz'", "known: ack, after, channels"),
        ({"sample_rate": 96000}, "invalid_option", "96000 Hz", "use 8000 to 48000 Hz"),
        ({"sample_rate": "16k"}, "invalid_option", "sample_rate='16k'", "for example 16000"),
        ({"format": "mp3"}, "invalid_option", "'mp3'", "s16le"),
        ({"channels": 0}, "invalid_option", "0 channels", "use 1 to 64"),
        ({"chunk_ms": 100}, "invalid_option", "100", "multiple of 80"),
        ({"delay_ms": 5000}, "invalid_option", "5000", "0..960"),
        ({"vad": "magic"}, "invalid_option", "'magic'", "silero"),
        ({"vad_stop_ms": 1}, "invalid_option", "1 ms", "32 to 5000"),
        ({"pace": "fast"}, "invalid_option", "pace='fast'", "use live or file"),
        ({"prompt": "x" * 2001}, "invalid_option", "2001 characters", "at most 2000"),
        ({"model": "large"}, "unknown_model", "'large'", "this server runs 'tiny'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_a_query_that_cannot_be_served(engine, url, query, code, part, hint):
    with open_stream(url, **query) as websocket:
        error, close_code = last_words(websocket)
    assert isinstance(error, messages.Error)
    assert (error.code, close_code) == (code, 1008)
    assert part in error.message
    assert hint in error.hint
    assert is_free(engine)


def test_a_query_field_that_is_given_twice(url):
    with connect(f"{url}/v1/stream?vad=off&vad=silero", proxy=None) as websocket:
        error, close_code = last_words(websocket)
    assert (error.code, close_code) == ("invalid_option", 1008)
    assert "twice" in error.message


@pytest.mark.parametrize(
    ("frame", "code", "close_code"),
    [
        ("hello", "wrong_frame_type", 1003),
        ("AAAA" * 100, "wrong_frame_type", 1003),
        ("", "wrong_frame_type", 1003),
        ("[1]", "wrong_frame_type", 1003),
        ("{broken", "invalid_message", 1007),
        ('{"a":' * 100_000, "invalid_message", 1007),
        ("{}", "invalid_message", 1007),
        ('{"type": 7}', "invalid_message", 1007),
        ('{"type": "flsh"}', "invalid_message", 1007),
        ('{"type": "flush", "now": true}', "invalid_message", 1007),
        ('{"type": "\\ud800"}', "invalid_message", 1007),
        (b"\0" * (1 << 20) + b"\0", "frame_too_big", 1009),
    ],
    ids=lambda value: repr(value[:16]) if isinstance(value, str | bytes) else None,
)
def test_a_frame_that_cannot_be_understood(engine, url, frame, code, close_code):
    with open_stream(url) as websocket:
        websocket.send(frame)
        error, closed_with = last_words(websocket)
    assert isinstance(error, messages.Error)
    assert (error.code, closed_with) == (code, close_code)
    assert error.message
    assert error.hint
    wait_until(lambda: is_free(engine))


def test_a_misspelt_command_is_guessed(url):
    with open_stream(url) as websocket:
        websocket.send('{"type": "flsh"}')
        error, _ = last_words(websocket)
    assert error.hint == "did you mean flush?"


@pytest.mark.parametrize("late", [b"\0\0", '{"type": "flush"}', '{"type": "end"}'])
def test_nothing_may_follow_the_end(engine, speech, url, late):
    with open_stream(url, pace="file") as websocket:
        websocket.send(s16(speech))
        websocket.send('{"type": "end"}')
        websocket.send(late)
        error, close_code = last_words(websocket)
    assert (error.code, close_code) == ("invalid_message", 1007)
    wait_until(lambda: is_free(engine))


@pytest.mark.parametrize("route", ["stream", "realtime"])
def test_a_frame_of_100_mb(engine, url, route):
    """It is refused by its length, before it is read: the server's memory does not grow."""
    with connect(f"{url}/v1/{route}", proxy=None, compression=None) as websocket:
        with contextlib.suppress(ConnectionClosed):  # it may notice while it sends
            websocket.send(bytes(100_000_000))
        assert not [frame for frame in frames(websocket) if '"error"' in frame]
        assert websocket.close_code == 1009
    wait_until(lambda: is_free(engine))


def test_text_that_is_not_utf8(engine, url):
    client = RawClient(url, "/v1/stream")
    client.send(b'{"type": "\xff"}', opcode=1)
    received = b""
    while b"not UTF-8" not in received:
        received += client.socket.recv(4096)
    assert received[-11:-9] == struct.pack(">H", 1007)
    client.socket.close()
    wait_until(lambda: is_free(engine))


def append_event(pcm) -> bytes:
    audio = base64.b64encode(s16(pcm)).decode()
    return json.dumps({"type": "input_audio_buffer.append", "audio": audio}).encode()


@pytest.mark.parametrize("goodbye", ["reset", "fin", "half a frame"])
@pytest.mark.parametrize("route", ["stream", "stream?pace=file", "realtime"])
def test_a_client_that_is_killed_mid_word_frees_its_slot(engine, url, speech, route, goodbye):
    """However the connection dies, and also while its audio waits for room."""
    client = RawClient(url, f"/v1/{route}")
    half = speech[: 2 * SAMPLE_RATE_HZ]
    if route == "realtime":
        client.send(append_event(half), opcode=1)
    else:
        client.send(s16(half))
    wait_until(lambda: engine.metrics().n_streams == 1)
    if goodbye == "half a frame":
        client.socket.sendall(b"\x82\xff" + struct.pack(">Q", 100_000) + bytes(50))
    if goodbye == "fin":
        client.socket.close()
    else:
        client.reset()
    wait_until(lambda: is_free(engine))


@pytest.mark.parametrize("goodbye", [RawClient.reset, lambda client: client.socket.close()])
def test_a_client_that_dies_while_its_file_waits_for_room(tiny, speech, goodbye):
    """The server does not read its socket then: the hang-up has to be seen in another way."""
    with (
        Engine(tiny, EngineConfig(n_slots=1, threads=1, backlog_s=1.0)) as engine,
        serving(engine, ping_s=10 * WAIT_S) as url,  # no ping tells it
    ):
        client = RawClient(url, "/v1/stream?pace=file&vad=off")
        for _ in range(4):
            client.send(s16(np.tile(speech, 4)))
        wait_until(lambda: engine.metrics().audio_seconds > 1.0)
        goodbye(client)
        wait_until(lambda: is_free(engine))
        assert engine.metrics().audio_seconds < 30  # of 64: it was waiting


def test_a_reader_that_is_too_slow_is_cut(engine):
    """Answers pile up in the kernel, then in the outbox, which is bounded; then it is over."""
    with serving(engine, outbox_events=16, send_s=0.3) as url:
        client = RawClient(url, "/v1/realtime", receive_buffer=4096)
        wait_until(lambda: engine.metrics().n_streams == 1)
        junk = json.dumps({"type": "x" * 60, "event_id": "e" * 20_000}).encode()
        with contextlib.suppress(ConnectionError):
            for _ in range(5_000):
                client.send(junk, opcode=1)
            pytest.fail("100 MB of answers went somewhere")
        wait_until(lambda: is_free(engine))
        client.socket.close()


def test_a_burst_of_bad_events_is_answered_one_by_one(url):
    """The outbox holds 256: a client that reads is never cut, however fast it talks."""
    with connect(f"{url}/v1/realtime", proxy=None) as websocket:
        assert json.loads(websocket.recv(timeout=WAIT_S))["type"] == "session.created"
        for i in range(1_000):
            websocket.send(json.dumps({"type": "nonsense", "event_id": f"e{i}"}))
        for i in range(1_000):
            assert json.loads(websocket.recv(timeout=WAIT_S))["error"]["event_id"] == f"e{i}"


def test_a_client_that_says_nothing_is_closed(engine):
    with serving(engine, idle_s=0.2) as url:
        with open_stream(url) as websocket:
            error, close_code = last_words(websocket)
        assert (error.code, close_code) == ("idle_timeout", 1008)
        with connect(f"{url}/v1/realtime", proxy=None) as realtime:
            seen = [json.loads(frame) for frame in frames(realtime)]
        assert seen[-1]["error"]["code"] == "idle_timeout"
        assert realtime.close_code == 1008
        wait_until(lambda: is_free(engine))


def test_any_frame_keeps_a_client_alive(engine):
    """Longer than it may be silent; a machine has to be very late for one of the frames to be."""
    with serving(engine, idle_s=1.5) as url, open_stream(url) as websocket:
        for _ in range(9):
            time.sleep(0.2)
            websocket.send('{"type": "keepalive"}')
        websocket.send('{"type": "end"}')
        assert isinstance(rest(websocket)[-1], messages.Done)


def test_a_full_server_says_so_before_the_upgrade(tiny):
    with Engine(tiny, EngineConfig(n_slots=1, threads=1)) as engine, serving(engine) as url:
        with open_stream(url) as first:
            for route in ("stream", "realtime"):
                with pytest.raises(InvalidStatus) as refused:
                    connect(f"{url}/v1/{route}", proxy=None)
                response = refused.value.response
                assert (response.status_code, response.headers["Retry-After"]) == (503, "5")
                said = json.loads(response.body)
                assert (said["type"], said["code"]) == ("error", "busy")
            assert ready(url)["slots_free"] == 0
            first.send('{"type": "end"}')
            rest(first)
        wait_until(lambda: ready(url)["slots_free"] == 1)
        assert run(url, b"")[-1].duration == 0.0


def ready(url):
    return get(url, "/readyz")[1]


def test_health_and_readiness(url):
    status, health = get(url, "/healthz")
    assert (status, health["status"]) == (200, "ok")
    assert get(url, "/readyz") == (
        200,
        {"ready": True, "model": "tiny", "slots": 8, "slots_free": 8},
    )
    assert get(url, "/v1/stream")[0] == 426
    assert get(url, "/nothing")[0] == 404


def test_a_wrong_path_names_the_right_one(url):
    with pytest.raises(InvalidStatus) as refused:
        connect(f"{url}/v1/streem", proxy=None)
    assert refused.value.response.status_code == 404
    assert json.loads(refused.value.response.body)["hint"] == "did you mean /v1/stream?"


@pytest.mark.parametrize(
    ("headers", "query", "subprotocols", "status"),
    [
        ({}, "", None, 401),
        ({"Authorization": "Bearer wrong"}, "", None, 401),
        ({"Authorization": f"Basic {KEY}"}, "", None, 401),
        ({"Authorization": f"Bearer {KEY}x"}, "", None, 401),
        ({}, "?api_key=wrong", None, 401),
        ({}, "", ["realtime", "openai-insecure-api-key.wrong"], 401),
        ({"Authorization": f"Bearer {KEY}"}, "", None, 101),
        ({"authorization": f"bearer {KEY}"}, "", None, 101),
        ({}, f"?api_key={KEY}", None, 101),
        ({}, f"?token={KEY}", None, 101),
        ({}, "", ["realtime", f"openai-insecure-api-key.{KEY}"], 101),
    ],
)
def test_keys(engine, caplog, headers, query, subprotocols, status):
    with serving(engine, api_key=KEY) as url:
        address = f"{url}/v1/realtime{query}"
        options = {"additional_headers": headers, "subprotocols": subprotocols, "proxy": None}
        if status == 101:
            with connect(address, **options) as websocket:
                assert json.loads(websocket.recv(timeout=WAIT_S))["type"] == "session.created"
                assert websocket.subprotocol == (subprotocols[0] if subprotocols else None)
        else:
            with pytest.raises(InvalidStatus) as refused:
                connect(address, **options)
            assert refused.value.response.status_code == status
            assert json.loads(refused.value.response.body)["code"] == "unauthorized"
    assert KEY not in caplog.text


@pytest.mark.parametrize(
    ("origin", "allowed", "status"),
    [
        ("https://evil.example", (), 403),
        ("null", (), 403),
        ("https://good.example", ("https://good.example",), 101),
        ("https://evil.example", ("https://good.example",), 403),
        ("https://any.example", ("*",), 101),
        ("http://{host}", (), 101),
    ],
)
def test_pages_of_other_hosts(engine, origin, allowed, status):
    """A browser lets any page open a websocket to this machine: the server has to look."""
    with serving(engine, allow_origins=allowed) as url:
        headers = {"Origin": origin.format(host=url.removeprefix("ws://"))}
        if status == 101:
            with connect(f"{url}/v1/realtime", additional_headers=headers, proxy=None) as websocket:
                assert websocket.recv(timeout=WAIT_S)
        else:
            with pytest.raises(InvalidStatus) as refused:
                connect(f"{url}/v1/realtime", additional_headers=headers, proxy=None)
            assert refused.value.response.status_code == 403


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.org", ""])
def test_an_open_address_wants_a_key(host):
    with pytest.raises(ConfigError, match="without a key") as refused:
        server.ServerConfig(host=host)
    assert "--api-key" in refused.value.hint
    assert server.ServerConfig(host=host, insecure=True).host == host
    assert server.ServerConfig(host=host, api_key="k").host == host


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "::1", "localhost"])
def test_this_machine_needs_none(host):
    assert server.ServerConfig(host=host).api_key == ""


def test_a_port_that_is_taken(engine, url):
    port = int(url.rpartition(":")[2])
    with pytest.raises(ConfigError, match="in use") as refused:
        server.serve(engine, server.ServerConfig(port=port))
    assert "--port" in refused.value.hint


def test_what_is_sent_behind_a_refused_frame_is_lost():
    """uvicorn has closed, and whoever writes has not been told."""
    raised: list[BaseException] = []

    async def app(_scope, receive, send) -> None:
        await receive()
        await send({"type": "websocket.accept"})
        try:
            while True:
                await send({"type": "websocket.send", "text": "word"})
                await asyncio.sleep(0.01)
        except Exception as err:
            raised.append(err)
            raise

    config = uvicorn.Config(app, port=0, lifespan="off", ws=AbortableProtocol, log_config=None)
    one = uvicorn.Server(config)
    thread = threading.Thread(target=one.run, daemon=True)
    thread.start()
    wait_until(lambda: one.started)
    port = one.servers[0].sockets[0].getsockname()[1]
    client = RawClient(f"ws://127.0.0.1:{port}", "/")
    client.send(b"\xff", opcode=1)
    wait_until(lambda: raised)
    client.socket.close()
    one.should_exit = True
    thread.join(WAIT_S)
    assert isinstance(raised[0], OSError)
