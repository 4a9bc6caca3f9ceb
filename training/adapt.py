"""Adapt the ear: distillation of the encoder into its chunk-causal self, with CTC.

Student and teacher start from the same weights. The teacher hears clean audio with full context,
the student distorted audio under a random chunk mask, left context and position offset. The head
learns alone first (`head_steps`), so that a random head never drags the encoder away.

`python -m training.adapt CONFIG.toml --work DIR [--resume]`
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from sparqle_stream.config import CtcConfig
from sparqle_stream.ctc import CtcHead
from sparqle_stream.errors import ConfigError
from sparqle_stream.pieces import CtcPieces
from sparqle_stream.weights import part
from training.data import AugmentConfig
from training.hearing import distil_loss, hear, load_ear, load_encoder, mel_of, padded, whole
from training.loop import Run, main, warmed
from training.losses import consistency
from training.place import HERE, Place, find_place
from training.settings import read_config
from training.sources import SHARE_SEED, Feed, Source, make_feed
from training.text import spoken

if TYPE_CHECKING:
    from sparqle_stream.encoder import Encoder


@dataclass(frozen=True, slots=True)
class AdaptConfig:
    pieces: str
    sources: tuple[Source, ...]
    init: str = ""  # encoder to begin with beside a random head (safetensors, our names), or ...
    ear: str = ""  # ... encoder and head to go on from, of a run or of a model folder
    teacher: str = ""  # encoder that `distil` holds to; else `init`'s, else `ear`'s
    head_hidden: int = 512  # width of a new head, ...
    head_blocks: int = 0  # ... its blocks, which look back ...
    head_kernel: int = 11  # ... over as many CTC frames each
    frozen_blocks: int = 0  # the stem and as many blocks stay as they are; a step costs less
    noise: str = ""
    steps: int = 1000
    head_steps: int = 150  # of the head alone; with `steps` of them the encoder stays as it is
    streams: int = 8
    stream_s: float = 12.8
    lengths_s: tuple[float, ...] = ()  # drawn for each batch, of streams * stream_s seconds in all
    p_empty: float = 0.0  # streams of noise without words
    workers: int = 0  # processes that make batches ahead of time: for a GPU
    dropout: float = 0.0  # of what each sub-layer adds, for many passes over the same hours
    lr_head: float = 1e-3
    lr_encoder: float = 6e-5
    warmup: int = 60
    distil: float = 1.0
    consistency: float = 0.0  # weight of what two masked views of a batch are apart; twice the cost
    distil_every: int = 1  # the teacher is a fifth of a step's cost
    bf16: bool | None = None  # None: where it is faster, which it is not on a CPU without AMX
    accumulate: int = 1  # shares of a batch, of `streams` each
    ema: float = 0.995
    seed: int = 0
    chunks: tuple[int, ...] = (8, 16, 16, 16, 32, 64, 0)
    lefts: tuple[int, ...] = (128, 256, 256)
    aheads: tuple[int, ...] = (0, 12)  # frames of look-ahead; 12 are the default delay
    augment: AugmentConfig = field(default_factory=AugmentConfig)


def load_config(path: Path) -> AdaptConfig:
    return read_config(AdaptConfig, path)


def ctc_loss(log_probs: Tensor, texts: list[str], pieces: CtcPieces) -> Tensor:
    """Mean CTC loss per piece. log_probs (B, T, V); a row without text is all blank."""
    if not texts:
        return log_probs.sum()  # zero, of no row
    targets = [pieces.encode(text) for text in texts]
    lengths = torch.tensor([len(t) for t in targets])
    flat = torch.tensor([i for t in targets for i in t], dtype=torch.long).to(log_probs.device)
    frames = torch.full((len(texts),), log_probs.shape[1])
    loss = F.ctc_loss(
        log_probs.transpose(0, 1), flat, frames, lengths, reduction="sum", zero_infinity=True
    )
    return loss / lengths.sum().clamp(min=1)


def freeze(encoder: Encoder, n_blocks: int) -> None:
    """The stem and the first `n_blocks` blocks are not trained, if there are any."""
    if n_blocks:
        for module in (encoder.conv1, encoder.conv2, *list(encoder.layers())[:n_blocks]):
            module.requires_grad_(False)


def add_dropout(encoder: Encoder, head: CtcHead, p: float) -> None:
    """Residual dropout (Vaswani et al., 2017) in training mode; serving has none."""

    def drop(module: torch.nn.Module, _: object, out: Tensor) -> Tensor:
        return F.dropout(out, p, training=module.training)

    added = [linear for block in encoder.layers() for linear in (block.out, block.fc2)]
    added += [linear for block in head.layers() for linear in (block.merge, block.fc2)]
    for linear in added:
        linear.register_forward_hook(drop)


class Trainer(Run):
    """The ear: the head alone at first, then the encoder with it, held by its teacher."""

    name, result, most_norm = "adapt", "ear.safetensors", 2.0
    shown = ("ctc", "distil", "apart")

    def __init__(
        self,
        cfg: AdaptConfig,
        encoder: Encoder,
        teacher: Encoder,
        head: CtcHead,
        pieces: CtcPieces,
        place: Place = HERE,
    ) -> None:
        super().__init__(cfg.steps, cfg.ema, cfg.accumulate, place)
        self.cfg, self.pieces = cfg, pieces
        self.encoder, self.head = encoder.to(place.device), head.to(place.device)
        self.teacher = teacher.eval().to(place.device)
        if place.bf16:
            self.teacher.bfloat16()
        freeze(encoder, cfg.frozen_blocks)
        if cfg.dropout:
            add_dropout(encoder, head, cfg.dropout)
        taught = [p for p in encoder.parameters() if p.requires_grad]
        self.ready(
            [
                {"params": list(head.parameters()), "peak": cfg.lr_head},
                {"params": taught, "peak": cfg.lr_encoder},
            ]
        )

    @classmethod
    def start(cls, cfg: AdaptConfig, device: str = "cpu") -> Trainer:
        torch.manual_seed(cfg.seed)
        pieces = CtcPieces.load(Path(cfg.pieces))
        if cfg.ear:
            encoder, head = load_ear(Path(cfg.ear), pieces.size)
        elif cfg.init:
            encoder = load_encoder(Path(cfg.init))
            shape = cfg.head_hidden, pieces.size, cfg.head_blocks, cfg.head_kernel
            head = CtcHead(CtcConfig(encoder.cfg.width, *shape))
        else:
            raise ConfigError("nothing to begin with", hint="give ear = or init = in the config")
        taught_by = cfg.teacher or cfg.init
        teacher = load_encoder(Path(taught_by)) if taught_by else deepcopy(encoder)
        for module in (encoder, head):
            module.train().requires_grad_(True)
        return cls(cfg, encoder, teacher, head, pieces, find_place(device, cfg.bf16))

    def weights(self) -> dict[str, Tensor]:
        encoder = {f"encoder.{k}": v for k, v in self.encoder.state_dict().items()}
        return encoder | {f"ctc.{k}": v for k, v in self.head.state_dict().items()}

    def load(self, weights: dict[str, Tensor]) -> None:
        self.encoder.load_state_dict(part(weights, "encoder"))
        self.head.load_state_dict(part(weights, "ctc"))

    def make_feed(self, share: int) -> Feed:
        seed = self.cfg.seed + self.step + SHARE_SEED * share
        return make_feed(self.cfg, seed, with_clean=self.cfg.distil > 0)

    def warm_up(self, group: int) -> float:
        waited = self.cfg.head_steps if group else -1
        return warmed(self.step - waited, self.cfg.warmup)

    def batch_loss(self) -> tuple[Tensor, dict[str, float]]:
        cfg, rng, place = self.cfg, self.rng, self.place
        batch = next(self.batches)
        n_views = 2 if cfg.consistency else 1
        mel, offset = hear(batch.noisy, rng, cfg.augment, place.device, n_views)
        is_frozen = self.step < cfg.head_steps
        self.encoder.train(not is_frozen)  # nothing is dropped from what does not learn
        chunk, left, ahead = (rng.choice(x) for x in (cfg.chunks, cfg.lefts, cfg.aheads))
        with place.autocast(), torch.set_grad_enabled(not is_frozen):
            frames = self.encoder.forward_train(padded(mel, ahead), chunk, left, offset, ahead)
        with place.autocast():
            log_probs = self.head(frames)
        views = log_probs.chunk(n_views)
        known = batch.transcribed()
        texts = [" ".join(spoken(u.text) for u in batch.said[i]) for i in known]
        ctc = ctc_loss(torch.cat([v[known] for v in views]), n_views * texts, self.pieces)
        apart = consistency(*views) if cfg.consistency else torch.zeros(())
        loss, distil = ctc + cfg.consistency * apart, torch.zeros(())
        if batch.clean is not None and not is_frozen and self.step % cfg.distil_every == 0:
            with torch.no_grad():
                clean = mel_of(batch.clean, place.device)
                target = whole(self.teacher, clean, ahead).repeat(n_views, 1, 1)
            heard = frames[:, ahead : ahead + target.shape[1]]
            distil = distil_loss(heard.float(), target.float())
            loss = loss + cfg.distil * distil
        row = {"ctc": ctc.item(), "distil": distil.item(), "apart": apart.item()}
        return loss, row | {"audio_s": batch.audio_s}


if __name__ == "__main__":
    main("adapt", __doc__, lambda path, device: Trainer.start(load_config(path), device))
