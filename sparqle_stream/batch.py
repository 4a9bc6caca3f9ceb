"""Batch: one step of the model's stages for all sessions that have a chunk.

In: sessions by row, each with a chunk of the same shape. Out: tokens by row. Contract: rows without
a chunk keep their state, so what a session gets does not depend on who else is in the batch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sparqle_stream.session import Start

if TYPE_CHECKING:
    from collections.abc import Mapping
    from contextlib import AbstractContextManager
    from typing import Any

    from sparqle_stream.decode import Writer
    from sparqle_stream.models import Model
    from sparqle_stream.session import Session, Turn
    from sparqle_stream.stages import Floats, StepResult


class Batch:
    """All rows of one model."""

    def __init__(self, model: Model, n_slots: int) -> None:
        self.stages = model.make_stages(n_slots)

    def working(self, threads: int) -> AbstractContextManager[Any]:
        """What the thread that calls the rest must hold."""
        return self.stages.working(threads)

    def state_bytes(self) -> int:
        return self.stages.state_bytes()

    def wipe(self, row: int) -> None:
        """The row becomes a new stream's."""
        self.stages.wipe(row)

    def run(self, sessions: Mapping[int, Session]) -> StepResult:
        """One chunk of every session, all of one shape.

        `Session.take` must follow with its row's tokens.
        """
        turns = {row: session.next_turn() for row, session in sessions.items()}
        if begins := _prefixes(turns, Start.SEGMENT):
            self.stages.begin(begins)
        if seams := _prefixes(turns, Start.SEAM):
            self.stages.seam(seams, {row: turns[row].n_again for row in seams})

        def hear(row: int, log_probs: Floats) -> Writer:
            return sessions[row].hear(log_probs)

        return self.stages.step(
            {row: turn.pcm for row, turn in turns.items()},
            {row: session.wait_ms for row, session in sessions.items()},
            next(iter(sessions.values())).ahead_frames,
            hear,
        )


def _prefixes(turns: Mapping[int, Turn], start: Start) -> dict[int, list[int]]:
    return {row: turn.prefix or [] for row, turn in turns.items() if turn.start is start}
