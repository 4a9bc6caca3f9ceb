"""ONNX stages: `stages.Stages` over the graphs, on a CPU.

The order of the stages is that of `pipeline.step`, and so is what a row keeps: rings with absolute
positions, slots that only grow. Rows are written in place, those without a chunk not at all. The
LLM reads the rows of all slots as one list without padding, in as few passes as it can: a slot's
prefix waits for its first queries, a chunk's last tokens for those of the next chunk, and queries
for one in which something may be written.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from sparqle_stream.config import (
    FIRST_PEAK,
    FRAMES_PER_QUERY,
    LOOK_BACK_SAMPLES,
    MEL_TAIL,
    SILENT_MEL,
)
from sparqle_stream.decode import write
from sparqle_stream.onnx_cpu.memory import sparse_zeros
from sparqle_stream.onnx_cpu.slots import Slots
from sparqle_stream.stages import N_RECENT, Laps, StepResult

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from contextlib import AbstractContextManager

    from sparqle_stream.decode import Writer
    from sparqle_stream.onnx_cpu.memory import Kind
    from sparqle_stream.onnx_cpu.model import OnnxModel
    from sparqle_stream.stages import Floats, Hear

    Ints = npt.NDArray[np.int64]

# Rows whose hearing is one pass: all at once would cost 5 % less, and half as much memory again.
HEARD_TOGETHER = 2


class Rings:
    """Rings of one length: arrays (rows, H, L, d) by name, and what lies at each place."""

    def __init__(
        self, names: Sequence[str], n_rows: int, shape: tuple[int, int, int], kind: Kind
    ) -> None:
        """shape: (H, L, d) of one row of an array."""
        self.length = length = shape[1]
        self.arrays = {name: sparse_zeros((n_rows, *shape), kind) for name in names}
        self.position = np.full((n_rows, length), -1, np.int64)

    def of(self, rows: Ints) -> dict[str, Floats]:
        return {name: _rows(array, rows) for name, array in self.arrays.items()}

    def put(self, rows: Ints, at: Ints, new: Mapping[str, Floats]) -> None:
        """new (b, H, T, d) at places (b, T), of which the last `length` stay."""
        at = at[:, -self.length :]
        index = (rows[:, None], slice(None), at % self.length)
        for name, array in self.arrays.items():
            array[index] = new[name][:, :, -self.length :].transpose(0, 2, 1, 3)
        self.position[rows[:, None], at % self.length] = at

    def forget(self, rows: Ints | int, *, wipe: bool = False) -> None:
        """-1 makes old bytes invisible; wiped, they are gone too: one may have been no number."""
        self.position[rows] = -1
        if wipe:
            for array in self.arrays.values():
                array[rows] = 0.0


def _rows(array: npt.NDArray[Any], rows: Ints) -> npt.NDArray[Any]:
    """Rows of an array, where they lie if they lie behind each other."""
    if rows[-1] - rows[0] + 1 == len(rows):
        return array[rows[0] : rows[-1] + 1]
    return array[rows]


class OnnxStages:
    """All rows of one model of graphs."""

    def __init__(self, model: OnnxModel, n_rows: int) -> None:
        cfg = model.cfg
        self.model = model
        self.tail = np.zeros((n_rows, LOOK_BACK_SAMPLES), np.float32)
        self.peak = np.full(n_rows, FIRST_PEAK, np.float32)
        tail = (n_rows, cfg.encoder.mel_tail, cfg.encoder.n_mels)
        self.mel_tail = np.full(tail, SILENT_MEL, np.float32)
        self.position = np.zeros(n_rows, np.int64)  # frames since the segment began
        layers = [f"{kind}_{i}" for i in range(cfg.encoder.n_layers) for kind in "kv"]
        enc, qf = cfg.encoder, cfg.qformer
        shape = (enc.n_heads, enc.left_frames, enc.head_width)
        self.ear = Rings(layers, n_rows, shape, model.kind("ear", "k_0"))
        head = cfg.ctc
        past = (n_rows, head.n_blocks, head.kernel - 1, head.hidden)
        self.ctc_past = np.zeros(past, np.float32)
        n_layers, d = (qf.n_layers if qf.kind == "window" else 0), qf.width // qf.n_heads
        asked = [f"self_{kind}_{i}" for i in range(n_layers) for kind in "kv"]
        seen = [f"cross_{kind}_{i}" for i in range(n_layers) for kind in "kv"]
        kind = model.kind("qformer", asked[0]) if asked else np.float32
        self.queries = Rings(asked, n_rows, (qf.n_heads, qf.query_ring, d), kind)
        self.frames = Rings(seen, n_rows, (qf.n_heads, qf.frame_ring, d), kind)
        self.posterior = np.zeros((n_rows, 1, qf.n_pieces), np.float32)
        self.recent = np.zeros((n_rows, N_RECENT, cfg.llm.width), np.float32)
        self.slots = Slots(model, n_rows)

    def state_bytes(self) -> int:
        arrays: list[npt.NDArray[Any]] = [
            self.tail,
            self.peak,
            self.mel_tail,
            self.position,
            self.ctc_past,
            self.posterior,
            self.recent,
        ]
        for rings in (self.ear, self.queries, self.frames):
            arrays += [rings.position, *rings.arrays.values()]
        return sum(array.nbytes for array in arrays) + self.slots.state_bytes()

    def working(self, threads: int) -> AbstractContextManager[None]:
        return nullcontext()

    # --- rows ------------------------------------------------------------------------------------

    def wipe(self, row: int) -> None:
        self.peak[row] = FIRST_PEAK
        self._forget(row, wipe=True)
        self.slots.wipe(row)

    def begin(
        self, prefixes: Mapping[int, list[int]], leads: Mapping[int, Floats] | None = None
    ) -> None:
        for row, prefix in prefixes.items():
            self._forget(row)
            self.slots.leave({row: prefix})
        for row, lead in (leads or {}).items():
            self._tune(row, lead)

    def seam(self, prefixes: Mapping[int, list[int]], n_again: Mapping[int, int]) -> None:
        for row, prefix in prefixes.items():
            self.slots.forget(row)
            self.slots.leave({row: prefix})
            if n := n_again.get(row, 0):
                self.slots.leave_embedded(row, self.recent[row, -n:].copy())

    def _tune(self, row: int, lead: Floats) -> None:
        """The gain of a row begins at the level of lead (L,), as in `features.begin_row`."""
        cfg = self.model.cfg.features
        n_samples = len(lead) // cfg.hop_samples * cfg.hop_samples
        if n_samples:
            wave = np.concatenate([np.zeros(LOOK_BACK_SAMPLES, np.float32), lead[:n_samples]])[None]
            inputs = {"wave": wave, "peak": np.full(1, np.inf, np.float32)}  # without a gain
            (mel,) = self.model.session("features").run(("mel",), inputs)
            self.peak[row] = cfg.first_peak(mel.max())

    def _forget(self, row: int, *, wipe: bool = False) -> None:
        self.tail[row] = 0.0
        self.mel_tail[row] = SILENT_MEL
        self.position[row] = 0
        for rings in (self.ear, self.queries, self.frames):
            rings.forget(row, wipe=wipe)
        self.ctc_past[row] = 0.0
        self.posterior[row] = 0.0
        self.recent[row] = 0.0
        self.slots.forget(row)

    # --- a chunk ---------------------------------------------------------------------------------

    def step(
        self,
        pcm: Mapping[int, Floats],
        wait_ms: Mapping[int, int],
        ahead_frames: int,
        hear: Hear,
    ) -> StepResult:
        lap, rows = Laps(), sorted(pcm)
        writers: dict[int, Writer] = {}
        for start in range(0, len(rows), HEARD_TOGETHER):
            some = rows[start : start + HEARD_TOGETHER]
            heard, queries = self._listen(some, pcm, wait_ms, ahead_frames, lap)
            for row, log_probs, new in zip(some, heard, queries, strict=True):
                writers[row] = hear(row, log_probs)
                self.slots.leave_embedded(row, new)
            lap("captions")
        tokens = write(self.slots, writers)
        self.slots.read({})  # where much waits, and nothing was written
        lap("llm")
        return StepResult(tokens, lap.seconds)

    def _listen(
        self,
        some: list[int],
        pcm: Mapping[int, Floats],
        wait_ms: Mapping[int, int],
        ahead_frames: int,
        lap: Laps,
    ) -> tuple[Floats, Floats]:
        """All before the text, of some rows: CTC log-probs (b, C, V), queries (b, Q, E)."""
        rows = np.array(some, np.int64)
        mel = self._features(rows, np.stack([pcm[row] for row in some]))
        lap("features")
        frames, log_probs = self._ear(rows, mel, ahead_frames)
        lap("encoder")
        waits = np.array([wait_ms[row] for row in some], np.int64)
        queries = self._qformer(rows, frames, log_probs, waits)
        lap("qformer")
        return log_probs, queries

    def _features(self, rows: Ints, pcm: Floats) -> Floats:
        """pcm (b, S) -> log-mel (b, S / 160, M)."""
        wave = np.concatenate([self.tail[rows], pcm], axis=1)
        session = self.model.session("features")
        mel, peak = session.run(("mel", "new_peak"), {"wave": wave, "peak": self.peak[rows]})
        self.tail[rows], self.peak[rows] = wave[:, -LOOK_BACK_SAMPLES:], peak
        out: Floats = mel
        return out

    def _ear(self, rows: Ints, mel: Floats, ahead: int) -> tuple[Floats, Floats]:
        """mel (b, 2 T, M) -> frames (b, T, D), CTC log-probs (b, T / 2, V)."""
        n_needed = MEL_TAIL + 2 * ahead + mel.shape[1]
        mel = np.concatenate([self.mel_tail[rows], mel], axis=1)
        position = self.position[rows]
        inputs = {
            "mel": mel[:, -n_needed:],
            "ahead": np.array([ahead], np.int64),
            "position": position,
            "ring_position": _rows(self.ear.position, rows),
            **self.ear.of(rows),
        }
        names = list(self.ear.arrays)
        if has_past := self.model.cfg.ctc.n_blocks > 0:
            names.append("ctc_past")
            inputs["ctc_past"] = _rows(self.ctc_past, rows)
        wanted = ["frames", "log_probs", *(f"new_{name}" for name in names)]
        frames, log_probs, *new = self.model.session("ear").run(wanted, inputs)
        at = position[:, None] + np.arange(frames.shape[1])
        fresh = dict(zip(names, new, strict=True))
        if has_past:
            self.ctc_past[rows] = fresh["ctc_past"]
        self.ear.put(rows, at, fresh)
        self.mel_tail[rows] = mel[:, -self.mel_tail.shape[1] :]
        return frames, log_probs

    def _qformer(self, rows: Ints, frames: Floats, log_probs: Floats, wait_ms: Ints) -> Floats:
        """-> queries (b, Q, E); moves the rows' clocks on."""
        position = self.position[rows]
        inputs = {
            "frames": frames,
            "log_probs": log_probs,
            "before": self.posterior[rows],
            "delay_ms": wait_ms,
        }
        names = [*self.queries.arrays, *self.frames.arrays]
        if names:
            inputs |= self.queries.of(rows) | self.frames.of(rows)
            inputs["position"] = position
            inputs["query_position"] = _rows(self.queries.position, rows)
            inputs["frame_position"] = _rows(self.frames.position, rows)
        wanted = ["queries", *(f"new_{name}" for name in names)]
        queries, *new = self.model.session("qformer").run(wanted, inputs)
        at = position[:, None] + np.arange(frames.shape[1])
        fresh = dict(zip(names, new, strict=True))
        self.frames.put(rows, at, fresh)
        self.queries.put(rows, at[:, ::FRAMES_PER_QUERY] // FRAMES_PER_QUERY, fresh)
        self.posterior[rows] = np.exp(log_probs[:, -1:])
        self.position[rows] += frames.shape[1]
        both = np.concatenate([self.recent[rows], queries], axis=1)
        self.recent[rows] = both[:, -N_RECENT:]
        out: Floats = queries
        return out
