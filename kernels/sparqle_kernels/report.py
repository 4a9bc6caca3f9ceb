"""The table of compiled kernels: `python -m sparqle_kernels.report [--into kernels/README.md]`.

Compiles every launch of every case for sm_80, sm_90 and sm_120, in all of its types, without a GPU,
and fails when one of them spills registers, wants too much shared memory, or has products
that miss the tensor cores.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from sparqle_kernels import aot
from sparqle_kernels.cases import CASES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sparqle_kernels.aot import Compiled

BEGIN, END = "<!-- compiled: begin -->", "<!-- compiled: end -->"
STREAMS = 16  # strides that are the same for any number of streams above one


@dataclass(frozen=True, slots=True)
class Row:
    """One kernel of one case and type, on all architectures."""

    kernel: str
    case: str
    dtype: str
    compiled: tuple[Compiled, ...]
    faults: tuple[str, ...]


def rows(ops: Sequence[str], capabilities: Sequence[int]) -> list[Row]:
    """Compiles what the ops launch; all ops when none is named."""
    found = []
    for case in CASES:
        if ops and case.op not in ops:
            continue
        for dtype in case.dtypes:
            launches, _ = case.launches(case.build(STREAMS, dtype, "meta"))
            for launch in launches:
                built = tuple(aot.compile_launch(launch, c) for c in capabilities)
                name = launch.kernel.__name__
                is_product = case.has_products and not name.endswith(("_merge", "_delta"))
                wants_mma = is_product and dtype != torch.float32
                faults = tuple(
                    f"sm_{b.capability}: {fault}"
                    for b in built
                    for fault in b.faults(wants_mma=wants_mma)
                )
                short = str(dtype).removeprefix("torch.")
                found.append(Row(name, case.label, short, built, faults))
    return found


def as_markdown(table: Sequence[Row], capabilities: Sequence[int]) -> str:
    """Registers of a thread / shared memory in KiB / tensor-core instructions, by architecture."""
    gpus = [f"sm_{c} ({aot.GPUS[c]})" for c in capabilities]
    lines = [
        f"| kernel | case | type | spills | {' | '.join(gpus)} |",
        "|---|---|---|---|" + "---|" * len(gpus),
    ]
    for row in table:
        cells = [f"{b.n_registers} / {b.shared_bytes / 1024:.1f} / {b.n_mma}" for b in row.compiled]
        spilled = sum(b.n_spilled_bytes for b in row.compiled)
        lines.append(
            f"| `{row.kernel}` | {row.case} | {row.dtype} | {spilled} | {' | '.join(cells)} |"
        )
    return "\n".join(lines)


def put_between(page: str, begin: str, end: str, text: str) -> str:
    """The page with `text` between two marks; raises ValueError when it lacks one."""
    before, found_begin, rest = page.partition(begin)
    _, found_end, after = rest.partition(end)
    if not (found_begin and found_end):
        raise ValueError(f"the page has no {begin} ... {end}")
    return f"{before}{begin}\n{text}\n{end}{after}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m sparqle_kernels.report")
    parser.add_argument("ops", nargs="*", help="only these (default: all)")
    parser.add_argument("--into", type=Path, help="page that holds the table (default: print it)")
    parser.add_argument("--arch", type=int, nargs="+", default=list(aot.SHARED_LIMIT))
    args = parser.parse_args(argv)
    try:
        import triton
    except ImportError:
        sys.stderr.write("error: Triton is not installed\nhint: pip install 'triton>=3.6'\n")
        return 2
    table = rows(args.ops, args.arch)
    text = (
        f"Triton {triton.__version__}. Registers of a thread / shared memory of a program in KiB /"
        f" tensor-core instructions in the code.\n\n{as_markdown(table, args.arch)}"
    )
    if args.into:
        args.into.write_text(put_between(args.into.read_text(), BEGIN, END, text))
    else:
        sys.stdout.write(text + "\n")
    faults = [f"{row.kernel}, {row.case}, {row.dtype}: {f}" for row in table for f in row.faults]
    sys.stderr.writelines(f"{fault}\n" for fault in faults)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
