"""Fakes for tests, ours and those of programs that use the engine. Seeded, small, no files.

`tiny_model` is a whole model with random weights: it runs every stage and writes nonsense.
`OracleBatch` stands in for the engine's `Batch` and is a perfect model of a language of its own:
`say` spells words as audio, one letter every 40 ms, and the oracle writes exactly those words, with
the delay, the slots and the prefixes of a real one. So what comes out is known beforehand.
"""

from __future__ import annotations

import contextlib
import itertools
import re
import string
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from sparqle_stream.config import (
    FRAME_SAMPLES,
    FRAMES_PER_CTC,
    FRAMES_PER_QUERY,
    SAMPLE_RATE_HZ,
    CtcConfig,
    EncoderConfig,
    EngineConfig,
    LlmConfig,
    ModelConfig,
    QFormerConfig,
)
from sparqle_stream.messages import Event, Final, Word
from sparqle_stream.session import Session, Start, Turn
from sparqle_stream.stages import StepResult

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from sparqle_stream.ctc import CtcHead
    from sparqle_stream.engine import Engine
    from sparqle_stream.llm import Llm
    from sparqle_stream.models import Model
    from sparqle_stream.pieces import CtcPieces
    from sparqle_stream.qformer import QFormer
    from sparqle_stream.torch_model import SparqleModel

Floats = npt.NDArray[np.float32]

CTC_MS = FRAMES_PER_CTC * FRAME_SAMPLES * 1000 // SAMPLE_RATE_HZ
LETTER_SAMPLES = FRAMES_PER_CTC * FRAME_SAMPLES
CODE_LEVELS = 64  # of amplitude in `say`
LONGEST_WORD = 50  # letters that the oracle can hear
LETTERS = string.ascii_lowercase
# Blank, letters that begin a word, letters inside a word.
PIECES = ["<blank>", *("▁" + x for x in LETTERS), *LETTERS, "'"]
SYLLABLES = [" " + a + b for a in "bdfgklm" for b in "aeiouy"]  # 42
FIRST_BYTE = 2  # after padding and the beginning
VOCAB = FIRST_BYTE + 256 + len(SYLLABLES)


class ByteTokenizer:
    """Ids of UTF-8 bytes, some syllables with their space, and a beginning; encodes bytes only."""

    bos_id = 1

    def encode(self, text: str) -> list[int]:
        return [FIRST_BYTE + byte for byte in text.encode()]

    def decode(self, ids: list[int]) -> str:
        """Bytes that are not UTF-8 (yet) come out as U+FFFD."""
        return b"".join(map(self._bytes, ids)).decode(errors="replace")

    def _bytes(self, token: int) -> bytes:
        if token < FIRST_BYTE:
            return b""
        if token < FIRST_BYTE + 256:
            return bytes([token - FIRST_BYTE])
        return SYLLABLES[token - FIRST_BYTE - 256].encode()


def tiny_pieces() -> CtcPieces:
    """CTC pieces of single letters."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE

    from sparqle_stream.pieces import CtcPieces

    vocab = {piece: i for i, piece in enumerate([*PIECES, "▁"])}
    tokenizer = Tokenizer(BPE(vocab=vocab, merges=[("▁", x) for x in LETTERS]))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    return CtcPieces(tokenizer)


def tiny_config(n_layers: int = 2) -> ModelConfig:
    n_pieces = len(PIECES) + 1
    return ModelConfig(
        name="tiny",
        encoder=EncoderConfig(width=64, n_heads=2, n_layers=n_layers, left_frames=64),
        ctc=CtcConfig(width=64, hidden=64, n_pieces=n_pieces, n_blocks=2, kernel=4),
        qformer=QFormerConfig(
            width=64,
            n_heads=2,
            n_layers=n_layers,
            ffn=128,
            encoder_width=64,
            llm_width=64,
            n_pieces=n_pieces,
            frame_ring=32,
            query_ring=16,
        ),
        llm=LlmConfig(
            width=64,
            n_layers=n_layers,
            n_heads=2,
            n_kv_heads=1,
            head_width=32,
            ffn=128,
            vocab=VOCAB,
        ),
    )


def tiny_model(seed: int = 0, n_layers: int = 2) -> SparqleModel:
    """A model of random weights, 0.3 M of them, that hears letters and writes syllables."""
    from sparqle_stream.ctc import CtcHead
    from sparqle_stream.encoder import Encoder
    from sparqle_stream.llm import Llm
    from sparqle_stream.qformer import QFormer
    from sparqle_stream.torch_model import SparqleModel

    cfg = tiny_config(n_layers)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder, ctc = Encoder(cfg.encoder), CtcHead(cfg.ctc)
        qformer, llm = QFormer(cfg.qformer), Llm(cfg.llm)
        for module in (encoder, ctc, qformer, llm):
            module.eval().requires_grad_(False)
        _liven(ctc, qformer, llm)
    return SparqleModel(
        cfg=cfg,
        encoder=encoder,
        ctc=ctc,
        pieces=tiny_pieces(),
        lexicon=None,
        qformer=qformer,
        llm=llm,
        tokenizer=ByteTokenizer(),
        name=cfg.name,
        weights_hash=f"seed-{seed}",
        device=torch.device("cpu"),
    )


def _liven(ctc: CtcHead, qformer: QFormer, llm: Llm) -> None:
    """Makes random weights talkative: many pieces, queries that differ, tokens that vary.

    Untouched, the CTC head would hear one piece all along, queries would be nothing, and tied
    embeddings would repeat the last token for ever: random signs before the vocabulary untie them.
    """
    ctc.out.weight.mul_(12.0)
    ctc.out.bias[0] = 2.0
    qformer.posterior.pieces.normal_(std=3.0)
    torch.nn.init.normal_(qformer.out.weight, std=0.1)
    torch.nn.init.normal_(qformer.delay.weight, std=0.1)
    llm.tokens.weight.mul_(0.3)
    llm.norm.weight.copy_(torch.randn_like(llm.norm.weight).sign())
    for layer in llm.blocks():
        layer.attn.q_proj.weight.mul_(4.0)
        layer.attn.o_proj.weight.mul_(6.0)
        layer.mlp.down_proj.weight.mul_(6.0)
    spoken = [FIRST_BYTE + ord(x) for x in LETTERS + " ,."]
    llm.tokens.weight[FIRST_BYTE : FIRST_BYTE + 256] *= 0.7
    llm.tokens.weight[spoken] *= 1.7
    llm.tokens.weight[FIRST_BYTE + 256 :] *= 1.6
    llm.stop.weight.mul_(4.0)
    llm.stop.bias.fill_(0.0)


class WordTokenizer:
    """Gives every word, with its space, an id of its own the first time it is seen."""

    bos_id = 1

    def __init__(self) -> None:
        self._words = ["", ""]
        self._ids: dict[str, int] = {}

    def encode(self, text: str) -> list[int]:
        return [self._id(piece) for piece in re.findall(r" ?\S+|\s+", text)]

    def decode(self, ids: list[int]) -> str:
        return "".join(self._words[i] for i in ids)

    def _id(self, piece: str) -> int:
        if piece not in self._ids:
            self._ids[piece] = len(self._words)
            self._words.append(piece)
        return self._ids[piece]


def oracle_model() -> SparqleModel:
    """The model to give an engine whose batch is an `OracleBatch`: only its tokenizer works."""
    return replace(tiny_model(), tokenizer=WordTokenizer())


def vocabulary(n: int, n_syllables: int = 2) -> list[str]:
    """n different words to `say`, of as many syllables of two letters."""
    syllables = [a + b for a in "bdfgklmnprst" for b in "aeiou"]
    words = itertools.product(syllables, repeat=n_syllables)
    return ["".join(word) for word in itertools.islice(words, n)]


def say(words: Sequence[str], gap_ms: int = 160) -> Floats:
    """Words of a to z as audio (S,): 40 ms of constant level per letter, silence after words."""
    gap = np.zeros(gap_ms * SAMPLE_RATE_HZ // 1000 // LETTER_SAMPLES * LETTER_SAMPLES, np.float32)
    parts = [np.zeros(LETTER_SAMPLES, np.float32)]
    for word in words:
        for i, letter in enumerate(word):
            code = 1 + LETTERS.index(letter) + (0 if i == 0 else len(LETTERS))
            parts.append(np.full(LETTER_SAMPLES, code / CODE_LEVELS, np.float32))
        parts.append(gap)
    return np.concatenate(parts)


@dataclass(slots=True)
class _OracleSlot:
    """What a perfect LLM knows: letters since the segment began, its prefix, what it wrote."""

    codes: list[int] = field(default_factory=list)  # one per CTC frame
    ahead: Floats = field(default_factory=lambda: np.zeros(0, np.float32))  # PCM of the look-ahead
    heard_from: int = 0  # frame at which the slot's first query begins
    context: list[str] = field(default_factory=list)
    n_written: int = 0  # words of the slot
    unsaid: list[int] = field(default_factory=list)  # tokens that were not allowed yet


class OracleBatch:
    """Stands in for `batch.Batch`: writes what `say` spelled. Use it without a detector.

    It knows what a slot can know: words whose end was heard in it, after those of its prefix.
    """

    def __init__(self, model: Model, n_slots: int) -> None:
        self.model = model
        self.n_slots = n_slots
        self.slots = [_OracleSlot() for _ in range(n_slots)]
        self.seam_prefixes: list[str] = []

    def working(self, threads: int) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def state_bytes(self) -> int:
        return 0

    def wipe(self, row: int) -> None:
        self.slots[row] = _OracleSlot()

    def run(self, sessions: Mapping[int, Session]) -> StepResult:
        """One chunk of every session, as `Batch.run`."""
        tokens: dict[int, list[int]] = {}
        for row, session in sessions.items():
            turn = session.next_turn()
            n_allowed = session.hear(self._hear(row, turn, session.ahead_frames)).n_most
            slot = self.slots[row]
            slot.unsaid += self._write(slot, session.wait_ms)
            tokens[row], slot.unsaid = slot.unsaid[:n_allowed], slot.unsaid[n_allowed:]
        return StepResult(tokens)

    def _hear(self, row: int, turn: Turn, ahead_frames: int) -> Floats:
        """The chunk's letters go into the row's slot -> certain CTC log-probabilities (C, V)."""
        if turn.start is Start.SEGMENT:
            self.slots[row] = _OracleSlot(ahead=np.zeros(ahead_frames * FRAME_SAMPLES, np.float32))
        slot = self.slots[row]
        if turn.prefix is not None:
            text = self.model.tokenizer.decode(turn.prefix)
            n_again = turn.n_again * FRAMES_PER_QUERY // FRAMES_PER_CTC
            codes = slot.codes[-(n_again + LONGEST_WORD) :]  # an hour must not cost a square
            self.slots[row] = slot = _OracleSlot(
                codes, slot.ahead, len(codes) - n_again, text.split()
            )
            self.seam_prefixes += [text] if turn.start is Start.SEAM else []
        pcm = np.concatenate([slot.ahead, turn.pcm])
        pcm, slot.ahead = pcm[: len(turn.pcm)], pcm[len(turn.pcm) :]
        middles = pcm[LETTER_SAMPLES // 2 :: LETTER_SAMPLES]
        codes = np.rint(middles * CODE_LEVELS).astype(int).tolist()
        slot.codes = slot.codes + codes
        log_probs = np.full((len(codes), len(PIECES) + 1), -30.0, np.float32)
        log_probs[range(len(codes)), codes] = 0.0
        return log_probs

    def _write(self, slot: _OracleSlot, wait_ms: int) -> list[int]:
        """Tokens of words that ended at least so long ago and are not written yet."""
        due = len(slot.codes) - wait_ms / CTC_MS
        words = [(word, end) for word, end in _words(slot.codes) if end > slot.heard_from]
        known = [word for word, _ in words]
        n_said = max(
            n
            for n in range(min(len(known), len(slot.context)) + 1)
            if known[:n] == slot.context[len(slot.context) - n :]
        )
        # Said in the prefix counts from the first call on: later words do not change it.
        ready = [word for word, end in words[n_said:] if end <= due]
        new, slot.n_written = ready[slot.n_written :], max(slot.n_written, len(ready))
        return [i for word in new for i in self.model.tokenizer.encode(" " + word)]


def oracle_engine(cfg: EngineConfig | None = None) -> Engine:
    """An engine that hears exactly what `say` spelled; give its streams no detector."""
    from sparqle_stream.engine import Engine

    return Engine(oracle_model(), cfg, make_slots=OracleBatch)


def text_of(events: Iterable[Event]) -> str:
    """The transcript: what the finals append to each other."""
    return "".join(event.text for event in events if isinstance(event, Final))


def words_of(events: Iterable[Event]) -> list[Word]:
    return [word for event in events if isinstance(event, Final) for word in event.words]


def _words(codes: Sequence[int]) -> list[tuple[str, int]]:
    """Words that silence ends, each with the frame after its last letter."""
    out, letters = [], ""
    for frame, code in enumerate(codes):
        if code:
            letters += PIECES[code].removeprefix("▁")
        elif letters:
            out.append((letters, frame))
            letters = ""
    return out
