"""Adapt the ear: distillation of the encoder into its chunk-causal self, with CTC.

Student and teacher start from the same weights. The teacher hears clean audio with full context,
the student distorted audio under a random chunk mask, left context and position offset. The head
learns alone first (`head_steps`), so that a random head never drags the encoder away.

`python -m training.adapt CONFIG.toml --work DIR [--resume]`
"""

from __future__ import annotations

import random
import tomllib
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from sparqle_stream import features
from sparqle_stream.config import CtcConfig, EncoderConfig, FeatureConfig
from sparqle_stream.ctc import CtcHead, CtcPieces
from sparqle_stream.encoder import SILENT_MEL, Encoder
from training.corpus import Clip, Pack
from training.data import AugmentConfig, Augmenter, StreamSampler, spec_augment, stack
from training.loop import Run, main, part
from training.text import is_spelled_out, spoken


@dataclass(frozen=True, slots=True)
class Source:
    """A pack, how often it is drawn, and whether its transcripts are used."""

    pack: str
    weight: float = 1.0
    transcribed: bool = True


@dataclass(frozen=True, slots=True)
class AdaptConfig:
    init: str  # encoder weights (safetensors, our names); the teacher keeps them
    pieces: str
    sources: tuple[Source, ...]
    ear: str = ""  # encoder and head to go on from, instead of `init` and a random head
    frozen_blocks: int = 0  # the stem and as many blocks stay as they are; a step costs less
    noise: str = ""
    steps: int = 1000
    head_steps: int = 150
    streams: int = 8
    stream_s: float = 12.8
    lr_head: float = 1e-3
    lr_encoder: float = 6e-5
    warmup: int = 60
    distil: float = 1.0
    distil_every: int = 1  # the teacher is a fifth of a step's cost
    bf16: bool = True  # False where a CPU multiplies float32 faster, as one without AMX may
    ema: float = 0.995
    seed: int = 0
    chunks: tuple[int, ...] = (8, 16, 16, 16, 32, 64, 0)
    lefts: tuple[int, ...] = (128, 256, 256)
    augment: AugmentConfig = field(default_factory=AugmentConfig)


def load_config(path: Path) -> AdaptConfig:
    raw = tomllib.loads(path.read_text())
    raw["sources"] = tuple(Source(**s) for s in raw["sources"])
    raw["augment"] = AugmentConfig(**raw.get("augment", {}))
    for key in ("chunks", "lefts"):
        if key in raw:
            raw[key] = tuple(raw[key])
    return AdaptConfig(**raw)


def usable(clip: Clip) -> bool:
    return clip.seconds < 20.0 and is_spelled_out(clip.text)


def make_sampler(
    sources: tuple[Source, ...], noise: str, augment: AugmentConfig, stream_s: float, seed: int
) -> StreamSampler:
    rng = random.Random(seed)
    parts = []
    for source in sources:
        pack = Pack(Path(source.pack))
        if source.transcribed:
            clips = [c for c in pack.clips if usable(c)]
        else:
            clips = [replace(c, text="") for c in pack.clips]
        parts.append((pack, clips, source.weight))
    augmenter = Augmenter(augment, Pack(Path(noise)) if noise else None, rng)
    return StreamSampler(parts, augmenter, stream_s)


def ctc_loss(log_probs: Tensor, texts: list[str], pieces: CtcPieces) -> Tensor:
    """Mean CTC loss per piece. log_probs (B, T, V); a row without text is all blank."""
    if not texts:
        return log_probs.sum()  # zero, of no row
    targets = [pieces.encode(text) for text in texts]
    lengths = torch.tensor([len(t) for t in targets])
    flat = torch.tensor([i for t in targets for i in t], dtype=torch.long)
    frames = torch.full((len(texts),), log_probs.shape[1])
    loss = F.ctc_loss(
        log_probs.transpose(0, 1), flat, frames, lengths, reduction="sum", zero_infinity=True
    )
    return loss / lengths.sum().clamp(min=1)


def distil_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Frame MSE (relative to the teacher's variance) + 0.5 cosine distance (models.md 2.8)."""
    mse = (student - teacher).square().mean() / teacher.var().clamp(min=1e-3)
    return mse + 0.5 * (1 - F.cosine_similarity(student, teacher, dim=-1)).mean()


def freeze(encoder: Encoder, n_blocks: int) -> None:
    """The stem and the first `n_blocks` blocks are not trained, if there are any."""
    if n_blocks:
        for module in (encoder.conv1, encoder.conv2, *list(encoder.layers())[:n_blocks]):
            module.requires_grad_(False)


class Trainer(Run):
    """The ear: the head alone at first, then the encoder with it, held by its teacher."""

    name, result, shown = "adapt", "ear.safetensors", ("ctc", "distil")

    def __init__(
        self, cfg: AdaptConfig, encoder: Encoder, teacher: Encoder, head: CtcHead, pieces: CtcPieces
    ) -> None:
        super().__init__(cfg.steps, cfg.ema)
        self.cfg, self.encoder, self.head, self.pieces = cfg, encoder, head, pieces
        self.teacher = teacher.eval().bfloat16()
        freeze(encoder, cfg.frozen_blocks)
        taught = [p for p in encoder.parameters() if p.requires_grad]
        self.ready(
            [
                {"params": list(head.parameters()), "peak": cfg.lr_head},
                {"params": taught, "peak": cfg.lr_encoder},
            ]
        )

    @classmethod
    def start(cls, cfg: AdaptConfig) -> Trainer:
        torch.manual_seed(cfg.seed)
        pieces = CtcPieces.load(Path(cfg.pieces))
        encoder, teacher = Encoder(EncoderConfig()), Encoder(EncoderConfig())
        weights = load_file(cfg.init)
        encoder.load_state_dict(weights)
        teacher.load_state_dict(weights)
        head = CtcHead(CtcConfig(n_pieces=pieces.size))
        if cfg.ear:
            ear = load_file(cfg.ear)
            encoder.load_state_dict(part(ear, "encoder"))
            head.load_state_dict(part(ear, "ctc"))
        return cls(cfg, encoder, teacher, head, pieces)

    def weights(self) -> dict[str, Tensor]:
        encoder = {f"encoder.{k}": v for k, v in self.encoder.state_dict().items()}
        return encoder | {f"ctc.{k}": v for k, v in self.head.state_dict().items()}

    def load(self, weights: dict[str, Tensor]) -> None:
        self.encoder.load_state_dict(part(weights, "encoder"))
        self.head.load_state_dict(part(weights, "ctc"))

    def seed(self) -> None:
        cfg, seed = self.cfg, self.cfg.seed + self.step
        self.sampler = make_sampler(cfg.sources, cfg.noise, cfg.augment, cfg.stream_s, seed)
        self.rng = random.Random(seed + 1)

    def warm_up(self, group: int) -> float:
        waited = self.cfg.head_steps if group else -1
        return min(1.0, max(0.0, (self.step - waited) / self.cfg.warmup))

    def train_step(self) -> dict[str, float]:
        cfg, rng = self.cfg, self.rng
        streams = [self.sampler.stream() for _ in range(cfg.streams)]
        n_rows = len(streams)
        everyone = torch.ones(n_rows, dtype=torch.bool)
        fcfg = FeatureConfig()
        with torch.no_grad():
            noisy = features.step(
                fcfg, features.init_state(fcfg, n_rows), stack(streams, "noisy"), everyone
            )[1]
            mel = spec_augment(noisy, rng, SILENT_MEL) if rng.random() < 0.3 else noisy
            clean = features.step(
                fcfg, features.init_state(fcfg, n_rows), stack(streams, "clean"), everyone
            )[1]
        frozen = self.step < cfg.head_steps
        offset = torch.tensor([rng.randrange(1500) for _ in range(n_rows)])
        chunk, left = rng.choice(cfg.chunks), rng.choice(cfg.lefts)
        with torch.autocast("cpu", torch.bfloat16, cfg.bf16), torch.set_grad_enabled(not frozen):
            frames = self.encoder.forward_train(mel, chunk, left, offset)
        with torch.autocast("cpu", torch.bfloat16, cfg.bf16):
            log_probs = self.head(frames)
        texts = [" ".join(spoken(u.text) for u in s.utterances) for s in streams]
        known = [i for i, s in enumerate(streams) if s.is_transcribed]
        ctc = ctc_loss(log_probs[known], [texts[i] for i in known], self.pieces)
        loss, distil = ctc, torch.zeros(())
        if not frozen and cfg.distil > 0 and self.step % cfg.distil_every == 0:
            with torch.no_grad():
                target = self.teacher.forward_train(clean, 0, 0, torch.zeros_like(offset))
            distil = distil_loss(frames.float(), target.float())
            loss = ctc + cfg.distil * distil
        norm = self.learn(loss, 2.0)
        return {
            "ctc": ctc.item(),
            "distil": distil.item(),
            "norm": norm,
            "audio_s": n_rows * cfg.stream_s,
        }


if __name__ == "__main__":
    main("adapt", __doc__, lambda path: Trainer.start(load_config(path)))
