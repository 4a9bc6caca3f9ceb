"""Which implementation runs: every reason once, and none that the machine of the test decides."""

from __future__ import annotations

from importlib import metadata

import pytest
import torch

from sparqle_kernels import choice
from sparqle_kernels.choice import choose, on_device


@pytest.fixture
def installed(monkeypatch):
    """Says which version of Triton is installed, None for none."""

    def pretend(version: str | None) -> None:
        def look_up(name: str) -> str:
            if name == "triton" and version:
                return version
            raise metadata.PackageNotFoundError(name)

        monkeypatch.setattr(metadata, "version", look_up)

    on_device.cache_clear()
    yield pretend
    on_device.cache_clear()


class OnCuda(torch.Tensor):
    """A tensor that says that it lies on a GPU."""

    device = torch.device("cuda")


def cuda(dtype=torch.float16, **kwargs):
    return torch.zeros(1, dtype=dtype, **kwargs).as_subclass(OnCuda)


def test_a_cpu_gets_what_is_fast_there(installed):
    installed("3.9.0")
    assert choose("decode_attention", torch.zeros(1)).implementation == "cpu"
    assert choose("chunk_attention", torch.zeros(1)).implementation == "reference"


def test_cuda_gets_triton_where_it_is(installed):
    installed("3.9.0")
    chosen = choose("chunk_attention", cuda(), cuda(torch.float16))
    assert chosen == choice.Choice("triton", "CUDA and Triton 3.9.0 are here")


def test_without_triton_the_reason_is_how_to_get_it(installed):
    installed(None)
    chosen = choose("decode_attention", cuda())
    assert chosen.implementation == "reference"
    assert "pip install 'sparqle-stream[gpu]'" in chosen.reason


def test_other_devices_have_no_kernels(installed):
    installed("3.9.0")
    assert on_device("chunk_attention", "mps") == choice.Choice("reference", "no kernel for mps")


@pytest.mark.parametrize("dtypes", [(torch.float64,), (torch.float16, torch.float32)], ids=str)
def test_types_without_a_kernel_go_to_the_reference(installed, dtypes):
    installed("3.9.0")
    chosen = choose("chunk_attention", *map(cuda, dtypes))
    assert chosen.implementation == "reference"
    assert all(str(dtype) in chosen.reason for dtype in dtypes)


def test_gradients_go_to_the_reference(installed):
    installed("3.9.0")
    x = cuda().requires_grad_()
    assert choose("query_attention", x).reason == "gradients are wanted"
    with torch.no_grad():
        assert choose("query_attention", x).implementation == "triton"
