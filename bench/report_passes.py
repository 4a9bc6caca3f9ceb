"""Section of the report for bench.passes: results -> Markdown."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bench.tables import number, table, was_busy

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bench.tables import Machines

    Json = dict[str, Any]

PASSES_NOTES = """One pass of the LLM over its slots, and every stage of one chunk whose queries the
LLM reads, in milliseconds (medians of turns, variants in turns). *8 x 4*: eight streams, four rows
each. The bound reads the LLM's matrices once, at the bandwidth measured in the same run for as many
threads as a stream has: one on onnx, all on torch."""


COMPANY_NOTES = """What a second of audio costs a stream, in milliseconds of one thread, alone and
in step with others through one batch, everything counted from PCM to events (the first variant, the
bundled clip, each stream from another place on; medians of turns)."""


def passes(results: Sequence[tuple[str, Json]], machines: Machines) -> list[str]:
    parts = ["## CPU engine", PASSES_NOTES]
    for name, result in results:
        label = machines.label(result["machine"])
        busy = ", **which was busy**" if was_busy(result) else ""
        facts = (
            f"{result['settings']['filled']} rows in each slot,"
            f" commit `{result['machine']['commit']}`, machine {label}{busy}."
        )
        parts += [f"### `{name}`", facts, _table(result)]
        if "second_ms" in result:
            parts += [COMPANY_NOTES, _company(result)]
    return parts


def _company(result: Json) -> str:
    by_streams = result["second_ms"]
    stages = list(next(iter(by_streams.values())))
    alone = sum(next(iter(by_streams.values())).values())
    rows = []
    for n, taken in by_streams.items():
        total = sum(taken.values())
        cells = [number(taken[stage], 1) for stage in stages]
        rows.append([n, *cells, number(total, 1), f"{total / alone:.2f}"])
    return table(" | ".join(["streams", *stages, "all", "of one alone"]), rows)


def _table(result: Json) -> str:
    shapes = list(next(iter(result["pass_ms"].values())))
    stages = sorted({stage for taken in result["stage_ms"].values() for stage in taken})
    head = ["variant", "bound", *(shape.replace("x", " x ") for shape in shapes), *stages]
    rows = []
    for name, taken in result["pass_ms"].items():
        by_stage = result["stage_ms"][name]
        bandwidth = f"{result['read_gb_per_s'][name]:g} GB/s"
        cells = [f"{number(result['bound_ms'][name], 1)} ({bandwidth})"]
        cells += [number(taken[shape], 1) for shape in shapes]
        cells += [number(by_stage.get(stage), 1) for stage in stages]
        rows.append([name, *cells])
    return table(" | ".join(head), rows)
