"""Judge: rival readings as plain text, in the passes of the LLM that read queries.

Each row has a second slot, for its plain text; readings are read apart, in places that all rows
share: K/V of the plain text is lent to them, and what they write behind it counts for nobody.
The plain text itself is read along with captions; what still waits of it is read once in its slot
and once in each place, if it is short: one pass instead of two.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from sparqle_stream.plain_text import MOST_KEPT, PlainText, portions

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from sparqle_stream.decode import Expect
    from sparqle_stream.onnx_cpu.model import TextPrefix
    from sparqle_stream.onnx_cpu.slots import Slots
    from sparqle_stream.plain_text import Doubts
    from sparqle_stream.stages import Floats

N_PLACES = 9  # apart, for all rows
FEW = 3  # waiting tokens that are read once more in every place


class Judge:
    """Plain text of all rows of some `Slots`; its slots lie behind those of the captions."""

    def __init__(self, slots: Slots, prefix: TextPrefix, n_rows: int, bos_id: int) -> None:
        self.slots, self.prefix, self.n_rows = slots, prefix, n_rows
        self._n_slot = min(slots.n_slot, prefix.n_places + MOST_KEPT)
        self.plain = PlainText(n_rows, self._n_slot, bos_id)
        self._apart = 2 * n_rows  # the first of the places
        self._wipe(slice(self._apart, self._apart + N_PLACES))

    def wipe(self, row: int) -> None:
        self.plain.wipe(row)
        self._wipe(slice(self.n_rows + row, self.n_rows + row + 1))

    def _wipe(self, slots: slice) -> None:
        """All memory that they will ever use is taken at once: hours later it is no more."""
        for array in self.slots.kv.values():
            array[slots, :, : self._n_slot] = 0

    def judge(
        self, doubts: Mapping[int, list[list[int]]], expect: Expect
    ) -> dict[int, list[float]]:
        """As `decode.Decoder.judge`: what waits in the rows is read in the same passes."""
        out: dict[int, list[float]] = {}
        for some in portions(doubts, N_PLACES):
            out |= self._judge(some, expect)
        return out

    def waiting(self, rows: Iterable[int]) -> dict[int, Floats]:
        """What waits of the plain text of some rows, by slot, for a pass that is made anyway."""
        found = {self.n_rows + row: self._take(row) for row in rows}
        return {text: self.slots.embed(ids) for text, ids in found.items() if ids}

    def _judge(self, doubts: Doubts, expect: Expect) -> dict[int, list[float]]:
        slots, at = self.slots, self._apart
        new = slots.take(doubts)
        apart: dict[int, Floats] = {}
        asked: list[tuple[int, int, int, list[int]]] = []  # text slot, place, waiting, reading
        for row, readings in doubts.items():
            text, ids = self.n_rows + row, self._catch_up(row)
            places = range(at, at + len(readings))
            at += len(readings)
            self._lend(text, places)
            if ids:
                new[text] = slots.embed(ids)
            for place, reading in zip(places, readings, strict=True):
                asked.append((text, place, len(ids), reading))
                if rest := ids + reading[:-1]:
                    apart[place] = slots.embed(rest)
        hidden = slots.append(new, {row: expect(row) for row in doubts if row in new}, apart)
        before = [
            np.concatenate([slots.hidden[[text]], hidden.get(place, slots.hidden[:0])[n:]])
            for text, place, n, _ in asked
        ]
        sums = iter(self._log_probs(before, [reading for *_, reading in asked]))
        return {row: [next(sums) for _ in readings] for row, readings in doubts.items()}

    def _log_probs(self, before: list[Floats], readings: list[list[int]]) -> list[float]:
        """Hidden states (R, E) before each of a reading's R tokens -> log p of all of them."""
        ids = [i for reading in readings for i in reading]
        log_probs = self.slots.model.plain_log_probs(np.concatenate(before), ids)
        ends = np.cumsum([len(reading) for reading in readings])[:-1]
        return [float(part.sum()) for part in np.split(log_probs, ends)]

    def _take(self, row: int) -> list[int]:
        slots, text = self.slots, self.n_rows + row
        ids, is_new = self.plain.take(row, int(slots.length[text]))
        if is_new:
            slots.forget(text)
            self._put_prefix(text)
        return ids

    def _catch_up(self, row: int) -> list[int]:
        """The plain text is read but for the few tokens that come back."""
        ids = self._take(row)
        if len(ids) <= FEW:
            return ids
        self.slots.append({self.n_rows + row: self.slots.embed(ids)}, {}, {})
        return []

    def _put_prefix(self, text: int) -> None:
        for name, array in self.slots.kv.items():
            array[text, :, : self.prefix.n_places] = self.prefix.kv[name]
        self.slots.length[text] = self.prefix.n_places

    def _lend(self, text: int, places: range) -> None:
        """Places hold what a plain text's slot does."""
        n, where = int(self.slots.length[text]), slice(places.start, places.stop)
        for array in self.slots.kv.values():
            array[where, :, :n] = array[text, :, :n]
        self.slots.length[where] = n
