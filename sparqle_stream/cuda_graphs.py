"""CUDA graphs: a step of all stages as a few replays, for rows whose number is rounded up.

One graph hears (features, encoder, CTC, Q-Former), others are passes of the LLM: the queries or
some tokens of each row, and the logits of words that are asked for. Between them writers on the
host choose. A graph belongs to a shape: `bucket` rows, and samples with look-ahead, rows or ids.
It is captured by whoever needs it first, which is the engine's worker.

Contract: the same numbers as `pipeline.step`. A graph reads weights, the state, which is written in
place for ever, and static buffers that every call fills; it writes the state and static buffers.
Its memory is shared with all other graphs, which is safe because nothing lives in it between
replays. Rows that are padding are the spare one, the last of the state, which is nobody's.

The host waits for the device once when a chunk was heard, for its CTC posteriors, and in each round
of `decode.write` for the stop head's logits and, where somebody goes on, for the scores: what is
written next depends on both, and choosing words is the host's (`HostCopy` is the only such place).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from sparqle_stream import llm, pipeline
from sparqle_stream.config import FRAME_SAMPLES, FRAMES_PER_CTC, FRAMES_PER_QUERY
from sparqle_stream.decode import write
from sparqle_stream.rows import Rows
from sparqle_stream.stages import Laps, StepResult

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from typing import Any

    from sparqle_stream.pipeline import PipelineState
    from sparqle_stream.stages import Floats, Hear
    from sparqle_stream.torch_model import SparqleModel

    Body = Callable[[], None]
    # What a graph does -> a call that does it again, on whatever the static buffers hold then.
    Capture = Callable[[Body], Callable[[], Any]]
    # Inputs and outputs of a body, which are static, and the body.
    Parts = tuple[tuple[Tensor, ...], tuple[Tensor, ...], Body]

WARM_UPS = 2  # before a capture: libraries choose algorithms and allocate, Triton compiles
MOST_GRAPHED_ROWS = 16  # of one slot in a pass; longer appends are prefixes, of many lengths


class CudaCapture:
    """Captures on a device; all graphs of one engine share their memory."""

    def __init__(self) -> None:
        self._pool: Any = None

    def __call__(self, body: Body) -> Callable[[], Any]:
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UPS):
                body()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # Other threads of the process may use the device meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            body()
        return graph.replay


class HostCopy:
    """Tensors on their way to the host; the only place where the host waits for the device."""

    n_waits = 0  # of the process, for tests and benchmarks

    def __init__(self, *tensors: Tensor) -> None:
        self._copies = [x.to("cpu", non_blocking=True, copy=True) for x in tensors]
        self._event: torch.cuda.Event | None = None
        if tensors[0].is_cuda:
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record()

    def wait(self) -> list[Tensor]:
        HostCopy.n_waits += 1
        if self._event is not None:
            self._event.synchronize()
        return self._copies


@dataclass(frozen=True, slots=True)
class Graph:
    """One captured body with what it reads and writes besides weights and state."""

    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    replay: Callable[[], Any]

    def __call__(self, *values: Tensor) -> tuple[Tensor, ...]:
        """Copies `values` into the inputs, without waiting, and replays."""
        for static, value in zip(self.inputs, values, strict=True):
            if static.is_cuda and not value.is_cuda:
                value = value.pin_memory()  # kept by its allocator until the copy is done
            static.copy_(value, non_blocking=True)
        self.replay()
        return self.outputs


class GraphedPasses:
    """`llm.Passes` by graphs: bodies, their buffers, and what the host knows of the slots."""

    def __init__(self, model: SparqleModel, state: PipelineState, capture: Capture) -> None:
        self.model, self.state, self._capture = model, state, capture
        self.spare = len(state.recent) - 1
        self._buckets = [1 << i for i in range((self.spare - 1).bit_length())] + [self.spare]
        self._graphs: dict[tuple[str | int, ...], Graph] = {}
        self._makers: dict[str, Callable[..., Parts]] = {
            "listen": self._listening,
            "append": self._appending,
            "read": self._reading,
            "score": self._scoring,
        }
        self._lengths: list[int] | None = None  # rows in each slot; None: the device knows better
        cfg = model.cfg.llm
        # Graphs read its memory, so it must outlive the cache that it comes from.
        self._rotation = llm.rope_table(
            cfg.rope_theta, cfg.head_width, state.llm.k.shape[3], state.llm.k.device
        )

    def graph(self, name: str, n_rows: int, *size: int) -> tuple[Graph, int]:
        """The graph of a shape, captured where it is new, and its bucket."""
        bucket = next(n for n in self._buckets if n >= n_rows)
        key: tuple[str | int, ...] = (name, bucket, *size)
        if key not in self._graphs:
            inputs, outputs, body = self._makers[name](bucket, *size)
            self._graphs[key] = Graph(inputs, outputs, self._capture(body))
        return self._graphs[key], bucket

    def padded(self, rows: Sequence[int], bucket: int) -> Tensor:
        """rows -> (bucket,) with the spare one behind them."""
        return torch.tensor([*rows, *[self.spare] * (bucket - len(rows))])

    def forget_lengths(self) -> None:
        """Slots were emptied or filled by somebody else."""
        self._lengths = None

    # --- what decode.write asks ------------------------------------------------------------------

    def stops(self, rows: Sequence[int]) -> list[float]:
        (stops,) = HostCopy(self.state.llm.stop).wait()
        every: list[float] = stops.tolist()
        return [every[row] for row in rows]

    def score(
        self, rows: Sequence[int], ids: list[list[int]]
    ) -> tuple[list[list[float]], list[int]]:
        n_ids = 1 << (max(8, len(ids[0])) - 1).bit_length()
        graph, bucket = self.graph("score", len(rows), n_ids)
        wanted = torch.zeros(bucket, n_ids, dtype=torch.int64)
        wanted[: len(ids), : len(ids[0])] = torch.tensor(ids, dtype=torch.int64)
        scores, best = HostCopy(*graph(self.padded(rows, bucket), wanted)).wait()
        return scores[: len(rows)].tolist(), best[: len(rows)].tolist()

    def read(self, rows: Sequence[int], ids: list[list[int]]) -> None:
        n = len(ids[0])
        if n > MOST_GRAPHED_ROWS:
            llm.EagerPasses(self.model.llm, self.state.llm).read(rows, ids)
            self.forget_lengths()
            return
        self._make_room(rows, n)
        graph, bucket = self.graph("read", len(rows), n)
        padded = torch.zeros(bucket, n, dtype=torch.int64)
        padded[: len(ids)] = torch.tensor(ids)
        graph(self.padded(rows, bucket), padded)

    def append(self, rows: Sequence[int], queries: Tensor) -> None:
        """queries (bucket, Q, E) on the device, those of `rows` first."""
        self._make_room(rows, queries.shape[1])
        graph, bucket = self.graph("append", len(rows), queries.shape[1])
        graph(self.padded(rows, bucket), queries)

    def _make_room(self, rows: Sequence[int], n: int) -> None:
        if self._lengths is None:
            (lengths,) = HostCopy(self.state.llm.length).wait()
            self._lengths = lengths.tolist()
        llm.check_room(max(self._lengths[row] for row in rows), n, self.state.llm)
        for row in rows:
            self._lengths[row] += n

    # --- bodies ----------------------------------------------------------------------------------

    def _rows(self, bucket: int) -> Tensor:
        """All spare, so that warming up touches no stream."""
        return torch.full((bucket,), self.spare, device=self.model.device)

    def _listening(self, bucket: int, n_samples: int, ahead_frames: int) -> Parts:
        model, state, device = self.model, self.state, self.model.device
        n_frames = n_samples // FRAME_SAMPLES
        pcm = torch.zeros(bucket, n_samples, device=device)
        rows, wait_ms = self._rows(bucket), torch.zeros(bucket, dtype=torch.int64, device=device)
        shape = (bucket, n_frames // FRAMES_PER_CTC, model.cfg.ctc.n_pieces)
        log_probs = torch.zeros(shape, device=device)
        queries = state.recent.new_zeros(
            bucket, n_frames // FRAMES_PER_QUERY, model.cfg.qformer.llm_width
        )

        def body() -> None:
            heard = pipeline.listen(model, state, pcm, Rows(rows), wait_ms, ahead_frames, _no_lap)
            log_probs.copy_(heard[0])
            queries.copy_(heard[1])

        return (rows, pcm, wait_ms), (log_probs, queries), body

    def _reading(self, bucket: int, n: int) -> Parts:
        rows = self._rows(bucket)
        ids = torch.zeros(bucket, n, dtype=torch.int64, device=self.model.device)

        def body() -> None:
            self._append(self.model.llm.embed(ids), rows)

        return (rows, ids), (), body

    def _appending(self, bucket: int, n: int) -> Parts:
        rows = self._rows(bucket)
        queries = self.state.recent.new_zeros(bucket, n, self.model.cfg.qformer.llm_width)

        def body() -> None:
            self._append(queries, rows)

        return (rows, queries), (), body

    def _append(self, embeds: Tensor, rows: Tensor) -> None:
        self.state.llm.length[self.spare].zero_()  # what padding writes always fits
        llm.append_rows(self.model.llm, self.state.llm, embeds, rows)

    def _scoring(self, bucket: int, n_ids: int) -> Parts:
        device, rows = self.model.device, self._rows(bucket)
        ids = torch.zeros(bucket, n_ids, dtype=torch.int64, device=device)
        scores = torch.zeros(bucket, n_ids + 1, device=device)
        best = torch.zeros(bucket, dtype=torch.int64, device=device)

        def body() -> None:
            found = llm.score_rows(self.model.llm, self.state.llm, rows, ids)
            scores.copy_(found[0])
            best.copy_(found[1])

        return (rows, ids), (scores, best), body


class GraphedSteps:
    """`pipeline.step` for the rows of a state whose last row is spare."""

    def __init__(self, model: SparqleModel, state: PipelineState, capture: Capture) -> None:
        self.passes = GraphedPasses(model, state, capture)

    def forget_lengths(self) -> None:
        self.passes.forget_lengths()

    def step(
        self,
        pcm: Mapping[int, Floats],
        wait_ms: Mapping[int, int],
        ahead_frames: int,
        hear: Hear,
    ) -> StepResult:
        """As `stages.Stages.step`."""
        lap, passes, rows = Laps(), self.passes, sorted(pcm)
        n_samples = len(pcm[rows[0]])
        graph, bucket = passes.graph("listen", len(rows), n_samples, ahead_frames)
        audio = torch.empty(bucket, n_samples, pin_memory=passes.model.device.type == "cuda")
        np.stack([pcm[row] for row in rows], out=audio.numpy()[: len(rows)])
        audio[len(rows) :] = 0.0
        waits = torch.zeros(bucket, dtype=torch.int64)
        waits[: len(rows)] = torch.tensor([wait_ms[row] for row in rows])
        log_probs, queries = graph(passes.padded(rows, bucket), audio, waits)
        heard = HostCopy(log_probs)
        passes.append(rows, queries)  # the device goes on while the host waits and thinks
        (host,) = heard.wait()
        lap("hearing")
        by_row = host.numpy()
        writers = {row: hear(row, by_row[i]) for i, row in enumerate(rows)}
        lap("captions")
        tokens = write(llm.Slots(passes, passes.state.judge), writers)
        lap("llm")
        return StepResult(tokens, lap.seconds)


def _no_lap(_stage: str) -> None:
    """Inside a graph no clock of the host tells anything."""
