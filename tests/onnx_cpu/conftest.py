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
    """dtype -> folder of the tiny model's graphs."""
    folders = {}

    def make(dtype: str = "float32"):
        if dtype not in folders:
            folders[dtype] = tmp_path_factory.mktemp("graphs") / "tiny"
            export(testing.tiny_model(), folders[dtype], dtype)
        return folders[dtype]

    return make


@pytest.fixture
def graphs(exported):
    """The tiny model on ONNX Runtime in float32."""
    return onnx_model.load(exported(), tokenizer=ByteTokenizer())


@pytest.fixture
def int8_graphs(exported):
    """The tiny model on ONNX Runtime in int8."""
    return onnx_model.load(exported("int8"), tokenizer=ByteTokenizer())


@pytest.fixture
def torch_model(tiny):
    return replace(tiny)
