"""Distil an encoder into its chunk-causal self, on audio that nobody has transcribed.

The teacher keeps the starting weights and hears clean audio with full context; the student hears it
distorted, under a random chunk mask, left context and position offset, and learns to give the same
frames: frame MSE and cosine. With `ear`, whose CTC head both
then have, the teacher's posteriors are soft targets as well (Hinton et al., 2015); with `init` too
the student begins as that.

`python -m training.distill CONFIG.toml --work DIR [--resume]` makes encoder.safetensors, which is
`init` of training.adapt.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from sparqle_stream.errors import ConfigError
from training.adapt import freeze
from training.data import AugmentConfig
from training.hearing import distil_loss, hear, load_ear, load_encoder, mel_of, padded, whole
from training.loop import Run, main, warmed
from training.place import HERE, Place, find_place
from training.settings import read_config
from training.sources import SHARE_SEED, Feed, Source, make_feed

if TYPE_CHECKING:
    from sparqle_stream.ctc import CtcHead
    from sparqle_stream.encoder import Encoder


@dataclass(frozen=True, slots=True)
class DistillConfig:
    """`sources` may have transcripts; they are not looked at."""

    sources: tuple[Source, ...]
    init: str = ""  # the student (safetensors, our names); without `ear` the teacher too
    ear: str = ""  # the teacher with its CTC head (training.adapt); without `init` the student too
    n_pieces: int = 256  # of the ear's head
    posterior: float = 1.0  # weight of the soft targets, where there is a head
    noise: str = ""
    steps: int = 2000
    streams: int = 8
    stream_s: float = 12.8
    lengths_s: tuple[float, ...] = ()  # drawn for each batch, of streams * stream_s seconds in all
    p_empty: float = 0.0  # streams of noise
    workers: int = 0  # processes that make batches ahead of time: for a GPU
    accumulate: int = 1
    lr: float = 1e-4
    warmup: int = 100
    frozen_blocks: int = 0
    bf16: bool | None = None
    ema: float = 0.995
    seed: int = 0
    chunks: tuple[int, ...] = (4, 8, 16, 16, 32, 64, 0)
    lefts: tuple[int, ...] = (64, 128, 256, 256)
    aheads: tuple[int, ...] = (0, 12)  # frames of look-ahead
    augment: AugmentConfig = field(default_factory=AugmentConfig)


def soft_ctc_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """KL divergence of the student's posteriors from the teacher's, a frame; both (B, T, V) log."""
    return F.kl_div(student, teacher, reduction="sum", log_target=True) / teacher[..., 0].numel()


class Trainer(Run):
    """The student; the head, if there is one, only says how alike both sound."""

    name, result, shown, most_norm = "distill", "encoder.safetensors", ("frames",), 2.0

    def __init__(
        self,
        cfg: DistillConfig,
        student: Encoder,
        teacher: Encoder,
        head: CtcHead | None = None,
        place: Place = HERE,
    ) -> None:
        super().__init__(cfg.steps, cfg.ema, cfg.accumulate, place)
        self.cfg, self.student = cfg, student.to(place.device).requires_grad_(True)
        self.teacher = teacher.eval().requires_grad_(False).to(place.device)
        self.head = head.to(place.device).requires_grad_(False) if head else None
        if place.bf16:
            self.teacher.bfloat16()
        freeze(student, cfg.frozen_blocks)
        taught = [p for p in student.parameters() if p.requires_grad]
        self.ready([{"params": taught, "peak": cfg.lr}])

    def weights(self) -> dict[str, Tensor]:
        return dict(self.student.state_dict())

    def load(self, weights: dict[str, Tensor]) -> None:
        self.student.load_state_dict(weights)

    def make_feed(self, share: int) -> Feed:
        seed = self.cfg.seed + self.step + SHARE_SEED * share
        return make_feed(self.cfg, seed, with_clean=True)

    def warm_up(self, group: int) -> float:
        return warmed(self.step + 1, self.cfg.warmup)

    def batch_loss(self) -> tuple[Tensor, dict[str, float]]:
        cfg, rng, place = self.cfg, self.rng, self.place
        batch = next(self.batches)
        mel, offset = hear(batch.noisy, rng, cfg.augment, place.device)
        chunk, left, ahead = (rng.choice(x) for x in (cfg.chunks, cfg.lefts, cfg.aheads))
        with place.autocast():
            frames = self.student.forward_train(padded(mel, ahead), chunk, left, offset, ahead)
        with torch.no_grad():
            assert batch.clean is not None
            clean = mel_of(batch.clean, place.device)
            target = whole(self.teacher, clean, ahead).float()
        frames = frames[:, ahead : ahead + target.shape[1]]
        alike = distil_loss(frames.float(), target)
        loss, soft = alike, torch.zeros(())
        if self.head is not None and cfg.posterior:
            soft = soft_ctc_loss(self.head(frames.float()), self.head(target))
            loss = alike + cfg.posterior * soft
        return loss, {"frames": alike.item(), "posterior": soft.item(), "audio_s": batch.audio_s}


def start(cfg: DistillConfig, device: str = "cpu") -> Trainer:
    """A run of `init` or `ear`. Raises ConfigError without either, ModelError for a wrong file."""
    torch.manual_seed(cfg.seed)
    place = find_place(device, cfg.bf16)
    if not (cfg.init or cfg.ear):
        raise ConfigError("nobody to distil", hint="give init = or ear = in the config")
    head = None
    if cfg.ear:
        teacher, head = load_ear(Path(cfg.ear), cfg.n_pieces)
    else:
        teacher = load_encoder(Path(cfg.init))
    student = load_encoder(Path(cfg.init)) if cfg.init else deepcopy(teacher)
    return Trainer(cfg, student, teacher, head, place)


if __name__ == "__main__":
    main("distill", __doc__, lambda path, device: start(read_config(DistillConfig, path), device))
