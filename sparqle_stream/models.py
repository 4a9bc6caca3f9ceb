"""Models: where weights come from, how they are checked, how they become a `SparqleModel`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from sparqle_stream import weights
from sparqle_stream.errors import ModelError
from sparqle_stream.llm import Llm

if TYPE_CHECKING:
    from sparqle_stream.weights import TextTokenizer


def load_llm(
    path_or_name: str | Path, dtype: torch.dtype = torch.float32
) -> tuple[Llm, TextTokenizer]:
    """An LLM and its tokenizer; the stop head is still untrained (zeros)."""
    path = Path(path_or_name)
    if not path.exists():
        raise ModelError(f"no model at {path}", hint="run: sparqle-stream models pull")
    gguf = weights.GgufFile(path)
    with torch.device("meta"):
        llm = Llm(gguf.config())
    llm.to_empty(device="cpu")
    weights.load_into(llm, gguf.state_dict(), optional=("stop.",))
    torch.nn.init.zeros_(llm.stop.weight)
    torch.nn.init.zeros_(llm.stop.bias)
    return llm.to(dtype).requires_grad_(False), gguf.tokenizer()
