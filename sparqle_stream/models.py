"""Models: names and folders -> a `SparqleModel` ready to run.

A model folder holds config.json, encoder.safetensors, bridge.safetensors (CTC head, Q-Former, stop
head, LoRA), pieces.json and, if words are to be searched for in what CTC hears, words.safetensors;
its LLM is an argument. Contract: what does not fit is a ModelError
that says which file and which tensor.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, is_dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol, get_type_hints

import torch

from sparqle_stream import artifacts, quantize, weights
from sparqle_stream.artifacts import list_models, path, pull, verify
from sparqle_stream.config import ModelConfig
from sparqle_stream.ctc import CtcHead, CtcPieces
from sparqle_stream.encoder import Encoder
from sparqle_stream.errors import ModelError, SparqleError
from sparqle_stream.lexicon import Lexicon
from sparqle_stream.llm import Llm
from sparqle_stream.qformer import QFormer

if TYPE_CHECKING:
    from pathlib import Path

    from sparqle_stream.weights import LlmFiles, TextTokenizer

__all__ = ["SparqleModel", "Tokenizer", "list_models", "load", "load_llm", "path", "pull", "verify"]

RANDOM_TINY = "random:tiny"
# Stored in config.json beside the fields of ModelConfig.
BESIDE_CONFIG: dict[str, Any] = {"lora_scale": 1.0, "sha256": {}}


class Tokenizer(Protocol):
    """What text goes through; `weights.TextTokenizer` and `testing.ByteTokenizer`."""

    bos_id: int

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: list[int]) -> str: ...


@dataclass(slots=True)
class SparqleModel:
    """Weights of all stages and what is needed to read and write text."""

    cfg: ModelConfig
    encoder: Encoder
    ctc: CtcHead
    pieces: CtcPieces
    lexicon: Lexicon | None  # None: the LLM alone decides what is written
    qformer: QFormer
    llm: Llm
    tokenizer: Tokenizer
    name: str
    weights_hash: str  # of the files of model and LLM
    device: torch.device


def load(
    name_or_path: str | Path = artifacts.DEFAULT_MODEL,
    *,
    llm: str | Path | None = None,
    dtype: str = "auto",
    device: str = "cpu",
) -> SparqleModel:
    """A model by name or folder with its LLM (by name, file or folder), ready on `device`.

    dtype: one of `quantize.DTYPES`. 'int8', what 'auto' is on a CPU, is for the LLM's matrices,
    where most of the bytes are; the other stages then compute in float32.
    """
    dtype = quantize.resolve(dtype, device)
    if str(name_or_path) == RANDOM_TINY:
        from sparqle_stream.testing import tiny_model

        return to_device(tiny_model(), dtype, device)
    folder = artifacts.model_folder(name_or_path)
    source = artifacts.llm_source(llm or artifacts.DEFAULT_LLM)
    return to_device(_read(folder, source), dtype, device)


def load_llm(
    path_or_name: str | Path = artifacts.DEFAULT_LLM, dtype: torch.dtype = torch.float32
) -> tuple[Llm, TextTokenizer]:
    """A frozen LLM and its tokenizer, as training wants them; the stop head is zero."""
    files = weights.read_llm(artifacts.llm_source(path_or_name))
    return _build(files).to(dtype), files.tokenizer


def to_device(model: SparqleModel, dtype: str, device: str) -> SparqleModel:
    """Moves the model's weights in place: dtype, device, joined or int8 matrices of the LLM."""
    rest = torch.float32 if dtype == "int8" else getattr(torch, dtype)
    for module in (model.encoder, model.ctc, model.qformer):
        module.to(device=device, dtype=rest).eval().requires_grad_(False)
    quantize.prepare(model.llm, dtype, device)
    model.device = torch.device(device)
    return model


def config_from_json(cls: type[Any], raw: dict[str, Any], source: Path) -> Any:  # noqa: ANN401
    """A (nested) config dataclass from JSON; what is unknown or impossible is a ModelError."""
    hints = get_type_hints(cls)
    known = {f.name: hints[f.name] for f in fields(cls)}
    if unknown := sorted(raw.keys() - known.keys()):
        raise ModelError(
            f"{source}: unknown {cls.__name__} field {unknown[0]!r}",
            hint="the model may need a newer sparqle-stream",
        )
    values = {
        name: config_from_json(known[name], value, source)
        if is_dataclass(known[name])
        else (tuple(value) if isinstance(value, list) else value)
        for name, value in raw.items()
    }
    try:
        return cls(**values)
    except (SparqleError, TypeError) as err:
        raise ModelError(f"{source}: {err}", hint="the model's config is damaged") from err


def _read(folder: Path, source: str | Path) -> SparqleModel:
    """All parts of a model folder, as they are stored."""
    raw = weights.read_json(folder / "config.json")
    beside = {key: raw.pop(key, default) for key, default in BESIDE_CONFIG.items()}
    cfg: ModelConfig = config_from_json(ModelConfig, raw, folder / "config.json")
    bridge = weights.read_safetensors(folder / "bridge.safetensors")
    files = weights.read_llm(source)
    if files.cfg.width != cfg.qformer.llm_width:
        raise ModelError(
            f"{cfg.name} speaks to an LLM of width {cfg.qformer.llm_width}, {source} has"
            f" {files.cfg.width}",
            hint="leave --llm out, or train a bridge for this LLM",
        )
    files.state.update(weights.part(bridge, "llm"))  # of an LLM that was updated as a whole
    weights.merge_lora(files.state, weights.part(bridge, "lora"), float(beside["lora_scale"]))
    pieces, words = CtcPieces.load(folder / "pieces.json"), folder / "words.safetensors"
    model = SparqleModel(
        cfg=replace(cfg, llm=replace(files.cfg, n_slot=cfg.llm.n_slot)),
        encoder=Encoder(cfg.encoder),
        ctc=CtcHead(cfg.ctc),
        pieces=pieces,
        lexicon=Lexicon.load(words, pieces) if words.is_file() else None,
        qformer=QFormer(cfg.qformer),
        llm=_build(files, n_slot=cfg.llm.n_slot),
        tokenizer=files.tokenizer,
        name=cfg.name,
        weights_hash=artifacts.hash_of(folder, source),
        device=torch.device("cpu"),
    )
    weights.load_into(model.encoder, weights.read_safetensors(folder / "encoder.safetensors"))
    weights.load_into(model.ctc, weights.part(bridge, "ctc"))
    weights.load_into(model.qformer, weights.part(bridge, "qformer"))
    weights.load_into(model.llm.stop, weights.part(bridge, "stop"))
    return model


def _build(files: LlmFiles, n_slot: int | None = None) -> Llm:
    """The LLM of some files, frozen. Tensors are taken over in the dtype that they have."""
    cfg = files.cfg if n_slot is None else replace(files.cfg, n_slot=n_slot)
    with torch.device("meta"):
        llm = Llm(cfg)
        if "head.weight" in files.state:
            llm.head = torch.nn.Linear(cfg.width, cfg.vocab, bias=False)
    stop = {"stop.weight": torch.zeros(1, cfg.width), "stop.bias": torch.zeros(1)}
    weights.load_into(llm, files.state | stop, assign=True)
    return llm.requires_grad_(False)
