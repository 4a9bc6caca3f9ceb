"""The tiny model as graphs, beside the torch model that they were made from."""

from __future__ import annotations

from dataclasses import replace

import pytest

from sparqle_stream import testing
from sparqle_stream.onnx_cpu import model as onnx_model
from sparqle_stream.onnx_cpu.export import export
from sparqle_stream.testing import ByteTokenizer


@pytest.fixture(scope="session")
def exported(tmp_path_factory):
    """bits -> folder of the tiny model's graphs."""
    folders = {}

    def make(bits: int = 32, **qformer: object):
        key = (bits, *sorted(qformer.items()))
        if key not in folders:
            model = testing.tiny_model()
            folders[key] = tmp_path_factory.mktemp("graphs") / "tiny"
            export(model, folders[key], bits)
        return folders[key]

    return make


@pytest.fixture
def graphs(exported):
    """The tiny model on ONNX Runtime in float32."""
    return onnx_model.load(exported(), threads=1, tokenizer=ByteTokenizer())


@pytest.fixture
def low_bit(exported):
    """bits -> the tiny model on ONNX Runtime with such an LLM."""
    return lambda bits: onnx_model.load(exported(bits), threads=1, tokenizer=ByteTokenizer())


@pytest.fixture
def torch_model(tiny):
    return replace(tiny)
