"""Kernels: `python -m bench.kernels [OP...]` compares results, then times, on a GPU.

In: the cases of `sparqle_kernels.cases`. Every case is first compared with PyTorch and float64;
when one is worse than PyTorch by more than a factor of two there are no figures and the exit
status is 1. Out: one JSON line with the median time of the kernel and of PyTorch (eager, its fused
attention, torch.compile), and the share of the copy bandwidth and matrix rate measured in the same
run. Inputs rotate through copies that do not fit into the GPU's cache together.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench import machine, plots, settings
from sparqle_stream.errors import ConfigError, DeviceError, MissingExtraError, SparqleError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch
    from torch import Tensor

    from sparqle_kernels.cases import Case, Problem

    Timer = Callable[[Callable[[], object]], float]  # -> median milliseconds

EXIT_RED, EXIT_USER_ERROR = 1, 2
CHECKED_STREAMS = 3  # rows of a check: results do not depend on their number
COMPILED_STREAMS = 256  # torch.compile takes seconds a shape: it is timed at this one only
ROTATED_BYTES = 256e6  # more than any cache
MAX_COPIES = 16
COPIED_BYTES = 1 << 30
MATRIX_SIDE = 8192
DTYPES = ("float32", "float16", "bfloat16")


@dataclass(frozen=True, slots=True)
class Check:
    """Root mean square errors against float64, of the tensor where ours is worst."""

    op: str
    case: str
    dtype: str
    error: float
    error_of_pytorch: float
    is_green: bool


def tensors_of(case: Case, problem: Problem) -> list[Tensor]:
    """Runs the kernels; everything that they write."""
    launches, out = case.launches(problem)
    for launch in launches:
        launch.run()
    found = list(out) if isinstance(out, tuple) else [out]
    if case.op == "rms_norm_rope_append":
        found += [problem.args[-1].k, problem.args[-1].v]
    return found


def check(case: Case, dtype: torch.dtype, device: str, streams: int = CHECKED_STREAMS) -> Check:
    """Compares one case; ours may be twice as wrong as PyTorch in the same type."""
    from bench.kernels_rivals import EAGER, SDPA, copied, in_float64

    problem = case.build(streams, dtype, device)
    exact = EAGER[case.op](*in_float64(problem.args))
    theirs = SDPA.get(case.op, EAGER[case.op])(*copied(problem.args))
    ours = tensors_of(case, problem)
    pairs = [
        errors(mine, other, truth)
        for mine, other, truth in zip(ours, theirs, exact, strict=True)
        if truth.is_floating_point()
    ]
    worst = max(pairs, key=lambda pair: pair[0] / (pair[1] or 1e-30))
    is_green = all(mine <= 2 * other + luck for mine, other, luck in pairs)
    name = str(dtype).removeprefix("torch.")
    return Check(case.op, case.label, name, worst[0], worst[1], is_green)


def errors(ours: Tensor, theirs: Tensor, truth: Tensor) -> tuple[float, float, float]:
    """Ours and PyTorch's, as root mean squares, and by what PyTorch may be better.

    Half a unit in the last place, because PyTorch is sometimes exact by luck where there are only a
    few numbers; four in float32, which we sum one after another, and PyTorch now and then in a
    tree, whose error was 2.9 times less on an H100. One product in TF32 would be a thousand units.
    """
    import torch

    def rms(x: Tensor) -> float:
        return x.double().square().mean().sqrt().item()

    units = 4 if ours.dtype == torch.float32 else 0.5
    luck = units * torch.finfo(ours.dtype).eps * rms(truth)
    return rms(ours.double() - truth), rms(theirs.double() - truth), luck


def rotating(op: Callable[[Problem], object], problems: Sequence[Problem]) -> Callable[[], object]:
    """A call without arguments that takes the next problem each time."""
    following = itertools.cycle(problems)
    return lambda: op(next(following))


def time_case(
    case: Case, streams: int, dtype: torch.dtype, timer: Timer, device: str
) -> dict[str, Any]:
    """Milliseconds of the kernel and of its rivals; None where a rival ran out of memory."""
    import torch

    from bench.kernels_rivals import rivals

    first = case.build(streams, dtype, device)
    n_copies = max(1, min(MAX_COPIES, int(ROTATED_BYTES / first.n_bytes)))
    problems = [first, *(case.build(streams, dtype, device) for _ in range(n_copies - 1))]
    ms: dict[str, float | None] = {
        "triton": timer(rotating(lambda problem: tensors_of(case, problem), problems))
    }
    for name, op in rivals(case.op, is_compiled=streams == COMPILED_STREAMS).items():
        try:
            ms[name] = timer(rotating(_on_arguments(op), problems))
        except torch.OutOfMemoryError:
            ms[name] = None
    return {
        "op": case.op,
        "case": case.label,
        "dtype": str(dtype).removeprefix("torch."),
        "streams": streams,
        "ms": ms,
        "bytes": first.n_bytes,
        "flops": first.n_flops,
    }


def _on_arguments(op: Callable[..., object]) -> Callable[[Problem], object]:
    return lambda problem: op(*problem.args)


def with_shares(row: dict[str, Any], copy_bytes_per_s: float, flops: float) -> dict[str, Any]:
    """The row with its share of the measured rates, and how much faster than the best rival."""
    seconds = row["ms"]["triton"] / 1000
    others = [ms for name, ms in row["ms"].items() if name != "triton" and ms]
    return row | {
        "share_of_copy": round(row["bytes"] / seconds / copy_bytes_per_s, 3),
        "share_of_matrix": round(row["flops"] / seconds / flops, 3),
        "speedup": round(min(others) / row["ms"]["triton"], 2) if others else None,
    }


def measured_rates(timer: Timer, device: str) -> tuple[float, float]:
    """Bytes/s of a copy (read and written) and FLOP/s of a bf16 matrix product."""
    import torch

    source = torch.zeros(COPIED_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy_s = timer(lambda: target.copy_(source)) / 1000
    a, b = torch.randn(2, MATRIX_SIDE, MATRIX_SIDE, device=device).bfloat16()
    return 2 * source.nbytes / copy_s, 2 * MATRIX_SIDE**3 / (timer(lambda: a @ b) / 1000)


def run(args: argparse.Namespace, timer: Timer, device: str) -> dict[str, Any]:
    """Checks, and figures when all of them are green."""
    import torch

    from sparqle_kernels.cases import CASES

    start = time.perf_counter()
    cases = [case for case in CASES if not args.ops or case.op in args.ops]
    if not cases:
        known = ", ".join(sorted({case.op for case in CASES}))
        raise ConfigError(f"no such op: {', '.join(args.ops)}", hint=f"there are {known}")
    with torch.no_grad():
        checks = [_checked(case, dtype, device) for case in cases for dtype in case.dtypes]
    result: dict[str, Any] = {"bench": "kernels", "checks": [asdict(c) for c in checks]}
    if not all(c.is_green for c in checks):
        return result | {"is_green": False}
    copy_rate, flops = measured_rates(timer, device)
    rates = {"copy_gb_per_s": round(copy_rate / 1e9), "matrix_tflops": round(flops / 1e12, 1)}
    todo = wanted_rows(cases, args)
    rows = []
    for case, streams, dtype in todo:
        if time.perf_counter() - start > args.limit_s:
            break
        row = time_case(case, streams, dtype, timer, device)
        rows.append(with_shares(row, copy_rate, flops))
        print(f"{case.op}, {case.label}, {streams}: {rows[-1]['ms']}", file=sys.stderr)
    left_out = len(todo) - len(rows)
    return result | {"is_green": True, **rates, "rows": rows, "rows_left_out": left_out}


def wanted_rows(
    cases: Sequence[Case], args: argparse.Namespace
) -> list[tuple[Case, int, torch.dtype]]:
    """What is timed, in this order: all cases for the first number of streams, then the next."""
    import torch

    numbers = args.streams or sorted({n for case in cases for n in case.streams})
    wanted = getattr(torch, args.dtype)
    return [
        (case, n, wanted if wanted in case.dtypes else case.dtypes[0])
        for n in numbers
        for case in cases
        if args.ops or n in case.streams
    ]


def _checked(case: Case, dtype: torch.dtype, device: str) -> Check:
    import torch

    with torch.enable_grad() if case.op == "utterance_attention" else torch.no_grad():
        return check(case, dtype, device)


def require_gpu() -> dict[str, Any]:
    """What the GPU is; raises DeviceError where there is none, MissingExtraError without Triton."""
    import torch

    if not torch.cuda.is_available():
        raise DeviceError(
            "no CUDA device here: kernels are timed on a GPU only",
            hint="python -m sparqle_kernels.report compiles them without one",
        )
    try:
        import triton
    except ImportError as err:
        hint = "pip install 'sparqle-stream[gpu]'"
        raise MissingExtraError("Triton is not installed", hint=hint) from err
    return {
        "gpu": torch.cuda.get_device_name(),
        "capability": list(torch.cuda.get_device_capability()),
        "versions": machine.versions() | {"triton": triton.__version__},
        "cuda": torch.version.cuda,
        "commit": machine.commit(),
    }


def do_bench(call: Callable[[], object]) -> float:
    """Median milliseconds; the cache is cleared before every call."""
    from triton.testing import do_bench as bench

    return float(bench(call, return_mode="median"))


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.kernels", description=__doc__)
    add = parser.add_argument
    add("ops", nargs="*", metavar="OP", help="only these (default: all)")
    add("--streams", type=int, nargs="+", metavar="N", help="(default: those of each op)")
    add("--dtype", choices=DTYPES, default="bfloat16", help="of the timing (%(default)s)")
    add("--limit-s", type=float, default=3600.0, metavar="S", help="no new row after (%(default)s)")
    add("--force", action="store_true", help="time on a busy machine, and say so in the result")
    plots.add_option(parser)
    add("--output", type=Path, metavar="FILE.json", help="for example in bench/results/")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    try:
        plots.require(args.plot)
        card = require_gpu()
        under = machine.Conditions(machine.require_free(is_forced=args.force))
        result = run(args, do_bench, "cuda") | {"machine": card, "timing": under.summary()}
        print(json.dumps(result))
        if result["is_green"]:
            settings.write(result, args.output)
            plots.draw(result, args.plot)
            return 0
    except SparqleError as err:
        print(f"error: {err.message}\nhint: {err.hint}", file=sys.stderr)
        return EXIT_USER_ERROR
    red = [f"{c['op']}, {c['case']}, {c['dtype']}" for c in result["checks"] if not c["is_green"]]
    print(f"error: wrong results, so no figures: {'; '.join(red)}", file=sys.stderr)
    return EXIT_RED


if __name__ == "__main__":
    sys.exit(main())
