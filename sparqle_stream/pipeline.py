"""Pipeline: one chunk of PCM (B, S) per stream -> text tokens per stream, for a batch of slots.

    pcm -> features -> encoder -> ctc
                              \\-> qformer -> llm -> tokens
                                            ^ hear(ctc log-probs): writers, a row each

The order of the stages, which `onnx_cpu.stages` follows; tests/onnx_cpu holds both equal. Contract:
every stage is causal and gated by `active` (B,), so a row gives what it gives alone; state is
written in place and the old one is dead after a step. Latency: the end of the chunk, plus
config.FRAME_LAG_SAMPLES, plus the encoder's look-ahead.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sparqle_stream import ctc, encoder, features, llm, qformer
from sparqle_stream.judge import Judge, n_slots
from sparqle_stream.rows import Rows
from sparqle_stream.stages import N_RECENT, Laps

if TYPE_CHECKING:
    from sparqle_stream.decode import Writer
    from sparqle_stream.torch_model import SparqleModel

# CTC log-probs (B, C, V) -> who chooses each row's tokens; None for rows without a chunk.
Hear = Callable[[Tensor], "Sequence[Writer | None]"]


@dataclass(slots=True)
class PipelineState:
    features: features.FeatureState
    encoder: encoder.EncoderState
    ctc: ctc.CtcState
    qformer: qformer.QFormerState
    llm: llm.LlmState
    recent: Tensor  # (B, N_RECENT, E) the last queries, newest last
    judge: Judge | None = None  # of readings, where the model has a prefix for plain text


@dataclass(frozen=True, slots=True)
class ChunkResult:
    log_probs: Tensor  # (B, C, V) CTC
    tokens: list[list[int]]  # per row
    seconds: dict[str, float] = field(default_factory=dict)  # wall clock per stage


def init_state(model: SparqleModel, batch: int) -> PipelineState:
    cfg, device = model.cfg, model.device
    dtype = model.encoder.ln_post.weight.dtype
    llm_dtype = model.llm.norm.weight.dtype
    slots = llm.init_state(
        model.cfg.llm, n_slots(model.text, batch), dtype=llm_dtype, device=device
    )
    judge = None
    if model.text is not None:
        judge = Judge(model.llm, slots, model.text, batch, model.tokenizer.bos_id)
    return PipelineState(
        features=features.init_state(cfg.features, batch, device=device),
        encoder=encoder.init_state(cfg.encoder, batch, dtype=dtype, device=device),
        ctc=ctc.init_state(model.ctc, batch),
        qformer=qformer.init_state(cfg.qformer, batch, dtype=dtype, device=device),
        llm=slots,
        recent=torch.zeros(batch, N_RECENT, cfg.llm.width, dtype=llm_dtype, device=device),
        judge=judge,
    )


def step(
    model: SparqleModel,
    state: PipelineState,
    pcm: Tensor,
    active: Tensor,
    wait_ms: Tensor,
    hear: Hear,
    ahead_frames: int = 0,
) -> tuple[PipelineState, ChunkResult]:
    """pcm (B, S), active (B,), wait_ms (B,) -> tokens per row. S is one chunk of every row.

    wait_ms: delay beyond the look-ahead, which all active rows share. `hear` is called between
    hearing and writing: text that CTC did not hear is not written.
    """
    lap = Laps()
    log_probs, queries = listen(model, state, pcm, Rows.of(active), wait_ms, ahead_frames, lap)
    writers = hear(log_probs)
    lap("captions")
    state.llm, tokens = llm.step(model.llm, state.llm, queries, active, writers, state.judge)
    lap("llm")
    return state, ChunkResult(log_probs, tokens, lap.seconds)


def listen(
    model: SparqleModel,
    state: PipelineState,
    pcm: Tensor,
    rows: Rows,
    wait_ms: Tensor,
    ahead_frames: int,
    lap: Callable[[str], None],
) -> tuple[Tensor, Tensor]:
    """All before the text: pcm (B, S), wait_ms (B,) -> CTC log-probs (B, C, V), queries (B, Q, E).

    With rows by number nothing is read back to the host and no shape depends on data.
    """
    state.features, mel = features.step(model.cfg.features, state.features, pcm, rows)
    lap("features")
    state.encoder, frames = encoder.step(model.encoder, state.encoder, mel, rows, ahead_frames)
    lap("encoder")
    state.ctc, log_probs = ctc.step(model.ctc, state.ctc, frames, rows)
    lap("ctc")
    state.qformer, queries = qformer.step(
        model.qformer, state.qformer, frames, log_probs, wait_ms, rows
    )
    queries = queries.to(state.recent.dtype)
    new = torch.cat([state.recent[rows.index], rows.take(queries)], dim=1)
    state.recent[rows.index] = new[:, -N_RECENT:]
    lap("qformer")
    return log_probs, queries


def reset_rows(state: PipelineState, mask: Tensor) -> None:
    """Rows of `mask` (B,) become new streams: nothing of the old ones is left to see."""
    features.forget_rows(state.features, mask)
    _reset_hearing(state, mask)
    llm.reset_rows(state.llm, mask)
    if state.judge is not None:
        for row in mask.nonzero()[:, 0].tolist():
            state.judge.wipe(row)


def begin_rows(
    model: SparqleModel,
    state: PipelineState,
    mask: Tensor,
    prefixes: Sequence[list[int] | None],
    leads: Mapping[int, Tensor] | None = None,
) -> None:
    """Rows of `mask` (B,) begin a segment after a pause, with prefix ids in the LLM's slot.

    The gain of the features begins where a row's lead (L,) says, and without one it goes on.
    """
    features.reset_rows(state.features, mask)
    for row, lead in (leads or {}).items():
        features.begin_row(model.cfg.features, state.features, row, lead)
    _reset_hearing(state, mask)
    llm.reset_rows(state.llm, mask)
    state.llm = llm.prefill(model.llm, state.llm, list(prefixes))


def seam_rows(
    model: SparqleModel,
    state: PipelineState,
    prefixes: Sequence[list[int] | None],
    n_again: Sequence[int],
) -> None:
    """Rows with a prefix begin a segment without a pause: only the LLM's slot starts again.

    Encoder and Q-Former carry on. The last `n_again` queries of each row are appended once more:
    words that ended less than the delay ago are still to be written, and what was said in them is
    not in the prefix.
    """
    mask = torch.tensor([prefix is not None for prefix in prefixes], device=state.recent.device)
    llm.reset_rows(state.llm, mask)
    state.llm = llm.prefill(model.llm, state.llm, list(prefixes))
    for row, n in enumerate(n_again):
        if prefixes[row] is not None and n:
            alone = torch.zeros_like(mask)
            alone[row] = True
            again = state.recent[:, N_RECENT - n :]
            state.llm = llm.append(model.llm, state.llm, again, alone)


def _reset_hearing(state: PipelineState, mask: Tensor) -> None:
    encoder.reset_rows(state.encoder, mask)
    ctc.reset_rows(state.ctc, mask)
    qformer.reset_rows(state.qformer, mask)
    state.recent[mask] = 0.0
