"""Batch: the pipeline's slots on the device, and one step of it for the sessions that have a chunk.

In: sessions by row, each with a chunk of the same size. Out: tokens by row. Contract: rows without
a chunk keep their state, so what a session gets does not depend on who else is in the batch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sparqle_stream import pipeline
from sparqle_stream.session import Session, Start, Turn

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sparqle_stream.llm import Writer
    from sparqle_stream.models import SparqleModel


class Batch:
    """All slots of one model."""

    def __init__(self, model: SparqleModel, n_slots: int) -> None:
        self.model = model
        self.n_slots = n_slots
        self.state = pipeline.init_state(model, n_slots)

    def wipe(self, row: int) -> None:
        """The row becomes a new stream's."""
        pipeline.reset_rows(self.state, self._mask([row]))

    def run(self, sessions: Mapping[int, Session]) -> pipeline.ChunkResult:
        """One chunk of every session; `Session.take` must follow with its row's tokens."""
        turns = {row: session.next_turn() for row, session in sessions.items()}
        self._begin({r: t for r, t in turns.items() if t.start is Start.SEGMENT})
        self._seam({r: t for r, t in turns.items() if t.start is Start.SEAM})
        rows, device = list(turns), self.model.device
        pcm = torch.zeros(self.n_slots, len(turns[rows[0]].pcm))
        delay_ms = torch.zeros(self.n_slots, dtype=torch.int64)
        for row, turn in turns.items():
            pcm[row] = torch.from_numpy(turn.pcm)
            delay_ms[row] = sessions[row].options.delay_ms

        def hear(log_probs: Tensor) -> list[Writer | None]:
            log_probs = log_probs.cpu()
            return [
                sessions[row].hear(log_probs[row]) if row in sessions else None
                for row in range(self.n_slots)
            ]

        self.state, result = pipeline.step(
            self.model,
            self.state,
            pcm.to(device),
            self._mask(rows),
            delay_ms.to(device),
            hear,
        )
        return result

    def _begin(self, turns: Mapping[int, Turn]) -> None:
        if turns:
            mask = self._mask(list(turns))
            pipeline.begin_rows(self.model, self.state, mask, self._prefixes(turns))

    def _seam(self, turns: Mapping[int, Turn]) -> None:
        if turns:
            n_again = [turns[row].n_again if row in turns else 0 for row in range(self.n_slots)]
            pipeline.seam_rows(self.model, self.state, self._prefixes(turns), n_again)

    def _prefixes(self, turns: Mapping[int, Turn]) -> list[list[int] | None]:
        return [turns[row].prefix if row in turns else None for row in range(self.n_slots)]

    def _mask(self, rows: list[int]) -> Tensor:
        mask = torch.zeros(self.n_slots, dtype=torch.bool)
        mask[rows] = True
        return mask.to(self.model.device)
