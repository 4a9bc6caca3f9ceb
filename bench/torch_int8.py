"""Torch's own ways to 8 bits: the candidates beside which `bench.passes` shows what is kept.

In: a torch model in float32 on the CPU. All matrices of its encoder, CTC head and LLM layers become
int8 in place; the Q-Former stays as it is, since it folds keys into queries by hand. What rounds
their input, and computes the products, is the way's:

- fbgemm, onednn: `torch.ao.quantization.quantize_dynamic`, a scale for every output, and one for
  all rows of input together. What a row gets depends on its neighbours, which the streaming
  contract forbids: they are here for their speed.
- torchao: `Int8DynamicActivationInt8WeightConfig`, a scale for every output and every row.
"""

from __future__ import annotations

import importlib.util
import warnings
from functools import partial
from typing import TYPE_CHECKING

import torch

from sparqle_stream.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

    from sparqle_stream.torch_model import SparqleModel


def _dynamic(module: torch.nn.Module, *, engine: str) -> None:
    from torch.ao.quantization import per_channel_dynamic_qconfig, quantize_dynamic

    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = engine  # of the packed weights, which know it from then on
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it is about to go
            of = {torch.nn.Linear: per_channel_dynamic_qconfig}
            quantize_dynamic(  # type: ignore[no-untyped-call]
                module, of, dtype=torch.qint8, inplace=True
            )
    finally:
        torch.backends.quantized.engine = before


def _torchao(module: torch.nn.Module) -> None:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    quantize_(module, Int8DynamicActivationInt8WeightConfig())


_WAYS: dict[str, Callable[[torch.nn.Module], None]] = {
    "fbgemm": partial(_dynamic, engine="fbgemm"),
    "onednn": partial(_dynamic, engine="onednn"),
    "torchao": _torchao,
}


def ways() -> list[str]:
    """Those that this torch has, and torchao where it is installed."""
    engines = set(torch.backends.quantized.supported_engines)
    is_there = importlib.util.find_spec("torchao") is not None
    return [name for name in _WAYS if name in engines or (name == "torchao" and is_there)]


def convert(model: SparqleModel, way: str) -> None:
    """Changes the model's matrices in place. Raises ConfigError for a way that is not there."""
    if way not in ways():
        raise ConfigError(f"no {way} here", hint=f"pip install torchao, or use {ways()}")
    for module in (model.encoder, model.ctc, model.llm.layers):
        _WAYS[way](module)
