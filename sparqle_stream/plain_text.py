"""Plain text: what was said so far, as the LLM reads it to judge what may be said next.

Beside the slot that it writes captions into, each row has one that holds the words alone: lower
case, without queries or punctuation, a beginning of its own before every sentence. Here is what the
host knows of it: which tokens wait to be read, and which were the last ones, with which the slot
begins anew when it is full. Bounded, whatever the length of the stream. No torch in here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

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


class Tree:
    """Readings as a tree of tokens, so that what several begin with is read once.

    A reading's last token is no node: nothing comes after it.
    """

    def __init__(self) -> None:
        self.ids: list[int] = []  # of each node, parents first
        self.depths: list[int] = []  # 0 for those that follow the plain text itself
        self.readings: list[list[int]] = []
        self.before: list[list[int]] = []  # of each reading: the node before each token; -1: none
        self._parents: list[int] = []
        self._nodes: dict[tuple[int, int], int] = {}  # (parent, token)

    def __len__(self) -> int:
        return len(self.ids)

    def add(self, reading: list[int]) -> None:
        path = self._known(reading)
        for token in reading[len(path) - 1 : -1]:
            path.append(self._grow(path[-1], token))
        self.readings.append(reading)
        self.before.append(path[: len(reading)])

    def n_new(self, reading: list[int]) -> int:
        """How many nodes it would add."""
        return len(reading[:-1]) + 1 - len(self._known(reading))

    def _known(self, reading: list[int]) -> list[int]:
        """-1 and the nodes that it begins with."""
        path = [-1]
        for token in reading[:-1]:
            if (path[-1], token) not in self._nodes:
                break
            path.append(self._nodes[path[-1], token])
        return path

    def _grow(self, parent: int, token: int) -> int:
        node = self._nodes[parent, token] = len(self.ids)
        self.ids.append(token)
        self._parents.append(parent)
        self.depths.append(0 if parent < 0 else self.depths[parent] + 1)
        return node

    def seen(self) -> npt.NDArray[np.bool_]:
        """(N, N): whether a node sees another: those on its way from the plain text, and itself."""
        out = np.eye(len(self.ids), dtype=np.bool_)
        for node, parent in enumerate(self._parents):
            if parent >= 0:
                out[node] |= out[parent]
        return out


def shortened(readings: Sequence[list[int]]) -> list[list[int]]:
    """As many as are judged, cut to the tokens that count."""
    return [reading[:MOST_READ] for reading in readings[:MOST_RIVALS]]


def trees(readings: Sequence[list[int]]) -> list[Tree]:
    """Shortened readings, in order, in trees of at most MOST_READ nodes: one, almost always."""
    found = [Tree()]
    for reading in shortened(readings):
        if len(found[-1]) + found[-1].n_new(reading) > MOST_READ:
            found.append(Tree())
        found[-1].add(reading)
    return found
