"""Torch model: the parts of a model folder as torch modules, with its LLM.

Contract: what does not fit is a ModelError that says which file and which tensor.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from sparqle_stream import artifacts, weights
from sparqle_stream.config import ModelConfig
from sparqle_stream.config_json import config_from_json, read_json
from sparqle_stream.ctc import CtcHead
from sparqle_stream.cuda_graphs import CudaCapture
from sparqle_stream.encoder import Encoder
from sparqle_stream.errors import ModelError
from sparqle_stream.judge import TextPrefix
from sparqle_stream.lexicon import Lexicon
from sparqle_stream.llm import Llm
from sparqle_stream.pieces import CtcPieces
from sparqle_stream.qformer import QFormer
from sparqle_stream.torch_stages import TorchStages

if TYPE_CHECKING:
    from pathlib import Path

    from sparqle_stream.stages import Tokenizer
    from sparqle_stream.tokenizer import TextTokenizer
    from sparqle_stream.weights import LlmFiles

# Stored in config.json beside the fields of ModelConfig.
BESIDE_CONFIG: dict[str, Any] = {"lora_scale": 1.0, "sha256": {}}


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
    text: TextPrefix | None = None  # None: nobody judges readings
    is_captured: bool = False  # whether steps are replayed as CUDA graphs
    is_shared: bool = False  # its kernels take all cores, or the one device there is

    def make_stages(self, n_rows: int) -> TorchStages:
        return TorchStages(self, n_rows, CudaCapture() if self.is_captured else None)

    def weight_bytes(self) -> dict[str, int]:
        """Bytes of each stage that one row reads; of `vocabulary` for all logits."""
        head = self.llm.tokens if self.llm.head is None else self.llm.head
        lookups = _n_bytes(self.llm.tokens) + (0 if head is self.llm.tokens else _n_bytes(head))
        return {
            "encoder": _n_bytes(self.encoder),
            "ctc": _n_bytes(self.ctc),
            "qformer": _n_bytes(self.qformer),
            "llm": _n_bytes(self.llm) - lookups,
            "vocabulary": _n_bytes(head),
        }


def _n_bytes(module: torch.nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))


def load_llm(
    path_or_name: str | Path = artifacts.DEFAULT_LLM, dtype: torch.dtype = torch.float32
) -> tuple[Llm, TextTokenizer]:
    """A frozen LLM and its tokenizer, as training wants them; the stop head is zero."""
    files = weights.read_llm(artifacts.llm_source(path_or_name))
    return _build(files).to(dtype), files.tokenizer


def to_device(model: SparqleModel, dtype: str, device: str) -> SparqleModel:
    """Changes the model's weights in place: dtype and device, and the LLM's joined matrices."""
    model.llm.join()
    for module in (model.encoder, model.ctc, model.qformer, model.llm):
        module.to(device=device, dtype=getattr(torch, dtype)).eval().requires_grad_(False)
    model.device = torch.device(device)
    return model


def read(folder: Path, source: str | Path) -> SparqleModel:
    """All parts of a model folder with the LLM of `source`, as they are stored."""
    raw = read_json(folder / "config.json")
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
        text=TextPrefix.of(weights.part(bridge, "text"), replace(files.cfg, n_slot=cfg.llm.n_slot)),
    )
    ear = weights.expanded(weights.read_safetensors(folder / "ear.safetensors"))
    weights.load_into(model.encoder, weights.part(ear, "encoder"))
    weights.load_into(model.ctc, weights.part(ear, "ctc"))
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
