"""`rms_norm_rope_append` in Triton: a program owns one row and all of its heads."""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from sparqle_kernels.launch import Launch, dense, tile

if TYPE_CHECKING:
    from torch import Tensor

    from sparqle_kernels.rms_norm_rope_append.reference import Rotation, Slots


@triton.jit
def rms_norm_rope_append_fwd(
    x, qkv, cos, sin, k, v, slot, start, q,
    eps, R, E, d, N, x_b, x_r, qkv_b, qkv_r, k_s, k_h, k_n, v_s, v_h, v_n, q_b, q_h, q_r,
    H: tl.constexpr, KV: tl.constexpr,
    BE: tl.constexpr, BH: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    i_b, i_r = (tl.program_id(0) // R).to(tl.int64), tl.program_id(0) % R
    i_slot = tl.load(slot + i_b)
    is_active = i_slot >= 0
    at = tl.load(start + i_b) + i_r
    fits = is_active & (at >= 0) & (at < N)  # or it would hit a neighbour
    o_e, o_h, o_d = tl.arange(0, BE), tl.arange(0, BH), tl.arange(0, BD)
    # nothing is read for a row that is not active, nothing written for one that does not fit
    n_e, n_heads = tl.where(is_active, E, 0), tl.where(is_active, H + 2 * KV, 0)
    n_at, n_kv = tl.where(fits, d, 0), tl.where(fits, KV, 0)
    b_x = tl.load(x + i_b * x_b + i_r * x_r + o_e, mask=o_e < n_e, other=0.0)
    b_x = b_x.to(tl.float32)
    b_scale = 1.0 / tl.sqrt_rn(tl.sum(b_x * b_x, 0) / E + eps)

    m_d, half = o_d < d, d // 2
    m = (o_h < n_heads)[:, None] & m_d[None, :]
    o_other = tl.where(o_d < half, o_d + half, o_d - half)  # the half that is swapped in
    p_row = qkv + i_b * qkv_b + i_r * qkv_r + o_h[:, None] * d
    b_own = tl.load(p_row + o_d[None, :], mask=m, other=0.0).to(tl.float32) * b_scale  # (BH, BD)
    b_other = tl.load(p_row + o_other[None, :], mask=m, other=0.0).to(tl.float32) * b_scale
    b_cos = tl.load(cos + at * d + o_d, mask=o_d < n_at, other=0.0)
    b_sin = tl.load(sin + at * d + o_d, mask=o_d < n_at, other=0.0)
    b_turned = b_own * b_cos[None, :] + b_other * b_sin[None, :]

    m_q = (o_h < H)[:, None] & m_d[None, :]
    p_q = q + i_b * q_b + o_h[:, None] * q_h + i_r * q_r + o_d[None, :]
    tl.store(p_q, b_turned.to(q.dtype.element_ty), mask=m_q)
    o_k = o_h - H
    m_k = ((o_k >= 0) & (o_k < n_kv))[:, None] & m_d[None, :]
    p_k = k + i_slot * k_s + o_k[:, None] * k_h + at * k_n + o_d[None, :]
    tl.store(p_k, b_turned.to(k.dtype.element_ty), mask=m_k)
    o_v = o_k - KV
    m_v = ((o_v >= 0) & (o_v < n_kv))[:, None] & m_d[None, :]
    p_v = v + i_slot * v_s + o_v[:, None] * v_h + at * v_n + o_d[None, :]
    tl.store(p_v, b_own.to(v.dtype.element_ty), mask=m_v)


def launches(
    x: Tensor, qkv: Tensor, eps: float, rotation: Rotation, slots: Slots
) -> tuple[list[Launch], Tensor]:
    """The launch, and the q (B, H, R, d) that it fills; in memory it is (B, R, H, d)."""
    x, qkv = dense(x), dense(qkv)
    b, n_rows, width = x.shape
    _, n_kv, n_slot, d = slots.k.shape
    n_heads = qkv.shape[2] // d - 2 * n_kv
    q = qkv.new_empty(b, n_rows, n_heads, d).transpose(1, 2)
    strides = {
        f"{short}_{axis}": x.stride(i)
        for short, axes, x in (
            *(("x", "br", x), ("qkv", "br", qkv)),
            *(("k", "shn", slots.k), ("v", "shn", slots.v), ("q", "bhr", q)),
        )
        for i, axis in enumerate(axes)
    }
    launch = Launch(
        rms_norm_rope_append_fwd,
        (b * n_rows,),
        {
            **{"x": x, "qkv": qkv, "cos": rotation.cos, "sin": rotation.sin},
            **slots._asdict(),
            **{"q": q, "eps": float(eps), "R": n_rows, "E": width, "d": d, "N": n_slot},
            **strides,
        },
        {
            **{"H": n_heads, "KV": n_kv},
            **{"BE": tile(width), "BH": tile(n_heads + 2 * n_kv, low=1), "BD": tile(d)},
        },
    )
    return [launch], q


def rms_norm_rope_append(
    x: Tensor, qkv: Tensor, eps: float, rotation: Rotation, slots: Slots
) -> Tensor:
    """As `reference.rms_norm_rope_append`; what does not fit into a slot is not written."""
    todo, out = launches(x, qkv, eps, rotation, slots)
    for launch in todo:
        launch.run()
    return out
