"""`utterance_attention` in Triton, forward and backward.

Chunk masks come from frame numbers, in the kernel; tiles that no query of a program sees are not
visited, so the cost grows with the left context and not with T squared. Probabilities are never in
memory: backward computes them again from the log-sum-exp that forward keeps for each row
(Dao, 2023). One kernel makes the gradients of keys and values, another those of queries: without
atomics the gradients are the same in every run.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl

from sparqle_kernels.launch import LOG2_E, Launch, precision, tile, warps
from sparqle_kernels.softmax import triton as softmax

if TYPE_CHECKING:
    from torch import Tensor


@triton.jit
def sees(o_m, o_n, C, left, T):
    """(M, N): may query frame o_m see key frame o_n; chunks of C frames, `left` before each."""
    b_start = (o_m // C * C)[:, None]
    m_see = (o_n[None, :] >= b_start - left) & (o_n[None, :] < b_start + C)
    return m_see & (o_m < T)[:, None] & (o_n < T)[None, :]


@triton.jit
def first_key(i_m, C, left, BN: tl.constexpr):
    """Where the tiles of keys begin that queries from i_m on see."""
    return tl.maximum(i_m // C * C - left, 0) // BN * BN


@triton.jit
def utterance_attention_fwd(
    q, k, v, out, lse,
    scale, T, d, C, left, s_b, s_h, s_t,
    H: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    i_m, i_bh = tl.program_id(0) * BM, tl.program_id(1).to(tl.int64)
    base = i_bh // H * s_b + i_bh % H * s_h
    o_m, o_n, o_d = i_m + tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, BD)
    m_m, m_d = (o_m < T)[:, None], o_d < d
    o_q = base + o_m[:, None] * s_t + o_d[None, :]
    b_q = tl.load(q + o_q, mask=m_m & m_d[None, :], other=0.0)
    b_m, b_l, b_acc = softmax.first(BM, BD)
    end = tl.minimum((i_m + BM - 1) // C * C + C, T)
    for i_n in range(first_key(i_m, C, left, BN), end, BN):
        o_key = i_n + o_n
        m_n = o_key < T
        o_kt = base + o_key[None, :] * s_t + o_d[:, None]
        o_v = base + o_key[:, None] * s_t + o_d[None, :]
        b_k = tl.load(k + o_kt, mask=m_n[None, :] & m_d[:, None], other=0.0)
        b_v = tl.load(v + o_v, mask=m_n[:, None] & m_d[None, :], other=0.0)
        b_s = tl.dot(b_q, b_k, input_precision=PRECISION) * scale
        b_s = tl.where(sees(o_m, o_key, C, left, T), b_s, float("-inf"))
        b_m, b_l, b_acc = softmax.join(b_s, b_v, b_m, b_l, b_acc, PRECISION)
    b_o = softmax.mean(b_l, b_acc)
    tl.store(out + o_q, b_o.to(out.dtype.element_ty), mask=m_m & m_d[None, :])
    tl.store(lse + i_bh * T + o_m, b_m + tl.log2(tl.where(b_l > 0.0, b_l, 1.0)), mask=o_m < T)


@triton.jit
def utterance_attention_delta(
    out, d_out, delta, T, d, s_b, s_h, s_t, H: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr
):
    """delta (B, H, T) = sum_d out d_out, which every gradient of a score subtracts."""
    i_bh = tl.program_id(1).to(tl.int64)
    o_m, o_d = tl.program_id(0) * BM + tl.arange(0, BM), tl.arange(0, BD)
    m = (o_m < T)[:, None] & (o_d < d)[None, :]
    o = i_bh // H * s_b + i_bh % H * s_h + o_m[:, None] * s_t + o_d[None, :]
    b_o = tl.load(out + o, mask=m, other=0.0).to(tl.float32)
    b_do = tl.load(d_out + o, mask=m, other=0.0).to(tl.float32)
    tl.store(delta + i_bh * T + o_m, tl.sum(b_o * b_do, 1), mask=o_m < T)


@triton.jit
def utterance_attention_bwd_kv(
    q, k, v, d_out, lse, delta, d_k, d_v,
    scale, unit, T, d, C, left, s_b, s_h, s_t,
    H: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """A program owns BN keys and visits the queries that see them; scores are transposed (N, M)."""
    i_n, i_bh = tl.program_id(0) * BN, tl.program_id(1).to(tl.int64)
    base = i_bh // H * s_b + i_bh % H * s_h
    o_n, o_m, o_d = i_n + tl.arange(0, BN), tl.arange(0, BM), tl.arange(0, BD)
    m_d, m_kv = o_d < d, (o_n < T)[:, None] & (o_d < d)[None, :]
    o_kv = base + o_n[:, None] * s_t + o_d[None, :]
    b_k = tl.load(k + o_kv, mask=m_kv, other=0.0)
    b_v = tl.load(v + o_kv, mask=m_kv, other=0.0)
    b_dk, b_dv = tl.zeros((BN, BD), tl.float32), tl.zeros((BN, BD), tl.float32)
    end = tl.minimum((i_n + BN - 1 + left) // C * C + C, T)
    for i_m in range(i_n // C * C // BM * BM, end, BM):
        o_q = i_m + o_m
        m_q = (o_q < T)[:, None] & m_d[None, :]
        p = base + o_q[:, None] * s_t + o_d[None, :]
        b_q = tl.load(q + p, mask=m_q, other=0.0)
        b_do = tl.load(d_out + p, mask=m_q, other=0.0)
        b_lse = tl.load(lse + i_bh * T + o_q, mask=o_q < T, other=0.0)
        b_delta = tl.load(delta + i_bh * T + o_q, mask=o_q < T, other=0.0)
        b_s = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION) * scale  # (BN, BM)
        m_see = tl.trans(sees(o_q, o_n, C, left, T))
        b_p = tl.where(m_see, tl.exp2(b_s - b_lse[None, :]), 0.0)
        b_dv = tl.dot(b_p.to(b_do.dtype), b_do, acc=b_dv, input_precision=PRECISION)
        b_dp = tl.dot(b_v, tl.trans(b_do), input_precision=PRECISION)
        b_ds = b_p * (b_dp - b_delta[None, :])
        b_dk = tl.dot(b_ds.to(b_q.dtype), b_q, acc=b_dk, input_precision=PRECISION)
    tl.store(d_k + o_kv, (b_dk * unit).to(d_k.dtype.element_ty), mask=m_kv)
    tl.store(d_v + o_kv, b_dv.to(d_v.dtype.element_ty), mask=m_kv)


@triton.jit
def utterance_attention_bwd_q(
    q, k, v, d_out, lse, delta, d_q,
    scale, unit, T, d, C, left, s_b, s_h, s_t,
    H: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """A program owns BM queries and visits the keys that they see."""
    i_m, i_bh = tl.program_id(0) * BM, tl.program_id(1).to(tl.int64)
    base = i_bh // H * s_b + i_bh % H * s_h
    o_m, o_n, o_d = i_m + tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, BD)
    m_d, m_q = o_d < d, (o_m < T)[:, None] & (o_d < d)[None, :]
    o_q = base + o_m[:, None] * s_t + o_d[None, :]
    b_q = tl.load(q + o_q, mask=m_q, other=0.0)
    b_do = tl.load(d_out + o_q, mask=m_q, other=0.0)
    b_lse = tl.load(lse + i_bh * T + o_m, mask=o_m < T, other=0.0)
    b_delta = tl.load(delta + i_bh * T + o_m, mask=o_m < T, other=0.0)
    b_dq = tl.zeros((BM, BD), tl.float32)
    end = tl.minimum((i_m + BM - 1) // C * C + C, T)
    for i_n in range(first_key(i_m, C, left, BN), end, BN):
        o_key = i_n + o_n
        m_kv = (o_key < T)[:, None] & m_d[None, :]
        o_kv = base + o_key[:, None] * s_t + o_d[None, :]
        b_k = tl.load(k + o_kv, mask=m_kv, other=0.0)
        b_v = tl.load(v + o_kv, mask=m_kv, other=0.0)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * scale
        b_p = tl.where(sees(o_m, o_key, C, left, T), tl.exp2(b_s - b_lse[:, None]), 0.0)
        b_dp = tl.dot(b_do, tl.trans(b_v), input_precision=PRECISION)
        b_ds = b_p * (b_dp - b_delta[:, None])
        b_dq = tl.dot(b_ds.to(b_k.dtype), b_k, acc=b_dq, input_precision=PRECISION)
    tl.store(d_q + o_q, (b_dq * unit).to(d_q.dtype.element_ty), mask=m_q)


def side_of_tile(dtype: torch.dtype) -> int:
    """Queries, and keys, of a tile; larger ones spill registers in float32."""
    return 32 if dtype == torch.float32 else 64


def _mask(q: Tensor, chunk_frames: int, left_frames: int) -> dict[str, int]:
    """Full context is one chunk of all frames."""
    n_frames = q.shape[2]
    is_full = chunk_frames == 0
    chunk, left = (max(1, n_frames), 0) if is_full else (chunk_frames, min(left_frames, n_frames))
    return {"T": n_frames, "d": q.shape[3], "C": chunk, "left": left}


def _layout(q: Tensor, bm: int) -> tuple[dict[str, int], dict[str, Any]]:
    """Strides, which all tensors share, and tiles."""
    strides = {f"s_{axis}": q.stride(i) for i, axis in enumerate("bht")}
    tiles = {"H": q.shape[1], "BM": bm, "BD": tile(q.shape[3])}
    return strides, tiles


def forward_launches(
    q: Tensor, k: Tensor, v: Tensor, chunk_frames: int, left_frames: int
) -> tuple[list[Launch], tuple[Tensor, Tensor]]:
    """The launch, out (B, H, T, d) and log-sum-exp (B, H, T) in units of log2."""
    b, h, t, d = q.shape
    out, lse = _by_frames(torch.empty_like(q)), q.new_empty(b, h, t, dtype=torch.float32)
    bm = tile(t, high=side_of_tile(q.dtype))
    strides, tiles = _layout(q, bm)
    tensors = {"q": q, "k": k, "v": v, "out": out, "lse": lse}
    launch = Launch(
        utterance_attention_fwd,
        (triton.cdiv(t, bm), b * h),
        {**tensors, "scale": d**-0.5 * LOG2_E, **_mask(q, chunk_frames, left_frames), **strides},
        {**tiles, "BN": side_of_tile(q.dtype), "PRECISION": precision(q.dtype)},
        n_warps=warps(bm),
    )
    return [launch], (out, lse)


def backward_launches(
    saved: tuple[Tensor, ...], d_out: Tensor, chunk_frames: int, left_frames: int
) -> tuple[list[Launch], tuple[Tensor, Tensor, Tensor]]:
    """Three launches, and the gradients of q, k, v; saved is q, k, v, out, lse."""
    q, k, v, out, lse = saved
    b, h, t, d = q.shape
    d_q, d_k, d_v = (_by_frames(torch.empty_like(q)) for _ in range(3))
    delta = torch.empty_like(lse)
    side = tile(t, high=side_of_tile(q.dtype))
    strides, tiles = _layout(q, side)
    grid = (triton.cdiv(t, side), b * h)
    mask = _mask(q, chunk_frames, left_frames)
    read: dict[str, Tensor | int | float] = {
        "q": q,
        "k": k,
        "v": v,
        "d_out": d_out,
        "lse": lse,
        "delta": delta,
    }
    scales = {"scale": d**-0.5 * LOG2_E, "unit": d**-0.5}
    constants = {**tiles, "BN": side, "PRECISION": precision(q.dtype)}
    rows: dict[str, Tensor | int | float] = {
        "out": out,
        "d_out": d_out,
        "delta": delta,
        "T": t,
        "d": d,
        **strides,
    }
    launches = [
        Launch(utterance_attention_delta, grid, rows, tiles),
        Launch(
            utterance_attention_bwd_kv,
            grid,
            {**read, "d_k": d_k, "d_v": d_v, **scales, **mask, **strides},
            {**constants, "BM": min(side, 32)},  # two sums in registers: 64 queries spill
            n_warps=warps(side),
        ),
        Launch(
            utterance_attention_bwd_q,
            grid,
            {**read, "d_q": d_q, **scales, **mask, **strides},
            constants,
            n_warps=warps(side),
        ),
    ]
    return launches, (d_q, d_k, d_v)


class UtteranceAttention(torch.autograd.Function):
    """Forward keeps q, k, v, the output and a log-sum-exp per row, and no probabilities."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, chunk_frames: int, left_frames: int
    ) -> Tensor:
        q, k, v = map(_by_frames, (q, k, v))
        todo, (out, lse) = forward_launches(q, k, v, chunk_frames, left_frames)
        for launch in todo:
            launch.run()
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.mask = chunk_frames, left_frames
        return out

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        todo, grads = backward_launches(ctx.saved_tensors, _by_frames(d_out), *ctx.mask)
        for launch in todo:
            launch.run()
        return *grads, None, None


def _by_frames(x: Tensor) -> Tensor:
    """x (B, H, T, d), in memory (B, T, H, d): no copy for heads cut out of (B, T, D)."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def utterance_attention(
    q: Tensor, k: Tensor, v: Tensor, chunk_frames: int, left_frames: int
) -> Tensor:
    """As `reference.utterance_attention`, with gradients."""
    out: Tensor = UtteranceAttention.apply(q, k, v, chunk_frames, left_frames)
    return out
