"""Calibrate: how large the numbers in the LLM's slots get -> the steps of their 8 bits.

The bundled clip is captioned once with the torch modules: text before it, queries, and tokens after
them are what a slot holds. Every channel of K and V gets a step of its own.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from sparqle_stream import audio, stages
from sparqle_stream.config import StreamOptions
from sparqle_stream.torch_stages import TorchStages
from sparqle_stream.writer import Greedy

if TYPE_CHECKING:
    from torch import Tensor

    from sparqle_stream.onnx_cpu.graph import Floats
    from sparqle_stream.torch_model import SparqleModel

CLIP = Path(__file__).parent.parent / "assets" / "demo.ogg"
TEXT = "Yes, 24 of them. In the year before, she said, nobody there had asked for anything else!"
N_TOKENS = 2  # after the queries of a chunk
# Larger than anything seen: what lies outside is clipped, and other voices and texts are larger.
MARGIN = 1.5


def slot_scales(model: SparqleModel) -> dict[str, Floats]:
    """k_i, v_i: (1, KV, 1, d), the number that a step in 8 bits stands for.

    Both channels of k that rotate together have one step: see graphs.llm.
    """
    made = TorchStages(model, 1)
    options = StreamOptions()
    ahead, pcm = model.cfg.encoder.ahead_frames(options.delay_ms), audio.read_file(CLIP)
    n_more = 2 * (options.chunk_queries + N_TOKENS)  # of a chunk; what it leaves waits
    with made.working(0):
        made.wipe(0)
        made.begin({0: stages.prefix_ids(model.tokenizer, TEXT)})
        for start in range(0, len(pcm) - options.chunk_samples, options.chunk_samples):
            chunk = {0: pcm[start : start + options.chunk_samples]}
            made.step(chunk, {0: 0}, ahead, lambda *_: Greedy(N_TOKENS))
            if made.state.llm.length[0] + n_more > model.cfg.llm.n_slot:
                break  # a model with short slots has told what it can
    state = made.state.llm
    n_rows = int(state.length[0])
    scales = {}
    for i in range(model.cfg.llm.n_layers):
        k, v = (x[i, 0, :, :n_rows].float() for x in (state.k, state.v))
        scales[f"k_{i}"], scales[f"v_{i}"] = _steps(_turned(k)), _steps(v.abs())
        if (text := model.text) is not None:  # what was trained may be larger than what is read
            for name, trained in (("k", _turned(text.k[i])), ("v", text.v[i].abs())):
                least = trained.amax(dim=1)[None, :, None].numpy() / 127.0
                scales[f"{name}_{i}"] = np.maximum(scales[f"{name}_{i}"], least)
    return scales


def _turned(k: Tensor) -> Tensor:
    """k (KV, N, d) -> how large its channels get at any position: rotation mixes pairs of them."""
    first, second = k.chunk(2, dim=-1)
    length = torch.hypot(first, second)
    return torch.cat([length, length], dim=-1)


def _steps(size: Tensor) -> Floats:
    """size (KV, N, d) -> (1, KV, 1, d)."""
    largest = size.amax(dim=1).clamp_min(1e-6)
    out: Floats = (largest * MARGIN / 127.0)[None, :, None].numpy()
    return out
