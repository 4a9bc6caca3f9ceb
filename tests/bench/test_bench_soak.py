"""Soak: what grew is found, what only shook is not; streams that come and go leave nothing."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest

from bench import soak
from bench.soak import Leave, Plan, Tally
from sparqle_stream import messages
from sparqle_stream.metrics import EngineMetrics


def samples(n: int = 20, **series) -> list[dict]:
    """n samples, a minute of audio apart, flat but for what is given."""
    flat = {
        "rss_mb": 800.0,
        "state_bytes": 1000,
        "chunk_ms": 30.0,
        "open_files": 20,
        "threads": 5,
        "streams_open": 0,
    }
    return [
        flat
        | {"audio_seconds": 60.0 * (i + 1), "cycles": i}
        | {name: values[i] for name, values in series.items()}
        for i in range(n)
    ]


def test_growth_is_the_median_slope_times_the_span():
    """2 per hour over 3 hours; one wild value in five moves no median."""
    hours = [1.0, 2.0, 3.0, 4.0]
    assert soak.growth(hours, [5.0, 7.0, 9.0, 11.0]) == pytest.approx(6.0)
    assert soak.growth([0, 1, 2, 3, 4], [1.0, 1.0, 50.0, 1.0, 1.0]) == 0.0
    assert soak.growth([1.0], [7.0]) == 0.0


def test_nothing_that_is_flat_is_blamed():
    rng = np.random.default_rng(0)
    shaking = {
        "rss_mb": (800 + rng.normal(0, 3, 20)).tolist(),
        "chunk_ms": (30 + rng.normal(0, 2, 20)).tolist(),
    }
    assert all(one["is_flat"] for one in soak.flatness(samples(**shaking)).values())


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("rss_mb", [800.0 + 2 * i for i in range(20)]),  # 30 MB in the last 16 samples
        ("chunk_ms", [30.0 + i for i in range(20)]),
        ("state_bytes", [1000] * 19 + [1001]),
        ("open_files", [20 + i // 4 for i in range(20)]),
        ("threads", [5 + i for i in range(20)]),
        ("streams_open", [0] * 12 + [1] * 8),
    ],
)
def test_what_grows_is_found_alone(name, values):
    found = soak.flatness(samples(**{name: values}))
    assert {key for key, one in found.items() if not one["is_flat"]} == {name}


def test_flatness_by_hand():
    """Of 10 samples the first 2 are warm-up. From 810 to 817 MB in the others: 7 MB, 2 % of the
    median 813.5 and 5 MB were allowed.
    """
    found = soak.flatness(samples(10, rss_mb=[400.0, 600.0, *(810.0 + i for i in range(8))]))
    assert found["rss_mb"] == {
        "first": 810.0,
        "last": 817.0,
        "most": 817.0,
        "growth": 7.0,
        "allowed": 21.27,
        "is_flat": True,
    }


def test_too_few_samples_say_nothing():
    assert soak.flatness(samples(4))["rss_mb"] == {"growth": None, "is_flat": None}


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

    watcher = soak.Watcher(SimpleNamespace(metrics=counters.copy), [tiny.make_stages(1)], play)
    for round_s in (9.0, 90.0):
        spend(100, round_s)
        assert watcher.sample(2, 60.0)["chunk_ms"] == pytest.approx(40.0)
    assert played == [soak.PROBE] * 2


# --- runs --------------------------------------------------------------------------------------


@pytest.fixture
def command(idle, clip_path, monkeypatch, tiny, capsys):
    monkeypatch.setattr("sparqle_stream.models.load", lambda *_, **__: tiny)

    def command(*arguments: str, status: int = 0) -> dict:
        fixed = ["--hours", "0.006", "--longest-s", "3", "--batch", "2", "--threads", "1"]
        assert soak.main([*fixed, *arguments]) == status
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    return command


@pytest.mark.parametrize("where", [[], ["--server"]], ids=["engine", "server"])
def test_streams_come_and_go(command, where, monkeypatch):
    """Whether a step takes as long on a busy test machine is not tested; what is exact is."""
    monkeypatch.setitem(soak.ALLOWED, "chunk_ms", (1e9, 0.0))
    monkeypatch.setitem(soak.ALLOWED, "rss_mb", (1e9, 0.0))
    result = command(*where)
    assert result["audio_seconds"] >= 0.006 * 3600
    assert result["cycles"] == 2 * len(result["samples"])
    assert result["words"] > 0
    assert (result["failed"], result["reasons"]) == (0, [])
    assert {s["streams_open"] for s in result["samples"]} == {0}
    assert len({s["state_bytes"] for s in result["samples"]}) == 1
    assert result["samples"][0]["state_bytes"] > 10_000
    assert result["is_flat"]


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
    taken, tally = soak._rounds(args, lambda one, tally: tally.fail("busy"), Watcher(), 16_000)
    assert (len(taken), tally.failed) == (1, 2)
