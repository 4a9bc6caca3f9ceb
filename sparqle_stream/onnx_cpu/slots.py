"""Slots: the LLM's K/V of all rows, and the decoder that `decode.write` asks.

Contract: a slot's K/V only grows, bytes once written never change; what waits to be read is read
before the next thing that is, in order. A pass reads what waits in all rows that it is asked for,
however many rows each has, without padding.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnxruntime as ort

from sparqle_stream.errors import ModelError
from sparqle_stream.onnx_cpu.memory import sparse_zeros
from sparqle_stream.onnx_cpu.settings import PASS_ROWS, places

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from sparqle_stream.onnx_cpu.model import OnnxModel
    from sparqle_stream.stages import Floats


class Slots:
    """K/V of every row and what waits to be written into it."""

    def __init__(self, model: OnnxModel, n_rows: int) -> None:
        cfg = model.cfg.llm
        self.model, self.n_slot, self.width = model, cfg.n_slot, cfg.width
        shape = (n_rows, cfg.n_kv_heads, places(cfg.n_slot), cfg.head_width)
        kind, layers = model.kind("llm", "k_0"), range(cfg.n_layers)
        self.kv = {f"{part}_{i}": sparse_zeros(shape, kind) for i in layers for part in "kv"}
        self.length = np.zeros(n_rows, np.int32)
        self.hidden = np.zeros((n_rows, cfg.width), np.float32)  # final-normed, of the last row
        self._waiting: list[list[Floats]] = [[] for _ in range(n_rows)]
        self._session = model.session("llm")
        self._binding = self._session.io_binding()
        for name, array in self.kv.items():
            value = ort.OrtValue.ortvalue_from_numpy(array)
            part, layer = name.split("_")
            self._binding.bind_ortvalue_input(name, value)
            self._binding.bind_ortvalue_output(f"{part}_out_{layer}", value)

    def forget(self, row: int) -> None:
        """The slot is empty. K/V bytes stay: length 0 makes them invisible."""
        self.length[row] = 0
        self.hidden[row] = 0.0
        self._waiting[row].clear()

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

    def leave(self, tokens: Mapping[int, list[int]]) -> None:
        for row, ids in tokens.items():
            if ids:
                self.leave_embedded(row, self.model.tokens[ids].astype(np.float32))

    def leave_embedded(self, row: int, embeds: Floats) -> None:
        """embeds (R, E) will be the slot's next rows."""
        self._waiting[row].append(embeds)

    def read(self, tokens: Mapping[int, list[int]]) -> None:
        """All that waits in these rows, then their tokens."""
        self.leave(tokens)
        new = {row: np.concatenate(self._waiting[row]) for row in tokens if self._waiting[row]}
        if not new:
            return
        self._check_room(new)
        for row in new:
            self._waiting[row].clear()
        while new:
            self._append({row: embeds[:PASS_ROWS] for row, embeds in new.items()})
            new = {row: e[PASS_ROWS:] for row, e in new.items() if len(e) > PASS_ROWS}

    # --- passes ----------------------------------------------------------------------------------

    def _check_room(self, new: Mapping[int, Floats]) -> None:
        for row, embeds in new.items():
            if self.length[row] + len(embeds) > self.n_slot:
                raise ModelError(
                    f"{len(embeds)} more rows do not fit into a slot of {self.n_slot}",
                    hint="cut the segment before its slot is full",
                )

    def _append(self, new: Mapping[int, Floats]) -> None:
        """One pass of the graph `llm`; see graphs.llm for its inputs."""
        counts = np.zeros(len(self.length), np.int32)
        for row, embeds in new.items():
            counts[row] = len(embeds)
        x = np.concatenate(list(new.values()))
        spread = np.full((len(counts), counts.max()), len(x), np.int64)
        pack = np.empty(len(x), np.int64)
        last = np.cumsum([len(embeds) for embeds in new.values()], dtype=np.int64) - 1
        at = 0
        for row, embeds in new.items():
            n = len(embeds)
            spread[row, :n] = np.arange(at, at + n)
            pack[at : at + n] = row * spread.shape[1] + np.arange(n)
            at += n
        total = self.length + counts
        inputs = {
            "x": x,
            "spread": spread,
            "pack": pack,
            "last": last,
            "n_total": np.maximum(total, 1) - 1,  # an idle slot says what it has
            "n_new": counts,
        }
        for name, value in inputs.items():
            self._binding.bind_cpu_input(name, np.ascontiguousarray(value))
        self._binding.bind_output("hidden")
        self._session.run_with_iobinding(self._binding)
        self.length = total
        self.hidden[list(new)] = self._binding.get_outputs()[-1].numpy()  # bound last
