"""Softmax over keys that come tile by tile: what all attention kernels share.

b_ is a tile in registers, m_ a mask, o_ offsets, p_ pointers, i_ a program's index. Scores are in
units of log2, so that exp2 takes the place of exp.
"""

import triton
import triton.language as tl


@triton.jit
def first(M: tl.constexpr, D: tl.constexpr):
    """Running maximum (M,), sum (M,) and weighted values (M, D) before any key."""
    b_m = tl.full((M,), float("-inf"), tl.float32)
    return b_m, tl.zeros((M,), tl.float32), tl.zeros((M, D), tl.float32)


@triton.jit
def join(b_s, b_v, b_m, b_l, b_acc, PRECISION: tl.constexpr):
    """Scores b_s (M, N) with -inf where nothing is seen, and values b_v (N, D), join the sums.

    Rows that have seen nothing keep maximum -inf: -inf - -inf would be NaN, so they shift by 0.
    """
    b_new = tl.maximum(b_m, tl.max(b_s, 1))
    b_shift = tl.where(b_new == float("-inf"), 0.0, b_new)
    b_p = tl.exp2(b_s - b_shift[:, None])
    b_old = tl.exp2(b_m - b_shift)
    b_acc = tl.dot(b_p.to(b_v.dtype), b_v, acc=b_acc * b_old[:, None], input_precision=PRECISION)
    return b_new, b_l * b_old + tl.sum(b_p, 1), b_acc


@triton.jit
def mean(b_l, b_acc):
    """(M, D) the softmax-weighted mean; zeros for rows that have seen nothing."""
    return b_acc / tl.where(b_l == 0.0, 1.0, b_l)[:, None]
