"""Soak: what grew is found, what only shook is not; streams that come and go leave nothing."""

from __future__ import annotations

import json
import os
import signal
import time
from types import SimpleNamespace

import numpy as np
import pytest

from bench import flat, soak
from bench.flat import Limit
from bench.soak import Leave, Plan, Tally
from sparqle_stream import messages
from sparqle_stream.config import EngineConfig
from sparqle_stream.engine import Engine
from sparqle_stream.errors import BusyError
from sparqle_stream.metrics import EngineMetrics


def samples(n: int = 20, **series) -> list[dict]:
    """n samples, five minutes of audio apart, flat but for what is given."""
    fixed = {
        "rss_mb": 800.0,
        "state_bytes": 1000,
        "slots_bytes": 2_000_000,
        "held_bytes": 30_000,
        "chunk_ms": 30.0,
        "open_files": 20,
        "threads": 5,
        "streams_open": 0,
    }
    return [
        fixed
        | {"audio_seconds": 300.0 * (i + 1), "cycles": i}
        | {name: values[i] for name, values in series.items()}
        for i in range(n)
    ]


def test_growth_is_the_median_slope_times_the_span():
    """2 per hour over 3 hours; one wild value in five moves no median."""
    hours = [1.0, 2.0, 3.0, 4.0]
    assert flat.growth(hours, [5.0, 7.0, 9.0, 11.0]) == pytest.approx(6.0)
    assert flat.growth([0, 1, 2, 3, 4], [1.0, 1.0, 50.0, 1.0, 1.0]) == 0.0
    assert flat.growth([1.0], [7.0]) == 0.0


def test_nothing_that_is_flat_is_blamed():
    rng = np.random.default_rng(0)
    shaking = {
        "rss_mb": (800 + rng.normal(0, 3, 20)).tolist(),
        "chunk_ms": (30 + rng.normal(0, 2, 20)).tolist(),
    }
    assert all(one["is_flat"] for one in flat.flatness(samples(**shaking)).values())


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("rss_mb", [800.0 + i for i in range(20)]),  # 15 MB in 1.25 h, where 10 are allowed
        ("slots_bytes", [2_000_000 + 20_000 * i for i in range(20)]),
        ("held_bytes", [30_000 + 300 * i for i in range(20)]),
        ("chunk_ms", [30.0 + i for i in range(20)]),
        ("state_bytes", [1000] * 19 + [1001]),
        ("open_files", [20 + i // 4 for i in range(20)]),
        ("threads", [5 + i for i in range(20)]),
        ("streams_open", [0] * 12 + [1] * 8),
    ],
)
def test_what_grows_is_found_alone(name, values):
    found = flat.flatness(samples(**{name: values}))
    assert {key for key, one in found.items() if not one["is_flat"]} == {name}


def test_flatness_by_hand():
    """Of 10 samples the first 2 are warm-up. From 810 to 817 MB in the others: 7 MB, where noise
    alone may be 10; in 35 minutes 1 % an hour of the median 813.5 would be 4.7.
    """
    found = flat.flatness(samples(10, rss_mb=[400.0, 600.0, *(810.0 + i for i in range(8))]))
    assert found["rss_mb"] == {
        "first": 810.0,
        "last": 817.0,
        "most": 817.0,
        "growth": 7.0,
        "allowed": 10.0,
        "is_flat": True,
    }


@pytest.mark.parametrize(("mb_an_hour", "is_flat"), [(7.0, True), (9.0, False)])
def test_memory_may_grow_by_so_much_an_hour(mb_an_hour, is_flat):
    """1 % an hour of the median of some 840 MB is 8.4 MB, however many hours it were: here 9.6."""
    grows = [800.0 + mb_an_hour * i / 12 for i in range(144)]
    assert flat.flatness(samples(144, rss_mb=grows))["rss_mb"]["is_flat"] is is_flat


def test_too_few_samples_say_nothing():
    assert flat.flatness(samples(4))["rss_mb"] == {"growth": None, "is_flat": None}


def test_too_little_audio_says_nothing():
    """20 samples, of which 16 count: 15 gaps of 100 s are under half an hour."""
    short = [s | {"audio_seconds": s["audio_seconds"] / 3} for s in samples()]
    found = flat.flatness(short)
    assert {one["is_flat"] for one in found.values()} == {None}
    is_flat, why = flat.verdict(found, failed=0)
    assert is_flat is None
    assert "0.5 h of audio" in why


def test_what_is_not_watched_in_a_run_has_no_verdict():
    """Over a socket nobody sees what a stream holds."""
    served = [{k: v for k, v in s.items() if k != "held_bytes"} for s in samples()]
    assert set(flat.flatness(samples())) - set(flat.flatness(served)) == {"held_bytes"}
    assert flat.verdict(flat.flatness(served), failed=0) == (True, "")


@pytest.mark.parametrize(
    ("verdicts", "failed", "wanted"),
    [
        ({"a": True, "b": True}, 0, True),
        ({"a": True, "b": True}, 1, False),
        ({"a": None, "b": True}, 0, None),
        ({"a": None, "b": False}, 0, False),
        ({"a": None}, 1, False),
        ({}, 0, None),
        ({}, 2, False),
    ],
)
def test_the_verdict_is_that_of_all(verdicts, failed, wanted):
    found = {name: {"is_flat": is_flat} for name, is_flat in verdicts.items()}
    is_flat, why = flat.verdict(found, failed)
    assert is_flat is wanted
    assert (why == "") is (wanted is True)


def test_streams_are_planned_as_they_are_said_to_be():
    """Lengths evenly over their logarithm: half of 1 .. 100 s are under 10 s."""
    rng = np.random.default_rng(0)
    plans = [soak.plan(rng, 100.0, 1_000_000) for _ in range(4000)]
    seconds = np.array([p.n_samples for p in plans]) / 16_000
    assert 1.0 <= seconds.min() < seconds.max() <= 100.0
    assert (seconds < 10).mean() == pytest.approx(0.5, abs=0.03)
    shares = {leave: sum(p.leave is leave for p in plans) / 4000 for leave in Leave}
    assert shares == pytest.approx(soak.LEAVES, abs=0.03)


def test_state_bytes_count_every_row(tiny):
    one, three = (tiny.make_stages(n).state_bytes() for n in (1, 3))
    assert three == 3 * one > 10_000


def test_a_tally_counts_words_and_failures():
    tally = Tally()
    word = messages.Word("hi", 0.0, 0.1, 0.2)
    tally.note(messages.Final("hi hi", (word, word), 0, 0.2))
    tally.note(messages.Error("backlog", "too slow", "", 0.2))
    assert (tally.words, tally.failed, tally.reasons) == (2, 1, {"too slow"})


def test_chunks_are_timed_on_one_stream_that_is_always_the_same(tiny):
    """What the rounds before it cost is not in the figure: it depends on how many ran at once."""
    counters, played = EngineMetrics(n_slots=2), []

    def spend(chunks: int, seconds: float) -> None:
        counters.chunks += chunks
        counters.step_seconds.add(seconds)

    def play(one, tally):
        played.append(one)
        spend(31, 31 * 0.040)

    engine = SimpleNamespace(metrics=counters.copy, model=tiny)
    watcher = soak.Watcher(engine, [tiny.make_stages(1)], play)
    for round_s in (9.0, 90.0):
        spend(100, round_s)
        assert watcher.sample(2, 60.0)["chunk_ms"] == pytest.approx(40.0)
    assert played == [soak.PROBE] * 2


# --- runs --------------------------------------------------------------------------------------


@pytest.fixture
def command(idle, clip_path, monkeypatch, tiny, capsys):
    monkeypatch.setattr("sparqle_stream.models.load", lambda *_, **__: tiny)
    monkeypatch.setattr(flat, "LEAST_HOURS", 0.0)
    for name in ("PROBE", "WITNESS"):  # much shorter
        one = getattr(soak, name)
        monkeypatch.setattr(soak, name, soak.Plan(one.start, 2 * 16_000, one.leave))

    def command(*arguments: str, status: int = 0) -> dict:
        fixed = ["--hours", "0.006", "--longest-s", "3", "--batch", "2", "--threads", "1"]
        assert soak.main([*fixed, *arguments]) == status
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    return command


@pytest.mark.parametrize("where", [[], ["--server"]], ids=["engine", "server"])
def test_streams_come_and_go(command, where, monkeypatch):
    """Whether a step takes as long on a busy test machine is not tested; what is exact is."""
    monkeypatch.setitem(flat.ALLOWED, "chunk_ms", Limit(share=1e9))
    monkeypatch.setitem(flat.ALLOWED, "rss_mb", Limit(share=1e9))
    monkeypatch.setattr(
        soak, "LEAVES", {Leave.IN_ORDER: 0.4, Leave.FLUSHED: 0.4, Leave.GIVEN_UP: 0.2}
    )
    result = command(*where)
    assert result["audio_seconds"] >= 0.006 * 3600
    assert result["cycles"] == 2 * len(result["samples"])
    assert result["words"] > 0
    assert (result["failed"], result["reasons"]) == (0, [])
    assert {s["streams_open"] for s in result["samples"]} == {0}
    assert len({s["state_bytes"] for s in result["samples"]}) == 1
    assert result["samples"][0]["state_bytes"] > 10_000
    assert result["flushed"] > 0
    assert ("held_bytes" in result["samples"][0]) is not where
    if not where:
        assert min(s["held_bytes"] for s in result["samples"]) > 10_000
    assert (result["is_flat"], result["why"], result["interrupted"]) == (True, "", False)


def test_a_leak_is_told_by_the_exit_status(command, monkeypatch, tmp_path):
    """Every stream leaves a file open."""
    leaked, play_well = [], soak.in_process

    def leaky(*arguments):
        play = play_well(*arguments)

        def play_and_leak(one, tally):
            leaked.append((tmp_path / str(len(leaked))).open("w"))
            play(one, tally)

        return play_and_leak

    monkeypatch.setattr(soak, "in_process", leaky)
    result = command(status=soak.EXIT_GREW)
    for file in leaked:
        file.close()
    assert not result["flat"]["open_files"]["is_flat"]
    n_kept = len(result["samples"]) - len(result["samples"]) // 5
    per_round = 3  # two streams and the one that chunks are timed on
    assert result["flat"]["open_files"]["growth"] == pytest.approx(
        per_round * (n_kept - 1), rel=0.4
    )


def test_the_same_seed_gives_the_same_streams():
    first, second = (
        [soak.plan(np.random.default_rng(7), 60.0, 1000) for _ in range(3)] for _ in range(2)
    )
    assert first == second
    assert isinstance(first[0], Plan)


@pytest.mark.parametrize(
    ("arguments", "what"),
    [(["--hours", "0"], "no audio"), (["--batch", "0"], "--batch 0"), (["--plot", "x"], "no PNG")],
)
def test_errors_say_what_to_do(idle, capsys, arguments, what):
    assert soak.main(arguments) == 2
    assert what in capsys.readouterr().err


def test_a_busy_machine_is_refused(monkeypatch, capsys):
    monkeypatch.setattr("bench.machine.busy_share", lambda: 0.6)
    assert soak.main(["--model", "no-such-model"]) == 2
    assert "--force" in capsys.readouterr().err


def test_only_audio_that_was_sent_counts():
    """Who gives up after a second has not had an hour captioned."""
    packets = [np.zeros(10, np.float32)] * 5
    given_up, other = Tally(), Tally()
    for n, _ in enumerate(given_up.sent(packets), 1):
        if n == 2:
            break
    list(other.sent(packets))
    other.fail("why")
    both = given_up + other
    assert (given_up.n_samples, both.n_samples, both.failed, both.reasons) == (20, 70, 1, {"why"})


def test_a_run_in_which_nobody_is_taken_ends():
    class Watcher:
        def sample(self, cycles, audio_s):
            return {"cycles": cycles, "audio_seconds": audio_s}

    args = SimpleNamespace(hours=1.0, batch=2, longest_s=60.0, seed=0)
    rounds = soak._rounds(args, lambda one, tally: tally.fail("busy"), Watcher(), 16_000)
    assert (len(rounds.samples), rounds.tally.failed) == (1, 2)


def test_a_run_in_which_nobody_is_taken_is_not_flat(command, monkeypatch, capsys):
    def refuse(*arguments):
        def play(one, tally):
            raise BusyError("all slots are taken")

        return play

    monkeypatch.setattr(soak, "in_process", refuse)
    result = command(status=soak.EXIT_GREW)
    assert (result["is_flat"], result["cycles"]) == (False, 2)
    assert (result["failed"], result["reasons"]) == (3, ["all slots are taken"])  # and the probe


def test_a_stream_that_fails_takes_no_other_with_it(command, monkeypatch):
    """What was measured stays, and the run is not flat."""
    play_well, n_played = soak.in_process, []

    def failing(*arguments):
        play = play_well(*arguments)

        def play_or_fail(one, tally):
            n_played.append(1)
            if len(n_played) == 2:
                raise KeyError("what")
            play(one, tally)

        return play_or_fail

    monkeypatch.setattr(soak, "in_process", failing)
    result = command(status=soak.EXIT_GREW)
    assert result["audio_seconds"] >= 0.006 * 3600
    assert (result["failed"], result["reasons"]) == (1, ["'what'"])
    assert (result["is_flat"], result["why"]) == (False, "1 streams failed")


def test_a_stream_that_stops_in_the_middle_gives_its_slot_back(tiny):
    class Broken:
        def packets(self, *_):
            yield np.zeros(1600, np.float32)
            raise KeyError("what")

    tally = Tally()
    with Engine(tiny, EngineConfig(n_slots=1, threads=1)) as engine:
        play = soak.alone(soak.in_process(engine, soak.settings.Settings(), Broken()))
        play(soak.PROBE, tally)
        assert engine.metrics().n_streams == 0
    assert (tally.failed, tally.n_samples) == (1, 1600)


@pytest.mark.parametrize("where", [[], ["--server"]], ids=["engine", "server"])
def test_ctrl_c_prints_what_was_measured(command, monkeypatch, where):
    """At once: streams of ten minutes are running then."""
    name = "over_a_socket" if where else "in_process"
    play_well, began = getattr(soak, name), []

    def interrupting(*arguments):
        play = play_well(*arguments)

        def play_and_interrupt(one, tally):
            began.append(time.perf_counter())
            if len(began) == 5:  # two of a round, the probe, two of the next
                os.kill(os.getpid(), signal.SIGINT)
            if len(began) > 3:
                one = Plan(0, 600 * 16_000, Leave.IN_ORDER)
            play(one, tally)

        return play_and_interrupt

    monkeypatch.setattr(soak, name, interrupting)
    result = command("--hours", "1", *where, status=130)
    assert time.perf_counter() - began[-1] < 10
    assert (len(result["samples"]), result["cycles"], result["interrupted"]) == (1, 2, True)
    assert (result["is_flat"], result["failed"]) == (None, 0)
    assert "too short to tell" in result["why"]
