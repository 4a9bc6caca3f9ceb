"""Several workers on one model: streams are spread, and each is what it is alone."""

from __future__ import annotations

import sys
import threading
import time

import numpy as np
import pytest

from sparqle_stream.batch import Batch
from sparqle_stream.config import EngineConfig, StreamOptions, VadConfig, n_cores
from sparqle_stream.engine import Engine
from sparqle_stream.errors import BusyError
from sparqle_stream.messages import Done, Error, Ready
from sparqle_stream.onnx_cpu import model as onnx_model
from sparqle_stream.session import Session
from sparqle_stream.testing import text_of
from sparqle_stream.writer import Greedy

OFF = StreamOptions(vad=VadConfig(kind="off"))


def noise(seed, n_chunks=6):
    n = n_chunks * OFF.chunk_samples
    return (0.3 * np.random.default_rng(seed).standard_normal(n)).astype(np.float32)


@pytest.fixture
def engine(graphs):
    with Engine(graphs, EngineConfig(n_slots=5, threads=2)) as engine:
        yield engine


def test_slots_are_shared_out(engine, graphs, torch_model):
    assert [len(worker.free_rows) for worker in engine.workers] == [3, 2]
    with Engine(graphs, EngineConfig(n_slots=1, threads=4)) as small:
        assert len(small.workers) == 1
    with Engine(graphs, EngineConfig(n_slots=64)) as large:
        assert len(large.workers) == min(64, n_cores())
    with Engine(torch_model, EngineConfig(n_slots=5, threads=2)) as other:
        assert [len(worker.free_rows) for worker in other.workers] == [5]


def test_streams_go_where_the_fewest_are(engine):
    streams = [engine.open(OFF) for _ in range(2)]
    assert [len(worker.streams) for worker in engine.workers] == [1, 1]
    streams += [engine.open(OFF) for _ in range(3)]
    assert [len(worker.streams) for worker in engine.workers] == [3, 2]
    with pytest.raises(BusyError, match="all 5 slots"):
        engine.open(OFF)
    assert engine.metrics().n_streams == 5
    streams[1].cancel()
    engine.open(OFF)
    assert engine.metrics().n_streams == 5


def test_a_stream_is_what_it_is_alone(engine):
    """Events and their times, with neighbours on both workers; clocks and names aside."""
    alone = [told(engine.transcribe(noise(seed), OFF)) for seed in range(5)]
    assert all(len(text_of(events)) > 5 for events in alone)
    streams = [engine.open(OFF) for _ in range(5)]
    for seed, stream in enumerate(streams):
        stream.feed(noise(seed))
        stream.finish()
    assert [told(stream.events()) for stream in streams] == alone


def told(events):
    """All that a stream says of its audio."""
    return [
        event.__class__(**{name: getattr(event, name) for name in event.__slots__ if name != "lag"})
        for event in events
        if not isinstance(event, Ready | Done)
    ]


def test_one_workers_failure_is_not_the_others(engine, monkeypatch):
    def broken(*_):
        raise ZeroDivisionError("a step's bug")

    alone = text_of(engine.transcribe(noise(1), OFF))
    monkeypatch.setattr(engine.workers[0].batch, "run", broken)
    streams = [engine.open(OFF) for _ in range(2)]
    for stream in streams:
        stream.feed(noise(1))
        stream.finish()
    failed, fine = (list(stream.events()) for stream in streams)
    assert isinstance(failed[-1], Error)
    assert text_of(fine) == alone
    assert engine.metrics().steps_failed == 1


def test_a_guess_that_fails_ends_its_own_stream(engine, monkeypatch):
    """`Writer.expect` is asked on this backend only."""
    hear = Session.hear
    alone = text_of(engine.transcribe(noise(2), OFF))

    def broken(session, log_probs):
        writer = hear(session, log_probs)
        if session.options.prompt != "bad":
            return writer
        return NoGuess(8, 1.0 - 1e-9)

    monkeypatch.setattr(Session, "hear", broken)
    streams = [engine.open(OFF), engine.open(StreamOptions(vad=OFF.vad, prompt="bad"))]
    for stream in streams:
        stream.feed(noise(2))
        stream.finish()
    fine, failed = (list(stream.events()) for stream in streams)
    assert "a guess's bug" in failed[-1].message
    assert text_of(fine) == alone


class NoGuess(Greedy):
    def expect(self):
        raise ZeroDivisionError("a guess's bug")


def test_workers_hand_over_soon(graphs, torch_model):
    """One that comes back from a graph must not wait 5 ms for another one's Python."""
    before = sys.getswitchinterval()
    try:
        sys.setswitchinterval(0.005)
        Engine(graphs, EngineConfig(n_slots=1)).close()
        Engine(torch_model, EngineConfig(n_slots=4)).close()
        assert sys.getswitchinterval() == pytest.approx(0.005)
        Engine(graphs, EngineConfig(n_slots=4, threads=2)).close()
        assert sys.getswitchinterval() <= 0.001
    finally:
        sys.setswitchinterval(before)


def test_closing_ends_the_streams_of_all_workers(engine):
    streams = [engine.open(OFF) for _ in range(4)]
    engine.close()
    assert [list(stream.events())[-1].code for stream in streams] == ["busy"] * 4


def test_closing_from_the_callbacks_of_two_workers_at_once(graphs):
    """Neither may wait for the other's thread."""
    both = threading.Barrier(2, timeout=30.0)

    def close(event):
        if isinstance(event, Done):
            both.wait()
            engine.close()

    engine = Engine(graphs, EngineConfig(n_slots=2, threads=2))
    for stream in [engine.open(OFF, close) for _ in range(2)]:
        stream.finish()
    for worker in engine.workers:
        worker._thread.join(30.0)  # what close() does elsewhere, but not forever
    assert not any(worker.is_alive for worker in engine.workers)


def test_an_engine_that_cannot_be_made_leaves_no_thread(graphs):
    made = []

    def make_slots(model, n):
        if made:
            raise MemoryError
        made.append(Batch(model, n))
        return made[0]

    before = threading.active_count()
    with pytest.raises(MemoryError):
        Engine(graphs, EngineConfig(n_slots=2, threads=2), make_slots)
    assert threading.active_count() == before


def test_workers_share_the_graph_that_comes_last(graphs, monkeypatch):
    opened, both = [], threading.Barrier(2, timeout=30.0)

    def slow(path):
        opened.append(path)
        time.sleep(0.05)
        return object()

    def ask():
        both.wait()
        got.append(graphs.session("none yet"))

    got = []
    monkeypatch.setattr(onnx_model, "open_session", slow)
    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    graphs.sessions.pop("none yet")
    assert len(opened) == 1
    assert got[0] is got[1]
