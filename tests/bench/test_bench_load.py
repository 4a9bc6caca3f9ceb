"""Load: the arithmetic of levels, arrivals and lag, by hand."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from bench import load, machine
from bench.load import Booking, Played
from bench.reel import Reel
from bench.targets import End, Outcome
from sparqle_stream import messages
from sparqle_stream.errors import ConfigError


def outcome(began: float, lags: list[tuple[float, float]], **fields) -> Outcome:
    fields = {"audio_s": 10.0, "ended_at": began + 10.5, "end": End.DONE} | fields
    return Outcome(began_at=began, lags=lags, **fields)


def played(*outcomes: Outcome, **fields) -> Played:
    bookings = [Booking(o.began_at - 100, o.audio_s) for o in outcomes]
    fixed = {"began_at": 100.0, "wall_s": 20.0, "cpu_s": 5.0, "rss_mb": 300.0}
    return Played(bookings, list(outcomes), **(fixed | fields))


def test_lag_is_what_an_event_comes_after_the_audio_it_needed():
    """Speech began when the clock said 100. What needed 1.5 s of it and came at 101.75 lags 0.25 s.

    Where speech begins and ends is not stream time that had to be heard: no lag.
    """
    one = Outcome(began_at=100.0)
    word = messages.Word("hi", 0.5, 0.9, 1.5)
    one.note(messages.SpeechStarted(0.2), 101.0)
    one.note(messages.Tail("h", 1.2), 101.3)
    one.note(messages.Final("hi", (word,), 0, 1.5), 101.75)
    one.note(messages.SpeechStopped(1.0), 101.8)
    assert [round(lag, 6) for _, lag in one.lags] == [0.1, 0.25]
    assert one.n_words == 1
    assert one.end is End.DROPPED  # until it says that it is done
    one.note(messages.Done(2.0, 0.5, 2.0), 102.1)
    assert (one.end, one.compute_s) == (End.DONE, 0.5)


@pytest.mark.parametrize(("code", "end"), [("busy", End.REFUSED), ("backlog", End.DROPPED)])
def test_an_error_says_whether_the_stream_was_refused_or_dropped(code, end):
    one = Outcome()
    one.note(messages.Error(code, "why", "hint", 0.0), 1.0)
    assert (one.end, one.why) == (end, "why")


def test_figures_of_a_level_by_hand():
    """Two streams, 100 .. 110 and 102 .. 112: they run together from 102 to 110.

    Lags that fell due outside that time do not count: due were they at 100.1, 102.9, 108.8, 103.7,
    110.2, and 0.1, 0.2, 0.3 are left.
    """
    got = load.figures(
        played(
            outcome(100.0, [(101.0, 0.9), (103.0, 0.1), (109.0, 0.2)], compute_s=1.0, n_words=3),
            outcome(102.0, [(104.0, 0.3), (111.0, 0.8)], compute_s=3.0, n_words=2, late_s=0.004),
        ),
        only_together=True,
    )
    assert (got["lag_ms"]["n"], got["lag_ms"]["p50"], got["lag_ms"]["max"]) == (3, 200.0, 300.0)
    assert got["lag_ms"]["p95"] == 290.0
    assert got["rtf_per_stream"] == 0.2
    assert got["cpu_cores"] == 0.25
    assert got["cpu_seconds_per_audio_second"] == 0.25
    assert (got["streams"], got["words"], got["audio_seconds"]) == (2, 5, 20.0)
    assert (got["refused"], got["dropped"], got["reasons"]) == (0, 0, [])
    assert (got["rss_mb"], got["latest_packet_ms"]) == (300.0, 4.0)
    assert got["without_lag"] == 0


@pytest.mark.parametrize(
    ("late", "p95", "has_kept_up"), [((0.05, 25.0), 23752.5, False), ((25.0, 25.0), 25000.0, False)]
)
def test_the_latest_events_count_although_they_come_when_all_is_over(late, p95, has_kept_up):
    """What was due at 105 comes at 130: by then both streams, 100 .. 110, have ended."""
    level = played(*(outcome(100.0, [(105.0 + lag, lag)]) for lag in late))
    got = load.figures(level, only_together=True)
    assert (got["lag_ms"]["n"], got["lag_ms"]["p95"]) == (2, p95)
    assert load.has_kept_up(got, 320.0) is has_kept_up


def test_a_stream_of_which_nothing_is_heard_does_not_keep_up():
    """Due before the other began, 100 .. 110 and 103 .. 113: nobody knows how it fared with it."""
    silent = outcome(100.0, [(102.1, 0.1)])
    other = outcome(103.0, [(104.1, 0.1)])
    got = load.figures(played(silent, other), only_together=True)
    assert (got["without_lag"], got["lag_ms"]["n"]) == (1, 1)
    assert not load.has_kept_up(got, 320.0)
    assert load.has_kept_up(load.figures(played(silent, other), only_together=False), 320.0)


def test_a_lag_that_is_told_at_the_end_alone_counts():
    """Two streams, 100 .. 110 and 102 .. 112, each with its one lag at its end."""
    level = played(outcome(100.0, [(110.2, 0.2)]), outcome(102.0, [(112.3, 0.3)]))
    as_it_goes = load.figures(level, only_together=True)
    assert (as_it_goes["lag_ms"]["n"], as_it_goes["without_lag"]) == (1, 1)
    at_ends = load.figures(level, only_together=True, is_told_at_ends=True)
    assert (at_ends["lag_ms"]["n"], at_ends["without_lag"]) == (2, 0)
    assert at_ends["lag_ms"]["max"] == 300.0


def test_who_was_turned_away_is_counted_and_adds_nothing_else():
    refused = outcome(0.0, [], audio_s=0.0, end=End.REFUSED, why="all slots are taken")
    dropped = outcome(100.0, [(101.0, 0.1)], end=End.DROPPED, why="backlog")
    got = load.figures(played(dropped, refused), only_together=False)
    assert (got["streams"], got["refused"], got["dropped"]) == (2, 1, 1)
    assert got["reasons"] == ["all slots are taken", "backlog"]
    assert (got["lag_ms"]["n"], got["audio_seconds"]) == (1, 10.0)
    assert got["rtf_per_stream"] is None  # nobody said what it cost


@pytest.mark.parametrize(
    ("p95", "refused", "dropped", "without", "wanted"),
    [
        (320.0, 0, 0, 0, True),
        (320.1, 0, 0, 0, False),
        (1.0, 1, 0, 0, False),
        (1.0, 0, 1, 0, False),
        (1.0, 0, 0, 1, False),
        (1.0, 0, 0, None, True),
        (None, 0, 0, None, False),
    ],
)
def test_keeping_up(p95, refused, dropped, without, wanted):
    figures = {"lag_ms": {"p95": p95}, "refused": refused, "dropped": dropped}
    assert load.has_kept_up(figures | {"without_lag": without}, 320.0) is wanted


def test_only_a_run_without_any_lag_is_not_judged():
    """A level without one has not kept up, and what was measured before it stays."""
    silent = {"lag_ms": {"n": 0}, "refused": 0, "dropped": 0}
    with pytest.raises(ConfigError, match="nothing was captioned"):
        load.require_lags([silent, silent])
    for other in ({"lag_ms": {"n": 1}}, {"refused": 1}, {"dropped": 2}):
        load.require_lags([silent, silent | other])


@pytest.mark.parametrize("most", [1, 2, 7, 8, 20])
def test_the_search_finds_the_last_number_that_keeps_up(most):
    for limit in range(most + 3):
        tried: list[int] = []

        def keeps_up(n, limit=limit, tried=tried):
            tried.append(n)
            return n <= limit

        assert load.search(keeps_up, most) == min(limit, most)
        assert len(tried) == len(set(tried)) <= 9
        assert all(1 <= n <= most for n in tried)


def test_the_search_doubles_first():
    tried = []
    load.search(lambda n: tried.append(n) or n <= 5, 32)
    assert tried == [1, 2, 4, 8, 6, 5]


def test_streams_of_a_level_start_evenly():
    assert load.level(4, 30.0, 2.0) == [Booking(s, 30.0) for s in (0.0, 0.5, 1.0, 1.5)]


def test_arrivals_come_at_the_wanted_rate():
    """Seeded; 3000 are expected in 1000 minutes, three standard deviations are 164."""
    bookings = load.arrivals(per_minute=3.0, mean_s=10.0, seconds=60_000.0, seed=1)
    assert abs(len(bookings) - 3000) < 164
    gaps = np.diff([0.0, *(b.start_s for b in bookings)])
    assert gaps.min() >= 0
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.1)  # as an exponential's
    lengths = [b.seconds for b in bookings]
    assert (min(lengths), max(lengths)) == (2.0, 50.0)
    assert np.mean(lengths) == pytest.approx(10.0, rel=0.1)
    assert bookings == load.arrivals(3.0, 10.0, 60_000.0, seed=1)


def test_nobody_coming_is_an_error():
    with pytest.raises(ConfigError, match="nobody came"):
        load.arrivals(0.001, 10.0, 1.0, seed=0)


def test_how_many_were_there_at_once():
    """Stays 100..105, 103..108 and 105..106: two at most, since the first has left when the third
    comes. 11 s of stay in 20 s are 0.55; offered were 5 + 6 + 7 s in the 12 s of the plan.
    """
    bookings = [Booking(0.0, 5.0), Booking(3.0, 6.0), Booking(5.0, 7.0)]
    stays = [(100.0, 105.0), (103.0, 108.0), (105.0, 106.0)]
    outcomes = [Outcome(began_at=a, ended_at=b, end=End.DONE) for a, b in stays]
    got = load.crowd(Played(bookings, outcomes, 100.0, 20.0, 1.0, 1.0))
    assert got == {
        "offered_at_once_mean": 1.5,
        "taken_at_once_mean": 0.55,
        "taken_at_once_most": 2,
    }


def memory_level(n: int, mb: float, **fields) -> dict:
    return {"streams": n, "rss_mb": mb, "refused": 0, "kept_up": True} | fields


def test_memory_per_stream_is_the_slope_through_all_levels():
    """By hand: n 1, 2, 4, 8 (mean 3.75) and MB 300, 310, 322, 338 (mean 317.5); products of the
    deviations sum up to 149.5, squares of those of n to 28.75.
    """
    levels = [memory_level(n, mb) for n, mb in ((1, 300.0), (2, 310.0), (4, 322.0), (8, 338.0))]
    assert load.memory_per_stream_mb(levels) == round(149.5 / 28.75, 2) == 5.2
    assert load.memory_per_stream_mb(levels[:1]) is None


def test_memory_of_levels_that_failed_or_came_after_does_not_count():
    """16 streams failed, and what they took was still there when 12 were tried."""
    levels = [memory_level(n, 300.0 + 5 * n) for n in (4, 8)]
    failed = memory_level(16, 900.0, kept_up=False, refused=6)
    assert load.memory_per_stream_mb([*levels, failed, memory_level(12, 880.0)]) == 5.0
    assert load.memory_per_stream_mb([levels[0], failed]) is None


def test_a_reel_goes_round_without_a_gap():
    """Every sample is its own number; packets that cross the end take from the beginning."""
    reel = Reel([np.arange(1, 701, dtype=np.float32)], pause_s=0.0, seed=0)
    got = np.concatenate(list(reel.packets(600, 1000, 320)))
    np.testing.assert_array_equal(got, (np.arange(600, 1600) % 700) + 1)
    assert [len(p) for p in reel.packets(600, 1000, 320)] == [320, 320, 320, 40]
    first = next(reel.packets(0, 320, 320))
    assert np.shares_memory(first, reel.tape)  # a stream costs no copy


def test_a_reel_has_pauses_after_each_clip():
    clips = [np.full(100, i, np.float32) for i in (1, 2, 3)]
    reel = Reel(clips, pause_s=0.1, seed=3)
    marks = np.flatnonzero(np.diff(reel.tape != 0)) + 1
    silences = [b - a for a, b in zip(marks[::2], [*marks[1::2], len(reel.tape)], strict=True)]
    assert sorted(reel.tape[reel.tape > 0][::100].tolist()) == [1.0, 2.0, 3.0]
    assert all(800 <= n <= 2400 for n in silences)
    np.testing.assert_array_equal(reel.tape, Reel(clips, pause_s=0.1, seed=3).tape)


def test_an_empty_reel_is_an_error():
    with pytest.raises(ConfigError, match="empty"):
        Reel([], pause_s=0.0, seed=0)


class FakeTarget:
    """Takes packets at once and remembers when each stream came."""

    lag_from = "nothing"
    is_told_at_ends = False

    def __init__(self) -> None:
        self.seen: list[tuple[float, int, float]] = []

    async def play(self, packets, seconds):
        n = sum(len(packet) for packet in packets)
        self.seen.append((asyncio.get_running_loop().time(), n, seconds))
        return Outcome(end=End.DONE)


def test_a_stream_that_fails_takes_no_other_with_it():
    class Failing(FakeTarget):
        async def play(self, packets, seconds):
            if seconds == 0.05:
                raise KeyError("type")
            return await super().play(packets, seconds)

    reel = Reel([np.ones(500, np.float32)], 0.0, 0)
    bookings = [Booking(0.0, 0.05), Booking(0.1, 0.1)]
    failed, done = load.play(Failing(), reel, bookings, 20, 0, machine.Process()).outcomes
    assert (failed.end, failed.why) == (End.DROPPED, "KeyError: 'type'")
    assert done.end is End.DONE


def test_streams_come_when_they_were_booked():
    target, reel = FakeTarget(), Reel([np.ones(500, np.float32)], 0.0, 0)
    bookings = [Booking(0.2, 0.05), Booking(0.0, 0.1)]
    got = load.play(target, reel, bookings, 20, 0, machine.Process())
    assert [(n, s) for _, n, s in target.seen] == [(1600, 0.1), (800, 0.05)]
    assert target.seen[1][0] - target.seen[0][0] >= 0.15
    assert got.wall_s >= 0.2
    assert got.rss_mb > 10
    assert [o.end for o in got.outcomes] == [End.DONE, End.DONE]
