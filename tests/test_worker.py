"""worker.py: what its thread may see while a caller is halfway through a call."""

from __future__ import annotations

import sys
import threading
from collections import deque

import numpy as np

from sparqle_stream import messages
from sparqle_stream.config import EngineConfig, StreamOptions, VadConfig
from sparqle_stream.stream import Mark, Stream
from sparqle_stream.testing import oracle_engine, say, text_of

OFF = StreamOptions(vad=VadConfig(kind="off"))


def test_a_stream_that_ends_is_not_heard_before_its_end_is_in_its_inbox(monkeypatch):
    """Else the worker, which looks without a lock, may close it on its last words."""
    seen, put = [], Stream.put

    def watched(self, item):
        if isinstance(item, Mark):
            seen.append(self.is_all_heard)
        put(self, item)

    monkeypatch.setattr(Stream, "put", watched)
    with oracle_engine(EngineConfig(n_slots=1)) as engine:
        stream = engine.open(StreamOptions(vad=VadConfig(kind="off")))
        stream.finish()
        list(stream.events())
    assert seen == [False]


def test_a_callback_that_exits_ends_its_own_stream_only(caplog):
    """`sys.exit()` in it ended the thread of all, and whoever waited for events waited for ever."""
    with oracle_engine(EngineConfig(n_slots=2, threads=1)) as engine:
        engine.open(OFF, on_event=lambda _event: sys.exit(1))
        stream = engine.open(OFF)
        stream.feed(say(["hello"]))
        stream.finish()
        assert text_of(stream.events(timeout=30)) == "hello"
        assert engine.workers[0].is_alive
    assert "the stream is cancelled" in caplog.text


def test_whatever_ends_a_worker_its_streams_are_told(monkeypatch):
    with oracle_engine(EngineConfig(n_slots=1)) as engine:
        monkeypatch.setattr(threading, "excepthook", lambda _: None)
        monkeypatch.setattr(engine.workers[0], "_tick", lambda _: sys.exit(1))
        stream = engine.open(OFF)
        stream.feed(say(["hello"]))
        assert [type(event) for event in stream.events(timeout=30)] == [messages.Error]


def test_tiny_packets_cost_what_they_are(monkeypatch):
    """Each was followed by a look at all that waited, under the lock of all streams."""

    class Unseen(deque):
        def __iter__(self):
            raise AssertionError("the inbox was searched")

    with oracle_engine(EngineConfig(n_slots=1)) as engine:
        stream = engine.open(StreamOptions(chunk_ms=1280, vad=VadConfig(kind="webrtc")))
        stream._inbox = Unseen(stream._inbox)
        for _ in range(100):
            stream.feed(np.zeros(1, np.float32))
        stream.flush()
        stream.finish()
        kinds = [type(event) for event in stream.events(timeout=30)]
    assert kinds[-2:] == [messages.Flushed, messages.Done]
