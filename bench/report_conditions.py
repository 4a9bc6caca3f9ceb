"""Sections of the report that come of bench.accuracy: conditions, long form, references.

Contract as bench.report's. A section is there when a result has something for it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bench.tables import FEWEST_GROUPS, number, settings, table, was_busy

if TYPE_CHECKING:
    from collections.abc import Sequence

    Json = dict[str, Any]
    Results = Sequence[tuple[str, Json]]

CONDITIONS_NOTES = """The same recordings as a worse place would bring them, in one run with the
clean ones. *Ratio*: WER over the clean WER, with a paired 95 % bootstrap interval over speakers
(utterances, where one speaks); none of fewer than ten."""

LONG_FORM_NOTES = """Recordings joined in a row, beside the same cut at utterances, in one run. *Of
one speaker* are as many as have enough to say; the others go on across speakers, which is harder.
*Ratio*: WER over that of the utterances, with an interval over the joined recordings where there
are ten or more."""

REFERENCES_NOTES = """Others on the same files in the same run, each recording at once and as they
come; ours streams. **Published** figures are those of papers: whole test sets, their own scorers,
offline, nothing of it measured here."""


def conditions(results: Results) -> list[str]:
    sets = [(name, r, s) for name, r in results for s in r["sets"]]
    rows = [
        [
            s["name"],
            s["condition"],
            settings(r),
            str(s["recordings"]),
            *_wer_and_ratio(s["speech"], "to_clean", _n_groups(s["speech"])),
            f"`{name}`",
        ]
        for name, r, s in sets
        if "to_clean" in s.get("speech", {})
    ]
    if not rows:
        return []
    head = "set | condition | settings | files | WER | clean | ratio | run"
    facts = [_facts(name, r["conditions"]) for name, r in results if r.get("conditions")]
    return ["## Conditions", CONDITIONS_NOTES, table(head, rows), "\n".join(facts)]


def _facts(run: str, of_conditions: Json) -> str:
    told = [
        f"{name} ({', '.join(f'{key} {value}' for key, value in facts.items())})"
        for name, facts in of_conditions.items()
    ]
    return f"- `{run}`: {'; '.join(told)}"


def long_form(results: Results) -> list[str]:
    rows = [_long_row(name, r, s) for name, r in results for s in r["sets"] if s.get("long_form")]
    if not rows:
        return []
    head = "set | settings | recordings: of one speaker, across | shortest, longest"
    return ["## Long form", LONG_FORM_NOTES, table(f"{head} | WER | cut | ratio | run", rows)]


def _long_row(name: str, result: Json, of_set: Json) -> list[str]:
    facts = of_set["long_form"]
    condition = of_set["condition"]
    return [
        of_set["name"] + (f", {condition}" if condition != "clean" else ""),
        settings(result),
        f"{facts['of_one_speaker']}, {facts['across_speakers']}",
        f"{facts['shortest_s']:.0f}, {facts['longest_s']:.0f} s",
        *_wer_and_ratio(of_set["speech"], "to_cut", of_set["speech"]["utterances"]),
        f"`{name}`",
    ]


def _n_groups(speech: Json) -> int:
    """What bench.ratios drew from; before it said so: speakers, or utterances of one."""
    n: int = len(speech["speakers"])
    drawn: int = speech["to_clean"].get("drawn_from", n if n > 1 else speech["utterances"])
    return drawn


def _wer_and_ratio(speech: Json, to: str, n_groups: int) -> list[str]:
    """Three cells: WER, WER of the other, ratio with its interval if enough groups were drawn."""
    other = speech[to]
    ratio = f"**{number(other['ratio'], 2)}**"
    if n_groups >= FEWEST_GROUPS and (edges := other["ratio_interval_95"]):
        ratio += f" ({edges[0]:.2f} .. {edges[1]:.2f})"
    return [f"{speech['wer_percent']:.1f}", f"{other['wer_percent']:.1f}", ratio]


def references(results: Results) -> list[str]:
    found = [(name, r) for name, r in results if r.get("references")]
    rows = [row for name, r in found for row in _measured(name, r)]
    published = [one for _, r in found for one in r["references"] if one.get("published")]
    once = {(one["system"], one["set"]): one for one in published}
    rows += [_published_row(one) for one in once.values()]
    if not rows:
        return []
    head = "system | set | condition | WER | RTF | version or source | run"
    return ["## Beside references", REFERENCES_NOTES, table(head, rows)]


def _measured(name: str, result: Json) -> list[list[str]]:
    """Ours and theirs, set by set."""
    rows = []
    for s in result["sets"]:
        key = (s["name"], s["condition"])
        theirs = [r for r in result["references"] if (r["set"], r.get("condition")) == key]
        if theirs:
            weights = result["machine"]["weights_hash"][:12]
            ours = {"system": "ours", "what": settings(result), "version": f"weights `{weights}`"}
            ours |= {"wer_percent": s["speech"]["wer_percent"], "rtf": s["rtf"]}
            rows += [_measured_row(name, result, key, one) for one in (ours, *theirs)]
    return rows


def _measured_row(name: str, result: Json, key: tuple[str, str], one: Json) -> list[str]:
    busy = " (machine was busy)" if was_busy(result) else ""
    return [
        f"{one['system']}: {one['what']}",
        *key,
        f"{one['wer_percent']:.1f}",
        number(one["rtf"], 3) + busy,
        one["version"],
        f"`{name}`",
    ]


def _published_row(one: Json) -> list[str]:
    wer = f"{one['wer_percent']:.2f}"
    return [f"{one['system']}, **published**", one["set"], "clean", wer, "-", one["source"], "-"]
