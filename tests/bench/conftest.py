"""Recordings in a language whose captions are known: what `testing.say` spells, as files."""

from __future__ import annotations

import json
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import pytest
from bench_wav import write_wav

from sparqle_stream import testing
from sparqle_stream.config import SAMPLE_RATE_HZ
from sparqle_stream.engine import Engine
from training.manifests import MANIFEST

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    MakeFolder = Callable[[str, list[dict[str, str]]], Path]


@pytest.fixture
def make_folder(tmp_path) -> MakeFolder:
    """A folder of recordings: each entry `said` becomes sound, the others go to the manifest."""

    def make(name: str, entries: list[dict[str, str]]) -> Path:
        folder = tmp_path / name
        lines = []
        for i, entry in enumerate(entries):
            said = entry.pop("said")
            pcm = testing.say(said.split()) if said else np.zeros(SAMPLE_RATE_HZ, np.float32)
            write_wav(folder / f"audio/{i}.wav", pcm)
            lines.append(json.dumps({"id": f"r{i}", "audio": f"audio/{i}.wav"} | entry))
        (folder / MANIFEST).write_text("\n".join(lines) + "\n")
        return folder

    return make


def use_slots(monkeypatch, slots: type[testing.OracleBatch]) -> None:
    """Every engine that is made from now on has these slots."""
    monkeypatch.setattr("sparqle_stream.engine.Engine", partial(Engine, make_slots=slots))
    monkeypatch.setattr("bench.players.Batch", slots)


@pytest.fixture
def oracle(monkeypatch):
    """The model to load while every engine writes exactly what was spelled."""
    use_slots(monkeypatch, testing.OracleBatch)
    return testing.oracle_model()


@pytest.fixture
def idle(monkeypatch):
    """A machine that nobody else uses."""
    monkeypatch.setattr("bench.machine.busy_share", lambda: 0.0)
    monkeypatch.setattr("bench.machine.Watch.others", lambda self: 0.0)
