"""Flat: samples of a long run, in order -> what has grown, by more than noise and time allow.

In: dicts with `audio_seconds` and a figure for each name in `ALLOWED`, None where there was none.
Contract: a run of too few samples, or of too little audio, gets no verdict instead of a good one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

WARM_UP_SHARE = 0.2
FEWEST_SAMPLES = 5  # after the warm-up; fewer say nothing
LEAST_HOURS = 0.5  # of audio after the warm-up; a leak must stand out from noise


class Limit(NamedTuple):
    """What may be gained: so much for each hour of audio, but in any case as much as noise is."""

    per_hour: float = 0.0  # share of the median
    share: float = 0.0  # of noise: of the median
    amount: float = 0.0  # of noise

    def allowed(self, median: float, hours: float) -> float:
        return max(self.per_hour * hours * median, self.share * median + self.amount)


ALLOWED = {
    "rss_mb": Limit(per_hour=0.01, amount=10.0),
    "state_bytes": Limit(),  # arrays of fixed size: it tells whether they were made anew
    "slots_bytes": Limit(amount=262_144.0),  # what waits in the rows that a round has left
    "held_bytes": Limit(amount=4_096.0),
    "chunk_ms": Limit(per_hour=0.02, share=0.2),
    "open_files": Limit(amount=0.5),
    "threads": Limit(amount=0.5),
    "streams_open": Limit(),
}


def growth(hours: Sequence[float], values: Sequence[float]) -> float:
    """Median slope of all pairs (Theil and Sen) times the span: a few outliers do not move it."""
    x, y = np.asarray(hours, float), np.asarray(values, float)
    i, j = np.triu_indices(len(x), 1)
    runs = x[j] - x[i]
    slopes = (y[j] - y[i])[runs > 0] / runs[runs > 0]
    return float(np.median(slopes) * (x[-1] - x[0])) if len(slopes) else 0.0


def flatness(samples: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """For everything watched: first and last, growth after the warm-up, and what is allowed.

    Without enough of them, over enough audio, `is_flat` is None.
    """
    kept = samples[int(WARM_UP_SHARE * len(samples)) :]
    found: dict[str, dict[str, Any]] = {}
    for name, limit in ALLOWED.items():
        if not any(name in s for s in samples):  # not of this kind of run
            continue
        points = [(s["audio_seconds"], s[name]) for s in kept if s[name] is not None]
        hours = (points[-1][0] - points[0][0]) / 3600 if points else 0.0
        if len(points) < FEWEST_SAMPLES or hours < LEAST_HOURS:
            found[name] = {"growth": None, "is_flat": None}
            continue
        seconds, values = zip(*points, strict=True)
        gained = growth(seconds, values)
        allowed = limit.allowed(float(np.median(values)), hours)
        found[name] = {
            "first": values[0],
            "last": values[-1],
            "most": max(values),
            "growth": round(gained, 3),
            "allowed": round(allowed, 3),
            "is_flat": gained <= allowed and (allowed > 0 or max(values) == values[0]),
        }
    return found


def verdict(flat: dict[str, dict[str, Any]], failed: int) -> tuple[bool | None, str]:
    """Whether a run was flat, None where nobody can tell, and why it is not or nobody can."""
    if failed:
        return False, f"{failed} streams failed"
    verdicts = {name: one["is_flat"] for name, one in flat.items()}
    if grown := [name for name, is_flat in verdicts.items() if is_flat is False]:
        return False, f"grown: {', '.join(grown)}"
    if not verdicts or None in verdicts.values():
        unknown = ", ".join(name for name, is_flat in verdicts.items() if is_flat is None)
        return None, (
            f"too short to tell ({unknown or 'no samples'}): it takes {FEWEST_SAMPLES} samples "
            f"over {LEAST_HOURS:g} h of audio after the first fifth of the run"
        )
    return True, ""
