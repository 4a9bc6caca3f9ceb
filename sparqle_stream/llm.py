"""LLM: query embeddings of a chunk (B, Q, E) -> text tokens; one Llama-family decoder, many slots.

Contract: a slot's K/V only grows, bytes once written never change, and a step over chunks equals
`Llm.forward_train` over the interleaved sequence of queries and text. Rows that are not active
keep every field of their state. Positions are slot indices, so a reset slot starts again at 0.
Latency: none of its own; a chunk's words leave with the chunk's last query.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparqle_kernels.decode_attention import decode_attention, make_plan
from sparqle_kernels.rms_norm_rope_append import Rotation, rms_norm_rope_append
from sparqle_kernels.rms_norm_rope_append import Slots as SlotRows
from sparqle_kernels.stop_head import stop_head
from sparqle_stream.decode import write
from sparqle_stream.errors import ModelError
from sparqle_stream.rows import Rows

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from sparqle_stream.config import LlmConfig
    from sparqle_stream.decode import Expect, Writer


@lru_cache(maxsize=8)
def rope_table(theta: float, head_width: int, n_positions: int, device: torch.device) -> Rotation:
    """Cosines and signed sines (N, d) in float32 of the rotation at every position.

    Halves are repeated and the sine's first half negated, so that rotating is
    `x * cos + swap_halves(x) * sin`.
    """
    with torch.inference_mode(False):  # training may find the table that serving made
        half = torch.arange(0, head_width, 2, dtype=torch.float64) / head_width
        angles = torch.outer(torch.arange(n_positions, dtype=torch.float64), theta**-half)
        cos, sin = angles.cos().float(), angles.sin().float()
        table = torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)
        return Rotation(table[0].to(device), table[1].to(device))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding of x (..., d), first half against second half."""
    return x * cos + x.roll(x.shape[-1] // 2, dims=-1) * sin


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Grouped-query attention over whole sequences, q (B, H, T, d), k and v (B, KV, T, d).

    On a CPU with bf16 tiles the plain matrix products with their backward are 1.2 to 1.7 times as
    fast as the fused kernel at T 160 to 640; past 1024 they would need too much memory.
    """
    if q.device.type != "cpu" or q.shape[2] > 1024:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    mask = torch.full((q.shape[2], q.shape[2]), -torch.inf, dtype=q.dtype).triu(1)
    return masked_attention(q, k, v, mask.repeat(q.shape[1] // k.shape[1], 1))


def masked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Grouped-query attention with G heads a key, as plain products: q (B, G KV, T, d), k and v
    (B, KV, N, d), mask (G T, N) of 0 and -inf -> (B, G KV, T, d)."""
    n_rows, n_kv, _, d = k.shape
    packed = q.reshape(n_rows * n_kv, -1, d)  # the heads that share k lie behind each other
    keys, values = k.flatten(0, 1), v.flatten(0, 1)
    p = torch.baddbmm(mask, packed, keys.transpose(1, 2), alpha=d**-0.5).softmax(dim=-1)
    return torch.bmm(p, values).view(q.shape)


class RmsNorm(nn.Module):
    """x / rms(x) * weight over the last axis."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


class Attention(nn.Module):
    """Projections of one layer's grouped-query attention.

    For decoding `Llm.join` puts q, k and v into one matrix, with the weights of the norm before it
    folded in: `qkv_proj` instead of the three.
    """

    qkv_proj: nn.Module | None

    def __init__(self, cfg: LlmConfig) -> None:
        super().__init__()
        self.head_width = cfg.head_width
        self.n_kv_heads = cfg.n_kv_heads
        q_width, kv_width = cfg.n_heads * cfg.head_width, cfg.n_kv_heads * cfg.head_width
        self.q_proj = nn.Linear(cfg.width, q_width, bias=False)
        self.k_proj = nn.Linear(cfg.width, kv_width, bias=False)
        self.v_proj = nn.Linear(cfg.width, kv_width, bias=False)
        self.o_proj = nn.Linear(q_width, cfg.width, bias=False)
        self.register_module("qkv_proj", None)

    def project(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, T, E) -> rotated q (B, H, T, d), rotated k and plain v (B, KV, T, d)."""
        heads = self._heads(self.qkv(x))
        q_and_k = rotate(heads[:, : -self.n_kv_heads], cos, sin)
        q, k = q_and_k[:, : -self.n_kv_heads], q_and_k[:, -self.n_kv_heads :]
        return q, k, heads[:, -self.n_kv_heads :]

    def qkv(self, x: Tensor) -> Tensor:
        """x (B, T, E) -> q, k and v of all heads behind each other (B, T, (H + 2 KV) d)."""
        if self.qkv_proj is None:
            return torch.cat([self.q_proj(x), self.k_proj(x), self.v_proj(x)], dim=-1)
        out: Tensor = self.qkv_proj(x)
        return out

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], -1, self.head_width).transpose(1, 2)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Causal attention over a whole sequence, x (B, T, E) -> (B, T, E)."""
        y = causal_attention(*self.project(x, cos, sin))  # (B, H, T, d)
        return self.merge(y)

    def merge(self, y: Tensor) -> Tensor:
        """Heads (B, H, T, d) -> (B, T, E)."""
        out: Tensor = self.o_proj(y.transpose(1, 2).flatten(2))
        return out


class Mlp(nn.Module):
    """SwiGLU feed-forward; `Llm.join` puts gate and up into one matrix, `gate_up_proj`."""

    gate_up_proj: nn.Module | None

    def __init__(self, cfg: LlmConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(cfg.width, cfg.ffn, bias=False)
        self.up_proj = nn.Linear(cfg.width, cfg.ffn, bias=False)
        self.down_proj = nn.Linear(cfg.ffn, cfg.width, bias=False)
        self.register_module("gate_up_proj", None)

    def forward(self, x: Tensor) -> Tensor:
        if self.gate_up_proj is None:
            gate, up = self.gate_proj(x), self.up_proj(x)
        else:
            gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        out: Tensor = self.down_proj(F.silu(gate) * up)
        return out


class Layer(nn.Module):
    """Pre-norm decoder layer."""

    def __init__(self, cfg: LlmConfig) -> None:
        super().__init__()
        self.attn_norm = RmsNorm(cfg.width, cfg.rms_eps)
        self.attn = Attention(cfg)
        self.mlp_norm = RmsNorm(cfg.width, cfg.rms_eps)
        self.mlp = Mlp(cfg)

    def qkv_before_norm(self, x: Tensor) -> Tensor:
        """x (B, T, E) -> q, k, v that lack x's factor 1 / rms alone (B, T, (H + 2 KV) d)."""
        is_folded = self.attn.qkv_proj is not None
        return self.attn.qkv(x if is_folded else x * self.attn_norm.weight)

    def feed_forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.mlp(self.mlp_norm(x))
        return out


class Llm(nn.Module):
    """Weights of a Llama-family decoder, plus the stop head.

    The stop head is trained with the bridge; the rest is what the LLM came with. Embeddings are
    tied unless there is a `head`.
    """

    head: nn.Module | None

    def __init__(self, cfg: LlmConfig) -> None:
        super().__init__()
        self.cfg = cfg
        weight = nn.Parameter(torch.empty(cfg.vocab, cfg.width))
        if not weight.is_meta:  # where torch would import a compiler for it: 1.5 s at every start
            nn.init.normal_(weight)
        self.tokens = nn.Embedding(cfg.vocab, cfg.width, _weight=weight)
        self.layers = nn.ModuleList(Layer(cfg) for _ in range(cfg.n_layers))
        self.norm = RmsNorm(cfg.width, cfg.rms_eps)
        self.register_module("head", None)
        self.stop = nn.Linear(cfg.width, 1)

    def blocks(self) -> Iterator[Layer]:
        return cast("Iterator[Layer]", iter(self.layers))

    @torch.no_grad()
    def join(self) -> None:
        """For decoding: what reads the same rows becomes one matrix, frozen.

        The weights of the norm before q, k and v go into their matrix, and are ones from then on.
        """
        for layer in self.blocks():
            attn, mlp, norm = layer.attn, layer.mlp, layer.attn_norm
            attn.qkv_proj = _joined(attn.q_proj, attn.k_proj, attn.v_proj)
            weight = attn.qkv_proj.weight
            weight.copy_((weight.float() * norm.weight.float()).to(weight.dtype))
            norm.weight.fill_(1.0)
            mlp.gate_up_proj = _joined(mlp.gate_proj, mlp.up_proj)
            del attn.q_proj, attn.k_proj, attn.v_proj, mlp.gate_proj, mlp.up_proj

    def embed(self, ids: Tensor) -> Tensor:
        """Token ids (B, T) -> embeddings (B, T, E)."""
        out: Tensor = self.tokens(ids)
        return out

    def logits(self, hidden: Tensor) -> Tensor:
        """Final-normed hidden (..., E) -> logits (..., V)."""
        if self.head is None:
            return F.linear(hidden, self.tokens.weight)
        out: Tensor = self.head(hidden)
        return out

    def forward_train(self, embeds: Tensor) -> Tensor:
        """Whole sequences (B, T, E) -> final-normed hidden (B, T, E).

        Shorter sequences are padded on the right: attention is causal, so padding reaches no row
        before it and needs no mask.
        """
        cfg = self.cfg
        cos, sin = rope_table(cfg.rope_theta, cfg.head_width, embeds.shape[1], embeds.device)
        cos, sin = cos.to(embeds.dtype), sin.to(embeds.dtype)
        x = embeds
        for layer in self.blocks():
            x = layer.feed_forward(x + layer.attn(layer.attn_norm(x), cos, sin))
        out: Tensor = self.norm(x)
        return out


def _joined(*parts: nn.Linear) -> nn.Linear:
    weight = torch.cat([part.weight for part in parts])
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear


@dataclass(slots=True)
class LlmState:
    """K/V slots of all streams; what lies past `length` is not there."""

    k: Tensor  # (L, B, KV, N, d) rotated keys, position = index in the slot
    v: Tensor  # (L, B, KV, N, d)
    length: Tensor  # (B,) int64 rows written
    hidden: Tensor  # (B, E) final-normed hidden of the last row written
    stop: Tensor  # (B,) float32 logit that the stop head gave it

    @property
    def n_free(self) -> Tensor:
        """(B,) rows that still fit."""
        return self.k.shape[3] - self.length


def init_state(
    cfg: LlmConfig,
    batch: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> LlmState:
    slots = (cfg.n_layers, batch, cfg.n_kv_heads, cfg.n_slot, cfg.head_width)
    return LlmState(
        k=torch.zeros(slots, dtype=dtype, device=device),
        v=torch.zeros(slots, dtype=dtype, device=device),
        length=torch.zeros(batch, dtype=torch.int64, device=device),
        hidden=torch.zeros(batch, cfg.width, dtype=dtype, device=device),
        stop=torch.zeros(batch, device=device),
    )


def reset_rows(state: LlmState, mask: Tensor) -> None:
    """Slots of `mask` (B,) are empty. K/V bytes stay: length 0 makes them invisible."""
    rows = mask.nonzero()[:, 0]  # there may be more slots than rows
    state.length[rows] = 0
    state.hidden[rows] = 0.0
    state.stop[rows] = 0.0


@torch.inference_mode()
def append(llm: Llm, state: LlmState, embeds: Tensor, active: Tensor | Rows) -> LlmState:
    """Writes embeds (B, R, E) of the active rows into their slots and keeps the last hidden."""
    rows = Rows.of(active)
    if len(rows) and embeds.shape[1]:
        check_room(int(state.length[rows.index].max()), embeds.shape[1], state)
        append_rows(llm, state, rows.take(embeds), rows.index)
    return state


@torch.inference_mode()
def prefill(llm: Llm, state: LlmState, ids: Sequence[list[int] | None]) -> LlmState:
    """Writes each row's token ids; rows with None or no ids stay as they are."""
    Slots(EagerPasses(llm, state)).read({row: new for row, new in enumerate(ids) if new})
    return state


@torch.inference_mode()
def step(
    llm: Llm,
    state: LlmState,
    queries: Tensor,
    active: Tensor,
    writers: Sequence[Writer | None],
    judge: Judges | None = None,
) -> tuple[LlmState, list[list[int]]]:
    """One chunk: queries (B, Q, E) of the active rows in, what their writers choose out.

    `judge` is asked where writers have doubts.
    """
    state = append(llm, state, queries, active)
    going: dict[int, Writer] = {}
    for slot in active.nonzero()[:, 0].tolist():
        writer = writers[slot]
        assert writer is not None, "an active row needs a writer"
        going[slot] = writer
    written = write(Slots(EagerPasses(llm, state), judge), going)
    return state, [written.get(slot, []) for slot in range(queries.shape[0])]


class Judges(Protocol):
    """What judges readings as plain text: `judge.Judge`."""

    def judge(self, doubts: Mapping[int, list[list[int]]]) -> dict[int, list[float]]: ...

    def say(self, row: int, ids: list[int]) -> None: ...


class Passes(Protocol):
    """What `Slots` asks of the device: eagerly, or by CUDA graphs (`cuda_graphs`)."""

    def stops(self, rows: Sequence[int]) -> list[float]:
        """The stop head's logits."""
        ...

    def score(
        self, rows: Sequence[int], ids: list[list[int]]
    ) -> tuple[list[list[float]], list[int]]:
        """Of ids (b, K): each id's logit and, behind them, that of the best; and which it is."""
        ...

    def read(self, rows: Sequence[int], ids: list[list[int]]) -> None:
        """Appends ids (b, R) to the slots of `rows`, which ascend."""
        ...


@dataclass(frozen=True, slots=True)
class Slots:
    """The decoder that `decode.write` asks."""

    passes: Passes
    judges: Judges | None = None

    def stops(self, rows: Sequence[int]) -> Sequence[float]:
        return self.passes.stops(rows)

    def score(self, wanted: Mapping[int, list[int]]) -> dict[int, tuple[list[int], list[float]]]:
        if not wanted:
            return {}
        asked = {row: list(dict.fromkeys(ids)) for row, ids in wanted.items()}
        n = max(map(len, asked.values()))
        padded = [ids + [0] * (n - len(ids)) for ids in asked.values()]
        scores, best = self.passes.score(list(asked), padded)
        return {
            row: (ids, of[: len(ids)]) if ids else ([top], of[-1:])
            for (row, ids), of, top in zip(asked.items(), scores, best, strict=True)
        }

    def read(self, tokens: Mapping[int, list[int]], expect: Expect | None = None) -> None:
        """Rows with equally many go together; nothing is read ahead."""
        for n in sorted({len(ids) for ids in tokens.values()} - {0}):
            same = sorted(row for row, ids in tokens.items() if len(ids) == n)
            self.passes.read(same, [tokens[row] for row in same])

    def judge(
        self, doubts: Mapping[int, list[list[int]]], going: Sequence[int], expect: Expect
    ) -> dict[int, list[float]]:
        return self.judges.judge(doubts) if doubts and self.judges is not None else {}

    def note(self, plain: Mapping[int, list[int]]) -> None:
        if self.judges is not None:
            for row, ids in plain.items():
                self.judges.say(row, ids)

    leave = read  # one pass has rows of equal length: waiting for the next queries saves nothing


@dataclass(frozen=True, slots=True)
class EagerPasses:
    """One kernel after the other."""

    llm: Llm
    state: LlmState

    def stops(self, rows: Sequence[int]) -> list[float]:
        stops: list[float] = self.state.stop[list(rows)].tolist()
        return stops

    def score(
        self, rows: Sequence[int], ids: list[list[int]]
    ) -> tuple[list[list[float]], list[int]]:
        device = self.state.length.device
        wanted = torch.tensor(ids, dtype=torch.int64, device=device)
        scores, best = score_rows(self.llm, self.state, torch.tensor(rows, device=device), wanted)
        return scores.tolist(), best.tolist()

    def read(self, rows: Sequence[int], ids: list[list[int]]) -> None:
        slots = torch.tensor(rows, device=self.state.length.device)
        check_room(int(self.state.length[slots].max()), len(ids[0]), self.state)
        embeds = self.llm.embed(torch.tensor(ids, device=slots.device))
        append_rows(self.llm, self.state, embeds, slots)


def check_room(longest: int, n_rows: int, state: LlmState) -> None:
    """Raises ModelError when slots that hold up to `longest` rows cannot take `n_rows` more."""
    n_slot = state.k.shape[3]
    if longest + n_rows > n_slot:
        raise ModelError(
            f"{n_rows} more rows do not fit into a slot of {n_slot}",
            hint="cut the segment before its slot is full",
        )


def score_rows(llm: Llm, state: LlmState, slots: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """slots (b,), ids (b, K) -> logits (b, K + 1) of the ids and the best, which is (b,)."""
    logits = llm.logits(state.hidden[slots]).float()  # (b, V)
    best = logits.argmax(dim=-1)
    return logits.gather(1, torch.cat([ids, best[:, None]], dim=1)), best


def append_rows(llm: Llm, state: LlmState, embeds: Tensor, slots: Tensor) -> None:
    """Writes embeds (b, R, E) into `slots` (b,), which ascend: K/V, lengths, last hidden, stop.

    There must be room. Nothing is read back to the host, no shape depends on data.
    """
    x = through_layers(llm, state, embeds, slots)
    stop = llm.stop
    hidden, logit = stop_head(x[:, -1], llm.norm.weight, llm.cfg.rms_eps, stop.weight[0], stop.bias)
    state.length[slots] += embeds.shape[1]
    state.hidden[slots] = hidden
    state.stop[slots] = logit


def through_layers(llm: Llm, state: LlmState, embeds: Tensor, slots: Tensor) -> Tensor:
    """embeds (b, R, E) behind what counts in `slots` -> (b, R, E) before the last norm.

    K/V are written, but do not count yet.
    """
    cfg, n_rows, n_slot = llm.cfg, embeds.shape[1], state.k.shape[3]
    start = state.length[slots]
    length = start + n_rows
    rotation = rope_table(cfg.rope_theta, cfg.head_width, n_slot, embeds.device)
    plan = make_plan(slots, length, n_rows, cfg.n_heads // cfg.n_kv_heads)
    x = embeds.to(state.k.dtype)
    for i, layer in enumerate(llm.blocks()):
        k, v = state.k[i], state.v[i]
        at = SlotRows(k, v, slots, start)
        q = rms_norm_rope_append(x, layer.qkv_before_norm(x), cfg.rms_eps, rotation, at)
        mixed = decode_attention(q, k, v, plan)  # (b, H, R, d)
        x = layer.feed_forward(x + layer.attn.merge(mixed))
    return x
