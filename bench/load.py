"""Load: many streams at once -> lag, computing, memory, and who was turned away.

Two shapes. `level` keeps a number of streams running together, started one after another over some
seconds so that their chunks do not fall due at the same moment. `arrivals` is an open loop: streams
come at random moments and stay for random times, whether or not the engine keeps up, as callers do.
Both are seeded. All streams share one event loop and one reel.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from bench.delays import percentiles_ms
from bench.targets import End, Outcome
from sparqle_stream.config import SAMPLE_RATE_HZ
from sparqle_stream.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from bench import machine
    from bench.reel import Reel
    from bench.targets import Target

SHORTEST_S, LONGEST_OF_MEAN = 2.0, 5.0  # of streams that come and go
SLACK_S = 0.002  # of due times: servers round theirs to milliseconds


@dataclass(frozen=True, slots=True)
class Booking:
    """One stream that will come: seconds after the beginning, and for how long."""

    start_s: float
    seconds: float


@dataclass(frozen=True, slots=True)
class Played:
    """Streams after they have ended, and what the process that served them spent."""

    bookings: list[Booking]
    outcomes: list[Outcome]
    began_at: float  # clock
    wall_s: float
    cpu_s: float
    rss_mb: float  # at the end


def level(n: int, seconds: float, stagger_s: float) -> list[Booking]:
    """n streams of the same length that start evenly over `stagger_s`."""
    return [Booking(stagger_s * i / n, seconds) for i in range(n)]


def arrivals(per_minute: float, mean_s: float, seconds: float, seed: int) -> list[Booking]:
    """Poisson arrivals during `seconds`; lengths are exponential, neither tiny nor endless."""
    rng = np.random.default_rng(seed)
    bookings, now = [], 0.0
    while (now := now + float(rng.exponential(60 / per_minute))) < seconds:
        length = float(rng.exponential(mean_s))
        bookings.append(Booking(now, min(max(length, SHORTEST_S), LONGEST_OF_MEAN * mean_s)))
    if not bookings:
        raise ConfigError("nobody came in that time", hint="a longer --seconds, or more --arrivals")
    return bookings


def play(
    target: Target,
    reel: Reel,
    bookings: Sequence[Booking],
    packet_ms: int,
    seed: int,
    process: machine.Process,
) -> Played:
    """All streams, at the speed of speech, until the last one has ended.

    One that fails for a reason that nobody foresaw was dropped; what the others saw stays.
    """
    rng = np.random.default_rng(seed)
    offsets = rng.integers(0, len(reel.tape), len(bookings)).tolist()
    before, start = process.read(), time.perf_counter()
    outcomes = asyncio.run(
        _play(target, reel, list(zip(bookings, offsets, strict=True)), packet_ms)
    )
    wall_s, after = time.perf_counter() - start, process.read()
    return Played(list(bookings), outcomes, start, wall_s, after.cpu_s - before.cpu_s, after.rss_mb)


async def _play(
    target: Target, reel: Reel, streams: Sequence[tuple[Booking, int]], packet_ms: int
) -> list[Outcome]:
    origin = time.perf_counter()

    async def one(booking: Booking, offset: int) -> Outcome:
        await asyncio.sleep(max(0.0, origin + booking.start_s - time.perf_counter()))
        n_samples = int(booking.seconds * SAMPLE_RATE_HZ)
        packets = reel.packets(offset, n_samples, packet_ms * SAMPLE_RATE_HZ // 1000)
        began_at = time.perf_counter()
        try:
            return await target.play(packets, booking.seconds)
        except Exception as err:  # noqa: BLE001 - one stream's failure is its own
            why = f"{type(err).__name__}: {err}"
            return Outcome(began_at=began_at, ended_at=time.perf_counter(), why=why)

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(one(*stream)) for stream in streams]
    return [task.result() for task in tasks]


# --- figures -----------------------------------------------------------------------------------


def figures(
    played: Played, *, only_together: bool, is_told_at_ends: bool = False
) -> dict[str, Any]:
    """What is reported of a load; `only_together`: lags that fell due while all streams ran.

    By when they fell due, not by when events came: the latest of them come when all is over.
    `is_told_at_ends` as in `Target`: then the time counts in which the streams end, too.
    """
    outcomes = played.outcomes
    taken = [o for o in outcomes if o.end is not End.REFUSED]
    window = _together(taken, is_told_at_ends) if only_together else (-np.inf, np.inf)
    lags_of = [_lags_due(o, window) for o in taken]
    lags = [lag for some in lags_of for lag in some]
    audio_s = sum(o.audio_s for o in taken)
    told = [o for o in taken if o.compute_s is not None]
    told_audio_s, compute_s = sum(o.audio_s for o in told), sum(o.compute_s or 0.0 for o in told)
    return {
        "streams": len(outcomes),
        "lag_ms": percentiles_ms(lags),
        # Streams that come and go may be too short for a word.
        "without_lag": sum(not some for some in lags_of) if only_together else None,
        "refused": sum(o.end is End.REFUSED for o in outcomes),
        "dropped": sum(o.end is End.DROPPED for o in outcomes),
        "reasons": sorted({o.why for o in outcomes if o.why}),
        "words": sum(o.n_words for o in taken),
        "audio_seconds": round(audio_s, 2),
        "rtf_per_stream": round(compute_s / told_audio_s, 4) if told_audio_s else None,
        "cpu_cores": round(played.cpu_s / played.wall_s, 3),
        "cpu_seconds_per_audio_second": round(played.cpu_s / audio_s, 4) if audio_s else None,
        "rss_mb": round(played.rss_mb, 1),
        "latest_packet_ms": round(1000 * max((o.late_s for o in taken), default=0.0), 1),
    }


def crowd(played: Played) -> dict[str, Any]:
    """How many streams were there at once: by plan, and of those that were taken."""
    offered_s = sum(b.seconds for b in played.bookings)
    span_s = max(b.start_s + b.seconds for b in played.bookings)
    stays = [(o.began_at, o.ended_at) for o in played.outcomes if o.end is not End.REFUSED]
    return {
        "offered_at_once_mean": round(offered_s / span_s, 2),
        "taken_at_once_mean": round(sum(b - a for a, b in stays) / played.wall_s, 2),
        "taken_at_once_most": most_at_once(stays),
    }


def most_at_once(stays: Sequence[tuple[float, float]]) -> int:
    """The most intervals [from, to) that hold one moment."""
    steps = sorted([(a, 1) for a, _ in stays] + [(b, -1) for _, b in stays])
    n = most = 0
    for _, step in steps:
        n += step
        most = max(most, n)
    return most


def _together(outcomes: Sequence[Outcome], is_told_at_ends: bool) -> tuple[float, float]:
    """Clock seconds from the last beginning to the first end of speech, or to the last."""
    begins = [o.began_at for o in outcomes]
    ends = [o.began_at + o.audio_s for o in outcomes]
    until = max(ends, default=0.0) if is_told_at_ends else min(ends, default=0.0)
    return max(begins, default=0.0), until


def _lags_due(outcome: Outcome, window: tuple[float, float]) -> list[float]:
    begin, end = window[0] - SLACK_S, window[1] + SLACK_S
    return [lag for at, lag in outcome.lags if begin <= at - lag <= end]


def has_kept_up(load_figures: dict[str, Any], limit_ms: float) -> bool:
    """Nobody turned away or dropped, of everybody a lag, and p95 of the lags within the limit."""
    if load_figures["refused"] or load_figures["dropped"] or load_figures["without_lag"]:
        return False
    p95 = load_figures["lag_ms"]["p95"]
    return p95 is not None and bool(p95 <= limit_ms)


def require_lags(loads: Sequence[dict[str, Any]]) -> None:
    """Raises ConfigError when every stream was taken and none of them was told anything."""
    if not any(one["lag_ms"]["n"] or one["refused"] or one["dropped"] for one in loads):
        raise ConfigError(
            "nothing was captioned, so nobody knows the lag", hint="speech, or a longer --seconds"
        )


def search(keeps_up: Callable[[int], bool], most: int) -> int:
    """The largest number of streams up to `most` that keeps up, 0 if not even one.

    Doubles until it fails and halves the gap then, so that every number is tried at most once.
    """
    good, bad, n = 0, most + 1, 1
    while good < n < bad:
        if keeps_up(n):
            good = n
        else:
            bad = n
        n = min(2 * good, most) if bad > most else (good + bad) // 2
    return good


def memory_per_stream_mb(levels: Sequence[dict[str, Any]]) -> float | None:
    """Growth of the resident memory per further stream that was taken: a line of least squares
    through the levels that kept up, in the order in which they were played; None with only one.

    What a larger level has taken may stay resident: levels after one do not count.
    """
    points: list[tuple[int, float]] = []
    most = 0
    for one in levels:
        if one["kept_up"] and one["streams"] > most:
            points.append((one["streams"] - one["refused"], one["rss_mb"]))
        most = max(most, one["streams"])
    if len(points) < 2:
        return None
    n, mb = np.array(points, float).T
    return round(float(np.polyfit(n, mb, 1)[0]), 2)
