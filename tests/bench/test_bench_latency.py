"""Latency: the players against hand-kept books, and against each other."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from bench_broken import BrokenBatch

from bench import latency, players, plots, report
from bench.manifests import Recording
from bench.players import StepMeter, Take, VirtualEngine
from sparqle_stream import testing
from sparqle_stream.config import EngineConfig, StreamOptions, VadConfig
from sparqle_stream.engine import Engine
from sparqle_stream.errors import AudioFormatError
from sparqle_stream.messages import Done, Final, Ready, SpeechStarted, SpeechStopped, Word
from sparqle_stream.metrics import EngineMetrics

NO_VAD = StreamOptions(vad=VadConfig(kind="off"))
CFG = EngineConfig(n_slots=1, threads=1)


class Clock:
    """Stands still; `slow` lets a batch's step take time."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def slow(self, monkeypatch, *seconds: float) -> None:
        """Steps take these times in turn, the last one for ever."""
        times = list(seconds)
        run = testing.OracleBatch.run

        def slow_run(batch, sessions):
            self.now += times.pop(0) if len(times) > 1 else times[0]
            return run(batch, sessions)

        monkeypatch.setattr(testing.OracleBatch, "run", slow_run)


def test_a_virtual_stream_queues_as_a_live_one_would(oracle, monkeypatch):
    """Chunks are heard at 0.32, 0.64, 0.96 .. s. The first step takes 0.7 s, the others 0.1 s.

    So the first is done at 1.02; the second waits for it and is done at 1.12, the third, heard at
    0.96, at 1.22. From the fourth on nobody waits: 1.28 + 0.1, 1.6 + 0.1.
    """
    clock = Clock()
    clock.slow(monkeypatch, 0.7, 0.1)
    pcm = np.tile(testing.say(["a"], gap_ms=80), 13)  # a word every 160 ms
    take = VirtualEngine(oracle, CFG).play(pcm[: 5 * 5120], NO_VAD, clock=clock)
    assert take.chunk_seconds[:5] == pytest.approx([0.7, 0.1, 0.1, 0.1, 0.1])
    arrived = {round(e.time, 3): at for at, e in take.arrivals if isinstance(e, Final)}
    wanted = {0.64: 1.12, 0.96: 1.22, 1.28: 1.38}  # no word is complete before the second chunk
    assert {t: arrived[t] for t in wanted} == pytest.approx(wanted)
    assert take.compute_seconds == pytest.approx(sum(take.chunk_seconds))
    assert take.duration == pytest.approx(1.6)


def test_a_fast_virtual_stream_is_never_late(oracle, monkeypatch):
    clock = Clock()
    clock.slow(monkeypatch, 0.03)
    pcm = testing.say(["now", "we", "are", "all", "here", "and", "so", "it", "goes"])
    take = VirtualEngine(oracle, CFG).play(pcm, NO_VAD, clock=clock)
    waits = [at - e.time for at, e in take.arrivals if isinstance(e, Final)]
    # The last chunks, of padding, are there all at once when the stream ends.
    assert waits[0] == pytest.approx(0.03)
    assert all(wait == pytest.approx(0.03 * round(wait / 0.03)) for wait in waits)
    assert latency.figures([take])["rtf"] == pytest.approx(
        0.03 * len(take.chunk_seconds) / (len(pcm) / 16_000), abs=1e-3
    )


def stream_side(events) -> list:
    """Events without what is a clock's or a random name."""
    out = []
    for event in events:
        event = replace(event, lag=0.0)
        if isinstance(event, Done):
            event = replace(event, compute_seconds=0.0)
        if not isinstance(event, Ready):
            out.append(event)
    return out


def test_both_players_say_what_the_engine_says(tiny, clip):
    """At the speed of speech, without waiting, and in one call: the same events."""
    pcm = clip[: 2 * 16_000]
    options = StreamOptions(chunk_ms=640)
    with Engine(tiny, replace(CFG, chunk_ms=640)) as engine:
        wanted = stream_side(engine.transcribe(pcm, options))
        before = engine.metrics().chunks
        live = players.play(engine, pcm, options)
        n_chunks = engine.metrics().chunks - before
    virtual = VirtualEngine(tiny, CFG).play(pcm, options)
    assert sum(isinstance(e, Final) for e in wanted) >= 2
    assert stream_side(live.events) == wanted
    assert stream_side(virtual.events) == wanted
    assert len(live.chunk_seconds) == len(virtual.chunk_seconds) == n_chunks
    assert live.duration == virtual.duration == 2.0
    # Nothing is said before it was spoken.
    assert all(at >= e.time for at, e in live.arrivals if isinstance(e, Final))
    assert sum(live.chunk_seconds) <= live.compute_seconds
    assert {"vad", "encoder", "llm", "captions"} <= live.stage_seconds.keys()
    assert live.stage_seconds.keys() == virtual.stage_seconds.keys()
    for take in (live, virtual):
        assert take.stage_chunks.keys() == take.stage_seconds.keys() - {"vad"}
        assert all(len(each) == n_chunks for each in take.stage_chunks.values())
        for stage, each in take.stage_chunks.items():
            assert sum(each) == pytest.approx(take.stage_seconds[stage], rel=1e-6)


def test_a_stream_that_fails_is_not_timed(tiny, clip, monkeypatch):
    def broken(batch, sessions):
        raise RuntimeError("a bug")

    monkeypatch.setattr("sparqle_stream.engine.Batch.run", broken)
    with Engine(tiny, CFG) as engine:
        with pytest.raises(players.TakeError, match="a bug"):
            players.play(engine, clip[:16_000], NO_VAD)
        assert engine.metrics().n_streams == 0  # the slot is free
    monkeypatch.setattr("bench.players.Batch.run", broken)
    with pytest.raises(players.TakeError, match="a bug"):
        VirtualEngine(tiny, CFG).play(clip[:16_000], NO_VAD)


def test_a_stream_that_never_ends_gives_its_slot_back(tiny, clip, monkeypatch):
    monkeypatch.setattr("bench.players.DONE_TIMEOUT_S", -1.0)
    monkeypatch.setattr("threading.Event.wait", lambda *_: False)
    with Engine(tiny, CFG) as engine, pytest.raises(players.TakeError, match="not done"):
        players.play(engine, clip[:1600], NO_VAD)
    assert engine.metrics().n_streams == 0


def test_the_meter_tells_steps_apart():
    """Two steps between two readings are known by their mean only."""
    now = EngineMetrics(n_slots=1)
    now.steps, now.stage_seconds = 7, {"llm": 1.0, "vad": 0.5}  # of streams before
    now.step_seconds.add(9.0)
    meter = StepMeter(lambda: now.copy())
    for seconds in ([0.25], [], [0.5, 0.25]):
        for spent in seconds:
            now.steps += 1
            now.step_seconds.add(spent)
            now.add_stages({"llm": 0.5 * spent, "encoder": 0.25 * spent, "vad": 0.125})
        meter.read()
    assert meter.chunk_seconds == pytest.approx([0.25, 0.375, 0.375])
    assert meter.stages() == pytest.approx({"llm": 0.5, "encoder": 0.25, "vad": 0.375})
    take = Take()
    meter.fill(take)
    assert take.stage_chunks.keys() == {"llm", "encoder"}  # the detector hears no chunks
    assert take.stage_chunks["llm"] == pytest.approx([0.125, 0.1875, 0.1875])
    assert take.stage_chunks["encoder"] == pytest.approx([0.0625, 0.09375, 0.09375])


def take_of(at: float, ended: float) -> Take:
    """One word, 0.2 .. 0.5 s, that had to be heard until 1.0 and arrived at `at`."""
    word = Final("hi", (Word("hi", 0.2, 0.5, 1.0),), 0, 1.0)
    return Take(
        arrivals=[
            (0.0, SpeechStarted(0.1)),
            (at, word),
            (ended, SpeechStopped(1.2)),
            (2.1, Done(2.0, 0.3, 2.0)),
        ],
        chunk_seconds=[0.02, 0.04, 0.06],
        stage_seconds={"llm": 0.1, "encoder": 0.02},
        stage_chunks={"llm": [0.01, 0.03, 0.06]},
        duration=2.0,
        compute_seconds=0.3,
        late_s=at / 1000,
    )


def test_figures_by_hand():
    """Emission 500 ms heard, 550 and 650 with the clock: their median is 600, p90 640."""
    got = latency.figures([take_of(1.05, 1.3), take_of(1.15, 1.3)])
    assert got["algorithmic"]["emission_ms"]["p50"] == 500.0
    assert got["algorithmic"]["first_word_ms"]["max"] == 800.0
    assert got["with_compute"]["emission_ms"] == {
        "n": 2,
        "p50": 600.0,
        "p90": 640.0,
        "p95": 645.0,
        "p99": 649.0,
        "max": 650.0,
    }
    assert got["with_compute"]["first_word_ms"]["p50"] == 900.0
    assert got["with_compute"]["end_of_speech_to_final_ms"]["p50"] == 600.0
    assert got["chunk_compute_ms"]["n"] == 6
    assert got["chunk_compute_ms"]["p50"] == 40.0
    assert (got["stage_ms"]["llm"]["n"], got["stage_ms"]["llm"]["p50"]) == (6, 30.0)
    assert got["stage_ms_per_audio_second"] == {"llm": 50.0, "encoder": 10.0}
    assert got["rtf"] == 0.15
    assert got["latest_packet_ms"] == 1.1


@pytest.fixture
def folder(make_folder):
    return make_folder(
        "sets/two", [{"said": "good day", "text": "x"}, {"said": "all", "text": "y"}]
    )


@pytest.fixture
def command(oracle, idle, folder, monkeypatch, capsys):
    monkeypatch.setattr("sparqle_stream.models.load", lambda *_, **__: oracle)
    monkeypatch.setattr("bench.latency.WARM_UP_S", 0.3)
    monkeypatch.setattr("bench.bounds.PROBE_BYTES", 1 << 20)

    def command(*arguments: str) -> dict:
        assert latency.main([str(folder), "--vad", "off", "--threads", "1", *arguments]) == 0
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    return command


@pytest.mark.parametrize("where", ["--virtual", "", "--server"])
def test_a_whole_run_gives_a_page(command, where):
    result = command(*where.split())
    assert result["algorithmic"]["emission_ms"]["n"] == 3  # the warm-up does not count
    seconds = (2 * 1 + 10) * 0.04 + 3 * 0.16
    assert result["audio_seconds"] == pytest.approx(seconds, abs=0.01)
    page = report.render([("x.json", json.loads(json.dumps(result)))])
    assert result["timing"]["pace"] in page
    assert "sets/two (files: 2)" in page
    assert result["bound"]["chunk_ms_at_least"] > 0
    assert result["chunk_compute_ms"]["n"] >= 4
    # Stream time is the same whatever the words went through.
    assert result["lagging"]["algorithmic"]["recordings"] == 2
    heard, clocked = result["lagging"]["algorithmic"], result["lagging"]["with_compute"]
    assert heard["dal_ms"] <= clocked["dal_ms"]


def test_stream_times_do_not_depend_on_the_way(command):
    virtual, socket = command("--virtual"), command("--server")
    assert socket["algorithmic"] == virtual["algorithmic"]
    assert socket["lagging"]["algorithmic"] == virtual["lagging"]["algorithmic"]
    assert socket["timing"]["through"] == "our server, dialect stream"


def test_a_server_that_runs_elsewhere(idle, folder, capsys):
    """No weights are loaded here, and nothing is known of its steps."""
    from sparqle_stream import server

    engine = testing.oracle_engine(CFG)
    with engine, server.background(engine, server.ServerConfig(port=0, drain_s=0.0)) as url:
        assert latency.main([str(folder), "--url", url, "--vad", "off"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["settings"]["model"] == "tiny"
    assert (result["machine"]["weights_hash"], result["bound"]) == ("", None)
    assert result["algorithmic"]["emission_ms"]["n"] == 3
    assert result["chunk_compute_ms"]["n"] == 0
    assert url not in json.dumps(result)


def test_a_server_that_is_not_there(idle, folder, capsys):
    assert latency.main([str(folder), "--url", "ws://127.0.0.1:1"]) == 2
    assert "hint: " in capsys.readouterr().err


def test_lagging_knows_the_references():
    """Words at 1 and 2 s of 4, by the clock 0.1 and 0.3 later, where one word was to be said.

    AL: (1 - 0 + 2 - 4) / 2; LAAL takes the two that were written: (1 - 0 + 2 - 2) / 2.
    """
    take = take_of(1.1, 2.5)
    late = Final(" you", (Word("you", 1.2, 1.5, 2.0),), 0, 2.0)
    take.arrivals.insert(2, (2.3, late))
    take.duration = 4.0
    got = latency.figures([take], [1])["lagging"]
    assert got["algorithmic"] == {
        "recordings": 1,
        "al_ms": -500.0,
        "laal_ms": 500.0,
        "dal_ms": 1000.0,
    }
    assert got["with_compute"]["al_ms"] == -300.0
    assert got["with_compute"]["laal_ms"] == 700.0
    # Without a text the words that were written are counted.
    assert latency.figures([take])["lagging"]["algorithmic"]["al_ms"] == 500.0


def test_a_busy_machine_is_refused_before_anything_is_loaded(monkeypatch, folder, capsys):
    monkeypatch.setattr("bench.machine.busy_share", lambda: 0.6)
    assert latency.main([str(folder), "--model", "no-such-model"]) == 2
    said = capsys.readouterr().err
    assert "60%" in said
    assert "--force" in said


def test_the_command_forced_on_a_busy_machine_says_so(monkeypatch, folder, capsys):
    monkeypatch.setattr("bench.machine.busy_share", lambda: 0.6)
    arguments = [str(folder / "audio" / "1.wav"), "--virtual", "--force", "--vad", "off"]
    assert latency.main([*arguments, "--model", "random:tiny"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["timing"]["machine_was_busy"]
    assert result["sets"] == [{"name": "files", "recordings": 1, "manifest_sha256": ""}]


@pytest.fixture
def played(command, monkeypatch, capsys):
    """The command on other folders with an engine that fails: status, result and stderr."""
    broken = partial(Engine, make_slots=BrokenBatch)
    monkeypatch.setattr("sparqle_stream.engine.Engine", broken)
    monkeypatch.setattr("bench.players.Batch", BrokenBatch)

    def played(folder, *arguments: str) -> tuple[int, dict, str]:
        status = latency.main([str(folder), "--vad", "off", "--threads", "1", *arguments])
        out, err = capsys.readouterr()
        return status, json.loads(out.splitlines()[-1]) if out else {}, err

    return played


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("where", ["--virtual", "", "--server"])
def test_a_recording_that_fails_costs_no_other(played, make_folder, where):
    """The first one, so that the warm-up fails, too."""
    entries = [{"said": s, "text": s} for s in ("aqua", "good day", "all")]
    status, result, err = played(make_folder("sets/q", entries), *where.split())
    assert status == 0
    assert (result["played"], result["failed"]) == (2, 1)
    assert "r0 failed: the stream failed" in err
    assert result["algorithmic"]["emission_ms"]["n"] == 3
    assert "sets/q (files: 3), 1 failed" in report.render([("x.json", result)])


def test_a_file_that_cannot_be_read_costs_no_other(played, make_folder, monkeypatch):
    """What its container says is right, what is in it is not."""
    folder = make_folder("sets/x", [{"said": s, "text": s} for s in ("good day", "all")])
    pcm = Recording.pcm

    def broken(recording: Recording) -> np.ndarray:
        if recording.id == "r1":
            raise AudioFormatError("no audio after all")
        return pcm(recording)

    monkeypatch.setattr(Recording, "pcm", broken)
    status, result, err = played(folder, "--virtual")
    assert (status, result["played"], result["failed"]) == (0, 1, 1)
    assert "r1 failed: no audio after all" in err


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_no_take_at_all_is_an_error(played, make_folder):
    folder = make_folder("sets/q", [{"said": "aqua", "text": "aqua"}])
    status, result, err = played(folder, "--virtual")
    assert (status, result) == (2, {})
    assert "error: no recording could be played" in err


def test_ctrl_c_leaves_what_was_played(played, folder, monkeypatch):
    play, n = VirtualEngine.play, []

    def interrupted(*given):
        n.append(1)
        if len(n) == 3:  # the second after the warm-up
            raise KeyboardInterrupt
        return play(*given)

    monkeypatch.setattr("bench.players.VirtualEngine.play", interrupted)
    status, result, err = played(folder, "--virtual")
    assert (status, result["interrupted"], result["played"]) == (130, True, 1)
    assert result["aligned"] is None
    assert result["algorithmic"]["emission_ms"]["n"] == 2
    assert "**interrupted** after 1" in report.render([("x.json", result)])
    n[:] = [1]  # and now the first: nothing is there
    assert played(folder, "--virtual")[:2] == (130, {})


def test_segments_without_words_are_counted_and_said(command):
    take = take_of(1.05, 1.3)
    take.arrivals[-1:-1] = [(1.6, SpeechStarted(1.5)), (1.9, SpeechStopped(1.8))]
    assert latency.figures([take, take_of(1.05, 1.3)])["segments_without_words"] == 1
    result = command("--virtual")
    assert (result["segments_without_words"], result["traced"]) == (0, False)
    assert "without words" not in report.render([("x.json", result)])
    page = report.render([("x.json", result | {"segments_without_words": 2})])
    assert "(segments without words: 2)" in page


def test_a_plot_has_no_percentile_of_too_few_values():
    figures = pytest.importorskip(
        "matplotlib.figure", reason="not installed (pip install -e .[plot])"
    )
    result = latency.figures([take_of(1.05, 1.3)] * 20)
    result["with_compute"]["first_word_ms"]["n"] = 19
    figure = figures.Figure()
    timing, settings = {"machine_was_busy": False}, {"model": "tiny"}
    plots._latency(figure, result | {"bench": "x", "timing": timing, "settings": settings})
    (axes,) = figure.axes
    drawn = {line.get_label(): list(line.get_xdata()) for line in axes.lines}
    assert drawn["emission, with compute"] == [0, 1, 2, 4]
    assert drawn["first word, with compute"] == [0, 1, 4]
    assert [text.get_text() for text in axes.get_xticklabels()] == [
        "p50",
        "p90",
        "p95",
        "p99",
        "max",
    ]
