"""model.py and export.py: a folder of graphs is complete, checked, and runs without torch."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import psutil
import pytest

from sparqle_stream import models, testing
from sparqle_stream.errors import ModelError
from sparqle_stream.onnx_cpu import calibrate
from sparqle_stream.onnx_cpu import model as onnx_model
from sparqle_stream.onnx_cpu.graph import FLOAT, Graph
from sparqle_stream.onnx_cpu.settings import INDEX


@pytest.fixture
def folder(exported, tmp_path):
    """A copy to spoil."""
    shutil.copytree(exported(), tmp_path / "tiny")
    return tmp_path / "tiny"


def test_a_folder_of_another_format_is_refused(folder):
    index = json.loads((folder / INDEX).read_text())
    (folder / INDEX).write_text(json.dumps(index | {"format": 0}))
    with pytest.raises(ModelError, match="format 0"):
        onnx_model.load(folder)


@pytest.mark.parametrize("name", ["ear.onnx", "llm.data", "tokens.npy"])
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(ModelError, match=name):
        onnx_model.load(folder)


def test_a_damaged_file_is_named(folder):
    (folder / "stop.npy").write_bytes(b"\x93NUMPY")
    with pytest.raises(ModelError, match=r"stop\.npy"):
        onnx_model.load(folder, testing.ByteTokenizer())


@pytest.mark.parametrize("field", ["name", "weights_hash", "bos_id", "config"])
def test_a_field_that_is_missing_is_named(folder, field):
    index = json.loads((folder / INDEX).read_text())
    (folder / INDEX).write_text(json.dumps({k: v for k, v in index.items() if k != field}))
    with pytest.raises(ModelError, match=f"does not say {field}"):
        onnx_model.load(folder)


def test_a_prefix_without_its_normaliser_is_found_at_once(folder):
    """Not in the middle of the first step that judges, which ends every stream."""
    (folder / "text.npz").write_bytes(b"")
    with pytest.raises(ModelError, match=r"plain\.onnx"):
        onnx_model.load(folder)


def test_a_model_with_short_slots_can_be_exported(tiny):
    """The clip that tells how large K and V get is longer than they are."""
    short = replace(tiny.cfg, llm=replace(tiny.cfg.llm, n_slot=160))
    scales = calibrate.slot_scales(replace(tiny, cfg=short))
    assert all((of > 0).all() for of in scales.values())


def test_nothing_is_left_of_a_failed_export(tmp_path, tiny, monkeypatch):
    from sparqle_stream.onnx_cpu import export

    monkeypatch.setattr(export.graphs, "vocabulary", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export.export(tiny, tmp_path / "out", "float32")
    assert not list(tmp_path.iterdir())


def test_graphs_run_without_torch(exported):
    """As a program of its own, which says what it imported."""
    code = f"""
import sys
import numpy as np
from sparqle_stream.config import EngineConfig, StreamOptions, VadConfig
from sparqle_stream.engine import Engine
from sparqle_stream.onnx_cpu import model
from sparqle_stream.tokenizer import TextTokenizer
from pathlib import Path

class Bytes:
    bos_id = 1
    def encode(self, text): return [2 + b for b in text.encode()]
    def decode(self, ids): return bytes(max(0, i - 2) % 256 for i in ids).decode(errors="replace")

loaded = model.load(Path({str(exported("int8"))!r}), tokenizer=Bytes())
noise = np.random.default_rng(0).standard_normal(32000).astype(np.float32) * 0.1
with Engine(loaded, EngineConfig(n_slots=2)) as engine:
    events = engine.transcribe(noise, StreamOptions(vad=VadConfig(kind="off")))
print(type(events[-1]).__name__, [m for m in ("torch", "transformers", "onnx") if m in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "Done []", done.stderr


def test_a_folder_of_graphs_is_a_model(exported, monkeypatch):
    seen = []
    monkeypatch.setattr(onnx_model, "load", seen.append)
    models.load(exported())
    assert seen == [exported()]


def test_sessions_share_the_memory_of_their_results(tmp_path):
    """Each would keep 32 MB for good after its first call."""
    sessions = []
    for name in ("first", "second", "third"):
        graph = Graph(name)
        wide = graph.add("Expand", graph.input("x", FLOAT, ["N"]), graph.const([4_000_000]))
        graph.output("y", graph.add("ReduceSum", graph.add("Exp", wide), keepdims=0), [])
        graph.save(tmp_path)
        sessions.append(onnx_model.open_session(tmp_path / f"{name}.onnx"))
    resident = []
    for session in sessions:
        session.run(None, {"x": np.ones(1, np.float32)})
        resident.append(psutil.Process().memory_info().rss)
    assert resident[2] - resident[0] < 16e6
