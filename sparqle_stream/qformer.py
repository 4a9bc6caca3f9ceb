"""Q-Former: encoder frames (B, T, 512) -> query embeddings (B, T / 4, E) for the LLM, at 12.5 Hz.

One learned query per 80 ms asks the frames around it (SparQLe's idea, Djanibekov and Aldarmaki,
2025; layers as in BLIP-2, Li et al., 2023, pre-norm). Cross-attention reads the chunk and a ring
of frames before it, self-attention the chunk's queries and a ring of queries before them; where a
key lies in time is told by a learned bias over (key time - query time), never by absolute time.

What leaves is `Q-Former output + sum over pieces of p(piece) e(piece)`: the CTC posteriors put
something close to text before the LLM from the first training step (DESIGN 5.3), and the Q-Former
learns what CTC does not say. Latency: the end of the chunk.

Of the kind 'utterance' (SparQLe's own) N queries without a place in time ask all frames at once
and one another in both directions: for comparison offline, `step` refuses it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparqle_kernels.add_layer_norm import add_layer_norm
from sparqle_kernels.frame_attention import fold_keys, frame_attention, unfold_values
from sparqle_kernels.query_attention import query_attention
from sparqle_stream.config import FRAMES_PER_CTC, FRAMES_PER_QUERY, QUERY_MS, QFormerConfig
from sparqle_stream.errors import ConfigError
from sparqle_stream.rows import Rows

if TYPE_CHECKING:
    from collections.abc import Iterator

CTC_PER_QUERY = FRAMES_PER_QUERY // FRAMES_PER_CTC


def add_norm(x: Tensor, y: Tensor, norm: nn.LayerNorm) -> tuple[Tensor, Tensor]:
    """x + y, and its norm."""
    return add_layer_norm(x, y, norm.weight, norm.bias, norm.eps)


class Sight(NamedTuple):
    """What queries may look at: what is where in time, of batch 1 for all rows alike."""

    distance: Tensor  # (B, Q, L) int64, time of the entry minus that of the query
    seen: Tensor  # (B, Q, L) bool


class TimedAttention(nn.Module):
    """Multi-head attention whose scores carry a learned bias over relative time.

    `norm` is applied by whoever calls it: the sum before it and the norm are one pass over memory.
    """

    def __init__(self, cfg: QFormerConfig, source_width: int, reach: int) -> None:
        super().__init__()
        self.n_heads, self.reach = cfg.n_heads, reach
        self.norm = nn.LayerNorm(cfg.width)
        self.query = nn.Linear(cfg.width, cfg.width)
        self.key = nn.Linear(source_width, cfg.width, bias=False)
        self.value = nn.Linear(source_width, cfg.width)
        self.out = nn.Linear(cfg.width, cfg.width)
        self.bias = nn.Parameter(torch.zeros(cfg.n_heads, 2 * reach + 1))

    def kv(self, source: Tensor) -> tuple[Tensor, Tensor]:
        """source (B, L, W) -> k, v (B, H, L, d)."""
        return self._heads(self.key(source)), self._heads(self.value(source))

    def forward(self, normed: Tensor, k: Tensor, v: Tensor, sight: Sight) -> Tensor:
        """normed (B, Q, D), k, v (B, H, L, d) -> what is heard (B, Q, D)."""
        q = self._heads(self.query(normed))
        return self._merge(query_attention(q, k, v, self._age(sight), sight.seen, self.bias))

    def ask(self, normed: Tensor, source: Tensor, sight: Sight) -> Tensor:
        """As `forward` over the keys and values of source (B, L, W), which it never projects.

        Few queries ask many entries: the projections move to the queries.
        """
        q = self._heads(self.query(normed))
        folded, age = fold_keys(q, self.key.weight), self._age(sight)
        mixed = frame_attention(folded, source, age, sight.seen, self.bias, q.shape[3] ** -0.5)
        return self._merge(unfold_values(mixed, self.value.weight, self.value.bias))

    def _age(self, sight: Sight) -> Tensor:
        return sight.distance.clamp(-self.reach, self.reach) + self.reach

    def _merge(self, mixed: Tensor) -> Tensor:
        out: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return out

    def _heads(self, x: Tensor) -> Tensor:
        b, t, width = x.shape
        return x.reshape(b, t, self.n_heads, width // self.n_heads).transpose(1, 2)


class QFormerLayer(nn.Module):
    """Self-attention over queries, cross-attention over frames, feed-forward; pre-norm."""

    def __init__(self, cfg: QFormerConfig) -> None:
        super().__init__()
        is_timed = cfg.kind == "window"
        query_reach, frame_reach = (cfg.query_ring, cfg.frame_ring) if is_timed else (0, 0)
        self.self_attn = TimedAttention(cfg, cfg.width, query_reach)
        self.cross_attn = TimedAttention(cfg, cfg.encoder_width, frame_reach)
        self.norm = nn.LayerNorm(cfg.width)
        self.fc1 = nn.Linear(cfg.width, cfg.ffn)
        self.fc2 = nn.Linear(cfg.ffn, cfg.width)

    def feed_forward(self, normed: Tensor) -> Tensor:
        """normed by `norm` (B, Q, D) -> what is added (B, Q, D)."""
        out: Tensor = self.fc2(F.gelu(self.fc1(normed)))
        return out


class PosteriorEmbedding(nn.Module):
    """CTC posteriors of one query's 80 ms -> LLM embedding space.

    A piece counts once, when its probability rises: relu(p_t - p_{t-1}) is CTC's collapsing of
    repeats, made soft. The two CTC frames of a query have a map each, so that their order shows.
    """

    def __init__(self, cfg: QFormerConfig) -> None:
        super().__init__()
        self.pieces = nn.Parameter(torch.zeros(cfg.n_pieces, cfg.llm_width))
        self.maps = nn.Parameter(torch.eye(cfg.llm_width).repeat(CTC_PER_QUERY, 1, 1))

    def forward(self, posterior: Tensor, before: Tensor) -> Tensor:
        """posterior (B, 2 Q, V), before (B, 1, V): the frame before it -> (B, Q, E)."""
        rise = (posterior - torch.cat([before, posterior[:, :-1]], dim=1)).clamp(min=0.0)
        b, t, _ = rise.shape
        heard = rise.to(self.pieces.dtype) @ self.pieces
        heard = heard.view(b, t // CTC_PER_QUERY, CTC_PER_QUERY, heard.shape[2])
        return torch.einsum("bqce,cef->bqf", heard, self.maps)


class QFormer(nn.Module):
    """Weights of one `kind`: windowed Q-Former, stack + MLP baseline or whole utterances."""

    def __init__(self, cfg: QFormerConfig) -> None:
        super().__init__()
        self.cfg = cfg
        if cfg.kind != "utterance":
            self.posterior = PosteriorEmbedding(cfg)
            self.delay = nn.Embedding(cfg.n_delays, cfg.llm_width)
            nn.init.zeros_(self.delay.weight)
        self.out_norm = nn.LayerNorm(cfg.width)
        self.out = nn.Linear(cfg.width, cfg.llm_width)
        nn.init.normal_(self.out.weight, std=1e-3)
        if cfg.kind == "stack":
            self.stack = nn.Linear(FRAMES_PER_QUERY * cfg.encoder_width, cfg.width)
            return
        n_queries = cfg.n_phases if cfg.kind == "window" else cfg.n_queries
        self.queries = nn.Parameter(torch.randn(n_queries, cfg.width) * 0.02)
        self.layers = nn.ModuleList(QFormerLayer(cfg) for _ in range(cfg.n_layers))

    def blocks(self) -> Iterator[QFormerLayer]:
        return cast("Iterator[QFormerLayer]", iter(self.layers))

    def norms(self) -> list[nn.LayerNorm]:
        """The norm before each layer, and the one behind the last."""
        return [*(layer.self_attn.norm for layer in self.blocks()), self.out_norm]

    def embed(self, normed: Tensor, posterior: Tensor, before: Tensor, delay_ms: Tensor) -> Tensor:
        """Q-Former output, normed (B, Q, D), and posteriors -> what the LLM reads (B, Q, E)."""
        told = self.delay((delay_ms + QUERY_MS // 2) // QUERY_MS)[:, None]
        heard = self.posterior(posterior, before)
        out: Tensor = self.out(normed) + heard + told
        return out

    def forward_train(
        self, frames: Tensor, log_probs: Tensor, chunk_frames: int, delay_ms: Tensor
    ) -> Tensor:
        """Whole utterances with the masks of streaming (chunk_frames 0: one chunk).

        frames (B, T, W), log_probs (B, T / 2, V), delay_ms (B,) -> (B, T / 4, E), equal to `step`
        over chunks. Of kind 'utterance' -> (B, n_queries, E); it looks at frames only.
        """
        if self.cfg.kind == "utterance":
            if chunk_frames:
                raise _offline_only()
            return self._ask_everything(frames)
        posterior = log_probs.exp()
        before = torch.zeros_like(posterior[:, :1])
        return self.embed(self.ask(frames, chunk_frames), posterior, before, delay_ms)

    def ask(self, frames: Tensor, chunk_frames: int) -> Tensor:
        """Whole utterances, frames (B, T, W) -> normed output (B, T / 4, D) as `step` has it."""
        if self.cfg.kind == "stack":
            return self._stacked(frames)
        return self._ask_windows(frames, chunk_frames)

    def _ask_everything(self, frames: Tensor) -> Tensor:
        """frames (B, T, W) -> (B, n_queries, E): every query sees all frames, all queries."""
        x = self.queries[None].expand(len(frames), -1, -1)
        see_query = x.new_ones(1, x.shape[1], x.shape[1], dtype=torch.bool)
        see_frame = x.new_ones(1, x.shape[1], frames.shape[1], dtype=torch.bool)
        # Without a place in time all distances are alike.
        to_query, to_frame = (
            Sight(torch.zeros_like(see, dtype=torch.int64), see) for see in (see_query, see_frame)
        )
        out: Tensor = self.out(self._layers(x, frames, to_query, to_frame))
        return out

    def _layers(self, x: Tensor, frames: Tensor, to_query: Sight, to_frame: Sight) -> Tensor:
        """x (B, Q, D) through all layers, over all frames (B, T, W) -> normed (B, Q, D)."""
        norms = self.norms()
        normed: Tensor = norms[0](x)
        for layer, after in zip(self.blocks(), norms[1:], strict=True):
            own, across = layer.self_attn, layer.cross_attn
            x, normed = add_norm(x, own(normed, *own.kv(x), to_query), across.norm)
            x, normed = add_norm(x, across(normed, *across.kv(frames), to_frame), layer.norm)
            x, normed = add_norm(x, layer.feed_forward(normed), after)
        return normed

    def _ask_windows(self, frames: Tensor, chunk_frames: int) -> Tensor:
        """frames (B, T, W) -> normed (B, T / 4, D), each query within the sight of its chunk."""
        cfg, n_frames = self.cfg, frames.shape[1]
        chunk = chunk_frames or n_frames
        frame = torch.arange(n_frames, device=frames.device)
        query = torch.arange(0, n_frames, FRAMES_PER_QUERY, device=frames.device)
        start = query // chunk * chunk
        end = (start + chunk).clamp(max=n_frames)
        x = self.queries[self._phase(query, end)][None].expand(len(frames), -1, -1)
        see_frame = (frame < end[:, None]) & (frame >= start[:, None] - cfg.frame_ring)
        past = start[:, None] - cfg.query_ring * FRAMES_PER_QUERY
        see_query = (query < end[:, None]) & (query >= past)
        query_distance = (query[None] - query[:, None]) // FRAMES_PER_QUERY
        to_query = Sight(query_distance[None], see_query[None])
        to_frame = Sight((frame[None] - query[:, None])[None], see_frame[None])
        return self._layers(x, frames, to_query, to_frame)

    def _stacked(self, frames: Tensor) -> Tensor:
        """frames (B, T, W) -> normed (B, T / 4, D)."""
        b, t, w = frames.shape
        rows = frames.reshape(b, t // FRAMES_PER_QUERY, FRAMES_PER_QUERY * w)
        out: Tensor = self.out_norm(F.gelu(self.stack(rows)))
        return out

    def _phase(self, query: Tensor, end: Tensor | int) -> Tensor:
        """How many queries follow in the chunk: what a query may know of the future."""
        follow = (end - query - 1) // FRAMES_PER_QUERY
        return follow.clamp(max=self.cfg.n_phases - 1)


@dataclass(slots=True)
class QFormerState:
    frames: Tensor  # (B, Lf, W) encoder frames: projecting them again beats storing K/V per layer
    frame_position: Tensor  # (B, Lf) absolute frame of each ring entry, -1: never written
    k: Tensor  # (layers, B, H, Lq, d) keys of past queries
    v: Tensor  # (layers, B, H, Lq, d)
    query_position: Tensor  # (B, Lq) absolute query of each ring entry, -1: never written
    posterior: Tensor  # (B, 1, V) CTC posteriors of the last frame
    position: Tensor  # (B,) frames heard since the rows began


def init_state(
    cfg: QFormerConfig,
    batch: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> QFormerState:
    n_layers = cfg.n_layers if cfg.kind == "window" else 0
    ring = (n_layers, batch, cfg.n_heads, cfg.query_ring, cfg.width // cfg.n_heads)
    return QFormerState(
        frames=torch.zeros(batch, cfg.frame_ring, cfg.encoder_width, dtype=dtype, device=device),
        frame_position=torch.full((batch, cfg.frame_ring), -1, device=device),
        k=torch.zeros(ring, dtype=dtype, device=device),
        v=torch.zeros(ring, dtype=dtype, device=device),
        query_position=torch.full((batch, cfg.query_ring), -1, device=device),
        posterior=torch.zeros(batch, 1, cfg.n_pieces, device=device),
        position=torch.zeros(batch, dtype=torch.int64, device=device),
    )


def reset_rows(state: QFormerState, mask: Tensor) -> None:
    """Rows of `mask` (B,) forget everything; position -1 makes old bytes invisible."""
    state.frame_position[mask] = -1
    state.query_position[mask] = -1
    state.posterior[mask] = 0.0
    state.position[mask] = 0


def step(
    qformer: QFormer,
    state: QFormerState,
    frames: Tensor,
    log_probs: Tensor,
    delay_ms: Tensor,
    active: Tensor | Rows,
) -> tuple[QFormerState, Tensor]:
    """frames (B, T, W), log_probs (B, T / 2, V), delay_ms (B,), active (B,) -> (B, T / 4, E)."""
    cfg = qformer.cfg
    if cfg.kind == "utterance":
        raise _offline_only()
    rows, n_queries = Rows.of(active), frames.shape[1] // FRAMES_PER_QUERY
    if len(rows) == 0 or n_queries == 0:
        return state, frames.new_zeros(rows.n_out, n_queries, cfg.llm_width)
    new, index = rows.take(frames).to(qformer.out.weight.dtype), rows.index
    posterior = rows.take(log_probs).exp()
    is_stack = cfg.kind == "stack"
    normed = qformer._stacked(new) if is_stack else _ask(qformer, state, new, index)
    embedded = qformer.embed(normed, posterior, state.posterior[index], rows.take(delay_ms))
    state.posterior[index] = posterior[:, -1:]
    state.position[index] += frames.shape[1]
    return state, rows.put(embedded.to(frames.dtype))


def _offline_only() -> ConfigError:
    return ConfigError(
        "a Q-Former of kind 'utterance' works offline only: it asks the whole utterance at once",
        hint="stream with a model of kind 'window' or 'stack'",
    )


def _ask(qformer: QFormer, state: QFormerState, new: Tensor, rows: Tensor) -> Tensor:
    """One chunk of new frames (b, T, W) through the layers; writes the rings. -> normed (b, Q, D).

    rows (b,): whose frames they are.
    """
    n_new = new.shape[1]
    steps = torch.arange(n_new, device=new.device)
    frame = state.position[rows, None] + steps  # (b, T) absolute
    query = frame[:, ::FRAMES_PER_QUERY]
    all_frames = torch.cat([state.frames[rows], new], dim=1)
    frame_at = torch.cat([state.frame_position[rows], frame], dim=1)
    query_at = torch.cat([state.query_position[rows], query // FRAMES_PER_QUERY], dim=1)
    to_frame = _sight(frame_at, query)
    to_query = _sight(query_at, query // FRAMES_PER_QUERY)
    phase = qformer._phase(steps[::FRAMES_PER_QUERY], n_new)
    x, norms = qformer.queries[phase][None].expand(len(rows), -1, -1), qformer.norms()
    normed: Tensor = norms[0](x)
    for i, layer in enumerate(qformer.blocks()):
        own, across = layer.self_attn, layer.cross_attn
        k, v = own.kv(x)
        ring_k, ring_v = state.k[i, rows].to(k.dtype), state.v[i, rows].to(v.dtype)
        both_k, both_v = torch.cat([ring_k, k], dim=2), torch.cat([ring_v, v], dim=2)
        x, normed = add_norm(x, own(normed, both_k, both_v, to_query), across.norm)
        x, normed = add_norm(x, across.ask(normed, all_frames, to_frame), layer.norm)
        x, normed = add_norm(x, layer.feed_forward(normed), norms[i + 1])
        _write(state.k[i].transpose(1, 2), rows, query // FRAMES_PER_QUERY, k.transpose(1, 2))
        _write(state.v[i].transpose(1, 2), rows, query // FRAMES_PER_QUERY, v.transpose(1, 2))
    _write(state.query_position, rows, query // FRAMES_PER_QUERY, query // FRAMES_PER_QUERY)
    _write(state.frames, rows, frame, new)
    _write(state.frame_position, rows, frame, frame)
    return normed


def _sight(entry_at: Tensor, query_at: Tensor) -> Sight:
    """entry_at (b, L), -1 where nothing was written, query_at (b, Q)."""
    distance = entry_at[:, None] - query_at[:, :, None]
    return Sight(distance, (entry_at >= 0)[:, None].expand_as(distance))


def _write(ring: Tensor, rows: Tensor, position: Tensor, new: Tensor) -> None:
    """Writes new (b, T, ...) into ring (B, L, ...) at position (b, T) modulo L."""
    length = ring.shape[1]
    slots = position[:, -length:] % length
    ring[rows[:, None], slots] = new[:, -length:].to(ring.dtype)
