"""Judge: rival readings as plain text, in the passes of the LLM that read queries.

Each row has a second slot, for its plain text; readings are read apart, in places that all rows
share: K/V of the plain text is lent to them, and what they write behind it counts for nobody.
What waits to be read of the plain text itself goes the same way, once in its slot and once in each
place, if it is short: one pass instead of two.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from sparqle_stream.plain_text import MOST_APART, MOST_READ, PlainText

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from sparqle_stream.decode import Expect
    from sparqle_stream.onnx_cpu.model import TextPrefix
    from sparqle_stream.onnx_cpu.slots import Slots
    from sparqle_stream.stages import Floats

    Doubts = dict[int, list[list[int]]]

FEW = 4  # waiting tokens that are read once more in every place


class Judge:
    """Plain text of all rows of some `Slots`; its slots lie behind those of the captions."""

    def __init__(self, slots: Slots, prefix: TextPrefix, n_rows: int, bos_id: int) -> None:
        self.slots, self.prefix, self.n_rows = slots, prefix, n_rows
        self.plain = PlainText(n_rows, slots.n_slot, bos_id)
        self._apart = 2 * n_rows  # the first of the places
        self._put_prefix(slice(self._apart, self._apart + MOST_APART))

    def wipe(self, row: int) -> None:
        self.plain.wipe(row)

    def judge(
        self, doubts: Mapping[int, list[list[int]]], expect: Expect
    ) -> dict[int, list[float]]:
        """As `decode.Decoder.judge`: what waits in the rows is read in the same passes."""
        out: dict[int, list[float]] = {}
        for some in _portions(doubts):
            out |= self._judge(some, expect)
        return out

    def _judge(self, doubts: Doubts, expect: Expect) -> dict[int, list[float]]:
        slots, at = self.slots, self._apart
        new = slots.take(doubts)
        apart: dict[int, Floats] = {}
        skip: dict[int, int] = {}
        places: dict[int, range] = {}
        for row, readings in doubts.items():
            ids = self._catch_up(row)
            skip[row], places[row] = len(ids), range(at, at + len(readings))
            at += len(readings)
            self._lend(row, places[row])
            if ids:
                new[self.n_rows + row] = slots.embed(ids)
            for place, reading in zip(places[row], readings, strict=True):
                if rest := ids + reading[:-1]:
                    apart[place] = slots.embed(rest)
        hidden = slots.append(new, {row: expect(row) for row in doubts if row in new}, apart)
        asked = [
            (
                np.concatenate([slots.hidden[[self.n_rows + row]], hidden[place][skip[row] :]]),
                reading,
            )
            if place in hidden
            else (slots.hidden[[self.n_rows + row]], reading)
            for row, readings in doubts.items()
            for place, reading in zip(places[row], readings, strict=True)
        ]
        sums = iter(self._log_probs(asked))
        return {row: [next(sums) for _ in readings] for row, readings in doubts.items()}

    def _log_probs(self, asked: list[tuple[Floats, list[int]]]) -> list[float]:
        """Hidden states (R, E) before each of R tokens, and these -> log p of all of them."""
        hidden = np.concatenate([before for before, _ in asked])
        ids = [i for _, reading in asked for i in reading]
        log_probs = self.slots.model.plain_log_probs(hidden, ids)
        ends = np.cumsum([len(reading) for _, reading in asked])[:-1]
        return [float(part.sum()) for part in np.split(log_probs, ends)]

    def _catch_up(self, row: int) -> list[int]:
        """The plain text is read but for the few tokens that come back."""
        slots, text = self.slots, self.n_rows + row
        ids, is_new = self.plain.take(row, int(slots.length[text]))
        if is_new:
            slots.forget(text)
            self._put_prefix(slice(text, text + 1))
        if len(ids) <= FEW:
            return ids
        slots.append({text: slots.embed(ids)}, {}, {})
        return []

    def _put_prefix(self, rows: slice) -> None:
        for name, array in self.slots.kv.items():
            array[rows, :, : self.prefix.n_places] = self.prefix.kv[name]
        self.slots.length[rows] = self.prefix.n_places

    def _lend(self, row: int, places: range) -> None:
        """What the plain text's slot holds, behind the prefix, which the places have."""
        text, start = self.n_rows + row, self.prefix.n_places
        n = int(self.slots.length[text])
        where = slice(places.start, places.stop)
        for array in self.slots.kv.values():
            array[where, :, start:n] = array[text, :, start:n]
        self.slots.length[where] = n


def _portions(doubts: Mapping[int, list[list[int]]]) -> Iterator[Doubts]:
    """As many rows as there are places for their readings; readings of a sensible length."""
    some: Doubts = {}
    for row, readings in doubts.items():
        cut = [reading[:MOST_READ] for reading in readings[:MOST_APART]]
        if some and sum(map(len, some.values())) + len(cut) > MOST_APART:
            yield some
            some = {}
        some[row] = cut
    if some:
        yield some
