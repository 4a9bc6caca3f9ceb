"""Rows: which rows of a batched state a step works on, and how its inputs lie.

A stage computes rows (b, ...) of a state of B. It is either given x (B, ...) with a mask `active`
(B,), from which the rows are found by looking (on a GPU the host waits for that), or x (b, ...)
with the rows' numbers, as a captured CUDA graph needs it: its shapes depend on no data.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows by number. One that stands for padding may be there several times: it is nobody's."""

    index: Tensor  # (b,) int64
    n_outer: int | None = None  # rows of inputs and outputs; None: the b rows alone

    @classmethod
    def of(cls, active: Tensor | Rows) -> Rows:
        """A mask (B,) -> the rows that it has."""
        if isinstance(active, Rows):
            return active
        return cls(active.nonzero()[:, 0], len(active))

    def __len__(self) -> int:
        return len(self.index)

    @property
    def n_out(self) -> int:
        return len(self) if self.n_outer is None else self.n_outer

    def take(self, x: Tensor) -> Tensor:
        """What a step was given -> (b, ...)."""
        return x if self.n_outer is None else x[self.index]

    def put(self, y: Tensor) -> Tensor:
        """y (b, ...) -> what a step returns, zeros for rows that are not active."""
        if self.n_outer is None:
            return y
        out = y.new_zeros(self.n_outer, *y.shape[1:])
        out[self.index] = y
        return out
