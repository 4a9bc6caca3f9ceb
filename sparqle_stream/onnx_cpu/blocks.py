"""Blocks: float32 matrices -> 4 or 8 bits with a scale for every 32 numbers of a row, or rows.

Blocks are what ONNX Runtime's MatMulNBits reads: w = (q - zero) * scale. Four bits with a zero
point of their own in each block are what the default LLM comes in (GGUF's Q4_1); eight are
symmetric. Whole rows with one scale are what MatMulIntegerToFloat reads: past a few rows of input
they win.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from sparqle_stream.errors import ModelError

if TYPE_CHECKING:
    Floats = npt.NDArray[np.float32]
    Bytes = npt.NDArray[np.uint8]

BLOCK = 32
# Shares of a block's range that are tried besides all of it: what lies outside is clipped, the rest
# is told finer. In the default LLM it takes a third off the loss that 4 bits cost.
NARROWER = ((0.94, 0.94), (0.88, 0.88), (0.92, 1.0), (1.0, 0.92))
# Of a whole row: 7 bits. Without VNNI two products are added in 16 bits: 255 * 63 * 2 still fits.
LARGEST_OF_ROW = 63


@dataclass(frozen=True, slots=True)
class Blocks:
    """A matrix (out, in) in blocks along its rows."""

    q: Bytes  # (out, in / block, bytes of a block), the first number in the lowest bits
    scale: Floats  # (out, in / block)
    zero: Bytes | None  # (out, half as many) two of 4 bits in a byte; None: the middle
    block: int = BLOCK

    @property
    def inputs(self) -> list[npt.NDArray[Any]]:
        return [self.q, self.scale] if self.zero is None else [self.q, self.scale, self.zero]


def quantize_blocks(weight: Floats, bits: int) -> Blocks:
    """weight (out, in) -> blocks of `bits`; raises ModelError where `in` is no multiple of 32."""
    n_out, n_in = weight.shape
    if n_in % BLOCK:
        raise ModelError(
            f"rows of {n_in} numbers do not fall into blocks of {BLOCK}",
            hint="use --dtype float32 with this LLM",
        )
    blocks = weight.reshape(n_out, n_in // BLOCK, BLOCK)
    return _four_bits(blocks) if bits == 4 else _eight_bits(blocks)


def quantize_rows(weight: Floats) -> tuple[npt.NDArray[np.int8], Floats]:
    """weight (out, in) -> whole numbers (out, in) of at most 63, and a scale for each output."""
    scale = np.maximum(np.abs(weight).max(axis=1) / LARGEST_OF_ROW, 1e-12).astype(np.float32)
    q: npt.NDArray[np.int8] = np.rint(weight / scale[:, None]).astype(np.int8)
    return q, scale


def _eight_bits(blocks: Floats) -> Blocks:
    largest = np.abs(blocks).max(axis=2)
    scale = np.maximum(largest / 127.0, 1e-12).astype(np.float32)
    q = np.rint(blocks / scale[..., None]) + 128.0
    return Blocks(q.astype(np.uint8), scale, None)


def _four_bits(blocks: Floats) -> Blocks:
    """Of some ranges for every block the one with the least squared error."""
    low, high = np.minimum(blocks.min(axis=2), 0.0), np.maximum(blocks.max(axis=2), 0.0)
    scale, zero, q, error = _steps(blocks, low, high)
    for less_low, less_high in NARROWER:
        other = _steps(blocks, low * less_low, high * less_high)
        is_better = other[3] < error
        scale, zero = np.where(is_better, other[0], scale), np.where(is_better, other[1], zero)
        q, error = np.where(is_better[..., None], other[2], q), np.where(is_better, other[3], error)
    packed: Bytes = (q[..., 0::2] | (q[..., 1::2] << 4)).astype(np.uint8)
    if zero.shape[1] % 2:
        zero = np.pad(zero, ((0, 0), (0, 1)))
    zeros: Bytes = (zero[:, 0::2] | (zero[:, 1::2] << 4)).astype(np.uint8)
    return Blocks(packed, scale, zeros)


def _steps(blocks: Floats, low: Floats, high: Floats) -> tuple[Floats, Bytes, Bytes, Floats]:
    """A range of every block in 15 steps, zero one of them: scale, zero, q, squared error."""
    scale = np.maximum((high - low) / np.float32(15.0), np.float32(1e-12))
    zero = np.rint(-low / scale).clip(0, 15)
    q = (np.rint(blocks / scale[..., None]) + zero[..., None]).clip(0, 15)
    error = np.square((q - zero[..., None]) * scale[..., None] - blocks).sum(axis=2)
    return scale, zero.astype(np.uint8), q.astype(np.uint8), error
