"""`decode_attention` in Triton: split-K over the slots, and a stable merge of the splits.

A program of the first kernel owns SPLIT keys of one slot and KV head, and packs the R rows of all G
heads that share them into one tile: keys are read once. Lengths stay on the device and the grid
covers the whole slot, so that one CUDA graph serves all lengths; a split past the length ends at
once. SPLIT is a constant: what a row gets does not depend on who else is in the batch. R is none:
prefixes have many lengths, and each would be compiled.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from sparqle_kernels.launch import LOG2_E, Launch, dense, keys_of_tile, precision, tile, warps
from sparqle_kernels.softmax import triton as softmax

if TYPE_CHECKING:
    from torch import Tensor

SPLIT = 256  # keys of a program: 64 KiB of K and V in bf16 at d 64


@triton.jit
def decode_attention_split(
    q, k, v, slots, lengths, out, part, lse,
    scale, d, R,
    q_b, q_h, q_r, k_s, k_h, k_n, v_s, v_h, v_n, o_b, o_h, o_r, part_b, part_s, lse_b, lse_s,
    KV: tl.constexpr, G: tl.constexpr, IS_WHOLE: tl.constexpr, SPLIT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Writes `out` when one split is the whole slot, else its mean and log2-sum-exp2."""
    i_s = tl.program_id(0)
    i_b, i_h = (tl.program_id(1) // KV).to(tl.int64), (tl.program_id(1) % KV).to(tl.int64)
    o_m = tl.program_id(2) * BM + tl.arange(0, BM)  # row r of group g is g R + r
    o_n, o_d = tl.arange(0, BN), tl.arange(0, BD)
    m_m, m_d = o_m < G * R, o_d < d
    length = tl.load(lengths + i_b).to(tl.int32)
    slot = tl.load(slots + i_b).to(tl.int64)
    b_last = length - R + o_m % R  # (BM,) the entry of the slot that each row is
    begin = i_s * SPLIT
    end = tl.minimum(begin + SPLIT, length)

    o_row = (i_h * G + o_m // R) * q_h + (o_m % R) * q_r
    p_q = q + i_b * q_b + o_row[:, None] + o_d[None, :]
    b_q = tl.load(p_q, mask=m_m[:, None] & m_d[None, :], other=0.0)  # (BM, BD)
    b_m, b_l, b_acc = softmax.first(BM, BD)
    p_k = k + slot * k_s + i_h * k_h + o_d[:, None]
    p_v = v + slot * v_s + i_h * v_h + o_d[None, :]
    for i_n in range(begin, end, BN):
        o_key = i_n + o_n
        m_n = o_key < end
        b_k = tl.load(p_k + o_key[None, :] * k_n, mask=m_n[None, :] & m_d[:, None], other=0.0)
        b_v = tl.load(p_v + o_key[:, None] * v_n, mask=m_n[:, None] & m_d[None, :], other=0.0)
        b_s = tl.dot(b_q, b_k, input_precision=PRECISION) * scale
        m_see = m_n[None, :] & (o_key[None, :] <= b_last[:, None])
        b_s = tl.where(m_see, b_s, float("-inf"))
        b_m, b_l, b_acc = softmax.join(b_s, b_v, b_m, b_l, b_acc, PRECISION)

    b_o = softmax.mean(b_l, b_acc)
    m_out = m_m[:, None] & m_d[None, :]
    if IS_WHOLE:
        o_row = (i_h * G + o_m // R) * o_h + (o_m % R) * o_r
        p_o = out + i_b * o_b + o_row[:, None] + o_d[None, :]
        tl.store(p_o, b_o.to(out.dtype.element_ty), mask=m_out)
    elif begin < length:
        i_part = tl.program_id(1).to(tl.int64)
        p_part = part + i_part * part_b + i_s * part_s + o_m[:, None] * d + o_d[None, :]
        tl.store(p_part, b_o, mask=m_out)
        b_lse = tl.where(b_l > 0.0, b_m + tl.log2(tl.where(b_l > 0.0, b_l, 1.0)), float("-inf"))
        tl.store(lse + i_part * lse_b + i_s * lse_s + o_m, b_lse, mask=m_m)


@triton.jit
def decode_attention_merge(
    part, lse, lengths, out,
    d, R, part_b, part_s, lse_b, lse_s, o_b, o_h, o_r,
    KV: tl.constexpr, G: tl.constexpr, SPLIT: tl.constexpr,
    BM: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """sum_s 2^(lse_s - max) mean_s / sum_s 2^(lse_s - max) over the splits that hold keys."""
    i_part = tl.program_id(0).to(tl.int64)
    i_b, i_h = i_part // KV, i_part % KV
    o_m = tl.program_id(1) * BM + tl.arange(0, BM)
    o_d = tl.arange(0, BD)
    m_m, m_d = o_m < G * R, o_d < d
    m_out = m_m[:, None] & m_d[None, :]
    n_splits = tl.cdiv(tl.load(lengths + i_b).to(tl.int32), SPLIT)
    b_m, b_l, b_acc = softmax.first(BM, BD)
    for i_s in range(0, n_splits):
        b_lse = tl.load(lse + i_part * lse_b + i_s * lse_s + o_m, mask=m_m, other=float("-inf"))
        p_part = part + i_part * part_b + i_s * part_s + o_m[:, None] * d + o_d[None, :]
        b_o = tl.load(p_part, mask=m_out, other=0.0)
        b_new = tl.maximum(b_m, b_lse)
        b_shift = tl.where(b_new == float("-inf"), 0.0, b_new)
        b_old, b_w = tl.exp2(b_m - b_shift), tl.exp2(b_lse - b_shift)
        b_acc = b_acc * b_old[:, None] + b_o * b_w[:, None]
        b_l = b_l * b_old + b_w
        b_m = b_new
    o_row = (i_h * G + o_m // R) * o_h + (o_m % R) * o_r
    p_o = out + i_b * o_b + o_row[:, None] + o_d[None, :]
    tl.store(p_o, softmax.mean(b_l, b_acc).to(out.dtype.element_ty), mask=m_out)


@dataclass(frozen=True, slots=True)
class Plan:
    """What all layers of one pass share; nothing of it is read back from the device."""

    slots: Tensor  # (B,)
    lengths: Tensor  # (B,)
    n_rows: int
    n_groups: int
    split: int = SPLIT

    @classmethod
    def of(cls, slots: Tensor, lengths: Tensor, n_rows: int, n_groups: int) -> Plan:
        return cls(slots, lengths, n_rows, n_groups)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (B, H, R, d), k and v (S, KV, N, d) -> (B, H, R, d)."""
        todo, out = self.launches(q, k, v)
        for launch in todo:
            launch.run()
        return out

    def launches(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[list[Launch], Tensor]:
        """One launch, or two when a slot is longer than a split; (B, R, H, d) in memory."""
        b, h, n_rows, d = q.shape
        q, k, v = map(dense, (q, k, v))
        n_kv, n_splits = k.shape[1], triton.cdiv(k.shape[2], self.split)
        n_packed = self.n_groups * n_rows
        out = q.new_empty(b, n_rows, h, d).transpose(1, 2)
        is_whole = n_splits == 1
        scratch = (1, 1) if is_whole else (b * n_kv, n_splits)
        part = q.new_empty(*scratch, n_packed, d, dtype=torch.float32)
        lse = q.new_empty(*scratch, n_packed, dtype=torch.float32)
        bm = tile(n_packed, high=64)
        shared: dict[str, Tensor | int | float] = {
            **{"lengths": self.lengths, "out": out, "part": part, "lse": lse, "d": d, "R": n_rows},
            **{"o_b": out.stride(0), "o_h": out.stride(1), "o_r": out.stride(2)},
            **{"part_b": part.stride(0), "part_s": part.stride(1)},
            **{"lse_b": lse.stride(0), "lse_s": lse.stride(1)},
        }
        shape = {"KV": n_kv, "G": self.n_groups, "SPLIT": self.split}
        tiles = {"BM": bm, "BD": tile(d)}
        split_args: dict[str, Tensor | int | float] = {
            **{"q": q, "k": k, "v": v, "slots": self.slots, "scale": d**-0.5 * LOG2_E},
            **{"q_b": q.stride(0), "q_h": q.stride(1), "q_r": q.stride(2)},
            **{"k_s": k.stride(0), "k_h": k.stride(1), "k_n": k.stride(2)},
            **{"v_s": v.stride(0), "v_h": v.stride(1), "v_n": v.stride(2)},
        }
        n_tiles = triton.cdiv(n_packed, bm)
        split_constants = {
            **shape,
            **tiles,
            **{"IS_WHOLE": is_whole, "BN": keys_of_tile(q.dtype)},
            **{"PRECISION": precision(q.dtype)},
        }
        split = Launch(
            decode_attention_split,
            (n_splits, b * n_kv, n_tiles),
            {**split_args, **shared},
            split_constants,
            n_warps=8 if is_whole else warps(bm),  # four would spill where the kernel writes out
        )
        merge = Launch(decode_attention_merge, (b * n_kv, n_tiles), shared, {**shape, **tiles})
        return ([split] if is_whole else [split, merge]), out
