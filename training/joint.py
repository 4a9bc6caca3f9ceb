"""Bridge: Q-Former, stop head and LLM adapters learn to write what the adapted ear hears.

The encoder and CTC head are frozen. A row is one segment: prefix, then for every chunk its query
embeddings and the words that end at least `delay` before the chunk does (DESIGN 2). Words are
placed by forced alignment on the streaming posteriors of the same distorted audio.

`python -m training.joint CONFIG.toml --work DIR [--resume]`
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from sparqle_stream.config import (
    FRAME_SAMPLES,
    FRAMES_PER_CTC,
    FRAMES_PER_QUERY,
    QUERY_MS,
    SAMPLE_RATE_HZ,
    StreamOptions,
)
from sparqle_stream.errors import ConfigError
from sparqle_stream.pieces import BLANK
from sparqle_stream.tasks import TRANSCRIBE
from training.align import BAD_ALIGNMENT, align_rows
from training.bridge import Bridge, JointConfig, load_config
from training.hearing import hear, padded
from training.loop import Run, main, warmed
from training.place import HERE, Place, find_place
from training.prompts import draw_instruction
from training.rows import Row, interleave, merged
from training.simulate import simulate
from training.sources import SHARE_SEED, Feed, make_feed, warn_of_plain
from training.text import is_spelled_out, spoken, written

if TYPE_CHECKING:
    from training.data import Utterance

FRAME_MS = FRAME_SAMPLES * 1000 // SAMPLE_RATE_HZ
LONG_WORD_MS = 600  # a word that ends this much after a seam may have begun before it


def read_sentences(path: Path) -> list[str]:
    """The lines of a text whose words are all spelled out. Raises ConfigError where none is."""
    lines = path.read_text().splitlines()
    found = [line for line in lines if spoken(line) and is_spelled_out(line)]
    if not found:
        raise ConfigError(
            f"none of the {len(lines)} lines of {path} can be read as it is spoken",
            hint="a sentence a line, in ASCII, numbers and abbreviations spelled out",
        )
    return found


class Trainer(Run):
    """The bridge: batches of text and of audio, and their losses."""

    name, result, shown = "joint", "bridge.safetensors", ("text", "stop")

    def __init__(self, cfg: JointConfig, place: Place = HERE) -> None:
        super().__init__(cfg.steps, cfg.ema, cfg.accumulate, place)
        torch.manual_seed(cfg.seed)
        self.cfg, self.bridge = cfg, Bridge(cfg, bf16=place.bf16).to(place.device)
        self.ready(self.bridge.groups(cfg.lr, cfg.lr_llm))
        self.sentences = read_sentences(Path(cfg.text)) if cfg.text else []

    def weights(self) -> dict[str, Tensor]:
        return self.bridge.trained()

    def load(self, weights: dict[str, Tensor]) -> None:
        self.bridge.load_trained(weights)

    def make_feed(self, share: int) -> Feed:
        return make_feed(self.cfg, self.cfg.seed + 17 * self.step + 1 + SHARE_SEED * share)

    def warm_up(self, group: int) -> float:
        return warmed(self.step + 1, self.cfg.warmup)

    @torch.no_grad()
    def listen(self, pcm: Tensor, chunk: int, ahead: int) -> tuple[Tensor, Tensor]:
        """PCM (B, S) through the frozen ear -> frames (B, T, W), log-probs (B, T / 2, V)."""
        mel, offset = hear(pcm, self.rng, self.cfg.augment, self.place.device)
        frames = self.bridge.encoder.forward_train(padded(mel, ahead), chunk, 256, offset, ahead)
        return frames, self.bridge.ctc(frames)

    def place_words(
        self, said: list[list[Utterance]], log_probs: Tensor
    ) -> list[list[tuple[list[int], int]] | None]:
        """Token ids and end (ms) of every word of each row, log_probs (B, T / 2, V).

        None for a row whose words nobody knows for sure, so far as posteriors can tell.
        """
        texts = [" ".join(written(u.text) for u in row) for row in said]
        found: list[list[tuple[list[int], int]] | None] = []
        for words, score in align_rows(log_probs, texts, self.bridge.pieces):
            is_sure = score >= BAD_ALIGNMENT or not words
            placed = [(self._tokens(word.text), word.end_ms) for word in words]
            found.append(placed if is_sure else None)
        return found

    def draw_task(self, said: list[Utterance]) -> str:
        """One of the config's tasks that everything said in a stream has a target for."""
        can = [
            task
            for task in self.cfg.tasks
            if task == TRANSCRIBE or all(task in u.targets for u in said)
        ]
        return self.rng.choice(can) if can and said else TRANSCRIBE

    def place_target(
        self, said: list[Utterance], task: str, late_ms: int
    ) -> list[tuple[list[int], int]]:
        """Token ids and end (ms) of the words of a target: all are due when an utterance is over.

        Translations change the order of words, and nobody answers in the middle of a question.
        Frames come `late_ms` after their audio.
        """
        return [
            (self._tokens(word), u.end * 1000 // SAMPLE_RATE_HZ + late_ms)
            for u in said
            for word in u.targets[task].split()
        ]

    def _tokens(self, word: str) -> list[int]:
        return list(self.bridge.tokenizer.encode(" " + word))

    def make_row(
        self,
        words: list[tuple[list[int], int]],
        n_queries: int,
        chunk: int,
        delay_ms: int,
        task: str = TRANSCRIBE,
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
        encode = self.bridge.tokenizer.encode
        asked = draw_instruction(task, self.rng) if task != TRANSCRIBE else ""
        told = encode(" " + asked) if asked else []
        pauses = [i for _ in range(self.cfg.sinks) for i in encode(" ...")]
        prefix = [self.bridge.tokenizer.bos_id, *told, *context, *encode("\n"), *pauses]
        return interleave(words, n_queries, chunk_queries, delay_ms, prefix, first, n_again)

    def blur(self, log_probs: Tensor) -> Tensor:
        """Makes posteriors of known audio as unsure as those of strangers will be."""
        gen = torch.Generator().manual_seed(self.rng.getrandbits(32))
        b, t, v = log_probs.shape
        device = log_probs.device
        hit = torch.rand(b, t, 1, generator=gen).to(device) < self.cfg.blur
        noise = torch.randn(b, t, v, generator=gen).to(device) * 2.0
        heat = 1.0 + 1.5 * torch.rand(b, 1, 1, generator=gen).to(device)
        blurred = ((log_probs + noise) / heat).log_softmax(dim=-1)
        return torch.where(hit, blurred, log_probs)

    def hear_batch(self) -> tuple[Tensor, list[Row]]:
        """Queries (B, Q, E) of distorted audio, and the rows that are to be written."""
        cfg, bridge = self.cfg, self.bridge
        batch = next(self.batches)
        chunk, ahead = self.rng.choice(cfg.chunks), self.rng.choice(cfg.aheads)
        frames, log_probs = self.listen(batch.noisy, chunk, ahead)
        tasks = [self.draw_task(said) for said in batch.said]
        spoken = [i for i in batch.transcribed() if tasks[i] == TRANSCRIBE]
        placed = self.place_words([batch.said[i] for i in spoken], log_probs[spoken])
        of_row = dict(zip(spoken, placed, strict=True))
        keep, rows, delays = [], [], []
        for i, (said, task) in enumerate(zip(batch.said, tasks, strict=True)):
            words = of_row.get(i)
            if task != TRANSCRIBE:
                words = self.place_target(said, task, ahead * FRAME_MS)
            if words is None:
                continue
            delay = self.pick_wait(ahead)
            keep.append(i)
            delays.append(delay)
            n_queries = frames.shape[1] // FRAMES_PER_QUERY
            rows.append(self.make_row(words, n_queries, chunk, delay, task))
        if not rows:  # nothing that anybody knows for sure
            return frames.new_zeros(0, 0, bridge.llm.cfg.width), []
        told = torch.tensor(delays, device=frames.device)
        with self.place.autocast():
            queries = bridge.qformer.forward_train(
                frames[keep].to(bridge.qformer.out.weight.dtype),
                self.blur(log_probs[keep]),
                chunk,
                told,
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
            delay = self.pick_wait(self.rng.choice(self.cfg.aheads))
            delays.append(delay)
            words = [(self._tokens(word.text), word.end_ms) for word in sketch.words]
            rows.append(self.make_row(words, n_queries, chunk, delay))
        device = self.place.device
        silent = torch.zeros(len(sketches), n_queries, bridge.qformer.cfg.width, device=device)
        before, told = torch.zeros_like(posterior[:, :1]), torch.tensor(delays)
        with self.place.autocast():
            normed = bridge.qformer.out_norm(silent)
            queries = bridge.qformer.embed(
                normed, posterior.to(device), before.to(device), told.to(device)
            )
        return queries, rows

    def draw_texts(self, n_words: int) -> list[str]:
        """Transcripts, or sentences of the file, `n_words` or a little more together."""
        if not self.sentences or self.rng.random() > self.cfg.p_sentence:
            return self.sampler.texts(n_words)
        out: list[str] = []
        while sum(len(text.split()) for text in out) < n_words:
            out.append(self.rng.choice(self.sentences))
        return out

    def pick_wait(self, ahead: int) -> int:
        """What is left of a delay (ms) after the look-ahead: the default's, or any."""
        if self.rng.random() < self.cfg.p_default_delay:
            return max(0, StreamOptions().delay_ms - ahead * FRAME_MS)
        return QUERY_MS * self.rng.randrange(13)

    def batch_loss(self) -> tuple[Tensor, dict[str, float]]:
        cfg = self.cfg
        is_text = self.step < cfg.text_steps or self.rng.random() < cfg.p_text
        queries, rows = self.read_batch() if is_text else self.hear_batch()
        text = stop = torch.zeros(())
        right = 0.0
        if rows:
            text, stop, right = self.losses(*merged(queries, rows, cfg.merge))
        values = {"text": text.item(), "stop": stop.item(), "right": right}
        loss = text + cfg.stop_weight * stop
        return loss, values | {"rows": len(rows), "is_text": is_text}

    def embed_rows(self, queries: Tensor, rows: list[Row]) -> Tensor:
        """What the LLM reads of rows whose queries are (B, Q, E), padded on the right: (B, N, E);
        some tokens are others than were written."""
        llm, rng = self.bridge.llm, self.rng
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
                    ids[i, j] = rng.randrange(100, llm.cfg.vocab)
                else:
                    ids[i, j] = value
        device = queries.device
        index = query_at.to(device)[:, :, None].expand(-1, -1, queries.shape[2])
        text_embeds = llm.embed(ids.to(device))
        asked = queries.to(text_embeds.dtype).gather(1, index)
        return torch.where(is_query.to(device), asked, text_embeds)

    def losses(self, queries: Tensor, rows: list[Row]) -> tuple[Tensor, Tensor, float]:
        """Cross-entropy of the text, of the stop decisions, and the share of tokens right."""
        bridge, embeds = self.bridge, self.embed_rows(queries, rows)
        longest, device = embeds.shape[1], embeds.device
        with self.place.autocast():
            hidden = bridge.llm.forward_train(embeds)
        flat = hidden.flatten(0, 1)
        stop_at = [i * longest + j for i, row in enumerate(rows) for j in row.stop_at]
        stop_to = torch.tensor([s for row in rows for s in row.stop], device=device)
        decided = bridge.stop(flat[stop_at].float())[:, 0]
        stop = F.binary_cross_entropy_with_logits(decided, stop_to)
        text_at = [i * longest + j for i, row in enumerate(rows) for j in row.text_at]
        text_to = torch.tensor([t for row in rows for t in row.text_ids], device=device)
        if not text_at:
            return stop.new_zeros(()), stop, 0.0
        with self.place.autocast():
            logits = bridge.llm.logits(flat[text_at]).float()
        right = (logits.argmax(dim=-1) == text_to).float().mean().item()
        return F.cross_entropy(logits, text_to), stop, right


def start(cfg: JointConfig, device: str = "cpu") -> Trainer:
    """Raises ConfigError for a bridge that could be trained but not served."""
    if not cfg.is_servable:
        raise ConfigError(
            "the engine serves no bridge with merge or sinks", hint="they are for training.ablate"
        )
    warn_of_plain(cfg.sources)
    return Trainer(cfg, find_place(device, cfg.bf16))


if __name__ == "__main__":
    main("joint", __doc__, lambda path, device: start(load_config(path), device))
