"""Bounds of every op: `python -m sparqle_kernels.roofline [--into kernels/ROOFLINE.md]`.

Bytes and operations are counted from the shapes (`cases`); a bound is the longer of the time that
memory needs for the bytes and arithmetic for the operations at datasheet rates. No op can be
faster; what one reaches is measured by `python -m bench.kernels`. Needs neither a GPU nor Triton.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from sparqle_kernels.cases import CASES
from sparqle_kernels.report import put_between

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sparqle_kernels.cases import Case, Problem

BEGIN, END = "<!-- roofline: begin -->", "<!-- roofline: end -->"


@dataclass(frozen=True, slots=True)
class Gpu:
    """Datasheet rates: bytes/s of memory, FLOP/s of dense bf16 tensor cores and of float32."""

    name: str
    bytes_per_s: float
    tensor_flops: float
    fp32_flops: float


GPUS = (
    Gpu("A100 SXM 80 GB", 2.039e12, 312e12, 19.5e12),
    Gpu("H100 SXM", 3.35e12, 989e12, 67e12),
    Gpu("H200 SXM", 4.8e12, 989e12, 67e12),
)


def bound_s(problem: Problem, gpu: Gpu, *, on_tensor_cores: bool) -> tuple[float, str]:
    """Seconds that the op needs at least, and what limits it: 'memory' or 'arithmetic'."""
    rate = gpu.tensor_flops if on_tensor_cores else gpu.fp32_flops
    memory_s, arithmetic_s = problem.n_bytes / gpu.bytes_per_s, problem.n_flops / rate
    return max((memory_s, "memory"), (arithmetic_s, "arithmetic"))


def row(case: Case, streams: int) -> str:
    """One line of the table; bf16 but for log_mel, whose sums are float32."""
    problem = case.build(streams, torch.bfloat16, "meta")
    bounds = [bound_s(problem, gpu, on_tensor_cores=case.has_products) for gpu in GPUS]
    cells = [f"{1e6 * seconds:.3g} ({limit[0]})" for seconds, limit in bounds]
    saved = 1 - problem.n_bytes / problem.unfused_bytes
    return (
        f"| `{case.op}` | {case.label} | {streams} | {problem.n_bytes / 1e6:.3f} |"
        f" {problem.n_flops / 1e6:.2f} | {problem.n_flops / problem.n_bytes:.1f} |"
        f" {' | '.join(cells)} | {problem.unfused_bytes / 1e6:.3f} | {saved:.0%} |"
    )


def page(streams: Sequence[int]) -> str:
    """The table as Markdown; no streams: those of each case."""
    bounds = " | ".join(f"{gpu.name}, us" for gpu in GPUS)
    lines = [
        f"| op | case | streams | MB | MFLOP | FLOP/byte | {bounds} | MB unfused | saved |",
        "|---|---|---:|---:|---:|---:|" + "---:|" * len(GPUS) + "---:|---:|",
    ]
    lines += [row(case, n) for case in CASES for n in streams or case.streams]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m sparqle_kernels.roofline")
    parser.add_argument("--into", type=Path, help="page that holds the table (default: print it)")
    parser.add_argument("--streams", type=int, nargs="+", default=[], help="(those of the op)")
    args = parser.parse_args(argv)
    table = page(args.streams)
    if args.into:
        args.into.write_text(put_between(args.into.read_text(), BEGIN, END, table))
    else:
        sys.stdout.write(table + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
