"""Ratios: WER under a condition over the clean one, of joined recordings over their utterances.

Both sides are of one run, and paired: the interval draws speakers (utterances, where there are
fewer than ten; joined recordings, against their own parts) with what they have on both sides.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bench import scoring
from bench.tables import FEWEST_GROUPS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bench.manifests import Recording, RecordingSet
    from bench.scoring import Tally

    Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Scored:
    """The recordings of a set that have texts, and a tally of each."""

    of_set: RecordingSet
    speech: Sequence[Recording]
    tallies: Sequence[Tally]


def all_of(one: Scored, scored: Sequence[Scored]) -> dict[str, Json]:
    """What there is of `to_clean` and `to_cut`, as JSON."""
    found = {"to_clean": _to_clean(one, scored), "to_cut": _to_cut(one, scored)}
    return {name: ratio for name, ratio in found.items() if ratio}


def _to_clean(one: Scored, scored: Sequence[Scored]) -> Json | None:
    if one.of_set.condition == "clean":
        return None
    for other in scored:
        if (other.of_set.name, other.of_set.condition) == (one.of_set.name, "clean"):
            speakers = [recording.speaker for recording in one.speech]
            return _ratio(_by_speaker(speakers, one.tallies, other.tallies), other)
    return None


def _by_speaker(
    speakers: Sequence[str], tallies: Sequence[Tally], others: Sequence[Tally]
) -> list[tuple[Tally, Tally]]:
    """Pairs of a speaker's sums; of utterances where there are too few speakers to draw from."""
    if len(set(speakers)) < FEWEST_GROUPS:
        return list(zip(tallies, others, strict=True))
    ours = scoring.by_speaker(zip(speakers, tallies, strict=True))
    theirs = scoring.by_speaker(zip(speakers, others, strict=True))
    return list(zip(ours.values(), theirs.values(), strict=True))


def _to_cut(one: Scored, scored: Sequence[Scored]) -> Json | None:
    if one.of_set.cut is None:
        return None
    (cut,) = (other for other in scored if other.of_set == one.of_set.cut)
    of_parts = dict(zip(cut.speech, cut.tallies, strict=True))
    pairs = [
        (tally, scoring.total(of_parts[part] for part in recording.parts))
        for recording, tally in zip(one.speech, one.tallies, strict=True)
    ]
    return _ratio(pairs, cut)


def _ratio(pairs: list[tuple[Tally, Tally]], other: Scored) -> Json:
    wer = round(scoring.total(other.tallies).wer, 2)
    return {"wer_percent": wer, "drawn_from": len(pairs)} | scoring.ratio(pairs)
