"""Adapt the ear: distillation of the encoder into its chunk-causal self, with CTC.

Student and teacher start from the same weights. The teacher hears clean audio with full context,
the student distorted audio under a random chunk mask, left context and position offset. The head
learns alone first (`head_steps`), so that a random head never drags the encoder away.

`python -m training.adapt CONFIG.toml --work DIR [--resume]`
"""

from __future__ import annotations

import argparse
import json
import random
import time
import tomllib
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from sparqle_stream import features
from sparqle_stream.config import CtcConfig, EncoderConfig, FeatureConfig
from sparqle_stream.ctc import CtcHead, CtcPieces
from sparqle_stream.encoder import SILENT_MEL, Encoder
from training.corpus import Clip, Pack
from training.data import AugmentConfig, Augmenter, StreamSampler, spec_augment, stack
from training.text import is_spelled_out, spoken


@dataclass(frozen=True, slots=True)
class Source:
    """A pack, how often it is drawn, and whether its transcripts are used."""

    pack: str
    weight: float = 1.0
    transcribed: bool = True


@dataclass(frozen=True, slots=True)
class AdaptConfig:
    init: str  # encoder weights (safetensors, our names)
    pieces: str
    sources: tuple[Source, ...]
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


@dataclass(slots=True)
class Trainer:
    cfg: AdaptConfig
    encoder: Encoder
    teacher: Encoder
    head: CtcHead
    pieces: CtcPieces
    optimizer: torch.optim.Optimizer
    average: dict[str, Tensor]
    step: int = 0

    @classmethod
    def start(cls, cfg: AdaptConfig) -> Trainer:
        torch.manual_seed(cfg.seed)
        pieces = CtcPieces.load(Path(cfg.pieces))
        encoder, teacher = Encoder(EncoderConfig()), Encoder(EncoderConfig())
        weights = load_file(cfg.init)
        encoder.load_state_dict(weights)
        teacher.load_state_dict(weights)
        head = CtcHead(CtcConfig(n_pieces=pieces.size))
        groups = [
            {"params": list(head.parameters()), "peak": cfg.lr_head},
            {"params": list(encoder.parameters()), "peak": cfg.lr_encoder},
        ]
        optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98), weight_decay=1e-3)
        self = cls(cfg, encoder, teacher.eval().bfloat16(), head, pieces, optimizer, {})
        self.average = {k: v.clone() for k, v in self.weights().items()}
        return self

    def weights(self) -> dict[str, Tensor]:
        encoder = {f"encoder.{k}": v for k, v in self.encoder.state_dict().items()}
        return encoder | {f"ctc.{k}": v for k, v in self.head.state_dict().items()}

    def set_rates(self) -> None:
        cfg = self.cfg
        left = max(0.02, 1 - self.step / cfg.steps)
        head_up = min(1.0, (self.step + 1) / cfg.warmup)
        body_up = min(1.0, max(0.0, (self.step - cfg.head_steps) / cfg.warmup))
        for group, up in zip(self.optimizer.param_groups, (head_up, body_up), strict=True):
            group["lr"] = group["peak"] * up * left

    def train_step(self, sampler: StreamSampler, rng: random.Random) -> dict[str, float]:
        cfg = self.cfg
        streams = [sampler.stream() for _ in range(cfg.streams)]
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
        with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(not frozen):
            frames = self.encoder.forward_train(mel, chunk, left, offset)
        with torch.autocast("cpu", torch.bfloat16):
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
        self.optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        params = [p for g in self.optimizer.param_groups for p in g["params"] if p.grad is not None]
        norm = torch.nn.utils.clip_grad_norm_(params, 2.0)
        self.set_rates()
        self.optimizer.step()
        self.step += 1
        self._follow()
        return {
            "ctc": ctc.item(),
            "distil": distil.item(),
            "norm": float(norm),
            "audio_s": n_rows * cfg.stream_s,
        }

    @torch.no_grad()
    def _follow(self) -> None:
        """Exponential moving average; short at first so that it does not remember the start."""
        decay = min(self.cfg.ema, (1 + self.step) / (10 + self.step))
        for key, value in self.weights().items():
            self.average[key].lerp_(value, 1 - decay)

    def save(self, work: Path) -> None:
        work.mkdir(parents=True, exist_ok=True)
        state = {
            "step": self.step,
            "weights": self.weights(),
            "average": self.average,
            "optimizer": self.optimizer.state_dict(),
        }
        torch.save(state, work / "last.tmp")
        (work / "last.tmp").rename(work / "last.pt")
        save_file({k: v.contiguous() for k, v in self.average.items()}, work / "ear.safetensors")

    def resume(self, work: Path) -> None:
        state = torch.load(work / "last.pt", weights_only=True)
        self.step, self.average = state["step"], state["average"]
        split = {"encoder": self.encoder, "ctc": self.head}
        for name, module in split.items():
            part = {
                k[len(name) + 1 :]: v for k, v in state["weights"].items() if k.startswith(name)
            }
            module.load_state_dict(part)
        peaks = [group["peak"] for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(state["optimizer"])
        for group, peak in zip(self.optimizer.param_groups, peaks, strict=True):
            group["peak"] = peak  # the config's, not the checkpoint's


def run(cfg: AdaptConfig, work: Path, *, resume: bool, save_every_s: float = 180.0) -> None:
    trainer = Trainer.start(cfg)
    if resume and (work / "last.pt").exists():
        trainer.resume(work)
    sampler = make_sampler(
        cfg.sources, cfg.noise, cfg.augment, cfg.stream_s, cfg.seed + trainer.step
    )
    rng = random.Random(cfg.seed + 1 + trainer.step)
    work.mkdir(parents=True, exist_ok=True)
    log, saved = (work / "log.jsonl").open("a"), time.monotonic()
    bar = tqdm(range(trainer.step, cfg.steps), desc="adapt", unit="step", mininterval=5)
    for _ in bar:
        began = time.monotonic()
        row = trainer.train_step(sampler, rng)
        row |= {"step": trainer.step, "seconds": time.monotonic() - began}
        log.write(json.dumps(row) + "\n")
        log.flush()
        bar.set_postfix(ctc=f"{row['ctc']:.2f}", distil=f"{row['distil']:.2f}")
        if time.monotonic() - saved > save_every_s:
            trainer.save(work)
            saved = time.monotonic()
    trainer.save(work)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m training.adapt", description=__doc__)
    parser.add_argument("config", type=Path)
    parser.add_argument("--work", type=Path, required=True, help="checkpoints and log.jsonl")
    parser.add_argument("--resume", action="store_true")
    args = parser.parse_args()
    run(load_config(args.config), args.work, resume=args.resume)


if __name__ == "__main__":
    main()
