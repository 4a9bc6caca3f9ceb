"""SparQLe's first stage, made streaming: the Q-Former learns what of speech belongs to its text.

The queries are those of the engine, asked chunk by chunk under the chunk masks, instead of 100 for
a whole utterance. Their text is spelled in the CTC head's pieces and read by a small tower that may
look at the queries; SparQLe shares BERT's self-attention between both instead. Each loss
(training.losses) has a weight in the config, 0 leaves it out.

`python -m training.stage1 CONFIG.toml --work DIR [--resume]` makes stage1.safetensors, which is
`init` of training.joint.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from sparqle_stream.config import QFormerConfig
from sparqle_stream.errors import ConfigError
from sparqle_stream.pieces import CtcPieces
from sparqle_stream.qformer import QFormer
from training import losses
from training.data import AugmentConfig
from training.hearing import LEFT_FRAMES, hear, load_ear, padded
from training.loop import Run, main, warmed
from training.place import HERE, Place, find_place
from training.settings import read_config
from training.sources import SHARE_SEED, Feed, Source, make_feed
from training.text import spoken

LONGEST_TEXT = 128  # pieces; SparQLe cuts there too
TAUGHT = ("queries", "layers.", "out_norm.", "stack.")  # of the Q-Former; the rest speaks to an LLM


@dataclass(frozen=True, slots=True)
class Stage1Config:
    ear: str
    pieces: str
    sources: tuple[Source, ...]
    noise: str = ""
    contrastive: float = 1.0
    matching: float = 1.0
    generation: float = 1.0
    kind: str = "window"
    n_layers: int = 2
    llm_width: int = 576  # of the LLM of training.joint later
    joint_width: int = 256  # in which speech and text are compared
    text_layers: int = 2
    steps: int = 1000
    streams: int = 16  # pairs: the negatives of one another
    stream_s: float = 6.4
    lengths_s: tuple[float, ...] = ()
    p_empty: float = 0.0  # streams of noise
    workers: int = 0  # processes that make batches ahead of time: for a GPU
    accumulate: int = 1
    lr: float = 5e-4
    warmup: int = 50
    bf16: bool | None = None
    ema: float = 0.99
    seed: int = 0
    chunks: tuple[int, ...] = (8, 16, 16, 16, 32)
    aheads: tuple[int, ...] = (12,)  # frames of look-ahead
    augment: AugmentConfig = field(default_factory=AugmentConfig)

    def __post_init__(self) -> None:
        if not (self.contrastive or self.matching or self.generation):
            raise ConfigError("all losses have weight 0", hint="leave one of them in")


class TextTower(nn.Module):
    """Pieces (B, L) -> states (B, L, D), with a look at queries or without, both ways or causal."""

    def __init__(self, n_pieces: int, width: int, n_layers: int) -> None:
        super().__init__()
        self.cls, self.dec, self.pad = n_pieces, n_pieces + 1, n_pieces + 2
        self.tokens = nn.Embedding(n_pieces + 3, width)
        self.places = nn.Parameter(0.02 * torch.randn(LONGEST_TEXT + 1, width))
        self.nothing = nn.Parameter(torch.zeros(1, 1, width))  # what is looked at without speech
        self.layers = nn.ModuleList(
            nn.TransformerDecoderLayer(
                width,
                nhead=8,
                dim_feedforward=4 * width,
                dropout=0.0,
                activation="gelu",
                batch_first=True,
                norm_first=True,
            )
            for _ in range(n_layers)
        )
        self.norm = nn.LayerNorm(width)

    def pack(self, texts: list[list[int]], first: int) -> Tensor:
        """`first`, then pieces, padded on the right -> (B, 1 + L)."""
        texts = [text[:LONGEST_TEXT] for text in texts]
        longest = max(map(len, texts))
        rows = [[first, *text] + [self.pad] * (longest - len(text)) for text in texts]
        return torch.tensor(rows, device=self.places.device)

    def forward(self, ids: Tensor, queries: Tensor | None, *, is_causal: bool) -> Tensor:
        length = ids.shape[1]
        x = self.tokens(ids) + self.places[:length]
        memory = self.nothing.expand(len(ids), -1, -1) if queries is None else queries
        padding = ids == self.pad
        mask = None
        if is_causal:
            mask = torch.ones(length, length, dtype=torch.bool, device=ids.device).triu(1)
        for layer in self.layers:
            x = layer(x, memory, tgt_mask=mask, tgt_key_padding_mask=padding)
        out: Tensor = self.norm(x)
        return out


class Stage1(nn.Module):
    """The frozen ear, the Q-Former, and what the losses need beside it."""

    def __init__(self, cfg: Stage1Config) -> None:
        super().__init__()
        self.cfg, self.pieces = cfg, CtcPieces.load(Path(cfg.pieces))
        self.encoder, _ = load_ear(Path(cfg.ear), self.pieces.size)
        self.qformer = QFormer(
            QFormerConfig(
                kind=cfg.kind,
                n_layers=cfg.n_layers,
                encoder_width=self.encoder.cfg.width,
                llm_width=cfg.llm_width,
                n_pieces=self.pieces.size,
            )
        )
        width = self.qformer.cfg.width
        self.tower = TextTower(self.pieces.size, width, cfg.text_layers)
        self.speech_proj = nn.Linear(width, cfg.joint_width)
        self.text_proj = nn.Linear(width, cfg.joint_width)
        self.match_head = nn.Linear(width, 2)
        self.generate_head = nn.Linear(width, self.pieces.size)
        self.temperature = nn.Parameter(torch.tensor(0.07))

    def taught(self) -> dict[str, nn.Parameter]:
        """What learns: not the ear, nor the parts of the Q-Former that no loss reaches."""
        return {
            name: p
            for name, p in self.named_parameters()
            if not name.startswith(("encoder.", "qformer."))
            or name.startswith(tuple(f"qformer.{taught}" for taught in TAUGHT))
        }

    def ask(self, frames: Tensor, chunk: int) -> Tensor:
        """Frames (B, T, W) of the ear -> answers (B, T / 4, D), as streaming hears them."""
        return self.qformer.ask(frames, chunk)

    def losses(
        self, answers: Tensor, texts: list[list[int]], is_same: Tensor, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """Losses by name, those of weight 0 left out; answers (B, Q, D), a text for each row."""
        cfg, tower, out = self.cfg, self.tower, {}
        read = tower(tower.pack(texts, tower.cls), None, is_causal=False)[:, 0]
        scores = losses.similarity(self.speech_proj(answers), self.text_proj(read)).float()
        if cfg.contrastive:
            out["contrastive"] = losses.contrastive(scores, self.temperature, is_same)
        if cfg.matching:
            out["matching"] = self._match(answers, texts, scores, is_same, generator)
        if cfg.generation:
            ids = tower.pack(texts, tower.dec)
            said = self.generate_head(tower(ids[:, :-1], answers, is_causal=True))
            out["generation"] = losses.generation(said.float(), ids[:, 1:], tower.pad)
        return out

    def _match(
        self,
        answers: Tensor,
        texts: list[list[int]],
        scores: Tensor,
        is_same: Tensor,
        generator: torch.Generator,
    ) -> Tensor:
        """Every pair, every text with speech that sounds like it, every speech with such a text."""
        n, tower = len(texts), self.tower
        sharp = scores.detach() / self.temperature.detach()
        speech = losses.hard_negatives(sharp.T, is_same, generator)
        text = losses.hard_negatives(sharp, is_same, generator).tolist()
        ids = tower.pack([*texts, *texts, *(texts[i] for i in text)], tower.cls)
        asked = torch.cat([answers, answers[speech], answers])
        states = tower(ids, asked, is_causal=False)[:, :1]
        is_pair = torch.arange(3 * n, device=ids.device) < n
        return losses.matching(self.match_head(states).float(), is_pair)


class Trainer(Run):
    """The first stage over streams of speech, each with the text of all that is said in it."""

    name, result = "stage1", "stage1.safetensors"

    def __init__(self, cfg: Stage1Config, place: Place = HERE) -> None:
        super().__init__(cfg.steps, cfg.ema, cfg.accumulate, place)
        torch.manual_seed(cfg.seed)
        self.cfg, self.model = cfg, Stage1(cfg).to(place.device)
        self.ready([{"params": list(self.model.taught().values()), "peak": cfg.lr}])

    def weights(self) -> dict[str, Tensor]:
        return {name: p.data for name, p in self.model.taught().items()}

    def load(self, weights: dict[str, Tensor]) -> None:
        self.model.load_state_dict(self.model.state_dict() | weights)

    def make_feed(self, share: int) -> Feed:
        return make_feed(self.cfg, self.cfg.seed + 13 * self.step + 1 + SHARE_SEED * share)

    def warm_up(self, group: int) -> float:
        return warmed(self.step + 1, self.cfg.warmup)

    def _names(self) -> list[str]:
        """Of the losses that count."""
        return [n for n in ("contrastive", "matching", "generation") if getattr(self.cfg, n)]

    def batch_loss(self) -> tuple[Tensor, dict[str, float]]:
        cfg, model, place, rng = self.cfg, self.model, self.place, self.rng
        batch = next(self.batches)
        known = batch.transcribed()
        texts = [spoken(" ".join(u.text for u in batch.said[i])) for i in known]
        spelled = [model.pieces.encode(text) for text in texts]
        if not any(spelled):  # of streams in which nothing is said there is nothing to learn
            return torch.zeros(()), dict.fromkeys(self._names(), 0.0)
        chunk = rng.choice(cfg.chunks)
        with torch.no_grad():
            mel, offset = hear(batch.noisy[known], rng, cfg.augment, place.device)
            ahead = rng.choice(cfg.aheads)
            mel = padded(mel, ahead)
            frames = model.encoder.forward_train(mel, chunk, LEFT_FRAMES, offset, ahead)
        generator = torch.Generator().manual_seed(rng.getrandbits(32))
        with place.autocast():
            answers = model.ask(frames, chunk)
            found = model.losses(answers, spelled, losses.same(texts, place.device), generator)
        loss = torch.stack([getattr(cfg, name) * value for name, value in found.items()]).sum()
        return loss, {name: value.item() for name, value in found.items()}


def start(cfg: Stage1Config, device: str = "cpu") -> Trainer:
    return Trainer(cfg, find_place(device, cfg.bf16))


if __name__ == "__main__":
    main("stage1", __doc__, lambda path, device: start(read_config(Stage1Config, path), device))
