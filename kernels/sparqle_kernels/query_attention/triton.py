"""`query_attention` in Triton, forward, for serving.

A program owns BM queries of one head of one row. The bias is looked up in its table for each score;
only which entry (`age`) and whether (`seen`) are read, by all heads at about the same time. Keys
that no query of the program sees are not loaded. Streams share no keys, so packing more of them
into a program would save no byte.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from sparqle_kernels.launch import LOG2_E, Launch, dense, keys_of_tile, precision, tile, warps
from sparqle_kernels.softmax import triton as softmax

if TYPE_CHECKING:
    from torch import Tensor


@triton.jit
def query_attention_fwd(
    q, k, v, age, seen, bias, out,
    scale, log2_e, Q, L, d,
    q_b, q_h, q_q, k_b, k_h, k_l, v_b, v_h, v_l,
    age_b, age_q, age_l, seen_b, seen_q, seen_l, bias_h, o_b, o_h, o_q,
    H: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    i_b, i_h = (tl.program_id(1) // H).to(tl.int64), (tl.program_id(1) % H).to(tl.int64)
    o_m = tl.program_id(0) * BM + tl.arange(0, BM)
    o_n, o_d = tl.arange(0, BN), tl.arange(0, BD)
    m_m, m_d = o_m < Q, o_d < d

    p_q = q + i_b * q_b + i_h * q_h + o_m[:, None] * q_q + o_d[None, :]
    b_q = tl.load(p_q, mask=m_m[:, None] & m_d[None, :], other=0.0)  # (BM, BD)
    b_m, b_l, b_acc = softmax.first(BM, BD)
    p_k = k + i_b * k_b + i_h * k_h + o_d[:, None]
    p_v = v + i_b * v_b + i_h * v_h + o_d[None, :]
    p_age = age + i_b * age_b + o_m[:, None] * age_q
    p_seen = seen + i_b * seen_b + o_m[:, None] * seen_q
    for i_n in range(0, L, BN):
        o_l = i_n + o_n
        m_mn = m_m[:, None] & (o_l < L)[None, :]
        m_mn &= tl.load(p_seen + o_l[None, :] * seen_l, mask=m_mn, other=0) != 0
        m_n = tl.max(m_mn.to(tl.int32), 0) > 0
        b_age = tl.load(p_age + o_l[None, :] * age_l, mask=m_mn, other=0)
        b_bias = tl.load(bias + i_h * bias_h + b_age, mask=m_mn, other=0.0).to(tl.float32)
        b_k = tl.load(p_k + o_l[None, :] * k_l, mask=m_n[None, :] & m_d[:, None], other=0.0)
        b_v = tl.load(p_v + o_l[:, None] * v_l, mask=m_n[:, None] & m_d[None, :], other=0.0)
        b_s = tl.dot(b_q, b_k, input_precision=PRECISION) * scale + b_bias * log2_e
        b_s = tl.where(m_mn, b_s, float("-inf"))
        b_m, b_l, b_acc = softmax.join(b_s, b_v, b_m, b_l, b_acc, PRECISION)

    b_o = softmax.mean(b_l, b_acc)
    p_o = out + i_b * o_b + i_h * o_h + o_m[:, None] * o_q + o_d[None, :]
    tl.store(p_o, b_o.to(out.dtype.element_ty), mask=m_m[:, None] & m_d[None, :])


def launches(
    q: Tensor, k: Tensor, v: Tensor, age: Tensor, seen: Tensor, bias: Tensor
) -> tuple[list[Launch], Tensor]:
    """The launch, and the (B, H, Q, d) that it fills; in memory it is (B, Q, H, d)."""
    b, h, n_queries, d = q.shape
    q, k, v, bias = map(dense, (q, k, v, bias))
    age, seen = age.expand(b, -1, -1), seen.expand(b, -1, -1)  # one for all rows: stride 0
    out = q.new_empty(b, n_queries, h, d).transpose(1, 2)
    bm = tile(n_queries, high=64)
    strides = {
        f"{short}_{axis}": x.stride(i)
        for short, axes, x in (
            *(("q", "bhq", q), ("k", "bhl", k), ("v", "bhl", v)),
            *(("age", "bql", age), ("seen", "bql", seen), ("bias", "h", bias), ("o", "bhq", out)),
        )
        for i, axis in enumerate(axes)
    }
    launch = Launch(
        query_attention_fwd,
        (triton.cdiv(n_queries, bm), b * h),
        {
            **{"q": q, "k": k, "v": v, "age": age, "seen": seen, "bias": bias, "out": out},
            **{"scale": d**-0.5 * LOG2_E, "log2_e": LOG2_E},
            **{"Q": n_queries, "L": k.shape[2], "d": d},
            **strides,
        },
        {
            **{"H": h, "BM": bm, "BN": keys_of_tile(q.dtype), "BD": tile(d)},
            **{"PRECISION": precision(q.dtype)},
        },
        n_warps=warps(bm),
    )
    return [launch], out


def query_attention(
    q: Tensor, k: Tensor, v: Tensor, age: Tensor, seen: Tensor, bias: Tensor
) -> Tensor:
    """As `reference.query_attention`; forward only."""
    todo, out = launches(q, k, v, age, seen, bias)
    for launch in todo:
        launch.run()
    return out
