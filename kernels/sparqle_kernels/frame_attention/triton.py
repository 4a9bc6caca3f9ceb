"""`frame_attention` in Triton, forward, for serving.

A program owns BM rows of one stream, packed from all heads and queries, because they share their
frames: a tile of frames is loaded once and is key and value to all of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from sparqle_kernels.launch import LOG2_E, Launch, dense, precision, tile
from sparqle_kernels.softmax import triton as softmax

if TYPE_CHECKING:
    from torch import Tensor


@triton.jit
def frame_attention_fwd(
    q, frames, age, seen, bias, out,
    scale, log2_e, L, W,
    q_b, q_h, q_q, f_b, f_l, age_b, age_q, age_l, seen_b, seen_q, seen_l, bias_h, o_b, o_h, o_q,
    H: tl.constexpr, Q: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BW: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    i_b = tl.program_id(1).to(tl.int64)
    o_m = tl.program_id(0) * BM + tl.arange(0, BM)  # query q of head h is h Q + q
    o_head, o_query = o_m // Q, o_m % Q
    o_n, o_w = tl.arange(0, BN), tl.arange(0, BW)
    m_m, m_w = o_m < H * Q, o_w < W

    p_q = q + i_b * q_b + (o_head * q_h + o_query * q_q)[:, None] + o_w[None, :]
    b_q = tl.load(p_q, mask=m_m[:, None] & m_w[None, :], other=0.0)  # (BM, BW)
    b_m, b_l, b_acc = softmax.first(BM, BW)
    p_f = frames + i_b * f_b + o_w[None, :]
    p_age = age + i_b * age_b + (o_query * age_q)[:, None]
    p_seen = seen + i_b * seen_b + (o_query * seen_q)[:, None]
    p_bias = bias + (o_head * bias_h)[:, None]
    for i_n in range(0, L, BN):
        o_l = i_n + o_n
        m_mn = m_m[:, None] & (o_l < L)[None, :]
        m_mn &= tl.load(p_seen + o_l[None, :] * seen_l, mask=m_mn, other=0) != 0
        m_n = tl.max(m_mn.to(tl.int32), 0) > 0
        b_age = tl.load(p_age + o_l[None, :] * age_l, mask=m_mn, other=0)
        b_bias = tl.load(p_bias + b_age, mask=m_mn, other=0.0).to(tl.float32)
        m_f = m_n[:, None] & m_w[None, :]
        b_f = tl.load(p_f + o_l[:, None] * f_l, mask=m_f, other=0.0)  # (BN, BW)
        b_s = tl.dot(b_q, tl.trans(b_f), input_precision=PRECISION) * scale + b_bias * log2_e
        b_s = tl.where(m_mn, b_s, float("-inf"))
        b_m, b_l, b_acc = softmax.join(b_s, b_f, b_m, b_l, b_acc, PRECISION)

    b_o = softmax.mean(b_l, b_acc)
    p_o = out + i_b * o_b + (o_head * o_h + o_query * o_q)[:, None] + o_w[None, :]
    tl.store(p_o, b_o.to(out.dtype.element_ty), mask=m_m[:, None] & m_w[None, :])


def launches(
    q: Tensor, frames: Tensor, age: Tensor, seen: Tensor, bias: Tensor, scale: float
) -> tuple[list[Launch], Tensor]:
    """The launch, and the (B, H, Q, W) that it fills."""
    b, h, n_queries, width = q.shape
    q, frames, bias = map(dense, (q, frames, bias))
    age, seen = age.expand(b, -1, -1), seen.expand(b, -1, -1)  # one for all rows: stride 0
    out = q.new_empty(q.shape)
    bm = tile(h * n_queries, high=32)
    strides = {
        f"{short}_{axis}": x.stride(i)
        for short, axes, x in (
            *(("q", "bhq", q), ("f", "bl", frames), ("o", "bhq", out)),
            *(("age", "bql", age), ("seen", "bql", seen), ("bias", "h", bias)),
        )
        for i, axis in enumerate(axes)
    }
    launch = Launch(
        frame_attention_fwd,
        (triton.cdiv(h * n_queries, bm), b),
        {
            **{"q": q, "frames": frames, "age": age, "seen": seen, "bias": bias, "out": out},
            **{"scale": float(scale) * LOG2_E, "log2_e": LOG2_E},
            **{"L": frames.shape[1], "W": width},
            **strides,
        },
        {
            **{"H": h, "Q": n_queries, "BM": bm, "BN": 16, "BW": tile(width)},
            **{"PRECISION": precision(q.dtype)},
        },
        n_warps=8,
    )
    return [launch], out


def frame_attention(
    q: Tensor, frames: Tensor, age: Tensor, seen: Tensor, bias: Tensor, scale: float
) -> Tensor:
    """As `reference.frame_attention`; forward only."""
    todo, out = launches(q, frames, age, seen, bias, scale)
    for launch in todo:
        launch.run()
    return out
