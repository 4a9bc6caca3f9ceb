"""What the engine writes to its log: one record per stream, nothing that was said."""

from __future__ import annotations

import logging

from sparqle_stream.config import EngineConfig, StreamOptions, VadConfig
from sparqle_stream.testing import oracle_engine, say


def test_one_log_record_per_stream_without_its_words(caplog):
    caplog.set_level(logging.DEBUG, logger="sparqle_stream.worker")
    with oracle_engine(EngineConfig(n_slots=1)) as engine:
        engine.transcribe(say(["secret", "words"]), StreamOptions(vad=VadConfig(kind="off")))
    assert len(caplog.records) == 1
    assert "audio 0.80 s" in caplog.text
    assert "secret" not in caplog.text
