"""LLM: query embeddings of a chunk (B, Q, E) -> text tokens, one Llama-family decoder for all slots.

Contract: a slot's K/V only grows, bytes once written never change, and a step over chunks equals
`Llm.forward_train` over the interleaved sequence of queries and text. Rows that are not active
keep every field of their state. Positions are slot indices, so a reset slot starts again at 0.
Latency: none of its own; a chunk's words leave with the chunk's last query.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparqle_stream.config import LlmConfig


@lru_cache(maxsize=8)
def rope_table(
    theta: float, head_width: int, n_positions: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Cosines and signed sines (N, d) in float32 of the rotation at every position.

    Halves are repeated and the sine's first half negated, so that rotating is
    `x * cos + swap_halves(x) * sin`.
    """
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
    """Projections of one layer's grouped-query attention."""

    def __init__(self, cfg: LlmConfig) -> None:
        super().__init__()
        self.head_width = cfg.head_width
        q_width, kv_width = cfg.n_heads * cfg.head_width, cfg.n_kv_heads * cfg.head_width
        self.q_proj = nn.Linear(cfg.width, q_width, bias=False)
        self.k_proj = nn.Linear(cfg.width, kv_width, bias=False)
        self.v_proj = nn.Linear(cfg.width, kv_width, bias=False)
        self.o_proj = nn.Linear(q_width, cfg.width, bias=False)

    def project(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, T, E) -> rotated q (B, H, T, d), rotated k and plain v (B, KV, T, d)."""
        q, k, v = (
            y.unflatten(-1, (-1, self.head_width)).transpose(1, 2)
            for y in (self.q_proj(x), self.k_proj(x), self.v_proj(x))
        )
        return rotate(q, cos, sin), rotate(k, cos, sin), v

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Causal attention over a whole sequence, x (B, T, E) -> (B, T, E)."""
        y = causal_attention(*self.project(x, cos, sin))  # (B, H, T, d)
        return self.o_proj(y.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """SwiGLU feed-forward."""

    def __init__(self, cfg: LlmConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(cfg.width, cfg.ffn, bias=False)
        self.up_proj = nn.Linear(cfg.width, cfg.ffn, bias=False)
        self.down_proj = nn.Linear(cfg.ffn, cfg.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """Pre-norm decoder layer."""

    def __init__(self, cfg: LlmConfig) -> None:
        super().__init__()
        self.attn_norm = RmsNorm(cfg.width, cfg.rms_eps)
        self.attn = Attention(cfg)
        self.mlp_norm = RmsNorm(cfg.width, cfg.rms_eps)
        self.mlp = Mlp(cfg)


class Llm(nn.Module):
    """Weights of a Llama-family decoder with tied embeddings, plus the stop head.

    The stop head is trained with the bridge; the rest is what the LLM came with.
    """

    def __init__(self, cfg: LlmConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.tokens = nn.Embedding(cfg.vocab, cfg.width)
        self.layers = nn.ModuleList(Layer(cfg) for _ in range(cfg.n_layers))
        self.norm = RmsNorm(cfg.width, cfg.rms_eps)
        self.stop = nn.Linear(cfg.width, 1)

    def embed(self, ids: Tensor) -> Tensor:
        """Token ids (B, T) -> embeddings (B, T, E)."""
        return self.tokens(ids)

    def logits(self, hidden: Tensor) -> Tensor:
        """Final-normed hidden (..., E) -> logits (..., V)."""
        return F.linear(hidden, self.tokens.weight)

    def forward_train(self, embeds: Tensor) -> Tensor:
        """Whole sequences (B, T, E) -> final-normed hidden (B, T, E).

        Shorter sequences are padded on the right: attention is causal, so padding reaches no row
        before it and needs no mask.
        """
        cfg = self.cfg
        cos, sin = rope_table(cfg.rope_theta, cfg.head_width, embeds.shape[1], embeds.device)
        cos, sin = cos.to(embeds.dtype), sin.to(embeds.dtype)
        x = embeds
        for layer in self.layers:
            x = x + layer.attn(layer.attn_norm(x), cos, sin)
            x = x + layer.mlp(layer.mlp_norm(x))
        return self.norm(x)
