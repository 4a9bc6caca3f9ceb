"""Judge: rival readings as plain text, in the passes of the LLM that read queries.

Each row has a second slot, for its plain text, which is read along with captions. Rival readings
are read behind it as a tree (Miao et al., 2023), in the same pass as what still waits: a node sees
the text and its own ancestors, and is written over by what comes next.
"""

from __future__ import annotations

from itertools import zip_longest
from typing import TYPE_CHECKING

import numpy as np

from sparqle_stream.onnx_cpu.settings import PASS_ROWS
from sparqle_stream.plain_text import MOST_KEPT, PlainText, trees

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from sparqle_stream.decode import Expect
    from sparqle_stream.onnx_cpu.model import TextPrefix
    from sparqle_stream.onnx_cpu.slots import Slots
    from sparqle_stream.plain_text import Tree
    from sparqle_stream.stages import Floats


class Judge:
    """Plain text of all rows of some `Slots`; its slots lie behind those of the captions."""

    def __init__(self, slots: Slots, prefix: TextPrefix, n_rows: int, bos_id: int) -> None:
        self.slots, self.prefix, self.n_rows = slots, prefix, n_rows
        self._n_slot = min(slots.n_slot, prefix.n_places + MOST_KEPT)
        self.plain = PlainText(n_rows, self._n_slot, bos_id)

    def wipe(self, row: int) -> None:
        """The row is a new stream's; all memory that it will ever use is taken at once."""
        self.plain.wipe(row)
        for array in self.slots.kv_of(self.n_rows + row).values():
            array[:, : self._n_slot] = 0

    def judge(
        self, doubts: Mapping[int, list[list[int]]], going: Sequence[int], expect: Expect
    ) -> dict[int, list[float]]:
        """As `decode.Decoder.judge`: what waits in rows that go on is read in the same pass."""
        out: dict[int, list[float]] = {row: [] for row in doubts}
        grown = {row: trees(readings) for row, readings in doubts.items()}
        for of in zip_longest(*grown.values()):
            some = {row: tree for row, tree in zip(grown, of, strict=True) if tree is not None}
            for row, log_probs in self._judge(some, going, expect).items():
                out[row] += log_probs
        return out

    def waiting(self, rows: Iterable[int]) -> dict[int, Floats]:
        """What waits of the plain text of some rows, by slot, for a pass that is made anyway."""
        found = {self.n_rows + row: self._take(row) for row in rows}
        return {text: self.slots.embed(ids) for text, ids in found.items() if ids}

    def _judge(
        self, grown: Mapping[int, Tree], going: Sequence[int], expect: Expect
    ) -> dict[int, list[float]]:
        slots = self.slots
        new = slots.take(going)
        picks = {row: expect(row) for row in going if row in new}
        new |= self.waiting(row for row in list(new) if row not in grown)
        for row, tree in grown.items():
            if ids := self._catch_up(row, len(tree)):
                new[self.n_rows + row] = slots.embed(ids)
        nodes = slots.append(new, picks, {self.n_rows + row: t for row, t in grown.items() if t})
        texts = [slots.hidden[self.n_rows + row] for row in grown]
        hidden, before, ids = [np.stack(texts)], list[int](), list[int]()
        n_hidden = len(texts)
        for i, (row, tree) in enumerate(grown.items()):
            for reading, after in zip(tree.readings, tree.before, strict=True):
                before += [i if node < 0 else n_hidden + node for node in after]
                ids += reading
            if tree:
                hidden.append(nodes[self.n_rows + row])
                n_hidden += len(tree)
        log_probs = iter(slots.model.plain_log_probs(np.concatenate(hidden), before, ids).tolist())
        return {
            row: [sum(next(log_probs) for _ in reading) for reading in tree.readings]
            for row, tree in grown.items()
        }

    def _take(self, row: int) -> list[int]:
        slots, text = self.slots, self.n_rows + row
        ids, is_new = self.plain.take(row, int(slots.length[text]))
        if is_new:
            slots.forget(text)
            self._put_prefix(text)
        return ids

    def _catch_up(self, row: int, n_nodes: int) -> list[int]:
        """What waits of the plain text, if a pass has room for it besides the tree."""
        ids = self._take(row)
        if len(ids) + n_nodes <= PASS_ROWS:
            return ids
        self.slots.append({self.n_rows + row: self.slots.embed(ids)}, {}, {})
        return []

    def _put_prefix(self, text: int) -> None:
        for name, array in self.slots.kv_of(text).items():
            array[:, : self.prefix.n_places] = self.prefix.kv[name]
        self.slots.length[text] = self.prefix.n_places
