"""Steps: `python -m bench.steps` times whole steps of all stages, with and without CUDA graphs.

In: numbers of streams; a model of random weights, of the default shape (`--model default`) or tiny.
Every stream has a chunk in every step, a writer takes one token after most and two after some,
whatever the stop head says: 1.25 a chunk. Between steps slots that are nearly full begin anew; that
is not timed. Out: one JSON document with the median and the 95th percentile of a step, how many
waits for the device it has, and what beginning and capturing took. No detector, beam or socket is
in it: what is measured is what the device and its launches cost.

The largest number of streams whose p95 is below the chunk is what one device holds in real time.
Without a GPU there is nothing to capture: `--compute cpu` measures the eager step only, and
`--fake` lets a fake graph stand for the real one, to try the command itself.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bench import machine, plots, settings
from sparqle_stream.config import ModelConfig, StreamOptions
from sparqle_stream.errors import ConfigError, DeviceError
from sparqle_stream.stages import prefix_ids
from sparqle_stream.writer import Greedy

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from sparqle_stream.stages import Floats
    from sparqle_stream.torch_model import SparqleModel
    from sparqle_stream.torch_stages import TorchStages

STREAMS = (1, 16, 256, 2048)
MODELS = ("default", "random:tiny")
WARM_UP_STEPS = 8  # every pattern of tokens twice: all graphs are captured then
SPARE_ROWS = 8  # of a slot, more than a step writes


class Steady(Greedy):
    """Writes as many tokens as it may."""

    def goes_on(self, stop: float) -> bool:
        return self.n_written < self.n_most


def random_model(name: str, dtype: str, device: str) -> SparqleModel:
    """Random weights; what they say does not matter, only their shapes do."""
    import torch

    from sparqle_stream import testing, torch_model
    from sparqle_stream.ctc import CtcHead
    from sparqle_stream.encoder import Encoder
    from sparqle_stream.llm import Llm
    from sparqle_stream.qformer import QFormer

    model = testing.tiny_model()
    if name == "default":
        cfg = ModelConfig()
        with torch.device(device):
            model = replace(
                model,
                cfg=cfg,
                encoder=Encoder(cfg.encoder),
                ctc=CtcHead(cfg.ctc),
                qformer=QFormer(cfg.qformer),
                llm=Llm(cfg.llm),
                name="random",
            )
    return torch_model.to_device(model, dtype, device)


class Run:
    """One number of streams, with or without graphs."""

    def __init__(self, model: SparqleModel, n_streams: int, capture: Any, chunk_ms: int) -> None:  # noqa: ANN401 - a cuda_graphs.Capture
        from sparqle_stream.torch_stages import TorchStages

        self.model, self.n_streams = model, n_streams
        self.stages: TorchStages = TorchStages(model, n_streams, capture)
        n_samples = StreamOptions(chunk_ms=chunk_ms).chunk_samples
        noise = 0.1 * np.random.default_rng(0).standard_normal(n_samples).astype(np.float32)
        self.pcm: dict[int, Floats] = dict.fromkeys(range(n_streams), noise)
        self.wait = dict.fromkeys(range(n_streams), 0)
        self.ahead_frames = model.cfg.encoder.ahead_frames(StreamOptions().delay_ms)
        self.n_steps, self.n_rows, self.begin_s = 0, 0, 0.0

    def begin(self) -> None:
        start = time.perf_counter()
        prefix = prefix_ids(self.model.tokenizer, "")
        self.stages.begin(dict.fromkeys(range(self.n_streams), prefix))
        self._wait()
        self.n_rows, self.begin_s = len(prefix), time.perf_counter() - start

    def step_seconds(self) -> float:
        """One step, until the device has done all of it."""
        n_queries = len(self.pcm[0]) // 1280
        if self.n_steps == 0 or self.n_rows + n_queries + SPARE_ROWS > self.model.cfg.llm.n_slot:
            self.begin()
        n_tokens = 2 if self.n_steps % 4 == 3 else 1
        start = time.perf_counter()
        self.stages.step(
            self.pcm, self.wait, self.ahead_frames, lambda _row, _heard: Steady(n_tokens)
        )
        self._wait()
        seconds = time.perf_counter() - start
        self.n_steps += 1
        self.n_rows += n_queries + n_tokens
        return seconds

    def _wait(self) -> None:
        import torch

        if self.model.device.type == "cuda":
            torch.cuda.synchronize()


def measure(run: Run, seconds: float, most: int) -> dict[str, Any]:
    """Milliseconds of a step, after warming up; for `seconds` or `most` steps, at least two."""
    from sparqle_stream.cuda_graphs import HostCopy

    start = time.perf_counter()
    with run.stages.working(0):
        for _ in range(WARM_UP_STEPS):
            run.step_seconds()
        warm_up_s, waits = time.perf_counter() - start, HostCopy.n_waits
        taken: list[float] = []
        start = time.perf_counter()
        while len(taken) < 2 or (len(taken) < most and time.perf_counter() - start < seconds):
            taken.append(run.step_seconds())
    p50, p95 = np.quantile(taken, [0.5, 0.95]).tolist()
    return {
        "p50_ms": round(1e3 * p50, 3),
        "p95_ms": round(1e3 * p95, 3),
        "n_steps": len(taken),
        "begin_ms": round(1e3 * run.begin_s, 1),
        "warm_up_s": round(warm_up_s, 2),
        "waits_of_a_step": round((HostCopy.n_waits - waits) / len(taken), 2),
        "state_mb": round(run.stages.state_bytes() / 1e6, 1),
    }


def fake_capture(body: Callable[[], None]) -> Callable[[], Any]:
    """What a graph would do, done anew each time."""
    body()
    return body


def captures(args: argparse.Namespace) -> dict[bool, Callable[[], Any]]:
    """With graphs or without -> makes what captures them. Raises DeviceError without a GPU."""
    if args.compute == "cpu":
        made: dict[bool, Callable[[], Any]] = {True: lambda: fake_capture} if args.fake else {}
        return made | {False: lambda: None}
    import torch

    from sparqle_stream.cuda_graphs import CudaCapture

    if not torch.cuda.is_available():
        raise DeviceError("no CUDA device here", hint="--compute cpu times the eager step")
    return {True: CudaCapture, False: lambda: None}


def run(args: argparse.Namespace) -> dict[str, Any]:
    import torch

    if not args.streams or min(args.streams) < 1:
        raise ConfigError("--streams takes numbers from 1 on", hint=f"such as {STREAMS}")
    capture_by = captures(args)
    under = machine.Conditions(machine.require_free(is_forced=args.force))
    dtype = args.dtype or ("float32" if args.compute == "cpu" else "bfloat16")
    start = time.perf_counter()
    model = random_model(args.model, dtype, args.compute)
    rows: list[dict[str, Any]] = []
    todo = [(n, is_graphed) for n in args.streams for is_graphed in capture_by]
    left_out = []
    for n_streams, is_graphed in todo:
        row: dict[str, Any] = {"streams": n_streams, "graphs": is_graphed}
        if time.perf_counter() - start > args.limit_s:
            left_out.append(row | {"why": f"after {args.limit_s:g} s"})
            continue
        try:  # nothing holds a state longer than its own measurement: two might not fit
            capture = capture_by[is_graphed]()
            taken = measure(Run(model, n_streams, capture, args.chunk_ms), args.seconds, args.steps)
        except torch.OutOfMemoryError:
            left_out.append(row | {"why": "out of memory"})
            continue
        rows.append(row | taken | {"is_real_time": taken["p95_ms"] < args.chunk_ms})
        print(rows[-1], file=sys.stderr)
    device = torch.cuda.get_device_name() if args.compute == "cuda" else "cpu"
    return {
        "bench": "steps",
        "settings": {"model": args.model, "dtype": dtype, "chunk_ms": args.chunk_ms},
        "device": device,
        "is_fake": args.compute == "cpu" and args.fake,
        "machine": machine.card(model.weights_hash, 0),
        "timing": under.summary(),
        "rows": rows,
        "left_out": left_out,
    }


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.steps", description=__doc__)
    add = parser.add_argument
    add("--model", choices=MODELS, default="default", help="shape (%(default)s)")
    add("--compute", choices=("cpu", "cuda"), default="cuda", help="(%(default)s)")
    add("--dtype", choices=("float32", "bfloat16"), help="(bfloat16 on CUDA, else float32)")
    add("--chunk-ms", type=int, default=320, metavar="MS", help="(%(default)s)")
    add("--streams", type=int, nargs="+", default=list(STREAMS), metavar="N", help="(%(default)s)")
    add("--seconds", type=float, default=6.0, metavar="S", help="of each number (%(default)s)")
    add("--steps", type=int, default=500, metavar="N", help="of each, at most (%(default)s)")
    add("--limit-s", type=float, default=3600.0, metavar="S", help="no new one after (%(default)s)")
    add("--force", action="store_true", help="time on a busy machine, and say so in the result")
    add("--fake", action="store_true", help="on a CPU: a fake graph, to try this command")
    plots.add_option(parser)
    add("--output", type=Path, metavar="FILE.json", help="for example in bench/results/")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)

    def measured() -> dict[str, Any]:
        plots.require(args.plot)
        return run(args)

    draw = [lambda result: plots.draw(result, args.plot)]
    return settings.run_and_print(measured, args.output, then=draw)


if __name__ == "__main__":
    sys.exit(main())
