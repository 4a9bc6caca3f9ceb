"""Sections of the report for a GPU: results of bench.kernels and bench.steps -> Markdown."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bench.tables import number, table, was_busy

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


BUSY = "; **the machine was busy**"
STEP_NOTES = """A whole step of all stages, every stream with a chunk in it: random weights, one or
two tokens a chunk, neither detector nor word beam. *Graphs*: steps replayed as CUDA graphs, or
kernel by kernel. *Waits*: how often the host waits for the device in a step that is replayed."""


def steps(results: Sequence[tuple[str, Json]], machines: Machines) -> list[str]:
    del machines
    parts = ["## Steps", STEP_NOTES]
    for name, result in results:
        asked = result["settings"]
        fake = ", **with a fake graph**" if result["is_fake"] else ""
        parts += [
            f"### `{name}`",
            f"{result['device']}{fake}; model {asked['model']} in {asked['dtype']}, chunks of"
            f" {asked['chunk_ms']} ms{BUSY if was_busy(result) else ''}",
            table(
                "streams | graphs | p50, ms | p95, ms | real time | waits | state, MB",
                [
                    [
                        str(row["streams"]),
                        "yes" if row["graphs"] else "no",
                        number(row["p50_ms"], 1),
                        number(row["p95_ms"], 1),
                        "yes" if row["is_real_time"] else "no",
                        number(row["waits_of_a_step"], 2) if row["graphs"] else "-",
                        number(row["state_mb"], 0),
                    ]
                    for row in result["rows"]
                ],
            ),
        ]
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
        f"{BUSY if was_busy(result) else ''}"
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
