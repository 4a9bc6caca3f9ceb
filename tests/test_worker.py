"""worker.py: what its thread may see while a caller is halfway through a call."""

from __future__ import annotations

from sparqle_stream.config import EngineConfig, StreamOptions, VadConfig
from sparqle_stream.stream import Mark, Stream
from sparqle_stream.testing import oracle_engine


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
