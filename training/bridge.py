"""Bridge: the frozen ear, the LLM, and what is trained between and inside them.

The LLM learns through adapters (`update = "lora"`), as a whole ("full") or not at all ("frozen").
Weights go by the names that bridge.safetensors has: qformer.*, stop.*, lora.* and, of a fully
updated LLM, llm.*.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sparqle_stream.config import FRAMES_PER_QUERY, QFormerConfig
from sparqle_stream.errors import ConfigError
from sparqle_stream.pieces import CtcPieces
from sparqle_stream.qformer import QFormer
from sparqle_stream.tasks import name_of
from sparqle_stream.torch_model import load_llm
from sparqle_stream.weights import load_into, merge_lora, part, read_safetensors
from training.data import AugmentConfig
from training.hearing import load_ear
from training.lora import LORA_SCALE, adapter_weights, attach, load_adapters
from training.settings import read_config
from training.sources import Source  # noqa: TC001 - the config's types are looked up

if TYPE_CHECKING:
    from sparqle_stream.llm import Llm
    from training.lora import LoraLinear

UPDATES = ("lora", "full", "frozen")


@dataclass(frozen=True, slots=True)
class JointConfig:
    ear: str  # weights of training.adapt
    pieces: str
    llm: str
    sources: tuple[Source, ...]
    init: str = ""  # bridge.safetensors to go on from, of a run or of a model folder
    update: str = "lora"  # of the LLM: lora | full | frozen
    noise: str = ""
    steps: int = 600
    streams: int = 8
    stream_s: float = 12.8
    lengths_s: tuple[float, ...] = ()  # drawn for each batch, of streams * stream_s seconds in all
    lr: float = 5e-4
    warmup: int = 40
    lr_llm: float = 2e-5  # of the LLM itself, where `update` is full
    rank: int = 32
    kind: str = "window"
    n_layers: int = 2
    ema: float = 0.99
    seed: int = 0
    bf16: bool | None = None  # None: where it is faster, which it is not on a CPU without AMX
    accumulate: int = 1  # shares of a batch, of `streams` or `text_rows` each
    chunks: tuple[int, ...] = (8, 16, 16, 16, 16, 32)
    aheads: tuple[int, ...] = (12,)  # frames of look-ahead; 12 are the default delay
    p_default_delay: float = 0.5
    p_seam: float = 0.25  # rows that start in the middle of a segment, primed with its text
    p_empty: float = 0.06  # rows of noise without words
    workers: int = 0  # processes that make batches ahead of time: for a GPU
    corrupt_tokens: float = 0.06  # fed-back tokens replaced at random
    blur: float = 0.12  # CTC frames whose posteriors are made unsure by noise and heat
    text_steps: int = 200  # first steps on text alone: reading pieces, before hearing them
    p_text: float = 0.1  # later steps on text alone
    text_rows: int = 8
    text: str = ""  # a file of sentences to read, beside the transcripts
    p_sentence: float = 0.6  # rows of text alone that come from it
    tasks: tuple[str, ...] = ("transcribe",)  # drawn for each stream whose clips have the target
    posteriors: bool = True  # False: queries do without what CTC hears, to see what it is worth
    merge: int = 1  # neighbouring queries that become one: 2 is 6.25 queries a second
    sinks: int = 0  # pauses before the audio, as attention sinks
    stop_weight: float = 1.0
    augment: AugmentConfig = field(default_factory=AugmentConfig)

    def __post_init__(self) -> None:
        if self.update not in UPDATES:
            raise ConfigError(
                f"update = {self.update!r} is not known", hint=f"use {', '.join(UPDATES)}"
            )
        for task in self.tasks:
            name_of(*task.split(" to "))
        if self.merge < 1 or any(n % (FRAMES_PER_QUERY * self.merge) for n in self.chunks):
            raise ConfigError(
                f"chunks {self.chunks} (frames) are not whole groups of {self.merge} queries",
                hint=f"use multiples of {FRAMES_PER_QUERY * self.merge}",
            )

    @property
    def is_servable(self) -> bool:
        """Whether the engine can serve what is trained; some settings are for comparisons only."""
        return self.merge == 1 and self.sinks == 0


def load_config(path: Path) -> JointConfig:
    return read_config(JointConfig, path)


class Bridge(torch.nn.Module):
    """The frozen ear and LLM with what is trained between and inside them."""

    def __init__(self, cfg: JointConfig, *, bf16: bool = False) -> None:
        """bf16: what is frozen is kept in it. Only where it is multiplied fast: on a CPU
        without AVX-512 a step took ten times as long with it."""
        super().__init__()
        frozen = torch.bfloat16 if bf16 else torch.float32
        self.update = cfg.update
        self.pieces = CtcPieces.load(Path(cfg.pieces))
        self.encoder, self.ctc = load_ear(Path(cfg.ear), self.pieces.size)
        self.encoder.to(frozen)
        start = read_safetensors(Path(cfg.init)) if cfg.init else {}
        self.llm, self.tokenizer = load_llm(cfg.llm, frozen)
        self.adapters = self._take_llm(start, cfg)
        self.stop = torch.nn.Linear(self.llm.cfg.width, 1)
        torch.nn.init.zeros_(self.stop.weight)
        self.qformer = QFormer(
            QFormerConfig(
                kind=cfg.kind,
                n_layers=cfg.n_layers,
                encoder_width=self.encoder.cfg.width,
                llm_width=self.llm.cfg.width,
                n_pieces=self.pieces.size,
            )
        )
        if cfg.posteriors:
            self.qformer.posterior.pieces.data.copy_(self.piece_embeddings())
        self.qformer.posterior.requires_grad_(cfg.posteriors)  # a table of zeros stays one
        # Silence reads as an ellipsis at first: a zero vector would be blown up by the first norm.
        pause = torch.tensor([self.tokenizer.encode(" ...")])
        self.qformer.delay.weight.data.copy_(0.5 * self.llm.embed(pause)[0].float().mean(dim=0))
        for name, module in (("qformer", self.qformer), ("stop", self.stop)):
            stored = part(start, name)
            if name == "qformer" and "out.weight" not in stored:  # what training.stage1 makes
                stored = module.state_dict() | stored
            if stored:
                load_into(module, stored)

    def _take_llm(self, start: dict[str, Tensor], cfg: JointConfig) -> dict[str, LoraLinear]:
        """Brings the LLM to where `start` had it, ready for `cfg.update`; returns its adapters.

        A full update melts adapters in; frozen ones stay, and are written out again.
        """
        whole, lora = part(start, "llm"), part(start, "lora")
        if cfg.update == "full":
            self.llm.float()
            state = own_weights(self.llm) | {name: w.float() for name, w in whole.items()}
            merge_lora(state, lora, LORA_SCALE)
            stop = {f"stop.{k}": v for k, v in self.llm.stop.state_dict().items()}
            load_into(self.llm, state | stop)
            self.llm.requires_grad_(True)
            self.llm.stop.requires_grad_(False)  # the bridge has one of its own
            return {}
        if whole:
            raise ConfigError(
                f"{cfg.init} holds an LLM that was updated as a whole",
                hint='go on with update = "full"',
            )
        if cfg.update == "frozen" and not lora:
            return {}
        rank = len(next(v for k, v in lora.items() if k.endswith(".a"))) if lora else cfg.rank
        if cfg.update == "lora" and rank != cfg.rank:
            raise ConfigError(
                f"{cfg.init} has adapters of rank {rank}, the config of {cfg.rank}",
                hint=f"set rank = {rank}",
            )
        adapters = attach(self.llm, rank)
        if lora:
            load_adapters(adapters, start)
        return adapters

    @torch.no_grad()
    def piece_embeddings(self) -> Tensor:
        """e(piece): the mean LLM embedding of the piece's own tokens; blank is zero."""
        table = torch.zeros(self.pieces.size, self.llm.cfg.width)
        for piece in range(1, self.pieces.size):
            ids = torch.tensor([self.tokenizer.encode(self.pieces.piece(piece))])
            table[piece] = self.llm.embed(ids)[0].float().mean(dim=0)
        return table

    def trained(self) -> dict[str, Tensor]:
        """What goes into bridge.safetensors."""
        out = {f"qformer.{k}": v for k, v in self.qformer.state_dict().items()}
        out |= {f"stop.{k}": v for k, v in self.stop.state_dict().items()}
        if self.update == "full":
            out |= {f"llm.{k}": v for k, v in own_weights(self.llm).items()}
        return out | adapter_weights(self.adapters)

    def groups(self, lr: float, lr_llm: float) -> list[dict[str, Any]]:
        """Parameters with their peak rates. Adam moves every entry by about its rate: tables that
        begin as LLM embeddings (entries near 0.1) or as identities would be lost at LoRA's."""
        posterior = self.qformer.posterior
        near_text = [posterior.pieces, posterior.maps, self.qformer.delay.weight]
        near_text = [p for p in near_text if p.requires_grad]
        known = {id(p) for p in (*near_text, *posterior.parameters())}
        rest = [p for p in self.qformer.parameters() if id(p) not in known]
        learns = self.adapters.values() if self.update == "lora" else ()
        adapters = [p for a in learns for p in (a.a, a.b)]
        groups = [
            {"params": adapters + list(self.stop.parameters()), "peak": lr},
            {"params": rest, "peak": 0.4 * lr},
            {"params": near_text, "peak": 0.08 * lr},
        ]
        if self.update == "full":
            whole = [p for p in self.llm.parameters() if p.requires_grad]
            groups.append({"params": whole, "peak": lr_llm})
        return groups

    def load_trained(self, weights: dict[str, Tensor]) -> None:
        """Weights of a checkpoint of the same config."""
        self.qformer.load_state_dict(part(weights, "qformer"))
        self.stop.load_state_dict(part(weights, "stop"))
        if self.update == "full":
            self.llm.load_state_dict(part(weights, "llm"), strict=False)  # but for its stop head
        load_adapters(self.adapters, weights)


def own_weights(llm: Llm) -> dict[str, Tensor]:
    """An LLM's weights without the stop head, which belongs to the bridge."""
    return {k: v for k, v in llm.state_dict().items() if not k.startswith("stop.")}
