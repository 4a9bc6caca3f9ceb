"""`chunk_attention` in Triton, forward, for serving: ring and chunk in one pass over keys.

A program owns BM queries of one head of one row, and reads the row's ring where it lies. What the
ring has not written and what lies past `length` is neither seen nor loaded; no mask is ever in
memory. In fp16 and bf16 both products run on tensor cores with float32 sums; float32 stays float32.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from sparqle_kernels.launch import LOG2_E, Launch, dense, keys_of_tile, precision, tile, warps
from sparqle_kernels.softmax import triton as softmax

if TYPE_CHECKING:
    from torch import Tensor

    from sparqle_kernels.chunk_attention.reference import Ring


@triton.jit
def chunk_attention_fwd(
    q, k, v, ring_k, ring_v, ring_position, length, rows, out,
    scale, TQ, T, L, d,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t,
    rk_b, rk_h, rk_l, rv_b, rv_h, rv_l, rp_b, rp_l, o_b, o_h, o_t,
    H: tl.constexpr, HAS_LENGTH: tl.constexpr, HAS_ROWS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    i_b, i_h = (tl.program_id(1) // H).to(tl.int64), (tl.program_id(1) % H).to(tl.int64)
    o_m = tl.program_id(0) * BM + tl.arange(0, BM)
    o_n, o_d = tl.arange(0, BN), tl.arange(0, BD)
    m_d = o_d < d
    n_new, n_ring, i_s = T, L, i_b
    if HAS_ROWS:
        i_s = tl.load(rows + i_b).to(tl.int64)
    if HAS_LENGTH:
        n_new = tl.load(length + i_b).to(tl.int32)
        n_ring = tl.where(n_new > 0, L, 0)  # an inactive row reads nothing
    m_m = (o_m < n_new) & (o_m < TQ)

    p_q = q + i_b * q_b + i_h * q_h + o_m[:, None] * q_t + o_d[None, :]
    b_q = tl.load(p_q, mask=m_m[:, None] & m_d[None, :], other=0.0)  # (BM, BD)
    b_m, b_l, b_acc = softmax.first(BM, BD)

    p_k = ring_k + i_s * rk_b + i_h * rk_h + o_d[:, None]
    p_v = ring_v + i_s * rv_b + i_h * rv_h + o_d[None, :]
    for i_n in range(0, n_ring, BN):
        o_l = i_n + o_n
        b_at = tl.load(ring_position + i_s * rp_b + o_l * rp_l, mask=o_l < L, other=-1)
        m_n = b_at >= 0
        b_k = tl.load(p_k + o_l[None, :] * rk_l, mask=m_n[None, :] & m_d[:, None], other=0.0)
        b_v = tl.load(p_v + o_l[:, None] * rv_l, mask=m_n[:, None] & m_d[None, :], other=0.0)
        b_s = tl.dot(b_q, b_k, input_precision=PRECISION) * scale
        b_s = tl.where(m_n[None, :], b_s, float("-inf"))
        b_m, b_l, b_acc = softmax.join(b_s, b_v, b_m, b_l, b_acc, PRECISION)

    p_k = k + i_b * k_b + i_h * k_h + o_d[:, None]
    p_v = v + i_b * v_b + i_h * v_h + o_d[None, :]
    for i_n in range(0, n_new, BN):
        o_t_new = i_n + o_n
        m_n = o_t_new < n_new
        b_k = tl.load(p_k + o_t_new[None, :] * k_t, mask=m_n[None, :] & m_d[:, None], other=0.0)
        b_v = tl.load(p_v + o_t_new[:, None] * v_t, mask=m_n[:, None] & m_d[None, :], other=0.0)
        b_s = tl.dot(b_q, b_k, input_precision=PRECISION) * scale
        b_s = tl.where(m_n[None, :], b_s, float("-inf"))
        b_m, b_l, b_acc = softmax.join(b_s, b_v, b_m, b_l, b_acc, PRECISION)

    b_o = tl.where(m_m[:, None], softmax.mean(b_l, b_acc), 0.0)
    p_o = out + i_b * o_b + i_h * o_h + o_m[:, None] * o_t + o_d[None, :]
    tl.store(p_o, b_o.to(out.dtype.element_ty), mask=(o_m < TQ)[:, None] & m_d[None, :])


def launches(
    q: Tensor, k: Tensor, v: Tensor, ring: Ring, length: Tensor | None = None
) -> tuple[list[Launch], Tensor]:
    """The launch, and the (B, H, T, d) that it fills; in memory it is (B, T, H, d)."""
    b, h, t, d = q.shape
    q, k, v, ring_k, ring_v = map(dense, (q, k, v, ring.k, ring.v))
    ring_position, rows = ring.position, ring.rows
    out = q.new_empty(b, t, h, d).transpose(1, 2)
    bm = tile(t, high=64)
    tensors = {"q": q, "k": k, "v": v, "ring_k": ring_k, "ring_v": ring_v}
    strides = {
        f"{short}_{axis}": x.stride(i)
        for short, axes, x in (
            *(("q", "bht", q), ("k", "bht", k), ("v", "bht", v)),
            *(("rk", "bhl", ring_k), ("rv", "bhl", ring_v), ("rp", "bl", ring_position)),
            ("o", "bht", out),
        )
        for i, axis in enumerate(axes)
    }
    launch = Launch(
        chunk_attention_fwd,
        (triton.cdiv(t, bm), b * h),
        {
            **tensors,
            "ring_position": ring_position,
            "length": ring_position if length is None else length,
            "rows": ring_position if rows is None else rows,
            "out": out,
            "scale": d**-0.5 * LOG2_E,
            **{"TQ": t, "T": k.shape[2], "L": ring_k.shape[2], "d": d},
            **strides,
        },
        {
            **{"H": h, "HAS_LENGTH": length is not None, "HAS_ROWS": rows is not None},
            **{"BM": bm, "BN": keys_of_tile(q.dtype), "BD": tile(d)},
            **{"PRECISION": precision(q.dtype)},
        },
        n_warps=warps(bm),
    )
    return [launch], out


def chunk_attention(
    q: Tensor, k: Tensor, v: Tensor, ring: Ring, length: Tensor | None = None
) -> Tensor:
    """As `reference.chunk_attention`; forward only."""
    todo, out = launches(q, k, v, ring, length)
    for launch in todo:
        launch.run()
    return out
