"""Slots: the LLM's K/V of all rows, and the decoder that `decode.write` asks.

Contract: a slot's K/V only grows, bytes that count never change; what waits to be read is read
before the next thing that is, in order. A pass reads what waits in all rows that it is asked for,
however many rows each has, without padding, and behind it what they expect to pick (speculative
decoding, Leviathan et al., 2023): rows that do not count before they are picked, and are written
over when something else is.

A slot has a number, by which it is asked for, and a place in memory. With a prefix for plain text
there are two for each row, one of captions (number: the row) and one of plain text (numbers behind
all of these; see `judge.Judge`), whose places are side by side, since they are read together.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from sparqle_stream.errors import ModelError
from sparqle_stream.onnx_cpu.judge import Judge
from sparqle_stream.onnx_cpu.memory import sparse_zeros
from sparqle_stream.onnx_cpu.settings import PASS_ROWS, UNSEEN, places
from sparqle_stream.onnx_cpu.slot_memory import SlotMemory

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from sparqle_stream.decode import Expect
    from sparqle_stream.onnx_cpu.model import OnnxModel
    from sparqle_stream.plain_text import Tree
    from sparqle_stream.stages import Floats

    Ints = npt.NDArray[np.int64]
    Counts = npt.NDArray[np.int32]

PATIENCE = 8  # rows that may wait for a pass that somebody needs


class Slots:
    """K/V of every row and what waits to be written into it."""

    def __init__(self, model: OnnxModel, n_rows: int) -> None:
        cfg, prefix = model.cfg.llm, model.text
        self.model, self.n_slot, self.width = model, cfg.n_slot, cfg.width
        n_slots = n_rows if prefix is None else 2 * n_rows
        self._memory = SlotMemory(model, n_slots)
        self.kv = self._memory.kv  # (B, KV, N, d) by name, in order of place
        # Numbers of slots by place, and places by number.
        self._at = np.arange(n_slots).reshape(-1, n_rows).T.ravel()
        self._place = np.argsort(self._at)
        self.length = np.zeros(n_slots, np.int32)
        self.hidden = np.zeros((n_slots, cfg.width), np.float32)  # final-normed, of the last row
        self._waiting: list[list[Floats]] = [[] for _ in range(n_slots)]
        # Picks that were read ahead, in order, with the hidden state after each.
        self._ahead: list[list[tuple[list[int], Floats]]] = [[] for _ in range(n_slots)]
        # Never written, so it takes no memory: without trees rows see all that is before them.
        self._all_seen = sparse_zeros((n_slots * PASS_ROWS * places(cfg.n_slot),), np.float32)
        self._judge: Judge | None = None
        if prefix is not None:
            self._judge = Judge(self, prefix, n_rows, model.tokenizer.bos_id)

    def kv_of(self, slot: int) -> dict[str, npt.NDArray[Any]]:
        """K and V (KV, N, d) of a slot by name, to write into."""
        return {name: of[self._place[slot]] for name, of in self.kv.items()}

    def wipe(self, row: int) -> None:
        """The row is a new stream's."""
        self.forget(row)
        if self._judge is not None:
            self._judge.wipe(row)

    def forget(self, row: int) -> None:
        """The slot is empty. K/V bytes stay: length 0 makes them invisible."""
        self.length[row] = 0
        self.hidden[row] = 0.0
        self._waiting[row].clear()
        self._ahead[row].clear()

    def state_bytes(self) -> int:
        return sum(array.nbytes for array in (*self.kv.values(), self.length, self.hidden))

    def n_waiting(self, row: int) -> int:
        """Rows that were left and are not read yet."""
        return sum(map(len, self._waiting[row]))

    # --- what `decode.write` asks ----------------------------------------------------------------

    def stops(self, rows: Sequence[int]) -> Sequence[float]:
        weight, bias = self.model.stop[:-1], self.model.stop[-1]
        out: list[float] = (self.hidden[list(rows)] @ weight + bias).tolist()
        return out

    def score(self, wanted: Mapping[int, list[int]]) -> dict[int, tuple[list[int], list[float]]]:
        """Only what is asked for is computed; all of the vocabulary where nothing is."""
        out = {}
        for row, ids in wanted.items():
            asked = list(dict.fromkeys(ids))
            if asked:
                logits = self.model.head[asked].astype(np.float32) @ self.hidden[row]
            else:
                hidden = self.hidden[row : row + 1]
                every = self.model.session("vocabulary").run(None, {"hidden": hidden})[0][0]
                asked = [int(every.argmax())]
                logits = every[asked]
            out[row] = asked, logits.tolist()
        return out

    def judge(
        self, doubts: Mapping[int, list[list[int]]], going: Sequence[int], expect: Expect
    ) -> dict[int, list[float]]:
        if self._judge is None or not doubts:
            return {}
        return self._judge.judge(doubts, going, expect)

    def note(self, plain: Mapping[int, list[int]]) -> None:
        if self._judge is not None:
            for row, ids in plain.items():
                self._judge.plain.say(row, ids)

    def leave(self, tokens: Mapping[int, list[int]]) -> None:
        for row, ids in tokens.items():
            if ids and not self._is_ahead(row, ids):
                self.leave_embedded(row, self.embed(ids))

    def leave_embedded(self, row: int, embeds: Floats) -> None:
        """embeds (R, E) will be the slot's next rows."""
        self._ahead[row].clear()
        self._waiting[row].append(embeds)

    def read(self, tokens: Mapping[int, list[int]], expect: Expect | None = None) -> None:
        """All that waits in these rows, then their tokens, then what they expect."""
        self.leave(tokens)
        new = self.take(tokens)
        picks = {row: expect(row) for row in tokens if row in new} if expect else {}
        self.append(new | self.plain_along(new), picks, {})

    def take(self, rows: Iterable[int]) -> dict[int, Floats]:
        """What waits in some rows, and in those where much does, and fits into one pass; all before
        that is read."""
        late = (row for row in range(len(self._waiting)) if self.n_waiting(row) > PATIENCE)
        asked = [row for row in dict.fromkeys([*rows, *late]) if self._waiting[row]]
        new = {row: np.concatenate(self._waiting[row]) for row in asked}
        self._check_room(new)
        for row in new:
            self._waiting[row].clear()
        while longer := {row: e for row, e in new.items() if len(e) > PASS_ROWS}:
            self.append({row: embeds[:PASS_ROWS] for row, embeds in longer.items()}, {}, {})
            new |= {row: embeds[PASS_ROWS:] for row, embeds in longer.items()}
        return new

    def plain_along(self, rows: Iterable[int]) -> dict[int, Floats]:
        """What waits of the plain text of rows that a pass is made for."""
        return self._judge.waiting(rows) if self._judge is not None else {}

    def embed(self, ids: list[int]) -> Floats:
        embeds: Floats = self.model.tokens[ids].astype(np.float32)
        return embeds

    def _is_ahead(self, row: int, ids: list[int]) -> bool:
        """Whether the slot's next rows have been read ahead; they count from now on."""
        if not self._ahead[row] or self._ahead[row][0][0] != ids:
            return False
        _, self.hidden[row] = self._ahead[row].pop(0)
        self.length[row] += len(ids)
        return True

    # --- passes ----------------------------------------------------------------------------------

    def _check_room(self, new: Mapping[int, Floats]) -> None:
        for row, embeds in new.items():
            if self.length[row] + len(embeds) > self.n_slot:
                raise ModelError(
                    f"{len(embeds)} more rows do not fit into a slot of {self.n_slot}",
                    hint="cut the segment before its slot is full",
                )

    def append(
        self,
        new: Mapping[int, Floats],
        ahead: Mapping[int, list[list[int]]],
        trees: Mapping[int, Tree],
    ) -> dict[int, Floats]:
        """One pass of the graph `llm`; see graphs.llm for its inputs.

        new: embeddings (R, E) that slots go on with; ahead: what slots may read behind these;
        trees: what is read there and never counts -> the hidden states (N, E) of the nodes.
        """
        if not new and not trees:
            return {}
        picks = {row: self._fitting(row, len(new[row]), ids) for row, ids in ahead.items()}
        parts = {row: [embeds, *map(self.embed, picks.get(row, []))] for row, embeds in new.items()}
        for row, tree in trees.items():
            parts[row] = [*parts.get(row, []), *self.embed(tree.ids)[:, None]]
        ends = np.cumsum([len(part) for of in parts.values() for part in of], dtype=np.int64)
        rows = {row: np.concatenate(of) for row, of in parts.items()}
        hidden = iter(self._run(rows, ends - 1, trees))
        nodes: dict[int, Floats] = {}
        for row in parts:
            if row in new:
                self.length[row] += len(new[row])
                self.hidden[row] = next(hidden)
                self._ahead[row] = [(ids, next(hidden)) for ids in picks.get(row, [])]
            if row in trees:
                nodes[row] = np.array([next(hidden) for _ in trees[row].ids])
        return nodes

    def _fitting(self, row: int, n_new: int, picks: list[list[int]]) -> list[list[int]]:
        """As many of a row's picks as fit into the pass and the slot behind its new rows."""
        room = min(PASS_ROWS, self.n_slot - int(self.length[row])) - n_new
        ends = np.cumsum([len(ids) for ids in picks])
        return picks[: int((ends <= room).sum())]

    def _run(self, new: Mapping[int, Floats], last: Ints, trees: Mapping[int, Tree]) -> Floats:
        """Rows behind those that count, of which trees are the last; the hidden states (R, E) of
        some of them, by place."""
        block = self._memory.block(self._place[list(new)])
        slots = self._at[block].tolist()  # of these the pass is made; some may be idle
        index = {slot: i for i, slot in enumerate(slots)}
        counts = np.array([len(new.get(slot, ())) for slot in slots], np.int32)
        spread = np.zeros((len(slots), counts.max()), np.int64)
        pack = np.empty((int(counts.sum()), 2), np.int64)
        at = 0
        for slot, embeds in new.items():
            n, i = len(embeds), index[slot]
            spread[i, :n] = np.arange(at, at + n)
            pack[at : at + n, 0], pack[at : at + n, 1] = i, np.arange(n)
            at += n
        length = self.length[slots]
        grown = {index[slot]: tree for slot, tree in trees.items()}
        position, unseen = self._places(length, counts, grown)
        inputs = {
            "x": np.concatenate(list(new.values())),
            "spread": spread,
            "pack": pack,
            "last": last,
            # An idle slot says what it has.
            "n_total": np.maximum(length + counts, 1) - 1,
            "n_new": counts,
            "position": position,
            "longest": np.array([unseen.shape[3]], np.int32),
            "unseen": unseen,
        }
        return self._memory.run(block, inputs)

    def _places(
        self, length: Counts, counts: Counts, trees: Mapping[int, Tree]
    ) -> tuple[Ints, Floats]:
        """Positions (B, S) of rows, of a tree's nodes by their depth; what they must not see
        (B, 1, S, L). length, counts (B): rows that slots have, and new ones; trees by index."""
        n_most = int(counts.max())
        position = length[:, None].astype(np.int64) + np.arange(n_most)
        # The kernel takes a pass as long as the longest slot for a beginning of all of them.
        longest = max(int((length + counts).max()), n_most + 1)
        shape = (len(counts), 1, n_most, longest)
        if not trees:
            return position, self._all_seen[: math.prod(shape)].reshape(shape)
        unseen = np.zeros(shape, np.float32)
        for i, tree in trees.items():
            end, n = int(counts[i]), len(tree)
            first = int(length[i]) + end - n
            position[i, end - n : end] = first + np.array(tree.depths)
            unseen[i, 0, end - n : end, first : first + n][~tree.seen()] = UNSEEN
        return position, unseen
