"""Where Triton kernels run in the tests: in its interpreter on a CPU, or on a GPU where one is."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest
import torch
from packaging.version import Version

if TYPE_CHECKING:
    from torch import Tensor

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:  # Triton reads it when it is imported first: before any test
    os.environ["TRITON_INTERPRET"] = "1"


def _why_no_interpreter() -> str:
    """'' where Triton's interpreter can run these kernels."""
    if HAS_GPU:
        return "a GPU is here: the same tests run on it"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: pip install 'triton>=3.6'"
    import triton

    # It makes loop bounds of arrays of one element: NumPy warns of it, and from 2.4 on refuses it.
    if Version(triton.__version__) < Version("3.9"):
        return (
            f"the interpreter of Triton {triton.__version__} does not get on with NumPy; 3.9 does"
        )
    return ""


@dataclass(frozen=True)
class Place:
    """`device` of the tensors; bfloat16 is tested on a GPU only, the interpreter refuses it."""

    device: str

    def put(self, *tensors: Tensor | None) -> list[Tensor | None]:
        return [None if x is None else x.to(self.device) for x in tensors]

    def wants(self, dtype: torch.dtype) -> None:
        if self.device == "cpu" and dtype == torch.bfloat16:
            pytest.skip("bfloat16: the interpreter has none (it refuses, which is tested)")


@pytest.fixture(params=["interpreter", pytest.param("gpu", marks=pytest.mark.gpu)])
def place(request, poisoned) -> Place:
    """Every test that asks for it runs in the interpreter and on a GPU, with memory poisoned."""
    if request.param == "interpreter" and (reason := _why_no_interpreter()):
        pytest.skip(reason)
    return Place("cpu" if request.param == "interpreter" else "cuda")
