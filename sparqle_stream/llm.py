"""LLM: query embeddings of a chunk (B, Q, E) -> text tokens; one Llama-family decoder, many slots.

Contract: a slot's K/V only grows, bytes once written never change, and a step over chunks equals
`Llm.forward_train` over the interleaved sequence of queries and text. Rows that are not active
keep every field of their state. Positions are slot indices, so a reset slot starts again at 0.
Latency: none of its own; a chunk's words leave with the chunk's last query.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparqle_kernels.decode_attention import decode_attention, make_plan
from sparqle_stream.decode import write
from sparqle_stream.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from sparqle_stream.config import LlmConfig
    from sparqle_stream.decode import Writer


@lru_cache(maxsize=8)
def rope_table(
    theta: float, head_width: int, n_positions: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Cosines and signed sines (N, d) in float32 of the rotation at every position.

    Halves are repeated and the sine's first half negated, so that rotating is
    `x * cos + swap_halves(x) * sin`.
    """
    with torch.inference_mode(False):  # training may find the table that serving made
        half = torch.arange(0, head_width, 2, dtype=torch.float64) / head_width
        angles = torch.outer(torch.arange(n_positions, dtype=torch.float64), theta**-half)
        cos, sin = angles.cos().float(), angles.sin().float()
        table = torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)
        return table[0].to(device), table[1].to(device)


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
    b, n_kv, t, d = k.shape
    n_groups = q.shape[1] // n_kv
    bias = torch.full((t, t), -torch.inf, dtype=q.dtype).triu(1).repeat(n_groups, 1)
    packed = q.reshape(b * n_kv, n_groups * t, d)  # the heads that share k lie behind each other
    keys, values = k.reshape(b * n_kv, t, d), v.reshape(b * n_kv, t, d)
    p = torch.baddbmm(bias, packed, keys.transpose(1, 2), alpha=d**-0.5).softmax(dim=-1)
    return torch.bmm(p, values).view(b, n_kv * n_groups, t, d)


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

    For decoding `Llm.join` puts q, k and v into one matrix: `qkv_proj` instead of the three.
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
        if self.qkv_proj is None:
            q, k, v = map(self._heads, (self.q_proj(x), self.k_proj(x), self.v_proj(x)))
            return rotate(q, cos, sin), rotate(k, cos, sin), v
        heads = self._heads(self.qkv_proj(x))
        q_and_k = rotate(heads[:, : -self.n_kv_heads], cos, sin)
        q, k = q_and_k[:, : -self.n_kv_heads], q_and_k[:, -self.n_kv_heads :]
        return q, k, heads[:, -self.n_kv_heads :]

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
        """For decoding: what reads the same rows becomes one matrix, frozen."""
        for layer in self.blocks():
            attn, mlp = layer.attn, layer.mlp
            attn.qkv_proj = _joined(attn.q_proj, attn.k_proj, attn.v_proj)
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
    )


def reset_rows(state: LlmState, mask: Tensor) -> None:
    """Slots of `mask` (B,) are empty. K/V bytes stay: length 0 makes them invisible."""
    state.length[mask] = 0
    state.hidden[mask] = 0.0


@torch.inference_mode()
def append(llm: Llm, state: LlmState, embeds: Tensor, active: Tensor) -> LlmState:
    """Writes embeds (B, R, E) of the active rows into their slots and keeps the last hidden."""
    slots = active.nonzero()[:, 0]
    if len(slots) and embeds.shape[1]:
        _append_slots(llm, state, embeds[slots], slots)
    return state


@torch.inference_mode()
def prefill(llm: Llm, state: LlmState, ids: Sequence[list[int] | None]) -> LlmState:
    """Writes each row's token ids; rows with None or no ids stay as they are."""
    device = state.length.device
    for row, tokens in enumerate(ids):  # prefixes are rare, short, and of unequal length
        if tokens:
            embeds = llm.embed(torch.tensor([tokens], device=device))
            _append_slots(llm, state, embeds, torch.tensor([row], device=device))
    return state


@torch.inference_mode()
def step(
    llm: Llm, state: LlmState, queries: Tensor, active: Tensor, writers: Sequence[Writer | None]
) -> tuple[LlmState, list[list[int]]]:
    """One chunk: queries (B, Q, E) of the active rows in, what their writers choose out."""
    state = append(llm, state, queries, active)
    going: dict[int, Writer] = {}
    for slot in active.nonzero()[:, 0].tolist():
        writer = writers[slot]
        assert writer is not None, "an active row needs a writer"
        going[slot] = writer
    written = write(_Slots(llm, state), going)
    return state, [written.get(slot, []) for slot in range(queries.shape[0])]


@dataclass(frozen=True, slots=True)
class _Slots:
    """The decoder that `decode.write` asks."""

    llm: Llm
    state: LlmState

    def stops(self, rows: Sequence[int]) -> Sequence[float]:
        stops: list[float] = self.llm.stop(self.state.hidden[list(rows)])[:, 0].tolist()
        return stops

    def score(self, wanted: Mapping[int, list[int]]) -> dict[int, tuple[list[int], list[float]]]:
        if not wanted:
            return {}
        logits = self.llm.logits(self.state.hidden[list(wanted)]).float()  # (b, V)
        out = {}
        for (slot, ids), row in zip(wanted.items(), logits, strict=True):
            asked = list(dict.fromkeys(ids)) or [int(row.argmax())]
            out[slot] = asked, row[asked].tolist()
        return out

    def read(self, tokens: Mapping[int, list[int]]) -> None:
        _append_tokens(self.llm, self.state, {row: ids for row, ids in tokens.items() if ids})

    leave = read  # one pass has rows of equal length: waiting for the next queries saves nothing


def _append_tokens(llm: Llm, state: LlmState, tokens: dict[int, list[int]]) -> None:
    """Writes each slot's tokens into it; slots with equally many go together."""
    device = state.length.device
    for n in sorted({len(ids) for ids in tokens.values()}):
        same = {slot: ids for slot, ids in tokens.items() if len(ids) == n}
        embeds = llm.embed(torch.tensor(list(same.values()), device=device))
        _append_slots(llm, state, embeds, torch.tensor(list(same), device=device))


def _append_slots(llm: Llm, state: LlmState, embeds: Tensor, slots: Tensor) -> None:
    """Writes embeds (b, R, E) into `slots` (b,): K/V, lengths and last hidden."""
    cfg, n_rows, n_slot = llm.cfg, embeds.shape[1], state.k.shape[3]
    start = state.length[slots]
    if int(start.max()) + n_rows > n_slot:
        raise ModelError(
            f"{n_rows} more rows do not fit into a slot of {n_slot}",
            hint="cut the segment before its slot is full",
        )
    position = start[:, None] + torch.arange(n_rows, device=start.device)  # (b, R)
    cos, sin = rope_table(cfg.rope_theta, cfg.head_width, n_slot, embeds.device)
    x = embeds.to(state.k.dtype)
    cos, sin = cos[position][:, None].to(x.dtype), sin[position][:, None].to(x.dtype)
    length = start + n_rows
    plan = make_plan(slots, length, n_rows, cfg.n_heads // cfg.n_kv_heads)
    for i, layer in enumerate(llm.blocks()):
        q, k, v = layer.attn.project(layer.attn_norm(x), cos, sin)
        state.k[i][slots[:, None], :, position] = k.transpose(1, 2)  # (b, R, KV, d)
        state.v[i][slots[:, None], :, position] = v.transpose(1, 2)
        mixed = decode_attention(q, state.k[i], state.v[i], plan)  # (b, H, R, d)
        x = layer.feed_forward(x + layer.attn.merge(mixed))
    state.length[slots] = length
    state.hidden[slots] = llm.norm(x[:, -1])
