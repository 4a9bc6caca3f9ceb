"""Long form: recordings in a row, S seconds of them and more, beside the same cut at utterances.

As many as possible are of one speaker. What speakers have left, all of it where they have less than
S, is joined across speakers in the order of the manifest: the harder case, because gain, context
and segments then have to follow a change of voice without a word from anybody. The last of those
may stay shorter than S. Recordings without text stay out.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from bench.manifests import Recording
from sparqle_stream.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from bench.manifests import RecordingSet

    Group = list[Recording]


def joined(recordings: RecordingSet, seconds: float, pause_s: float) -> RecordingSet:
    """Recordings of `seconds` or more with `pause_s` in their joints; `cut` has the parts."""
    if seconds <= 0 or pause_s < 0:
        raise ConfigError("nothing can be joined to that", hint="--long-form 300 --pause-s 0.5")
    spoken = [one for one in recordings.recordings if one.text]
    if not spoken:
        raise ConfigError(f"{recordings.name} has no texts", hint="long-form needs speech")
    rows = [_in_a_row(group, pause_s) for group in _groups(spoken, seconds, pause_s)]
    return replace(
        recordings,
        name=f"{recordings.name}, joined to {seconds:g} s",
        recordings=tuple(rows),
        n_all=len(rows),
        joined_to_s=seconds,
        cut=replace(recordings, recordings=tuple(spoken)),
    )


def facts(recordings: RecordingSet) -> dict[str, Any]:
    """How recordings were joined, as JSON."""
    rows = recordings.recordings
    lengths_s = [one.length_s() for one in rows]
    n_across = sum(_is_across(one.parts) for one in rows)
    return {
        "joined_to_s": recordings.joined_to_s,
        "pause_s": rows[0].pause_s,
        "recordings": len(rows),
        "of_one_speaker": len(rows) - n_across,
        "across_speakers": n_across,
        "shorter": sum(length < (recordings.joined_to_s or 0.0) for length in lengths_s),
        "shortest_s": round(min(lengths_s), 1),
        "longest_s": round(max(lengths_s), 1),
    }


def _groups(spoken: Sequence[Recording], seconds: float, pause_s: float) -> list[Group]:
    """Whole ones of each speaker, then what is left across speakers."""
    of_speakers: dict[str, Group] = {}
    for one in spoken:
        of_speakers.setdefault(one.speaker, []).append(one)
    whole: list[Group] = []
    left: Group = []
    for of_one in of_speakers.values():
        *full, rest = _runs(of_one, seconds, pause_s)
        whole += full
        left += rest
    *full, rest = _runs(left, seconds, pause_s)
    return [*whole, *full, *([rest] if rest else [])]


def _runs(spoken: Iterable[Recording], seconds: float, pause_s: float) -> list[Group]:
    """Neighbours until they are long enough; the last run, maybe empty, is not."""
    runs: list[Group] = [[]]
    length_s = 0.0
    for one in spoken:
        length_s += one.length_s() + (pause_s if runs[-1] else 0.0)
        runs[-1].append(one)
        if length_s >= seconds:
            runs.append([])
            length_s = 0.0
    return runs


def _is_across(group: Sequence[Recording]) -> bool:
    """Also where nobody knows who speaks."""
    return len({one.speaker for one in group}) > 1 or (len(group) > 1 and not group[0].speaker)


def _in_a_row(group: Group, pause_s: float) -> Recording:
    first = group[0]
    others = len({one.speaker for one in group}) - 1
    return Recording(
        id=f"{first.id}+{len(group) - 1}",
        path=first.path,
        text=" ".join(one.text for one in group),
        speaker=f"{first.speaker}+{others}" if others else first.speaker,
        corpus=first.corpus,
        parts=tuple(group),
        pause_s=pause_s,
    )
