"""Ray Serve: two replicas, one of them killed; options; what its proxies do not do for a server."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

pytest.importorskip("ray.serve", reason="no ray here; pip install 'sparqle-stream[ray]'")

REPO = Path(__file__).parents[2]
WAIT_S = 240.0


def test_options_of_serve_and_of_the_scale():
    from deploy import ray_serve

    given = {"slots": "8", "chunk_ms": "160", "insecure": "true", "max_replicas": "3"}
    args, scale = ray_serve.parse(given | {"slots_in_use": "0.5"})
    assert (args.slots, args.chunk_ms, args.insecure) == (8, 160, True)
    assert scale == ray_serve.Scale(max_replicas=3, slots_in_use=0.5)
    assert ray_serve.server_config(args).defaults.chunk_ms == 160


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"max_replica": "3"}, "did you mean max_replicas"),
        ({"port": "8000"}, "unknown option 'port'"),
        ({"num_cpus": "two"}, "num_cpus='two' is no number"),
        ({"min_replicas": "3", "max_replicas": "2"}, "do not fit"),
        ({"slots_in_use": "1.5"}, "slots_in_use"),
        ({"slots": "0"}, "above 0"),
        ({"insecure": "yes"}, "neither true nor false"),  # it meant false, without a word
        ({}, "without a key"),
    ],
)
def test_options_that_cannot_be(options, said):
    from deploy import ray_serve
    from sparqle_stream.errors import ConfigError

    with pytest.raises(ConfigError) as refused:
        ray_serve.app(options)
    assert said in f"{refused.value.message} {refused.value.hint}"


def converse(frames: list[dict], app, max_bytes: int = 100) -> list[dict]:
    """What an application sends over a wire whose proxy has `frames`, and then nothing."""
    from deploy.ray_serve import Wire

    sent: list[dict] = []
    waiting = iter(frames)

    async def receive():
        frame = next(waiting, None)
        return frame if frame is not None else await asyncio.Event().wait()

    async def send(message):
        sent.append(message)

    asyncio.run(Wire(receive, send, max_bytes).run(app, {"type": "websocket"}))
    return sent


def audio(n: int) -> dict:
    return {"type": "websocket.receive", "bytes": bytes(n)}


def test_a_client_that_is_too_far_ahead_is_closed():
    """Ray's proxy would keep whatever comes, without a bound."""
    seen: list[dict] = []

    async def app(scope, receive, send):
        await asyncio.sleep(0.05)
        seen.append(await receive())
        await send({"type": "websocket.send", "text": "too late"})

    sent = converse([audio(40)] * 3, app)
    assert [m["type"] for m in seen] == ["websocket.disconnect"]
    assert [(m["type"], m.get("code")) for m in sent] == [("websocket.close", 1013)]


def test_the_end_is_seen_before_what_came_before_it_is_read():
    """A slot must be free at once, whatever waits in front of the hang-up."""
    from sparqle_stream.server.transport import IS_GONE

    seen: list[str] = []

    async def app(scope, receive, send):
        assert not scope["extensions"][IS_GONE]()
        await asyncio.sleep(0.05)
        assert scope["extensions"][IS_GONE]()
        while not seen or seen[-1] != "websocket.disconnect":
            seen.append((await receive())["type"])

    gone = {"type": "websocket.disconnect", "code": 1006}
    assert converse([audio(40), audio(40), gone], app) == []
    assert seen == ["websocket.receive"] * 2 + ["websocket.disconnect"]


def test_a_proxy_that_dies():
    from deploy.ray_serve import Wire

    seen: list[str] = []

    async def app(scope, receive, send):
        seen.append((await receive())["type"])

    async def receive():
        raise RuntimeError("actor died")

    with pytest.raises(RuntimeError, match="actor died"):
        asyncio.run(Wire(receive, receive).run(app, {"type": "websocket"}))
    assert seen == ["websocket.disconnect"]


def test_a_connection_that_is_cut():
    from sparqle_stream.server.transport import ABORT

    async def app(scope, receive, send):
        scope["extensions"][ABORT]()
        assert (await receive())["type"] == "websocket.disconnect"

    assert converse([audio(40)], app) == []


class Cluster:
    """The process of cluster.py."""

    def __init__(self) -> None:
        paths = os.pathsep.join([str(REPO), str(REPO / "kernels"), str(Path(__file__).parent)])
        env = os.environ | {
            "PYTHONPATH": paths,
            "PYTHONWARNINGS": "ignore",
            "RAY_USAGE_STATS_ENABLED": "0",
            # A machine that is busy with something else starts its parts late.
            "RAY_agent_register_timeout_ms": "240000",
            "RAY_worker_register_timeout_seconds": "240",
            "RAY_gcs_server_request_timeout_seconds": "240",
            "RAY_health_check_timeout_ms": "60000",
            "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
            "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "60",
            "OMP_NUM_THREADS": "1",
        }
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("cluster.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=env,
            cwd=REPO,
        )
        self.url = self._line("ready ").split()[1]

    def _line(self, start: str) -> str:
        for line in self._process.stdout:
            if line.startswith(start):
                return line
        raise AssertionError("the cluster ended")

    def replicas(self) -> list[dict[str, int]]:
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return json.loads(self._line("["))

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait(WAIT_S)
        self._process.stdout.close()


@pytest.fixture(scope="module")
def cluster():
    started = Cluster()
    yield started
    started.close()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_killed_replica(cluster):
    """kill -9 in the middle of a stream: the other replica goes on with it, no word is lost."""
    from sparqle_stream import client, messages, testing

    said = testing.vocabulary(80)[20:]
    pcm = testing.say(said)
    has_heard = threading.Event()
    killed: list[int] = []

    def microphone():
        middle = len(pcm) // 2
        yield pcm[:middle]
        assert has_heard.wait(WAIT_S)
        states = cluster.replicas()
        assert len(states) == 2
        (busy,) = [s["pid"] for s in states if s["streams"]]
        os.kill(busy, signal.SIGKILL)
        killed.append(busy)
        yield pcm[middle:]

    events = []
    for event in client.stream_sync(cluster.url, microphone(), resume_s=WAIT_S):
        events.append(event)
        if isinstance(event, messages.Final) and len(testing.words_of(events)) > 10:
            has_heard.set()
    assert len(killed) == 1
    assert testing.text_of(events) == " ".join(said)
    ends = [w.end for w in testing.words_of(events)]
    assert ends == sorted(ends)
    codes = [e.code for e in events if isinstance(e, messages.Warning)]
    assert codes.count("reconnected") >= 1
    assert events[-1].duration == pytest.approx(len(pcm) / 16_000)
