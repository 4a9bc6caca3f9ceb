"""Section of the report for kernels: results of bench.kernels -> Markdown."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bench.tables import number, table

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bench.tables import Machines

    Json = dict[str, Any]

KERNEL_NOTES = """Median time of our Triton kernels and of PyTorch on one GPU, after every kernel
was compared with float64; a result with a wrong kernel has no times. *Of the copy* is the share of
the bandwidth of a plain copy measured in the same run, *of the matrix rate* that of a large bf16
matrix product. *Faster* is against the best of the others."""


def kernels(results: Sequence[tuple[str, Json]], machines: Machines) -> list[str]:
    del machines  # what counts is the GPU, which each result names
    parts = ["## Kernels", KERNEL_NOTES]
    for name, result in results:
        parts += [f"### `{name}`", _facts(result)]
        if result.get("rows"):
            parts.append(_rows(result["rows"]))
    return parts


def _facts(result: Json) -> str:
    card = result.get("machine", result)
    versions = ", ".join(f"{name} {v}" for name, v in card.get("versions", {}).items())
    wrong = [
        f"{c['op']} ({c['case']}, {c['dtype']})" for c in result["checks"] if not c["is_green"]
    ]
    found = f"{len(result['checks'])} comparisons, " + (
        f"**wrong: {', '.join(wrong)}**" if wrong else "all green"
    )
    rates = ""
    if "copy_gb_per_s" in result:
        rates = (
            f"; a copy {result['copy_gb_per_s']} GB/s, matrix product "
            f"{result['matrix_tflops']} TFLOP/s"
        )
    return (
        f"{card.get('gpu', 'a GPU')}{rates}; {found}; commit `{card.get('commit', '')}`; {versions}"
    )


def _rows(rows: Sequence[Json]) -> str:
    others = sorted({name for row in rows for name in row["ms"]} - {"triton"})
    head = ["op", "case", "streams", "type", "ours, ms", *(f"{name}, ms" for name in others)]
    columns = " | ".join([*head, "faster", "of the copy", "of the matrix rate"])
    return table(columns, [_row(row, others) for row in rows])


def _row(row: Json, others: Sequence[str]) -> list[str]:
    return [
        row["op"],
        row["case"],
        str(row["streams"]),
        row["dtype"],
        number(row["ms"]["triton"], 4),
        *(number(row["ms"].get(name), 4) for name in others),
        f"{number(row['speedup'], 2)} times",
        f"{row['share_of_copy']:.0%}",
        f"{row['share_of_matrix']:.0%}",
    ]
