"""Export: a torch model -> a folder of ONNX graphs that runs without torch.

    stages.json       config, name and hash of the model, precision
    features.onnx     log-mel            ear.onnx         encoder and CTC
    qformer.onnx      queries            llm.onnx         rows into slots
    vocabulary.onnx   all logits         *.data           their weights
    tokens.npy        the LLM's embeddings (V, E), float16
    head.npy          its output embeddings, where they differ
    stop.npy          stop head: (E + 1,) weights and bias
    text.npz, plain.onnx   prefix and normaliser of plain text, where the model has them
    tokenizer.json, pieces.json, words.safetensors   text

A folder appears complete or not at all: it is written beside its place and renamed. One that holds
anything else is never replaced.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sparqle_stream import features
from sparqle_stream.errors import ConfigError, ModelError
from sparqle_stream.onnx_cpu import graphs
from sparqle_stream.onnx_cpu.calibrate import slot_scales
from sparqle_stream.onnx_cpu.settings import FORMAT, INDEX
from sparqle_stream.tokenizer import TextTokenizer

if TYPE_CHECKING:
    from torch import nn

    from sparqle_stream.judge import TextPrefix
    from sparqle_stream.llm import Llm
    from sparqle_stream.onnx_cpu.graph import Floats
    from sparqle_stream.onnx_cpu.graphs import Weights
    from sparqle_stream.torch_model import SparqleModel


WRITTEN = (
    *("tokens.npy", "head.npy", "stop.npy", "text.npz"),
    *("tokenizer.json", "pieces.json", "words.safetensors", INDEX),
)


def require_place(out: Path) -> None:
    """Raises ConfigError where something else than graphs would be lost."""
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out} is a file", hint="name a folder of its own for the graphs")
    for path in out.iterdir() if out.is_dir() else ():
        if path.is_dir() or (path.suffix not in (".onnx", ".data") and path.name not in WRITTEN):
            raise ConfigError(
                f"{out} holds {path.name}, and would be replaced as a whole",
                hint="name a folder of its own for the graphs",
            )


def export(model: SparqleModel, out: Path, dtype: str, words: Path | None = None) -> None:
    """Writes `model`, whose weights are float32 and unjoined, with matrices in one of DTYPES.

    With int8 the LLM's slots are int8 too, and rings float16.
    words: the model's lexicon file, if it has one. Raises ModelError for what cannot be exported,
    ConfigError for a folder that holds something else.
    """
    require_place(out)
    if model.cfg.qformer.kind == "utterance":
        raise ModelError("a Q-Former of kind 'utterance' has no step", hint="use it offline")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".tmp-") as temporary:
        new = Path(temporary) / out.name
        new.mkdir()
        _write(model, new, dtype)
        if words is not None:
            shutil.copyfile(words, new / "words.safetensors")
        if out.exists():
            shutil.rmtree(out)
        new.rename(out)


def _write(model: SparqleModel, out: Path, dtype: str) -> None:
    cfg = model.cfg
    encoder = _arrays(model.encoder) | {"positions": _array(model.encoder.positions)}
    filters = features.mel_filters(cfg.features.n_mels, cfg.features.n_fft).numpy()
    graphs.features(cfg.features, filters).save(out)
    is_int8 = dtype == "int8"
    graphs.ear(cfg.encoder, encoder, cfg.ctc, _arrays(model.ctc), is_int8=is_int8).save(out)
    graphs.qformer(cfg.qformer, _arrays(model.qformer), is_int8=is_int8).save(out)
    scales = slot_scales(model) if is_int8 else None
    graphs.llm(cfg.llm, _joined(model.llm), scales).save(out)
    tokens = _array(model.llm.tokens.weight)
    head = tokens if model.llm.head is None else _array(model.llm.head.weight)
    graphs.vocabulary(head, is_int8=is_int8).save(out)
    if model.text is not None:
        _write_prefix(model.text, head, scales, out)
    np.save(out / "tokens.npy", tokens.astype(np.float16))
    if head is not tokens:
        np.save(out / "head.npy", head.astype(np.float16))
    stop = model.llm.stop
    np.save(out / "stop.npy", np.append(_array(stop.weight), _array(stop.bias)))
    if isinstance(model.tokenizer, TextTokenizer):
        model.tokenizer.save(out / "tokenizer.json")
    model.pieces.tokenizer.save(str(out / "pieces.json"))
    index = {
        "format": FORMAT,
        "name": model.name,
        "weights_hash": model.weights_hash,
        "dtype": dtype,
        "bos_id": model.tokenizer.bos_id,
        "config": asdict(cfg),
    }
    (out / INDEX).write_text(json.dumps(index, indent=1) + "\n")


def _write_prefix(text: TextPrefix, head: Floats, scales: Weights | None, out: Path) -> None:
    ids, bias = text.ids.numpy(), _array(text.bias)
    graphs.plain(head[ids], bias[ids], is_int8=scales is not None).save(out)
    kv: dict[str, Any] = {
        f"{x}_{i}": _array(of) for x in "kv" for i, of in enumerate(getattr(text, x))
    }
    if scales is not None:
        rounded = {name: np.rint(of / scales[name][0]) for name, of in kv.items()}
        kv = {name: np.clip(of, -127, 127).astype(np.int8) for name, of in rounded.items()}
    np.savez(out / "text.npz", bias=bias, **kv)


def _joined(llm: Llm) -> dict[str, Floats]:
    """The LLM's weights with q, k and v, and gate and up, in one matrix each."""
    weights = _arrays(llm)
    for i in range(llm.cfg.n_layers):
        attn, mlp = f"layers.{i}.attn.", f"layers.{i}.mlp."
        qkv = [weights.pop(f"{attn}{part}_proj.weight") for part in "qkv"]
        gate_up = [weights.pop(f"{mlp}{part}_proj.weight") for part in ("gate", "up")]
        weights[f"{attn}qkv_proj"] = np.concatenate(qkv)
        weights[f"{mlp}gate_up_proj"] = np.concatenate(gate_up)
    return weights


def _arrays(module: nn.Module) -> dict[str, Floats]:
    return {name: _array(value) for name, value in module.named_parameters()}


def _array(tensor: object) -> Floats:
    out: Floats = tensor.detach().float().numpy()  # type: ignore[attr-defined]
    return out
