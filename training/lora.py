"""Low-rank adapters (Hu et al., 2021) on the LLM's linear layers: trained here, merged at load."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from sparqle_stream.llm import Llm

LORA_SCALE = 2.0  # stored beside the weights by export
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class LoraLinear(nn.Module):
    """y = W x + scale * B A x, W frozen. A (r, in) starts random, B (out, r) at zero."""

    def __init__(self, base: nn.Linear, rank: int, scale: float) -> None:
        super().__init__()
        self.base, self.scale = base, scale
        self.a = nn.Parameter(torch.randn(rank, base.in_features) / base.in_features**0.5)
        self.b = nn.Parameter(torch.zeros(base.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        whole = self.base(x)
        low = nn.functional.linear(x.flatten(0, -2), self.a.to(x.dtype))
        b = (self.scale * self.b).to(x.dtype)  # on the small matrix, not on the large result
        return torch.addmm(whole.flatten(0, -2), low, b.t()).view_as(whole)


def attach(llm: Llm, rank: int, scale: float = LORA_SCALE) -> dict[str, LoraLinear]:
    """Puts adapters around every target layer; returns them by 'layers.i.attn.q_proj' names."""
    adapters = {}
    for i, layer in enumerate(llm.layers):
        for part_name in ("attn", "mlp"):
            part = getattr(layer, part_name)
            for name in TARGETS:
                if hasattr(part, name):
                    adapter = LoraLinear(getattr(part, name), rank, scale)
                    setattr(part, name, adapter)
                    adapters[f"layers.{i}.{part_name}.{name}"] = adapter
    return adapters


def adapter_weights(adapters: dict[str, LoraLinear]) -> dict[str, Tensor]:
    """Names and tensors as they are stored in bridge.safetensors."""
    out = {}
    for name, adapter in adapters.items():
        out[f"lora.{name}.a"] = adapter.a.detach()
        out[f"lora.{name}.b"] = adapter.b.detach()
    return out


def load_adapters(adapters: dict[str, LoraLinear], weights: Mapping[str, Tensor]) -> None:
    """Takes what `adapter_weights` gave."""
    for name, adapter in adapters.items():
        adapter.a.data.copy_(weights[f"lora.{name}.a"])
        adapter.b.data.copy_(weights[f"lora.{name}.b"])


@contextmanager
def lent(adapters: dict[str, LoraLinear], weights: Mapping[str, Tensor]) -> Iterator[None]:
    """The adapters have other weights for a while."""
    own = {name: weight.clone() for name, weight in adapter_weights(adapters).items()}
    load_adapters(adapters, weights)
    try:
        yield
    finally:
        load_adapters(adapters, own)
