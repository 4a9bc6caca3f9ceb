"""Torch stages: `stages.Stages` over `pipeline`, on any device that torch knows.

Rows that have no chunk keep their state, so what a row gets does not depend on who else is in the
batch. The engine's default on CUDA, where steps are replayed (`cuda_graphs`); on a CPU `onnx_cpu`
computes the same several times faster.
"""

from __future__ import annotations

import dataclasses
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from sparqle_stream import pipeline
from sparqle_stream.cuda_graphs import GraphedSteps
from sparqle_stream.stages import StepResult

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import Tensor

    from sparqle_stream.cuda_graphs import Capture
    from sparqle_stream.decode import Writer
    from sparqle_stream.stages import Floats, Hear
    from sparqle_stream.torch_model import SparqleModel


class TorchStages:
    """All rows of one torch model."""

    def __init__(self, model: SparqleModel, n_rows: int, capture: Capture | None = None) -> None:
        """`capture` makes graphs of steps (`cuda_graphs.CudaCapture`); None: kernel by kernel."""
        self.model, self.n_rows = model, n_rows
        self.state = pipeline.init_state(model, n_rows + (capture is not None))  # one is spare
        self._graphs = GraphedSteps(model, self.state, capture) if capture else None

    def state_bytes(self) -> int:
        return _tensor_bytes(self.state)

    @contextmanager
    def working(self, threads: int) -> Iterator[None]:
        if threads:
            torch.set_num_threads(threads)  # OpenMP keeps it per thread: set it here
        with torch.inference_mode():
            yield

    def wipe(self, row: int) -> None:
        pipeline.reset_rows(self.state, self._mask([row]))
        self._forget_lengths()

    def begin(
        self, prefixes: Mapping[int, list[int]], leads: Mapping[int, Floats] | None = None
    ) -> None:
        mask = self._mask(list(prefixes))
        heard = {row: torch.from_numpy(lead) for row, lead in (leads or {}).items()}
        pipeline.begin_rows(self.model, self.state, mask, self._by_row(prefixes), heard)
        self._forget_lengths()

    def seam(self, prefixes: Mapping[int, list[int]], n_again: Mapping[int, int]) -> None:
        again = [n_again.get(row, 0) for row in range(len(self.state.recent))]
        pipeline.seam_rows(self.model, self.state, self._by_row(prefixes), again)
        self._forget_lengths()

    def step(
        self,
        pcm: Mapping[int, Floats],
        wait_ms: Mapping[int, int],
        ahead_frames: int,
        hear: Hear,
    ) -> StepResult:
        if self._graphs is not None:
            return self._graphs.step(pcm, wait_ms, ahead_frames, hear)
        rows, device = list(pcm), self.model.device
        audio = torch.zeros(self.n_rows, len(pcm[rows[0]]))
        waits = torch.zeros(self.n_rows, dtype=torch.int64)
        for row in rows:
            audio[row] = torch.from_numpy(pcm[row])
            waits[row] = wait_ms[row]

        def hear_all(log_probs: Tensor) -> list[Writer | None]:
            host = log_probs.cpu().numpy()
            return [hear(row, host[row]) if row in pcm else None for row in range(self.n_rows)]

        self.state, result = pipeline.step(
            self.model,
            self.state,
            audio.to(device),
            self._mask(rows),
            waits.to(device),
            hear_all,
            ahead_frames,
        )
        return StepResult({row: result.tokens[row] for row in rows}, result.seconds)

    def _by_row(self, prefixes: Mapping[int, list[int]]) -> list[list[int] | None]:
        return [prefixes.get(row) for row in range(len(self.state.recent))]

    def _mask(self, rows: list[int]) -> Tensor:
        mask = torch.zeros(len(self.state.recent), dtype=torch.bool)
        mask[rows] = True
        return mask.to(self.model.device)

    def _forget_lengths(self) -> None:
        if self._graphs is not None:
            self._graphs.forget_lengths()


def _tensor_bytes(value: object) -> int:
    """Bytes of all tensors in a state: dataclasses, lists, tuples and dicts of them."""
    if isinstance(value, torch.Tensor):
        return value.nbytes
    if dataclasses.is_dataclass(value):
        return sum(_tensor_bytes(getattr(value, f.name)) for f in dataclasses.fields(value))
    if isinstance(value, dict):
        return sum(map(_tensor_bytes, value.values()))
    if isinstance(value, list | tuple):
        return sum(map(_tensor_bytes, value))
    return 0
