"""SIGTERM: no new streams, running ones finish or are flushed and closed with 1012."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from server_harness import SAMPLE_RATE_HZ, WAIT_S, frames, get, open_stream, rest, s16, words
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from sparqle_stream import messages, server

REPO = Path(__file__).parents[2]
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
    with open_stream(urls[0]) as own, connect(f"{urls[0]}/v1/realtime", proxy=None) as realtime:
        own.send(s16(speech[: 2 * SAMPLE_RATE_HZ]))
        stop.set()
        yield urls[0], own, realtime
    thread.join()


def test_a_drain(draining, engine):
    url, own, realtime = draining
    events = (messages.from_json(frame) for frame in frames(own))
    said = list[messages.Event]()  # a quick engine may have words before the server warns
    while not isinstance(warning := next(events), messages.Warning):
        said.append(warning)
    assert (warning.code, warning.message) == ("draining", "the server stops in 1 s")
    status, state = get(url, "/readyz")
    assert (status, state["ready"]) == (503, False)
    assert get(url, "/healthz")[0] == 200
    with pytest.raises(InvalidStatus) as refused:
        open_stream(url)
    assert refused.value.response.status_code == 503
    said += events
    assert isinstance(said[-1], messages.Done)
    assert len(words(said)) >= 1  # the words, although the client never sent its end
    assert own.close_code == 1012
    assert [json.loads(frame)["type"] for frame in frames(realtime)] == ["session.created"]
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
    paths = os.pathsep.join([*(str(REPO / x) for x in (".", "kernels")), *sys.path])
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": paths},
    ) as process:
        try:
            url = process.stdout.readline().strip()
            assert url, process.stderr.read()
            with open_stream(url) as websocket:
                websocket.send(s16(speech[:SAMPLE_RATE_HZ]))
                events = (messages.from_json(frame) for frame in frames(websocket))
                assert isinstance(next(events), messages.Ready)
                process.send_signal(signal.SIGTERM)
                # Signals that wait together are one: the second comes once the first was heard.
                told = next(e for e in events if isinstance(e, messages.Warning))
                assert told.code == "draining"
                if n_signals == 2:
                    process.send_signal(signal.SIGTERM)
                list(events)
                assert websocket.close_code == 1012
            out, err = process.communicate(timeout=WAIT_S)
        finally:
            process.kill()
    assert (process.returncode, out.strip(), err) == (0, "ended", "")
