"""Targets: what becomes of one stream whose connection, answers or audio fail."""

from __future__ import annotations

import asyncio
import contextlib
import threading

import pytest

from bench import load, machine
from bench.dialects import DIALECTS
from bench.reel import Reel
from bench.socket_target import SocketTarget
from bench.targets import End, EngineTarget, StreamTarget
from sparqle_stream import messages, testing
from sparqle_stream.config import EngineConfig, StreamOptions, VadConfig


@pytest.fixture
def reel():
    return Reel([testing.say(["good", "day", "to", "you"])], pause_s=0.0, seed=0)


def play(target, reel):
    (outcome,) = load.play(
        target, reel, [load.Booking(0.0, 0.5)], 20, 0, machine.Process()
    ).outcomes
    return outcome


@pytest.fixture
def hasty():
    """A server that loses every connection once it has got some audio, and says how many it had."""
    from websockets.exceptions import ConnectionClosed
    from websockets.sync.server import serve

    n_connections = []

    def lose(socket):
        n_connections.append(1)
        socket.send(messages.to_json(messages.Ready("x", "tiny", 16_000, 320, 240)))
        with contextlib.suppress(ConnectionClosed):
            socket.recv()
            socket.recv()
            socket.close(1012, "restarting")

    with serve(lose, "127.0.0.1", 0) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"ws://127.0.0.1:{server.socket.getsockname()[1]}", n_connections
        server.shutdown()
        thread.join()


def test_a_connection_that_is_lost_is_a_stream_that_was_dropped(hasty, reel):
    """Nobody connects again and calls it one stream that was served."""
    url, n_connections = hasty
    got = play(StreamTarget(url), reel)
    assert got.end is End.DROPPED
    assert "restarting" in got.why
    assert len(n_connections) == 1


def test_an_answer_that_is_not_of_the_dialect_is_a_stream_that_was_dropped(hasty, reel):
    """Our Ready has no field that Deepgram's answers have; what was sent until then is known."""
    dialect = type("Strict", (DIALECTS["deepgram"],), {"take": lambda self, event, at: event["no"]})
    got = play(SocketTarget(hasty[0], dialect), reel)
    assert (got.end, got.why) == (End.DROPPED, "KeyError: 'no'")
    assert got.audio_s > 0


def test_a_stream_that_breaks_gives_its_slot_back(reel):
    class Broken(Exception):
        pass

    def packets():
        yield next(reel.packets(0, 320, 320))
        raise Broken

    options = StreamOptions(vad=VadConfig(kind="off"))
    with testing.oracle_engine(EngineConfig(n_slots=1, threads=1)) as engine:
        with pytest.raises(Broken):
            asyncio.run(EngineTarget(engine, options).play(packets(), 1.0))
        assert engine.metrics().n_streams == 0
