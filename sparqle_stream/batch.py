"""Batch: one step of the model's stages for all sessions that have a chunk.

In: sessions by row, each with a chunk of the same shape. Out: tokens by row. Contract: rows without
a chunk keep their state, so what a session gets does not depend on who else is in the batch; nor
does whether it gets anything: what fails in one row's session, in what it says about its chunk or
in its writer is in `StepResult.failed`, and the others go on. What the stages themselves raise is
everybody's: their state is written in place, so no row may be tried again.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from sparqle_stream.errors import ModelError
from sparqle_stream.session import Start
from sparqle_stream.stages import StepResult
from sparqle_stream.writer import Greedy

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from contextlib import AbstractContextManager
    from typing import Any

    from sparqle_stream.decode import Writer
    from sparqle_stream.models import Model
    from sparqle_stream.session import Session, Turn
    from sparqle_stream.stages import Floats

Failed = dict[int, Exception]
T = TypeVar("T")


class Batch:
    """All rows of one model."""

    def __init__(self, model: Model, n_slots: int) -> None:
        self.stages = model.make_stages(n_slots)
        self._vocab = model.cfg.llm.vocab

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
        failed: Failed = {}
        turns = self._turns(sessions, failed)
        if not turns:
            return StepResult({}, failed=failed)
        if begins := _prefixes(turns, Start.SEGMENT):
            leads = {row: lead for row in begins if (lead := turns[row].lead) is not None}
            self.stages.begin(begins, leads)
        if seams := _prefixes(turns, Start.SEAM):
            self.stages.seam(seams, {row: turns[row].n_again for row in seams})

        def hear(row: int, log_probs: Floats) -> Writer:
            try:
                _check_heard(log_probs)
                return _Guarded(row, sessions[row].hear(log_probs), failed)
            except Exception as err:  # noqa: BLE001 - one row's failure is its own
                failed[row] = err
                return Greedy(n_most=0)

        result = self.stages.step(
            {row: turn.pcm for row, turn in turns.items()},
            {row: sessions[row].wait_ms for row in turns},
            next(iter(sessions.values())).ahead_frames,
            hear,
        )
        return replace(result, failed=failed)

    def _turns(self, sessions: Mapping[int, Session], failed: Failed) -> dict[int, Turn]:
        """What the rows ask for, as far as it can be run: nothing is written before that."""
        turns: dict[int, Turn] = {}
        for row, session in sessions.items():
            try:
                turn = session.next_turn()
                _check_turn(turn, session.options.chunk_samples, self._vocab)
                turns[row] = turn
            except Exception as err:  # noqa: BLE001 - one row's failure is its own
                failed[row] = err
        return turns


class _Guarded:
    """A writer whose failure is its row's: it writes nothing more, and the others do not notice."""

    def __init__(self, row: int, writer: Writer, failed: Failed) -> None:
        self.n_most = writer.n_most
        self._row, self._writer, self._failed = row, writer, failed

    def goes_on(self, stop: float) -> bool:
        return self._is_well and self._or(lambda: self._writer.goes_on(stop), False)

    def suggest(self) -> list[int]:
        return self._or(self._writer.suggest, [0])  # any: it is not asked what it picks

    def pick(self, ids: Sequence[int], scores: Sequence[float]) -> list[int]:
        return self._or(lambda: self._writer.pick(ids, scores), []) if self._is_well else []

    def expect(self) -> list[list[int]]:
        return self._or(self._writer.expect, [])

    def doubts(self) -> list[list[int]]:
        return self._or(self._writer.doubts, [])

    def judged(self, log_probs: Sequence[float]) -> None:
        self._or(lambda: self._writer.judged(log_probs), None)

    def plain(self) -> list[int]:
        return self._or(self._writer.plain, [])

    def is_over(self) -> bool:
        return not self._is_well or self._or(self._writer.is_over, True)

    @property
    def _is_well(self) -> bool:
        return self._row not in self._failed

    def _or(self, ask: Callable[[], T], otherwise: T) -> T:
        """What the writer says, or what it counts for once it has failed."""
        try:
            return ask()
        except Exception as err:  # noqa: BLE001 - one row's failure is its own
            self._failed[self._row] = err
            return otherwise


def _check_turn(turn: Turn, n_samples: int, vocab: int) -> None:
    """One row with a wrong shape, or a token that there is not, would fail the step of all."""
    if turn.pcm.shape != (n_samples,) or not np.isfinite(turn.pcm).all():
        raise ValueError(f"a chunk of shape {turn.pcm.shape}, not of {n_samples} finite samples")
    if turn.prefix and not 0 <= min(turn.prefix) <= max(turn.prefix) < vocab:
        raise ValueError(f"a prefix with tokens that are not of {vocab}")


def _check_heard(log_probs: Floats) -> None:
    if np.isnan(log_probs).any():
        raise ModelError("the model heard what is no number", hint="connect again, and report it")


def _prefixes(turns: Mapping[int, Turn], start: Start) -> dict[int, list[int]]:
    return {row: turn.prefix or [] for row, turn in turns.items() if turn.start is start}
