"""Ray Serve: two replicas, one of them killed; options; what its proxies do not do for a server."""

from __future__ import annotations

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


class Cluster:
    """The process of cluster.py."""

    def __init__(self) -> None:
        paths = os.pathsep.join([str(REPO), str(REPO / "kernels"), str(Path(__file__).parent)])
        env = os.environ | {
            "PYTHONPATH": paths,
            "PYTHONWARNINGS": "ignore",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_DEDUP_LOGS": "0",
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
