"""SIGTERM: no new streams, running ones finish or are flushed and closed with 1012."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import threading
import time

import httpx
import pytest
from server_harness import SAMPLE_RATE_HZ, WAIT_S, open_stream, rest, s16, words
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from sparqle_stream import messages, server

SERVE = """
import sys
from sparqle_stream import server, testing
from sparqle_stream.config import EngineConfig
from sparqle_stream.engine import Engine

cfg = server.ServerConfig(port=0, drain_s=float(sys.argv[1]))
with Engine(testing.tiny_model(), EngineConfig(n_slots=4, threads=1)) as engine:
    server.serve(engine, cfg, lambda address: print(address, flush=True))
print("ended", flush=True)
"""


@pytest.fixture
def draining(engine, speech):
    """A server that was asked to stop with two streams open; both have sent 2 s of speech."""
    stop = threading.Event()
    ready = threading.Event()
    urls = []

    def run():
        with server.background(engine, server.ServerConfig(port=0, drain_s=1.0)) as url:
            urls.append(url)
            ready.set()
            stop.wait(WAIT_S)

    thread = threading.Thread(target=run)
    thread.start()
    ready.wait(WAIT_S)
    own = open_stream(urls[0])
    own.send(s16(speech[: 2 * SAMPLE_RATE_HZ]))
    realtime = connect(f"{urls[0]}/v1/realtime", proxy=None)
    stop.set()
    yield urls[0], own, realtime
    thread.join()
    own.close()
    realtime.close()


def test_a_drain(draining, engine):
    url, own, realtime = draining
    frames = iter(lambda: messages.from_json(own.recv(timeout=WAIT_S)), None)
    warning = next(e for e in frames if isinstance(e, messages.Warning))
    assert (warning.code, warning.message) == ("draining", "the server stops in 1 s")
    http = url.replace("ws", "http", 1)
    answer = httpx.get(f"{http}/readyz", trust_env=False)
    assert (answer.status_code, answer.json()["ready"]) == (503, False)
    assert httpx.get(f"{http}/healthz", trust_env=False).status_code == 200
    with pytest.raises(InvalidStatus) as refused:
        open_stream(url)
    assert refused.value.response.status_code == 503
    events = []
    with pytest.raises(ConnectionClosed):
        events.extend(frames)
    assert isinstance(events[-1], messages.Done)
    assert len(words(events)) >= 1  # the last words, although the client never sent its end
    assert own.close_code == 1012
    assert json.loads(realtime.recv(timeout=WAIT_S))["type"] == "session.created"
    with pytest.raises(ConnectionClosed):
        realtime.recv(timeout=WAIT_S)
    assert realtime.close_code == 1012
    assert engine.metrics().n_streams == 0


def test_a_stream_that_ends_in_time_is_not_disturbed(draining):
    _, own, realtime = draining
    realtime.close()
    own.send('{"type": "end"}')
    assert isinstance(rest(own)[-1], messages.Done)
    assert own.close_code == 1000


@pytest.mark.parametrize(("drain_s", "n_signals"), [(0, 1), (600, 2)])
def test_a_process_that_gets_sigterm(speech, drain_s, n_signals):
    """Exit code 0, the last words out, no traceback; a second signal hurries a long drain."""
    command = [sys.executable, "-c", SERVE, str(drain_s)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            url = process.stdout.readline().strip()
            with open_stream(url) as websocket:
                websocket.send(s16(speech[:SAMPLE_RATE_HZ]))
                assert isinstance(messages.from_json(websocket.recv(WAIT_S)), messages.Ready)
                for _ in range(n_signals):
                    process.send_signal(signal.SIGTERM)
                    time.sleep(0.5)
                with contextlib.suppress(ConnectionClosed):
                    while websocket.recv(WAIT_S):
                        pass
                assert websocket.close_code in ((1012,) if n_signals == 1 else (1006, 1012))
            out, err = process.communicate(timeout=WAIT_S)
        finally:
            process.kill()
    assert (process.returncode, out.strip(), err) == (0, "ended", "")
