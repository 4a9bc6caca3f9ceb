"""Section of the report for bench.tradeoff: results -> Markdown."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bench.tables import conditions, number, table

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bench.tables import Machines

    Json = dict[str, Any]

TRADEOFF_NOTES = """What waiting buys: every chunk with every delay over the same recordings. In a
cell: **WER** in per cent; emission delay p50, p90 in milliseconds (from the end of a word to the
audio that had been heard when it left, stream time); RTF. A dash is a cell that was not run."""


def tradeoff(results: Sequence[tuple[str, Json]], machines: Machines) -> list[str]:
    parts = ["## Delay and chunk", TRADEOFF_NOTES]
    for name, result in results:
        parts += [f"### `{name}`", _facts(result, machines)]
        if result.get("plot"):
            parts.append(f"![WER over emission delay]({result['plot']})")
        for i, of_set in enumerate(result["sets"]):
            parts.append(f"{of_set['name']} (files: {of_set['recordings']}):")
            parts.append(_table(result, i))
    return parts


def _facts(result: Json, machines: Machines) -> str:
    s = result["settings"]
    llm = f", LLM {s['llm']}" if s["llm"] else ""
    n, n_all = len(result["cells"]), len(result["grid"])
    part = "" if n == n_all else f"; **{n} of {n_all} cells so far**"
    commits = sorted({cell["commit"] for cell in result["cells"]} - {result["machine"]["commit"]})
    also = f"; cells also of {', '.join(f'`{one}`' for one in commits)}" if commits else ""
    return (
        f"{s['model']}, VAD {s['vad']}, {s['dtype']}{llm}, {s['n_streams']} at once{part}; "
        f"{conditions(result, machines)}{also}."
    )


def _table(result: Json, i: int) -> str:
    """A row for each chunk, a column for each delay, for the i-th set."""
    cells = {(cell["chunk_ms"], cell["delay_ms"]): cell for cell in result["cells"]}
    chunks = sorted({chunk for chunk, _ in result["grid"]})
    delays = sorted({delay for _, delay in result["grid"]})
    rows = [
        [f"{chunk} ms", *(_cell(cells.get((chunk, delay)), i) for delay in delays)]
        for chunk in chunks
    ]
    return table(" | ".join(["chunk", *(f"delay {delay} ms" for delay in delays)]), rows)


def _cell(cell: Json | None, i: int) -> str:
    if cell is None:
        return "-"
    one = cell["sets"][i]
    emission = one["delays_stream_time"]["emission_ms"]
    waited = f"{number(emission['p50'], 0)}, {number(emission['p90'], 0)}"
    failed = f"; {one['failed']} failed" if one["failed"] else ""
    return f"**{one['wer_percent']:.1f}**; {waited}; {number(cell['timing']['rtf'], 3)}{failed}"
