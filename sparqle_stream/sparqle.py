"""SparQLe's own checkpoints: `SparQLe_best.pt`, `SparQLe_last.pt` -> their Q-Former, offline.

The layout is BLIP-2's (LAVIS names): BERT with queries in the place of words, post-norm, attention
to the frames of a speech encoder in every second layer, then one linear map to the width of an LLM.
100 queries ask a whole utterance, so nothing of it streams: a reference, and a place to begin from.

Contract: only tensors are read (`weights_only`), and of them only what is used; names that are
missing, misshapen or not known are told, never passed over. frames (B, T, E) -> (B, N, width of the
LLM).
"""

from __future__ import annotations

import argparse
import pickle
import zipfile
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparqle_stream.errors import ModelError

if TYPE_CHECKING:
    from pathlib import Path

NORM_EPS = 1e-12  # BERT's
HEAD_WIDTH = 64  # of every BERT
HOLDERS = ("model", "state_dict")  # entries of a checkpoint that may hold the weights
# The training class defines one name and its forward calls the other: files may have either.
PROJECTORS = ("llm_proj.", "llama_proj.")
# Parts of the training that inference does without: by the beginning of their names.
TRAINING_ONLY = (
    *("speech_proj.", "text_proj.", "itm_head.", "stm_head.", "temp", "Qformer.cls."),
    *("Qformer.bert.embeddings.word_embeddings.", "Qformer.bert.embeddings.position_"),
)
TEXT_BRANCH = (".intermediate.", ".output.dense.", ".output.LayerNorm.")  # of a layer itself


@dataclass(frozen=True, slots=True)
class SparqleShape:
    """What the tensors of a checkpoint say."""

    n_queries: int
    width: int
    n_layers: int
    ffn: int
    encoder_width: int
    llm_width: int
    asking_layers: tuple[int, ...]  # those with attention to the frames


@dataclass(slots=True)
class KeyReport:
    """Which names of a checkpoint were used, and which were not."""

    used: int = 0
    missing: list[str] = field(default_factory=list)
    misshapen: list[str] = field(default_factory=list)
    training_only: Counter[str] = field(default_factory=Counter)  # by their first part
    unknown: Counter[str] = field(default_factory=Counter)  # such as the frozen encoder and LLM

    def lines(self) -> list[str]:
        """For people, one finding a line."""
        out = [f"{self.used} tensors used"]
        out += [f"missing: {name}" for name in self.missing]
        out += [f"wrong shape: {told}" for told in self.misshapen]
        out += [f"not used, of training: {k}* ({n})" for k, n in sorted(self.training_only.items())]
        out += [f"not used, not known: {k}* ({n})" for k, n in sorted(self.unknown.items())]
        return out


class _Attention(nn.Module):
    """BERT's attention with its residual and norm, under LAVIS' names."""

    def __init__(self, width: int, source_width: int) -> None:
        super().__init__()
        qkv = {"query": width, "key": source_width, "value": source_width}
        self.n_heads = width // HEAD_WIDTH
        self.add_module(
            "self", nn.ModuleDict({name: nn.Linear(w, width) for name, w in qkv.items()})
        )
        self.output = _Output(width, width)

    def forward(self, x: Tensor, source: Tensor, mask: Tensor | None) -> Tensor:
        """x (B, N, D), source (B, T, E), mask (B, 1, 1, T) bool or None -> (B, N, D)."""
        maps = self.get_submodule("self")
        q, k, v = (
            maps.get_submodule(name)(y).unflatten(2, (self.n_heads, -1)).transpose(1, 2)
            for name, y in (("query", x), ("key", source), ("value", source))
        )
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        out: Tensor = self.output(mixed.transpose(1, 2).flatten(2), x)
        return out


class _Output(nn.Module):
    """norm(dense(x) + residual)."""

    def __init__(self, width_in: int, width: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width_in, width)
        self.LayerNorm = nn.LayerNorm(width, eps=NORM_EPS)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        out: Tensor = self.LayerNorm(self.dense(x) + residual)
        return out


class _Layer(nn.Module):
    """Self-attention, attention to the frames where there is any, the queries' feed-forward."""

    def __init__(self, shape: SparqleShape, index: int) -> None:
        super().__init__()
        self.attention = _Attention(shape.width, shape.width)
        asks = index in shape.asking_layers
        self.crossattention = _Attention(shape.width, shape.encoder_width) if asks else None
        self.intermediate_query = nn.ModuleDict({"dense": nn.Linear(shape.width, shape.ffn)})
        self.output_query = _Output(shape.ffn, shape.width)

    def forward(self, x: Tensor, frames: Tensor, mask: Tensor | None) -> Tensor:
        x = self.attention(x, x, None)
        if self.crossattention is not None:
            x = self.crossattention(x, frames, mask)
        out: Tensor = self.output_query(F.gelu(self.intermediate_query["dense"](x)), x)
        return out


class SparqleBridge(nn.Module):
    """`ln_speech`, the Q-Former and the projector, under the names of the checkpoint."""

    def __init__(self, shape: SparqleShape) -> None:
        super().__init__()
        self.shape = shape
        self.query_tokens = nn.Parameter(torch.zeros(1, shape.n_queries, shape.width))
        self.ln_speech = nn.LayerNorm(shape.encoder_width)
        layers = nn.ModuleList(_Layer(shape, i) for i in range(shape.n_layers))
        norm = nn.LayerNorm(shape.width, eps=NORM_EPS)
        bert = nn.ModuleDict(
            {
                "embeddings": nn.ModuleDict({"LayerNorm": norm}),
                "encoder": nn.ModuleDict({"layer": layers}),
            }
        )
        self.Qformer = nn.ModuleDict({"bert": bert})
        self.llm_proj = nn.Linear(shape.width, shape.llm_width)

    def forward(self, frames: Tensor, n_frames: Tensor | None = None) -> Tensor:
        """frames (B, T, E), their numbers (B,) where shorter ones are padded -> (B, N, LLM's)."""
        mask = None
        if n_frames is not None:
            steps = torch.arange(frames.shape[1], device=frames.device)
            mask = (steps[None] < n_frames[:, None])[:, None, None]
        x = self.get_submodule("Qformer.bert.embeddings.LayerNorm")(self.query_tokens)
        x = x.expand(len(frames), -1, -1)
        frames = self.ln_speech(frames)
        for layer in self.get_submodule("Qformer.bert.encoder.layer").children():
            x = layer(x, frames, mask)
        out: Tensor = self.llm_proj(x)
        return out


def read(path: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint by their names without 'module.'; nothing in it is run.

    Raises ModelError for a file that cannot be read so.
    """
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # fairseq keeps its options
            raw = torch.load(
                path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
            )
    except (OSError, RuntimeError, pickle.UnpicklingError, EOFError) as err:
        first_line = str(err).strip().partition("\n")[0]
        raise ModelError(
            f"cannot read {path} as a checkpoint of tensors: {first_line}",
            hint="store its 'model' entry alone, on a machine where it may run what it holds",
        ) from err
    for holder in HOLDERS:
        if isinstance(raw, dict) and isinstance(raw.get(holder), dict):
            raw = raw[holder]
            break
    if not isinstance(raw, dict):
        raise ModelError(f"{path} holds no table of weights", hint="use a checkpoint of SparQLe")
    found = {str(k).removeprefix("module."): v for k, v in raw.items() if isinstance(v, Tensor)}
    for name in [name for name in found if name.startswith(PROJECTORS[1])]:
        found.setdefault(PROJECTORS[0] + name.removeprefix(PROJECTORS[1]), found.pop(name))
    return found


def shape_of(state: dict[str, Tensor], path: Path) -> SparqleShape:
    """Raises ModelError for a checkpoint that lacks what says how large it is."""
    layer = "Qformer.bert.encoder.layer."
    numbers = {int(name.split(".")[4]) for name in state if name.startswith(layer)}
    asking = {int(n.split(".")[4]) for n in state if n.startswith(layer) and "crossattention" in n}
    try:
        first = min(asking)
        return SparqleShape(
            n_queries=state["query_tokens"].shape[1],
            width=state["query_tokens"].shape[2],
            n_layers=max(numbers) + 1,
            ffn=len(state[f"{layer}0.intermediate_query.dense.bias"]),
            encoder_width=state[f"{layer}{first}.crossattention.self.key.weight"].shape[1],
            llm_width=len(state["llm_proj.bias"]),
            asking_layers=tuple(sorted(asking)),
        )
    except (KeyError, ValueError) as err:
        raise ModelError(
            f"{path} is no SparQLe checkpoint: it has no {str(err).strip(chr(39))}",
            hint=f"it needs query_tokens, {layer}*, ln_speech.* and llm_proj.* or llama_proj.*",
        ) from err


def load(path: Path) -> tuple[SparqleBridge, KeyReport]:
    """The bridge of a checkpoint, float32, ready to ask, and what became of every name.

    Raises ModelError, with the names, when a tensor is missing or has another shape.
    """
    state = read(path)
    bridge = SparqleBridge(shape_of(state, path))
    report = compare(bridge, state)
    if report.missing or report.misshapen:
        told = "; ".join(report.lines()[1 : 1 + len(report.missing) + len(report.misshapen)][:4])
        raise ModelError(f"{path} does not fit: {told}", hint="use a complete SparQLe checkpoint")
    own = bridge.state_dict()
    bridge.load_state_dict({name: state[name].float() for name in own})
    return bridge.eval().requires_grad_(False), report


def compare(bridge: SparqleBridge, state: dict[str, Tensor]) -> KeyReport:
    """Names of a checkpoint beside those of the bridge."""
    own, report = bridge.state_dict(), KeyReport()
    for name, value in own.items():
        if name not in state:
            report.missing.append(name)
        elif state[name].shape != value.shape:
            shapes = f"{tuple(state[name].shape)} instead of {tuple(value.shape)}"
            report.misshapen.append(f"{name} {shapes}")
        else:
            report.used += 1
    for name in state.keys() - own.keys():
        is_text = name.startswith("Qformer.bert.encoder.layer.") and any(
            name[len("Qformer.bert.encoder.layer.") :].partition(".")[2].startswith(part[1:])
            for part in TEXT_BRANCH
        )
        known = next((p for p in TRAINING_ONLY if name.startswith(p)), "")
        if is_text:
            report.training_only["Qformer.bert.encoder.layer.*.(intermediate|output)."] += 1
        elif known:
            report.training_only[known] += 1
        else:
            report.unknown[name.partition(".")[0] + "."] += 1
    return report
