"""Tiny parts for whole runs: an ear, pieces, a pack of noise with texts, an LLM of two layers."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from sparqle_stream.config import CtcConfig, EncoderConfig, LlmConfig
from sparqle_stream.ctc import CtcHead
from sparqle_stream.encoder import Encoder
from sparqle_stream.llm import Llm
from training import bridge
from training.corpus import PackWriter
from training.text import train_pieces

TEXTS = ["so it is told", "told so", "it is so", "is it told so"]
TINY_LLM = LlmConfig(
    width=32, n_layers=2, n_heads=4, n_kv_heads=2, head_width=8, ffn=64, vocab=300, n_slot=256
)


class Letters:
    """A tokenizer: a token for every letter."""

    bos_id = 1

    def encode(self, text):
        return [10 + ord(c) % 200 for c in text]


@pytest.fixture
def tiny_llm(monkeypatch):
    """What training.bridge loads, whatever the config names."""

    def load_llm(name, dtype):
        torch.manual_seed(7)
        return Llm(TINY_LLM).to(dtype).requires_grad_(False), Letters()

    monkeypatch.setattr(bridge, "load_llm", load_llm)
    return load_llm


@pytest.fixture
def files(tmp_path):
    """Paths of `ear`, `pieces` and `pack`."""
    torch.manual_seed(0)
    pieces = train_pieces(TEXTS, 30, tmp_path / "pieces.json")
    encoder = Encoder(EncoderConfig(width=64, n_heads=1, n_layers=1))
    head = CtcHead(CtcConfig(64, 16, pieces.size))
    weights = {f"encoder.{k}": v for k, v in encoder.state_dict().items()}
    weights |= {f"ctc.{k}": v for k, v in head.state_dict().items()}
    save_file(weights, tmp_path / "ear.safetensors")
    rng = np.random.default_rng(0)
    with PackWriter(tmp_path / "pack") as writer:
        for i, text in enumerate(TEXTS):
            pcm = rng.integers(-3000, 3000, 12_000, dtype=np.int16)
            writer.add(pcm, id=str(i), text=text, speaker="s", corpus="c", licence="l")
    return SimpleNamespace(
        ear=str(tmp_path / "ear.safetensors"),
        pieces=str(tmp_path / "pieces.json"),
        pack=str(tmp_path / "pack"),
    )
