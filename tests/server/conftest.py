"""A tiny model behind a real socket."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import numpy as np
import pytest
from server_harness import SAMPLE_RATE_HZ, serving

from sparqle_stream.config import EngineConfig

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sparqle_stream.engine import Engine


@pytest.fixture(scope="module")
def engine(tiny) -> Iterator[Engine]:
    from sparqle_stream.engine import Engine

    with Engine(tiny, EngineConfig(n_slots=8, threads=1)) as engine:
        yield engine


@pytest.fixture(scope="module")
def url(engine) -> Iterator[str]:
    """ws://127.0.0.1:PORT of a server with default settings."""
    with serving(engine) as url:
        yield url


@pytest.fixture
def no_traceback(caplog) -> Iterator[None]:
    """Whatever a client does is no bug: nothing at ERROR, nowhere a traceback."""
    caplog.set_level(logging.INFO)
    yield
    for record in caplog.get_records("call"):  # `records` are those of the teardown by now
        assert record.levelno < logging.ERROR, record.getMessage()
        assert record.exc_info is None, record.getMessage()


@pytest.fixture
def speech(clip):
    """4 s of real speech with s16 values, (S,) float32 at 16 kHz."""
    return np.round(clip[: 4 * SAMPLE_RATE_HZ] * 32_767).astype(np.float32) / 32_768
