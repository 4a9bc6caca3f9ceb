"""Plain text: what was said so far, as the LLM reads it to judge what may be said next.

Beside the slot that it writes captions into, each row has one that holds the words alone: lower
case, without queries or punctuation, a beginning of its own before every sentence. Here is what the
host knows of it: which tokens wait to be read, and which were the last ones, with which the slot
begins anew when it is full. Bounded, whatever the length of the stream. No torch in here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    Doubts = dict[int, list[list[int]]]  # rival readings by row, as tokens

MOST_RIVALS = 8  # readings of one row
MOST_READ = 32  # tokens of a reading that count
MOST_WAITING = 48  # tokens
LONGEST = 1 + MOST_WAITING + MOST_READ  # rows of one pass
MOST_KEPT = 160  # tokens of a slot behind the prefix, room for a pass included
N_LAST = 24  # tokens that a slot begins anew with


class Due(NamedTuple):
    """What a row's slot has to read before a reading can be judged."""

    ids: list[int]
    is_new: bool  # the slot has to be emptied first


class PlainText:
    """Tokens of all rows that wait for their slots."""

    def __init__(self, n_rows: int, n_slot: int, bos_id: int) -> None:
        self.n_slot, self.bos_id = n_slot, bos_id
        self._last: list[list[int]] = [[] for _ in range(n_rows)]
        self._waiting: list[list[int]] = [[bos_id] for _ in range(n_rows)]
        self._is_new = [True] * n_rows

    def wipe(self, row: int) -> None:
        """The row is a new stream's: nothing was said."""
        self._last[row] = []
        self._begin(row)

    def say(self, row: int, ids: list[int]) -> None:
        self._last[row] = (self._last[row] + ids)[-N_LAST:]
        self._waiting[row] = self._waiting[row] + ids
        if len(self._waiting[row]) > MOST_WAITING:
            self._begin(row)

    def take(self, row: int, n_filled: int) -> Due:
        """What waits, for a slot of `n_filled` places in use; a reading fits behind it."""
        if n_filled + LONGEST > self.n_slot:
            self._begin(row)
        due = Due(self._waiting[row], self._is_new[row])
        self._waiting[row], self._is_new[row] = [], False
        return due

    def _begin(self, row: int) -> None:
        self._waiting[row] = [self.bos_id, *self._last[row]]
        self._is_new[row] = True


def portions(doubts: Mapping[int, list[list[int]]], n_places: int) -> Iterator[Doubts]:
    """As many rows as there are places for their readings, which are cut to a sensible length."""
    some: Doubts = {}
    for row, readings in doubts.items():
        cut = [reading[:MOST_READ] for reading in readings[:MOST_RIVALS]]
        if some and sum(map(len, some.values())) + len(cut) > n_places:
            yield some
            some = {}
        some[row] = cut
    if some:
        yield some
