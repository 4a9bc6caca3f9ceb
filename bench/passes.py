"""Passes: what one pass of the LLM and one chunk cost on every backend and precision of a CPU.

`python -m bench.passes` times a single row (a token), a chunk's queries (the append), and both for
eight streams at once, on slots that hold `--filled` rows, beside the memory bound: the bytes of the
LLM's matrices, read once at the bandwidth that as many threads reach here. Then every stage of a
chunk of the bundled clip, and what a second of audio costs one stream alone and each of eight that
go through one batch in step (`bench.company`). Variants take turns (A B C A B C); a turn makes each
pass three times and takes the last, for threads of the variant before may still be spinning. The
figure is the median of all turns. `--torch-int8` has torch's own ways to 8 bits take turns too
(`bench.torch_int8`).
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import replace
from statistics import median
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from bench import bounds, company, machine, manifests, plots, settings, torch_int8
from sparqle_stream.config import StreamOptions
from sparqle_stream.stages import prefix_ids
from sparqle_stream.writer import Greedy

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from bench.settings import Settings
    from sparqle_stream.stages import Floats, Stages
    from sparqle_stream.torch_model import SparqleModel

VARIANTS = (("onnx", "int8"), ("onnx", "float32"), ("torch", "float32"))
SHAPES = ((1, 1), (1, 4), (8, 1), (8, 4))  # streams, rows of each
WARM_UPS = 3
REPEATS = 3  # of a pass in its turn
IN_STEP = (1, 8)  # streams
SEED = 0
COMPANY_TURNS = 3


class Variant:
    """A model on one backend in one precision, with rows for eight streams."""

    def __init__(
        self, wanted: Settings, backend: str, dtype: str, n_filled: int, way: str = ""
    ) -> None:
        """`way`: of `torch_int8`, by which a float32 model's matrices become int8."""
        self.name = f"{backend} int8, {way}" if way else f"{backend} {dtype}"
        self.model = replace(wanted, backend=backend, dtype=dtype).load_model()
        self.n_filled = n_filled
        self.llm_bytes = self.model.weight_bytes()["llm"]
        if way:
            self.llm_bytes //= 4
            torch_int8.convert(cast("SparqleModel", self.model), way)
        self._stages = self.model.make_stages(max(n for n, _ in SHAPES))

    def pass_seconds(self, n_streams: int, n_rows: int) -> float:
        """One pass that appends `n_rows` rows to each of `n_streams` slots."""
        rng = np.random.default_rng(SEED)
        width = self.model.cfg.llm.width
        rows = rng.standard_normal((n_streams, n_rows, width)).astype(np.float32)
        append = _appender(self._stages, self.n_filled, rows)
        start = time.perf_counter()
        append()
        return time.perf_counter() - start

    def chunk_seconds(self, pcm: Floats, chunk: int) -> list[dict[str, float]]:
        """Seconds by stage of each chunk of a recording; nothing is written."""
        stages, out = self.model.make_stages(1), []
        ahead = self.model.cfg.encoder.ahead_frames(StreamOptions().delay_ms)
        with stages.working(0):
            stages.wipe(0)
            stages.begin({0: prefix_ids(self.model.tokenizer, "")})
            for at in range(0, len(pcm) - chunk, chunk):
                result = stages.step({0: pcm[at : at + chunk]}, {0: 0}, ahead, _listen)
                out.append(dict(result.seconds))
        return out


class _Mute(Greedy):
    """Writes nothing, but has the queries read: what a chunk costs before its first word."""

    def is_over(self) -> bool:
        return False


def _listen(_row: int, _log_probs: Floats) -> _Mute:
    return _Mute(n_most=0)


def _appender(stages: Stages, n_filled: int, rows: Floats) -> Callable[[], None]:
    """A call that appends rows (B, R, E) to slots of `n_filled` rows, on either backend."""
    from sparqle_stream.onnx_cpu.stages import OnnxStages

    if isinstance(stages, OnnxStages):
        slots = stages.slots
        slots.length[:] = 0
        slots.length[: len(rows)] = n_filled
        for row, new in enumerate(rows):
            slots.leave_embedded(row, new)
        return lambda: slots.read({row: [] for row in range(len(rows))})
    return _torch_appender(stages, n_filled, rows)


def _torch_appender(stages: Any, n_filled: int, rows: Floats) -> Callable[[], None]:  # noqa: ANN401 - TorchStages
    import torch

    from sparqle_stream import llm

    state, model = stages.state.llm, stages.model
    state.length[:] = n_filled
    embeds = torch.zeros(stages.n_rows, *rows.shape[1:])
    embeds[: len(rows)] = torch.from_numpy(rows)
    active = torch.arange(stages.n_rows) < len(rows)

    def append() -> None:
        llm.append(model.llm, state, embeds, active)

    return append


def measure(variants: Sequence[Variant], n_turns: int) -> dict[str, dict[str, float]]:
    """Median milliseconds by variant and shape ('8x4': eight streams, four rows each)."""
    taken: dict[str, dict[str, list[float]]] = {v.name: {} for v in variants}
    for turn in range(WARM_UPS + n_turns):
        for variant in variants:
            for n_streams, n_rows in SHAPES:
                for _ in range(REPEATS):  # the last one counts: its threads are awake
                    seconds = variant.pass_seconds(n_streams, n_rows)
                if turn >= WARM_UPS:
                    taken[variant.name].setdefault(f"{n_streams}x{n_rows}", []).append(seconds)
    return {
        name: {shape: round(1000 * median(all_), 2) for shape, all_ in by_shape.items()}
        for name, by_shape in taken.items()
    }


def run(args: argparse.Namespace, wanted: Settings) -> dict[str, Any]:
    under = machine.Conditions(machine.require_free(is_forced=args.force))
    variants = [Variant(wanted, *names, args.filled) for names in VARIANTS]
    if args.torch_int8:
        ways = torch_int8.ways()
        variants += [Variant(wanted, "torch", "float32", args.filled, way) for way in ways]
    by_threads = {v.model.is_shared: v.model for v in variants}
    rates = {shared: bounds.bandwidth_of_stream(model) for shared, model in by_threads.items()}
    bandwidth = {v.name: rates[v.model.is_shared] for v in variants}
    passes = measure(variants, args.turns)
    pcm = manifests.bundled().recordings[0].pcm()
    chunk = wanted.stream_options().chunk_samples
    stages: dict[str, dict[str, float]] = {}
    for variant in variants:
        taken = variant.chunk_seconds(pcm, chunk)[WARM_UPS:]
        stages[variant.name] = {
            stage: round(1000 * median(t[stage] for t in taken), 2) for stage in taken[0]
        }
    together = [
        {n: company.stage_ms(variants[0].model, wanted.stream_options(), pcm, n) for n in IN_STEP}
        for _ in range(COMPANY_TURNS)
    ]
    return {
        "bench": "passes",
        "settings": wanted.summary() | {"filled": args.filled, "turns": args.turns, "seed": SEED},
        "machine": machine.card(variants[0].model.weights_hash, wanted.threads),
        "timing": under.summary(),
        "read_gb_per_s": {name: round(rate, 1) for name, rate in bandwidth.items()},
        "bound_ms": {v.name: round(v.llm_bytes / bandwidth[v.name] / 1e6, 2) for v in variants},
        "pass_ms": passes,
        "stage_ms": stages,
        "second_ms": {str(n): _medians([turn[n][0] for turn in together]) for n in IN_STEP},
        "words": {str(n): together[0][n][1] for n in IN_STEP},
    }


def _medians(turns: Sequence[dict[str, float]]) -> dict[str, float]:
    return {stage: round(median(turn[stage] for turn in turns), 2) for stage in turns[0]}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.passes", description=__doc__)
    add = parser.add_argument
    add("--filled", type=int, default=150, metavar="ROWS", help="of each slot (%(default)s)")
    add("--turns", type=int, default=15, help="(%(default)s)")
    add("--torch-int8", action="store_true", help="fbgemm, onednn, torchao too (11 GB)")
    add("--force", action="store_true", help="time on a busy machine, and say so in the result")
    plots.add_option(parser)
    settings.add_options(parser)
    args = parser.parse_args(argv)

    def measured() -> dict[str, Any]:
        plots.require(args.plot)
        return run(args, settings.from_args(args))

    draw = [lambda result: plots.draw(result, args.plot)]
    return settings.run_and_print(measured, args.output, then=draw)


if __name__ == "__main__":
    sys.exit(main())
