"""Sections of the report for bench.start and bench.flips: results -> Markdown."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bench.tables import conditions, number, settings, table, wider

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bench.tables import Machines

    Json = dict[str, Any]

START_NOTES = """The command line in a process of its own, the file read as fast as the machine
goes: from making the process to the model loaded (the header of WebVTT), to the first caption on
standard output (the first cue, which has to be heard to its end) and to the end; the most memory
that the process held. Medians of runs with warm files, with min and max. The bound reads weights
and texts once, at the bandwidth of one thread; it has neither Python in it nor any captioning."""

FLIPS_NOTES = """The same weights in two precisions on the same recordings. *Frames*: CTC frames in
the same segments whose best piece is another, and KL divergence from float32. *Words*: edits
between the two transcripts over the words of float32, normalised as for scoring, and as they are
written, with capitals and marks. *Difference*: WER less that of float32, in points, with its paired
95 % bootstrap interval (the wider of those over speakers and over recordings)."""


def start(results: Sequence[tuple[str, Json]], machines: Machines) -> list[str]:
    head = "run | settings | runs | loaded | first caption | end | peak memory | bound"
    rows = [_start_row(name, result, machines) for name, result in results]
    return ["## Start and memory", START_NOTES, table(f"{head} | measured with", rows)]


def _start_row(name: str, result: Json, machines: Machines) -> list[str]:
    goals, limit = result["goals"], result["bound"]
    caption, memory = result["first_caption_s"], result["peak_rss_mb"]
    return [
        f"`{name}`",
        settings(result),
        str(result["settings"]["runs"]),
        _spread(result["loaded_s"], 2, "s"),
        f"**{_spread(caption, 2, 's')}**, goal {goals['first_caption_s']:g} s; cue "
        f"{result['first_cue'].replace('-->', 'to')}",
        _spread(result["whole_s"], 2, "s") + f" of {result['recording']['seconds']:.1f} s",
        f"**{_spread(memory, 0, 'MB')}**, goal {goals['peak_rss_mb']:g} MB",
        f"{number(limit['seconds_at_least'], 3)} s: {limit['read_mb']:.0f} MB at"
        f" {limit['read_gb_per_s']:g} GB/s",
        conditions(result, machines),
    ]


def _spread(values: Json, n_digits: int, unit: str) -> str:
    """'1.52 s (1.49 .. 1.60)'."""
    low, high = (number(values[edge], n_digits) for edge in ("min", "max"))
    return f"{number(values['median'], n_digits)} {unit} ({low} .. {high})"


def flips(results: Sequence[tuple[str, Json]], machines: Machines) -> list[str]:
    head = "set | settings | files | frames | KL, nats a frame | words | as written"
    rows = [_flips_row(name, r, s, machines) for name, r in results for s in r["sets"]]
    return [
        "## What rounding changes",
        FLIPS_NOTES,
        table(f"{head} | WER | WER, float32 | difference | run", rows),
    ]


def _flips_row(name: str, result: Json, of_set: Json, machines: Machines) -> list[str]:
    ear, said, scored = of_set["ear"], of_set["captions"], of_set["accuracy"]
    n, n_all = of_set["recordings"], of_set["recordings_in_manifest"]
    files = str(n) if n == n_all else f"{n} of {n_all}"
    return [
        of_set["name"],
        f"{settings(result)} against {result['settings']['against']}",
        files + (f", {of_set['failed']} failed" if of_set["failed"] else ""),
        f"{ear['frames_changed_percent']:.2f} % of {ear['frames']}",
        f"{ear['nats_per_frame']:.2g}",
        f"**{said['flip_rate_percent']:.2f} %** of {said['words']}",
        f"{said['flip_rate_as_written_percent']:.2f} %",
        number(scored and scored["wer_percent"], 2),
        number(scored and scored["wer_float32_percent"], 2),
        _difference(scored, result["goals"]),
        f"`{name}`: {conditions(result, machines)}",
    ]


def _difference(scored: Json | None, goals: Json) -> str:
    if scored is None:
        return "-"
    found = scored["difference"]
    edges = wider(found["interval_95"], found["interval_95_speakers"])
    chance = f" ({edges[0]:+.2f} .. {edges[1]:+.2f})" if edges else ""
    return f"**{found['points']:+.2f}**{chance}, goal at most {goals['wer_points']:g}"
