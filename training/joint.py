"""Bridge: Q-Former, stop head and LLM adapters learn to write what the adapted ear hears.

The encoder and CTC head are frozen. A row is one segment: prefix, then for every chunk its query
embeddings and the words that end at least `delay` before the chunk does (DESIGN 2). Words are
placed by forced alignment on the streaming posteriors of the same distorted audio.

`python -m training.joint CONFIG.toml --work DIR [--resume]`
"""

from __future__ import annotations

import random
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from sparqle_stream import features
from sparqle_stream.config import (
    FRAMES_PER_CTC,
    FRAMES_PER_QUERY,
    QUERY_MS,
    CtcConfig,
    EncoderConfig,
    FeatureConfig,
    QFormerConfig,
)
from sparqle_stream.ctc import BLANK, CtcHead, CtcPieces
from sparqle_stream.encoder import SILENT_MEL, Encoder
from sparqle_stream.models import load_llm
from sparqle_stream.qformer import QFormer
from training.adapt import Source, make_sampler
from training.align import AlignedWord, align_words
from training.corpus import Pack
from training.data import AugmentConfig, Stream, spec_augment, stack
from training.loop import Run, main, part
from training.lora import adapter_weights, attach
from training.simulate import simulate
from training.text import is_spelled_out, written

if TYPE_CHECKING:
    from sparqle_stream.llm import Llm

LONG_WORD_MS = 600  # a word that ends this much after a seam may have begun before it
BAD_ALIGNMENT = -1.2  # mean log-probability a frame; below it the transcript is not this audio's


@dataclass(frozen=True, slots=True)
class JointConfig:
    ear: str  # weights of training.adapt
    pieces: str
    llm: str
    sources: tuple[Source, ...]
    noise: str = ""
    steps: int = 600
    streams: int = 8
    stream_s: float = 12.8
    lr: float = 5e-4
    warmup: int = 40
    rank: int = 32
    kind: str = "window"
    ema: float = 0.99
    seed: int = 0
    chunks: tuple[int, ...] = (8, 16, 16, 16, 16, 32)
    p_default_delay: float = 0.5
    p_seam: float = 0.25  # rows that start in the middle of a segment, primed with its text
    p_empty: float = 0.06  # rows of noise without words
    corrupt_tokens: float = 0.06  # fed-back tokens replaced at random
    blur: float = 0.12  # CTC frames whose posteriors are mixed with another frame's
    text_steps: int = 200  # first steps on text alone: reading pieces, before hearing them
    p_text: float = 0.1  # later steps on text alone
    text_rows: int = 8
    text: str = ""  # a file of sentences to read, beside the transcripts
    p_sentence: float = 0.6  # rows of text alone that come from it
    stop_weight: float = 1.0
    augment: AugmentConfig = field(default_factory=AugmentConfig)


def load_config(path: Path) -> JointConfig:
    raw = tomllib.loads(path.read_text())
    raw["sources"] = tuple(Source(**s) for s in raw["sources"])
    raw["augment"] = AugmentConfig(**raw.get("augment", {}))
    if "chunks" in raw:
        raw["chunks"] = tuple(raw["chunks"])
    return JointConfig(**raw)


@dataclass(slots=True)
class Row:
    """One segment as the LLM sees it. `kinds`: 'q' with a query index or 't' with a token id."""

    items: list[tuple[str, int]]
    text_at: list[int]  # positions whose next token is text ...
    text_ids: list[int]  # ... and which
    stop_at: list[int]  # positions at which the stop head decides ...
    stop: list[float]  # ... 1 to stop, 0 to write on


def interleave(
    words: list[tuple[list[int], int]],
    n_queries: int,
    chunk_queries: int,
    delay_ms: int,
    prefix: list[int],
    first_chunk: int = 0,
    n_again: int = 0,
) -> Row:
    """Words (token ids, end in ms) and queries -> the row that training and serving share.

    A word belongs to the first chunk whose end is `delay_ms` or more after the word's end; what
    is still open after the last chunk is not taught. A row that begins at `first_chunk` is a
    segment after a seam: it hears the last `n_again` queries before it once more, because words
    that they hold are still to be written.
    """
    row = Row([("t", i) for i in prefix], [], [], [], [])
    seam = first_chunk * chunk_queries
    row.items += [("q", i) for i in range(max(0, seam - n_again), seam)]
    pending = list(words)
    for chunk in range(-(-n_queries // chunk_queries)):
        first = chunk * chunk_queries
        end_ms = min(first + chunk_queries, n_queries) * QUERY_MS
        due = []
        while pending and pending[0][1] + delay_ms <= end_ms:
            due += pending.pop(0)[0]
        if chunk < first_chunk:
            continue
        row.items += [("q", i) for i in range(first, min(first + chunk_queries, n_queries))]
        for token in due:
            row.stop_at.append(len(row.items) - 1)
            row.stop.append(0.0)
            row.text_at.append(len(row.items) - 1)
            row.text_ids.append(token)
            row.items.append(("t", token))
        row.stop_at.append(len(row.items) - 1)
        row.stop.append(1.0)
    return row


class Bridge(torch.nn.Module):
    """The frozen ear and LLM with what is trained between and inside them."""

    def __init__(self, cfg: JointConfig) -> None:
        super().__init__()
        self.pieces = CtcPieces.load(Path(cfg.pieces))
        ear = load_file(cfg.ear)
        self.encoder = Encoder(EncoderConfig())
        self.encoder.load_state_dict(part(ear, "encoder"))
        self.ctc = CtcHead(CtcConfig(n_pieces=self.pieces.size))
        self.ctc.load_state_dict(part(ear, "ctc"))
        llm, self.tokenizer = load_llm(cfg.llm, torch.bfloat16)
        self.llm: Llm = llm
        for frozen in (self.encoder, self.ctc, self.llm):
            frozen.requires_grad_(False)
        self.encoder.bfloat16()
        self.adapters = attach(self.llm, cfg.rank)
        self.stop = torch.nn.Linear(llm.cfg.width, 1)
        torch.nn.init.zeros_(self.stop.weight)
        self.qformer = QFormer(QFormerConfig(kind=cfg.kind, n_pieces=self.pieces.size))
        self.qformer.posterior.pieces.data.copy_(self.piece_embeddings())
        # Silence reads as an ellipsis at first: a zero vector would be blown up by the first norm.
        pause = torch.tensor([self.tokenizer.encode(" ...")])
        self.qformer.delay.weight.data.copy_(0.5 * self.llm.embed(pause)[0].float().mean(dim=0))

    @torch.no_grad()
    def piece_embeddings(self) -> Tensor:
        """e(piece): the mean LLM embedding of the piece's own tokens; blank is zero."""
        table = torch.zeros(self.pieces.size, self.llm.cfg.width)
        for piece in range(1, self.pieces.size):
            ids = torch.tensor([self.tokenizer.encode(self.pieces.piece(piece))])
            table[piece] = self.llm.embed(ids)[0].float().mean(dim=0)
        return table

    def trained(self) -> dict[str, Tensor]:
        """What goes into bridge.safetensors (the CTC head is written beside it by export)."""
        out = {f"qformer.{k}": v for k, v in self.qformer.state_dict().items()}
        out |= {f"stop.{k}": v for k, v in self.stop.state_dict().items()}
        return out | adapter_weights(self.adapters)

    def groups(self, lr: float) -> list[dict[str, Any]]:
        """Parameters with their peak rates. Adam moves every entry by about its rate: tables that
        begin as LLM embeddings (entries near 0.1) or as identities would be lost at LoRA's."""
        posterior = self.qformer.posterior
        near_text = [posterior.pieces, posterior.maps, self.qformer.delay.weight]
        known = {id(p) for p in near_text}
        rest = [p for p in self.qformer.parameters() if id(p) not in known]
        adapters = [p for a in self.adapters.values() for p in (a.a, a.b)]
        return [
            {"params": adapters + list(self.stop.parameters()), "peak": lr},
            {"params": rest, "peak": 0.4 * lr},
            {"params": near_text, "peak": 0.08 * lr},
        ]

    def load_trained(self, weights: dict[str, Tensor]) -> None:
        self.qformer.load_state_dict(part(weights, "qformer"))
        self.stop.load_state_dict(part(weights, "stop"))
        for name, adapter in self.adapters.items():
            adapter.a.data.copy_(weights[f"lora.{name}.a"])
            adapter.b.data.copy_(weights[f"lora.{name}.b"])


class Trainer(Run):
    """The bridge: batches of text and of audio, and their losses."""

    name, result, shown = "joint", "bridge.safetensors", ("text", "stop")

    def __init__(self, cfg: JointConfig) -> None:
        super().__init__(cfg.steps, cfg.ema)
        torch.manual_seed(cfg.seed)
        self.cfg, self.bridge = cfg, Bridge(cfg)
        self.ready(self.bridge.groups(cfg.lr))
        self.noise = Pack(Path(cfg.noise)) if cfg.noise else None
        self.sentences = Path(cfg.text).read_text().splitlines() if cfg.text else []

    def weights(self) -> dict[str, Tensor]:
        return self.bridge.trained()

    def load(self, weights: dict[str, Tensor]) -> None:
        self.bridge.load_trained(weights)

    def seed(self) -> None:
        cfg = self.cfg
        seed = cfg.seed + 17 * self.step + 1
        self.rng = random.Random(seed)
        self.sampler = make_sampler(cfg.sources, cfg.noise, cfg.augment, cfg.stream_s, seed)

    def warm_up(self, group: int) -> float:
        return min(1.0, (self.step + 1) / self.cfg.warmup)

    def draw(self) -> Stream:
        """A stream of speech, or of noise that must stay without words."""
        if self.noise is None or self.rng.random() > self.cfg.p_empty:
            return self.sampler.stream()
        n = round(self.cfg.stream_s * 16_000)
        pcm = np.resize(self.noise.pcm(self.rng.choice(self.noise.clips)), n)
        gain = np.float32(10 ** (self.rng.uniform(-30, 0) / 20))
        return Stream(pcm, pcm * gain, [])

    @torch.no_grad()
    def listen(self, streams: list[Stream], chunk: int) -> tuple[Tensor, Tensor]:
        """Distorted audio through the frozen ear -> frames (B, T, W), log-probs (B, T / 2, V)."""
        everyone = torch.ones(len(streams), dtype=torch.bool)
        state = features.init_state(FeatureConfig(), len(streams))
        pcm = stack(streams, "noisy")
        mel = features.step(FeatureConfig(), state, pcm, everyone)[1]
        if self.rng.random() < 0.3:
            mel = spec_augment(mel, self.rng, SILENT_MEL)
        offset = torch.tensor([self.rng.randrange(1500) for _ in streams])
        frames = self.bridge.encoder.forward_train(mel, chunk, 256, offset)
        return frames, self.bridge.ctc(frames)

    def place_words(self, stream: Stream, log_probs: Tensor) -> list[tuple[list[int], int]] | None:
        """Token ids and end (ms) of every word; None where nobody knows them for sure."""
        if not stream.is_transcribed:
            return None
        text = " ".join(written(u.text) for u in stream.utterances)
        if not text:
            return []
        words, score = align_words(log_probs.numpy(), text, self.bridge.pieces)
        if score < BAD_ALIGNMENT:
            return None
        return [(self._tokens(word), _end_ms(word)) for word in words]

    def _tokens(self, word: AlignedWord) -> list[int]:
        return list(self.bridge.tokenizer.encode(" " + word.text))

    def make_row(
        self, words: list[tuple[list[int], int]], n_queries: int, chunk: int, delay_ms: int
    ) -> Row:
        """A whole segment, or with `p_seam` one that begins later and is primed with its text."""
        chunk_queries, first, n_again = chunk // FRAMES_PER_QUERY, 0, 0
        context: list[int] = []
        n_chunks = -(-n_queries // chunk_queries)
        if self.rng.random() < self.cfg.p_seam and n_chunks > 4:
            first = self.rng.randrange(1, n_chunks // 2)
            seam_ms = first * chunk_queries * QUERY_MS
            said = [t for t, end in words if end + delay_ms <= seam_ms]
            # The engine's seams hear the time of the delay again, its segments after a pause do
            # not: only where nobody speaks can a row be either.
            is_open = any(-delay_ms < end - seam_ms <= LONG_WORD_MS for _, end in words)
            if is_open or self.rng.random() < 0.5:
                n_again = -(-delay_ms // QUERY_MS)
            context = [i for ids in said[-self.rng.randint(1, 8) :] for i in ids][-40:]
        newline = list(self.bridge.tokenizer.encode("\n"))
        prefix = [self.bridge.tokenizer.bos_id, *context, *newline]
        return interleave(words, n_queries, chunk_queries, delay_ms, prefix, first, n_again)

    def blur(self, log_probs: Tensor) -> Tensor:
        """Makes posteriors of known audio as unsure as those of strangers will be."""
        gen = torch.Generator().manual_seed(self.rng.getrandbits(32))
        b, t, v = log_probs.shape
        hit = torch.rand(b, t, 1, generator=gen) < self.cfg.blur
        noise = torch.randn(b, t, v, generator=gen) * 2.0
        heat = 1.0 + 1.5 * torch.rand(b, 1, 1, generator=gen)
        blurred = ((log_probs + noise) / heat).log_softmax(dim=-1)
        return torch.where(hit, blurred, log_probs)

    def hear_batch(self) -> tuple[Tensor, list[Row]]:
        """Queries (B, Q, E) of distorted audio, and the rows that are to be written."""
        cfg, bridge = self.cfg, self.bridge
        streams = [self.draw() for _ in range(cfg.streams)]
        chunk = self.rng.choice(cfg.chunks)
        frames, log_probs = self.listen(streams, chunk)
        keep, rows, delays = [], [], []
        for i, stream in enumerate(streams):
            words = self.place_words(stream, log_probs[i])
            if words is None:
                continue
            delay = self.pick_delay()
            keep.append(i)
            delays.append(delay)
            n_queries = frames.shape[1] // FRAMES_PER_QUERY
            rows.append(self.make_row(words, n_queries, chunk, delay))
        with torch.autocast("cpu", torch.bfloat16):
            queries = bridge.qformer.forward_train(
                frames[keep], self.blur(log_probs[keep]), chunk, torch.tensor(delays)
            )
        return queries, rows

    def read_batch(self) -> tuple[Tensor, list[Row]]:
        """The same from text alone: posteriors are simulated, the Q-Former is silent (DESIGN 5.3).

        Text has no long silences, needs no encoder, and its mapping is clean: the LLM learns to
        follow the pieces in a tenth of the time that audio would take.
        """
        bridge, chunk = self.bridge, self.rng.choice(self.cfg.chunks)
        chunk_queries = chunk // FRAMES_PER_QUERY
        sketches = [
            simulate(self.draw_texts(24), bridge.pieces, self.rng)
            for _ in range(self.cfg.text_rows)
        ]
        longest = max(len(sketch.posterior) for sketch in sketches)
        n_queries = -(-longest // (FRAMES_PER_CTC * chunk_queries)) * chunk_queries
        posterior = torch.zeros(len(sketches), n_queries * 2, bridge.pieces.size)
        posterior[:, :, BLANK] = 1.0
        rows, delays = [], []
        for i, sketch in enumerate(sketches):
            posterior[i, : len(sketch.posterior)] = torch.from_numpy(sketch.posterior)
            delay = self.pick_delay()
            delays.append(delay)
            words = [(self._tokens(word), _end_ms(word)) for word in sketch.words]
            rows.append(self.make_row(words, n_queries, chunk, delay))
        silent = torch.zeros(len(sketches), n_queries, bridge.qformer.cfg.width)
        before = torch.zeros_like(posterior[:, :1])
        with torch.autocast("cpu", torch.bfloat16):
            queries = bridge.qformer.embed(silent, posterior, before, torch.tensor(delays))
        return queries, rows

    def draw_texts(self, n_words: int) -> list[str]:
        """Transcripts, or sentences of the file, `n_words` or a little more together."""
        if not self.sentences or self.rng.random() > self.cfg.p_sentence:
            return self.sampler.texts(n_words)
        out: list[str] = []
        while sum(len(text.split()) for text in out) < n_words:
            text = self.rng.choice(self.sentences)
            out += [text] if is_spelled_out(text) else []
        return out

    def pick_delay(self) -> int:
        default = self.rng.random() < self.cfg.p_default_delay
        return 240 if default else QUERY_MS * self.rng.randrange(13)

    def train_step(self) -> dict[str, float]:
        cfg = self.cfg
        is_text = self.step < cfg.text_steps or self.rng.random() < cfg.p_text
        queries, rows = self.read_batch() if is_text else self.hear_batch()
        if not rows:
            return {"text": 0.0, "stop": 0.0, "rows": 0}
        text, stop, right = self.losses(queries.bfloat16(), rows)
        norm = self.learn(text + cfg.stop_weight * stop, 1.0)
        return {
            "text": text.item(),
            "stop": stop.item(),
            "right": right,
            "norm": norm,
            "rows": len(rows),
            "is_text": is_text,
        }

    def losses(self, queries: Tensor, rows: list[Row]) -> tuple[Tensor, Tensor, float]:
        """Cross-entropy of the text, of the stop decisions, and the share of tokens right."""
        bridge, rng = self.bridge, self.rng
        # Few different shapes: memory that is kept for each new one grew to 12 GB in 200 steps.
        longest = -(-max(len(row.items) for row in rows) // 32) * 32
        ids = torch.zeros(len(rows), longest, dtype=torch.long)
        query_at = torch.zeros(len(rows), longest, dtype=torch.long)
        is_query = torch.zeros(len(rows), longest, 1, dtype=torch.bool)
        for i, row in enumerate(rows):
            for j, (kind, value) in enumerate(row.items):
                if kind == "q":
                    query_at[i, j], is_query[i, j] = value, True
                elif rng.random() < self.cfg.corrupt_tokens and j > 3:
                    ids[i, j] = rng.randrange(100, bridge.llm.cfg.vocab)
                else:
                    ids[i, j] = value
        index = query_at[:, :, None].expand(-1, -1, queries.shape[2])
        embeds = torch.where(is_query, queries.gather(1, index), bridge.llm.embed(ids))
        hidden = bridge.llm.forward_train(embeds)
        flat = hidden.flatten(0, 1)
        stop_at = [i * longest + j for i, row in enumerate(rows) for j in row.stop_at]
        stop_to = torch.tensor([s for row in rows for s in row.stop])
        decided = bridge.stop(flat[stop_at].float())[:, 0]
        stop = F.binary_cross_entropy_with_logits(decided, stop_to)
        text_at = [i * longest + j for i, row in enumerate(rows) for j in row.text_at]
        text_to = torch.tensor([t for row in rows for t in row.text_ids])
        if not text_at:
            return stop.new_zeros(()), stop, 0.0
        logits = bridge.llm.logits(flat[text_at]).float()
        right = (logits.argmax(dim=-1) == text_to).float().mean().item()
        return F.cross_entropy(logits, text_to), stop, right


def _end_ms(word: AlignedWord) -> int:
    return (word.end_frame + 1) * FRAMES_PER_CTC * 20


if __name__ == "__main__":
    main("joint", __doc__, lambda path: Trainer(load_config(path)))
