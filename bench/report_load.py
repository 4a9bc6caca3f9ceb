"""Sections of the report for throughput, soak and compare: results -> Markdown.

Contract as bench.report's: every figure is in a result file, with what it was measured under.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bench.tables import bound, conditions, number, settings, table

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bench.tables import Machines

    Json = dict[str, Any]
    Results = Sequence[tuple[str, Json]]

THROUGHPUT_NOTES = """Streams of real speech with its pauses, played at the speed of speech, started
one after another; more and more of them until p95 of the *lag* exceeds the limit or somebody is
refused or dropped. Lag is what an event comes later than the audio it needed: queueing, computing
and transport; it counts from when an event was due, and a stream of which nothing came does not
keep up. RTF is the computing of one stream per second of its audio while the others run; CPU has
the players in it where they share the process. Memory of a further stream is a slope over all
numbers that kept up (in results from before 2026-11-28 between the least and the most)."""

SOAK_NOTES = """Streams of random lengths come and go, faster than real time; a fifth of them is
given up in the middle. The time of a chunk is that of one stream that is always the same, alone in
the engine after every round. *Growth* is the median slope over the run without its first fifth,
times its length; memory may grow by 1 % an hour of audio (in results from before 2026-11-28: 3 % a
run), and what one stream holds that stays open all the time not at all."""

COMPARE_NOTES = """The same files through each recogniser on the same cores, in processes of their
own, in turns: A B A B. Ratios are theirs over ours, the mean of the rounds, each round in brackets:
above 1 we are faster, or smaller. Whisper has random weights of the same shape and writes as many
tokens as the text has: its speed and memory are real, its words are not. *Growing*: the audio so
far is decoded again each second, as captions would need it."""


# --- throughput --------------------------------------------------------------------------------


def throughput(results: Results, machines: Machines) -> list[str]:
    parts = ["## Throughput", THROUGHPUT_NOTES]
    for name, result in results:
        parts += [f"### `{name}`", _load_facts(result, machines), _levels(result)]
    return parts


def _load_facts(result: Json, machines: Machines) -> str:
    load = result["load"]
    sets = ", ".join(f"{s['name']} (files: {s['recordings']})" for s in result["sets"])
    if "arrivals" in result:
        found = (
            f"open loop: {load['arrivals_per_minute']:g} streams a minute that stay "
            f"{load['mean_seconds']:g} s on average, for {load['seconds']:g} s"
        )
    else:
        more = " or more" if result["is_limited_by_most"] else ""
        found = (
            f"**{result['streams_held']}{more} streams** held "
            f"({number(result['streams_per_core'], 1)} per core), "
            f"{number(result['memory_per_stream_mb'], 1)} MB for each further one"
        )
    return (
        f"{found}; through {load['through']}, limit {load['limit_ms']:g} ms; {sets}, "
        f"{settings(result)}; lag counted from {load['lag_from']}; "
        f"{conditions(result, machines)}.{bound(result)}"
    )


def _levels(result: Json) -> str:
    head = "streams | kept up | lag p50 | p95 | p99 | max, ms | RTF of a stream | CPU, cores"
    levels = result["levels"] if "levels" in result else [result["arrivals"]]
    rows = [_level_row(one) for one in levels]
    if "arrivals" in result:
        at_once = result["arrivals"]
        rows[0][0] += (
            f" came; at once {at_once['taken_at_once_mean']:.1f} on average, "
            f"{at_once['taken_at_once_most']} at most"
        )
    return table(f"{head} | memory, MB | refused | dropped | words", rows)


def _level_row(one: Json) -> list[str]:
    lag = one["lag_ms"]
    return [
        str(one["streams"]),
        ("yes" if one["kept_up"] else "no") + _without_lag(one),
        *(number(lag[share], 0) for share in ("p50", "p95", "p99", "max")),
        number(one["rtf_per_stream"], 3),
        number(one["cpu_cores"], 2),
        number(one["rss_mb"], 0),
        str(one["refused"]),
        str(one["dropped"]),
        str(one["words"]),
    ]


def _without_lag(one: Json) -> str:
    n = one.get("without_lag")
    return f"; without a lag: {n}" if n else ""


# --- soak --------------------------------------------------------------------------------------

_UNITS = {
    "rss_mb": "resident memory, MB",
    "chunk_ms": "time of a chunk, ms",
    "slots_bytes": "all that slots keep, bytes",
    "held_bytes": "held by a stream that stays open, bytes",
}


def soak(results: Results, machines: Machines) -> list[str]:
    parts = ["## Soak", SOAK_NOTES]
    for name, result in results:
        parts += [f"### `{name}`", _soak_facts(result, machines), _flatness(result)]
    return parts


def _soak_facts(result: Json, machines: Machines) -> str:
    verdict = {True: "**flat**", False: "**not flat**", None: "too short to say"}
    grown = f" ({result['why']})" if result.get("why") and result["is_flat"] is False else ""
    ended = "; **interrupted**" if result.get("interrupted") else ""
    return (
        f"{verdict[result['is_flat']]}{grown}{ended}: "
        f"{result['audio_seconds'] / 3600:.2f} h of audio in "
        f"{result['cycles']} streams, {result['times_real_time']:.1f} times real time, "
        f"{result['failed']} failed; through {result['load']['through']}, {settings(result)}, "
        f"{result['settings']['n_streams']} at once; {conditions(result, machines)}."
    )


def _flatness(result: Json) -> str:
    rows = []
    for name, one in result["flat"].items():
        known = one["is_flat"] is not None
        cells = [f"{one[key]:,.6g}" if known else "-" for key in _FLAT_COLUMNS]
        rows.append([_UNITS.get(name, name.replace("_", " ")), *cells, _verdict(one["is_flat"])])
    return table("what | first | last | most | growth | allowed | flat", rows)


_FLAT_COLUMNS = ("first", "last", "most", "growth", "allowed")


def _verdict(is_flat: bool | None) -> str:
    return "-" if is_flat is None else "yes" if is_flat else "**no**"


# --- compare -----------------------------------------------------------------------------------


def compare(results: Results, machines: Machines) -> list[str]:
    parts = ["## Beside others", COMPARE_NOTES]
    for name, result in results:
        parts += [f"### `{name}`", _compare_facts(result, machines)]
        if result["ratios"]:
            parts.append(table("peer | time | memory", _ratio_rows(result)))
        head = "engine | RTF | of each turn | peak memory | WER | version"
        parts.append(table(head, [_engine_row(*item) for item in result["engines"].items()]))
        left_out = [f"{peer} ({why})" for peer, why in result["left_out"].items()]
        parts += [f"Left out: {', '.join(left_out)}."] if left_out else []
    return parts


def _compare_facts(result: Json, machines: Machines) -> str:
    sets = ", ".join(f"{s['name']} (files: {s['recordings']})" for s in result["sets"])
    return (
        f"{sets}, {result['audio_seconds']:.0f} s, {settings(result)}, threads of each: "
        f"{result['load']['threads']}; {conditions(result, machines)}.{bound(result)}"
    )


def _ratio_rows(result: Json) -> list[list[str]]:
    return [
        [peer, *(_ratio(one[what], one[f"{what}_rounds"]) for what in ("time", "memory"))]
        for peer, one in result["ratios"].items()
    ]


def _ratio(mean: float, rounds: Sequence[float]) -> str:
    return f"**{mean:.2f}** ({', '.join(f'{one:.2f}' for one in rounds)})"


def _engine_row(name: str, engine: Json) -> list[str]:
    return [
        f"{name}: {engine['what']}",
        number(engine["rtf"], 3),
        ", ".join(number(turn["rtf"], 3) for turn in engine["turns"]),
        f"{number(engine['peak_rss_mb'], 0)} MB",
        number(engine["wer_percent"], 1),
        engine["version"],
    ]
