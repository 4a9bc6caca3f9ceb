"""Stages: what the host side of a stream knows of the device side, whatever computes it.

A row is one stream's place in the device's state. `torch_stages` and `onnx_cpu.stages` offer the
same `Stages`: a session on the host cannot tell which of them it has. No torch in here.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from sparqle_stream.config import CHUNK_MS_RANGE, DELAY_MS_RANGE, QUERY_MS

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from contextlib import AbstractContextManager

    import numpy as np
    import numpy.typing as npt

    from sparqle_stream.decode import Writer

    Floats = npt.NDArray[np.float32]
    # A row and the CTC log-probs (C, V) of its chunk -> who chooses its tokens.
    Hear = Callable[[int, Floats], Writer]

PREFIX_TOKENS = 48  # context or prompt; training saw no more
# Queries that may have to be heard again after a seam: the longest delay and one chunk.
N_RECENT = (DELAY_MS_RANGE[1] + CHUNK_MS_RANGE[1]) // QUERY_MS


@dataclass(frozen=True, slots=True)
class StepResult:
    tokens: dict[int, list[int]]  # of each row that had a chunk
    seconds: dict[str, float] = field(default_factory=dict)  # wall clock per stage
    failed: dict[int, Exception] = field(default_factory=dict)  # rows whose own fault it was


class Laps:
    """Wall-clock seconds between calls, summed by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def __call__(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._last
        self._last = now


class Stages(Protocol):
    """All rows of one model on its device."""

    def wipe(self, row: int) -> None:
        """The row becomes a new stream's: nothing of the old one is left to see."""
        ...

    def begin(
        self, prefixes: Mapping[int, list[int]], leads: Mapping[int, Floats] | None = None
    ) -> None:
        """Rows begin a segment after a pause, with ids before it.

        Of some of them a lead (L,) has been heard, which tells how loud they are; the others' gain
        goes on.
        """
        ...

    def seam(self, prefixes: Mapping[int, list[int]], n_again: Mapping[int, int]) -> None:
        """Rows get a new LLM slot without a pause, and hear their last queries again."""
        ...

    def step(
        self,
        pcm: Mapping[int, Floats],
        wait_ms: Mapping[int, int],
        ahead_frames: int,
        hear: Hear,
    ) -> StepResult:
        """One chunk (S,) of some rows, all of one size and look-ahead.

        wait_ms: what is left of each row's delay after the look-ahead.
        """
        ...

    def state_bytes(self) -> int:
        """What all rows keep; fixed from the start on."""
        ...

    def working(self, threads: int) -> AbstractContextManager[Any]:
        """What the thread that calls the rest must hold; 0 threads: as many as there are cores."""
        ...


class Tokenizer(Protocol):
    """What text goes through; `tokenizer.TextTokenizer` and fakes of tests."""

    bos_id: int

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: list[int]) -> str: ...


def prefix_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """What stands before a segment's first query: beginning, the end of `text`, a line break.

    As in training every word of `text` has its space before it.
    """
    context = tokenizer.encode(" " + text)[-PREFIX_TOKENS:] if text else []
    return [tokenizer.bos_id, *context, *tokenizer.encode("\n")]
