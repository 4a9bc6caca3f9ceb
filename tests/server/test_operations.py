"""What operators rely on: limits, probes, figures, logs, TLS; limits, and who breaks them."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import logging
import os
import re
import shutil
import signal
import ssl
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import Mock

import pytest
from server_harness import (
    WAIT_S,
    frames,
    get,
    open_stream,
    rest,
    run,
    s16,
    serving,
    text,
    wait_until,
)
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from sparqle_stream import messages, server, testing
from sparqle_stream.config import EngineConfig, StreamOptions, VadConfig
from sparqle_stream.errors import ConfigError
from sparqle_stream.server import hub, logs, request
from sparqle_stream.server.connection import Pace

REPO = Path(__file__).parents[2]
SPOKEN = StreamOptions(vad=VadConfig(kind="off"))
WORDS = ["far", "away", "bird", "sing"]
SPEECH = s16(testing.say(WORDS))


@pytest.fixture(scope="module")
def oracle():
    with testing.oracle_engine(EngineConfig(n_slots=3)) as engine:
        yield engine


def status_of(url: str, path: str, **options) -> tuple[int, dict]:
    """The HTTP status that a handshake is refused with, and what is said."""
    with pytest.raises(InvalidStatus) as refused:
        connect(f"{url}{path}", proxy=None, **options)
    return refused.value.response.status_code, json.loads(refused.value.response.body)


def fetch(url: str, path: str, key: str = "") -> tuple[int, str]:
    host, port = url.removeprefix("ws://").split(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=WAIT_S)
    connection.request("GET", path, headers={"Authorization": f"Bearer {key}"} if key else {})
    response = connection.getresponse()
    body = response.read().decode()
    connection.close()
    return response.status, body


def test_any_of_several_keys_opens_the_door(oracle):
    with serving(oracle, api_key="one", api_keys=("two", "three"), defaults=SPOKEN) as url:
        for key in ("one", "two", "three"):
            events = run(url, SPEECH, api_key=key)
            assert text(events) == " ".join(WORDS)
        assert status_of(url, "/v1/stream?api_key=four")[0] == 401
        assert status_of(url, "/v1/stream")[0] == 401


@pytest.mark.parametrize("scheme", ["Token", "token", "Bearer"])
def test_schemes_of_the_header(oracle, scheme):
    with serving(oracle, api_key="k") as url:
        headers = {"Authorization": f"{scheme} k"}
        with connect(f"{url}/v1/stream", additional_headers=headers, proxy=None) as websocket:
            assert json.loads(websocket.recv(timeout=WAIT_S))["type"] == "ready"


def test_one_key_may_have_so_many_streams(oracle):
    with serving(oracle, api_keys=("a", "b"), streams_per_key=1) as url:
        with open_stream(url, api_key="a") as first:
            assert isinstance(messages.from_json(first.recv(timeout=WAIT_S)), messages.Ready)
            status, said = status_of(url, "/v1/stream?api_key=a")
            assert (status, said["code"]) == (429, "too_many_streams")
            with open_stream(url, api_key="b") as other:
                assert messages.from_json(other.recv(timeout=WAIT_S)).stream_id
            first.send('{"type": "end"}')
            rest(first)
        wait_until(lambda: get(url, "/readyz")[1]["slots_free"] == 3)
        assert isinstance(run(url, b"", api_key="a")[-1], messages.Done)


def test_without_keys_the_address_counts(oracle):
    with serving(oracle, streams_per_key=1) as url, open_stream(url) as first:
        assert messages.from_json(first.recv(timeout=WAIT_S)).stream_id
        assert status_of(url, "/v1/realtime")[0] == 429


def test_a_stream_that_is_too_long_is_captioned_and_closed(oracle):
    """The words that were sent in time come out, then the close says why."""
    with serving(oracle, max_stream_s=3.0, defaults=SPOKEN) as url:
        with open_stream(url, pace="file") as websocket:
            with contextlib.suppress(
                ConnectionClosed
            ):  # the server may close while this still sends
                for start in range(0, 20 * len(SPEECH), 3200):
                    offset = start % len(SPEECH)
                    websocket.send(SPEECH[offset : offset + 3200])
            events = rest(websocket)
        assert (websocket.close_code, websocket.close_reason) == (
            1008,
            "the limit of 3 s is reached",
        )
    warnings = [e.code for e in events if isinstance(e, messages.Warning)]
    assert warnings == ["stream_too_long"]
    assert isinstance(events[-1], messages.Done)
    assert 3.0 < events[-1].duration < 3.5
    assert text(events).split()[:4] == WORDS


def test_a_connection_that_only_keeps_alive_ends_too(oracle):
    with serving(oracle, max_stream_s=0.3) as url:
        with open_stream(url) as websocket:
            with contextlib.suppress(ConnectionClosed):  # a late client finds it closed
                for _ in range(4):
                    websocket.send('{"type": "keepalive"}')
                    time.sleep(0.05)
            assert isinstance(rest(websocket)[-1], messages.Done)
        assert websocket.close_code == 1008


def test_frames_above_the_rate_are_read_later(oracle):
    """50 a second: 100 at once cost the second that the first 50 do not."""
    with serving(oracle, frames_per_s=50.0, defaults=SPOKEN) as url, open_stream(url) as websocket:
        start = time.perf_counter()
        for _ in range(100):
            websocket.send(bytes(64))
        websocket.send('{"type": "end"}')
        done = rest(websocket)[-1]
        assert time.perf_counter() - start > 0.9
    assert done.duration == 100 * 32 / 16_000


def test_pace():
    now = [0.0]
    pace = Pace(10.0, lambda: now[0])
    assert max(pace.take() for _ in range(10)) < 1e-9
    assert pace.take() == pytest.approx(0.1)
    now[0] = 100.0
    assert pace.take() == 0.0


def test_a_full_server_is_not_ready(oracle):
    with serving(oracle) as url, contextlib.ExitStack() as stack:
        assert get(url, "/readyz")[0] == 200
        for _ in range(3):
            stack.enter_context(open_stream(url)).recv(timeout=WAIT_S)
        assert get(url, "/readyz") == (
            503,
            {"ready": False, "model": "tiny", "slots": 3, "slots_free": 0},
        )
        assert get(url, "/healthz")[0] == 200


def value(page: str, name: str) -> float:
    return float(re.search(rf"^{re.escape(name)} ([\d.e+-]+)$", page, re.MULTILINE)[1])


def test_metrics_count_what_happened(oracle):
    before = oracle.metrics()
    with serving(oracle, api_key="k", defaults=SPOKEN) as url:
        run(url, SPEECH, api_key="k")
        with open_stream(url, api_key="k", sample_rate=7) as bad:
            rest(bad)
        status_of(url, "/v1/stream")
        assert fetch(url, "/metrics")[0] == 401
        status, page = fetch(url, "/metrics", "k")
    assert status == 200
    assert value(page, "sparqle_slots") == 3
    assert value(page, "sparqle_streams_open") == 0
    assert value(page, "sparqle_streams_opened_total") == before.streams_opened + 1
    seconds = value(page, "sparqle_audio_seconds_total") - before.audio_seconds
    assert seconds == pytest.approx(len(SPEECH) / 32_000)
    assert value(page, 'sparqle_connections_total{dialect="/v1/stream"}') == 2
    assert value(page, 'sparqle_refusals_total{reason="unauthorized"}') == 1
    assert value(page, 'sparqle_closes_total{code="1000"}') == 1
    assert value(page, 'sparqle_closes_total{code="1008"}') == 1
    assert value(page, "sparqle_word_delay_seconds_count") == len(WORDS)
    assert value(page, 'sparqle_step_seconds_bucket{le="+Inf"}') == oracle.metrics().steps
    assert value(page, "sparqle_lag_seconds_count") >= 5
    assert value(page, "sparqle_backlog_seconds") == 0


def test_the_model_is_listed(oracle):
    with serving(oracle) as url:
        assert json.loads(fetch(url, "/v1/models")[1])["data"][0]["id"] == "tiny"


def test_a_log_of_json_lines_without_a_word_of_what_was_said(oracle, caplog):
    caplog.set_level(logging.INFO, "sparqle_stream")
    with serving(oracle, api_key="s3cret", defaults=SPOKEN) as url:
        events = run(url, SPEECH, api_key="s3cret", prompt="bimo")
        with open_stream(url, api_key="s3cret") as websocket:
            websocket.send('{"type": "bimo"}')
            rest(websocket)
    lines = [json.loads(logs.JsonFormatter().format(record)) for record in caplog.records]
    ends = [line for line in lines if line["message"].startswith("connection ended")]
    assert ends[0]["stream"] == events[0].stream_id
    assert (ends[0]["dialect"], ends[0]["code"]) == ("/v1/stream", 1000)
    assert ends[0]["audio_s"] == pytest.approx(len(SPEECH) / 32_000, abs=1e-3)
    assert ends[0]["time"].endswith("+00:00")
    everything = json.dumps(lines)
    for word in [*WORDS, "bimo", "s3cret"]:
        assert word not in everything


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    if shutil.which("openssl") is None:
        pytest.skip("no openssl to make a certificate with")
    folder = tmp_path_factory.mktemp("tls")
    names = [str(folder / "cert.pem"), str(folder / "key.pem")]
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"]
    command += ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run([*command, "-out", names[0], "-keyout", names[1]], check=True, stderr=-3)
    return names


def test_tls(oracle, certificate):
    cert, key = certificate
    with serving(oracle, tls_cert=cert, tls_key=key, defaults=SPOKEN) as url:
        assert url.startswith("wss://127.0.0.1:")
        context = ssl.create_default_context(cafile=cert)
        with connect(f"{url}/v1/stream", ssl=context, proxy=None) as websocket:
            websocket.send(SPEECH)
            websocket.send('{"type": "end"}')
            heard = [json.loads(frame) for frame in frames(websocket)]
    assert "".join(e["text"] for e in heard if e["type"] == "final") == " ".join(WORDS)


def test_tls_files_that_are_none(oracle, tmp_path):
    (tmp_path / "x.pem").write_text("nothing")
    name = str(tmp_path / "x.pem")
    with pytest.raises(ConfigError, match="cannot be used"):
        server.serve(oracle, server.ServerConfig(port=0, tls_cert=name, tls_key=name))
    with pytest.raises(ConfigError, match="two files"):
        server.ServerConfig(tls_cert=name)


def test_settings_that_cannot_work():
    nan = float("nan")
    for bad in (
        *({"max_stream_s": 0}, {"streams_per_key": -1}, {"frames_per_s": 0}),
        *({"idle_s": nan}, {"drain_s": nan}, {"frames_per_s": nan}),
        *({"wyoming_port": 70_000}, {"port": -1}),
    ):
        with pytest.raises(ConfigError):
            server.ServerConfig(**bad)
    with pytest.raises(ConfigError, match="Wyoming has no keys"):
        server.ServerConfig(host="0.0.0.0", api_key="k", wyoming_port=10300)


def test_keys_in_a_file(tmp_path):
    file = tmp_path / "keys"
    file.write_text("# customers\n\nanna-key\n  berta-key  \n")
    assert server.keys_of(str(file)) == ("anna-key", "berta-key")
    assert server.keys_of("") == ()
    file.write_text("# nobody\n")
    with pytest.raises(ConfigError, match="no key"):
        server.keys_of(str(file))
    with pytest.raises(ConfigError, match="cannot be read"):
        server.keys_of(str(tmp_path / "none"))


@pytest.mark.slow
def test_the_command_logs_json_and_says_where_the_page_is():
    """A process: the log's set-up belongs to it alone."""
    command = [sys.executable, "-m", "sparqle_stream.cli", "serve", "--model", "random:tiny"]
    command += ["--port", "0", "--log", "json", "--vad", "off", "--drain-s", "0"]
    paths = os.pathsep.join(str(REPO / folder) for folder in (".", "kernels"))
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": paths},
    ) as process:
        try:
            url = re.search(r"ws://\S+", process.stdout.readline())[0]
            run(url, SPEECH)
            process.send_signal(signal.SIGTERM)
            _, err = process.communicate(timeout=WAIT_S)
        finally:
            process.kill()
    page, *lines = err.splitlines()
    assert page == f"page: {url.replace('ws', 'http', 1)}/"
    records = [json.loads(line) for line in lines]
    assert process.returncode == 0
    assert "/v1/stream" in {record.get("dialect") for record in records}
    assert {record["level"] for record in records} == {"info"}


@pytest.mark.parametrize(
    ("origin", "host", "settings", "is_allowed"),
    [
        ("http://localhost:8765", "localhost:8765", {}, True),
        ("http://127.0.0.1:1", "127.0.0.1:2", {}, False),
        ("http://evil.example:8765", "evil.example:8765", {}, False),
        ("http://evil.example:8765", "evil.example:8765", {"api_key": "k"}, True),
        ("https://host.example", "host.example", {"host": "0.0.0.0", "insecure": True}, True),
        (
            "https://host.example",
            "host.example",
            {"allow_origins": ("https://host.example",)},
            True,
        ),
        ("http://[", "[", {}, False),
    ],
)
def test_a_name_that_leads_here_is_not_yet_a_friend(origin, host, settings, is_allowed):
    """DNS rebinding: a page of somebody's domain whose address is suddenly this machine's."""
    assert request._is_allowed(origin, host, server.ServerConfig(**settings)) is is_allowed


def test_a_server_whose_steps_all_fail_wants_to_be_restarted(monkeypatch):
    """An orchestrator cannot tell it from a healthy one otherwise: it answers, and is idle."""
    with testing.oracle_engine(EngineConfig(n_slots=3)) as engine, serving(engine) as url:
        run_batch = engine.workers[0].batch.run

        def broken(_):
            raise RuntimeError("device lost")

        monkeypatch.setattr(engine.workers[0].batch, "run", broken)
        for _ in range(hub.FAILING_STEPS):
            assert get(url, "/healthz")[0] == get(url, "/readyz")[0] == 200
            error = run(url, SPEECH, vad="off")[-1]
            assert (error.code, error.message) == (
                "internal",
                "a step of 1 streams failed: RuntimeError: device lost",
            )
        assert get(url, "/healthz")[0] == get(url, "/readyz")[0] == 503
        assert get(url, "/healthz")[1]["status"] == "failing"
        page = fetch(url, "/metrics")[1]
        assert value(page, "sparqle_steps_failed_total") == hub.FAILING_STEPS
        monkeypatch.setattr(
            engine.workers[0].batch, "run", run_batch
        )  # it came back: nobody was locked out
        assert isinstance(run(url, SPEECH, vad="off")[-1], messages.Done)
        assert get(url, "/healthz")[0] == get(url, "/readyz")[0] == 200


def test_a_drain_may_take_as_long_as_it_takes(oracle):
    """--drain-s inf was an OverflowError, and nobody was waited for."""
    cfg = server.ServerConfig(port=0, drain_s=float("inf"))

    stream = Mock(lag_s=0.0)

    async def drain() -> None:
        house = hub.Hub(oracle, cfg)
        house.connections.add(stream)
        asyncio.get_running_loop().call_later(0.1, house.connections.discard, stream)
        await asyncio.wait_for(house.drain(lambda: False), WAIT_S)

    asyncio.run(drain())
    assert stream.notify.call_count == 1
    assert stream.stop.call_count == 0
