"""bench.torch_int8: a converted model computes what it did, nearly; torch is left as it was."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bench import torch_int8
from sparqle_stream import messages, testing
from sparqle_stream.config import EngineConfig, StreamOptions, VadConfig
from sparqle_stream.engine import Engine
from sparqle_stream.errors import ConfigError


@pytest.fixture(params=["fbgemm", "onednn", "torchao"])
def way(request) -> str:
    if request.param not in torch_int8.ways():
        pytest.skip(f"no {request.param} here")
    return request.param


def test_matrices_become_int8(way):
    model, before = testing.tiny_model(), torch.backends.quantized.engine
    layer = model.llm.layers[0]
    x = torch.randn(1, 4, model.cfg.llm.width, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = layer.feed_forward(x) - x
        torch_int8.convert(model, way)
        got = layer.feed_forward(x) - x
    assert torch.backends.quantized.engine == before
    error = (got - expected).norm() / expected.norm()
    assert 0 < error < 0.1
    for part in (model.encoder, model.ctc, model.llm.layers):
        matrices = [m for m in part.modules() if type(m) is torch.nn.Linear]
        assert all(type(m.weight) is not torch.nn.Parameter for m in matrices)


def test_a_converted_model_captions(way):
    model = testing.tiny_model()
    torch_int8.convert(model, way)
    pcm = np.random.default_rng(0).standard_normal(16_000).astype(np.float32) * 0.1
    options = StreamOptions(vad=VadConfig(kind="off"))
    with Engine(model, EngineConfig(n_slots=2)) as engine:
        assert isinstance(engine.transcribe(pcm, options)[-1], messages.Done)


def test_a_way_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch_int8.importlib.util, "find_spec", lambda name: None)
    assert "torchao" not in torch_int8.ways()
    with pytest.raises(ConfigError, match="no torchao here"):
        torch_int8.convert(testing.tiny_model(), "torchao")
