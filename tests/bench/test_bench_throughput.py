"""Throughput: real streams of an oracle, in process, over our sockets, and in OpenAI's dialect."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest

from bench import load, machine, throughput
from bench.dialects import DIALECTS
from bench.reel import Reel
from bench.socket_target import SocketTarget
from bench.targets import End, EngineTarget, Outcome, StreamTarget
from sparqle_stream import testing
from sparqle_stream.config import EngineConfig, StreamOptions, VadConfig, n_cores
from sparqle_stream.engine import Engine
from sparqle_stream.server.connection import Connection

NO_VAD = StreamOptions(vad=VadConfig(kind="off"))
WORDS = ["good", "day", "to", "you", "all", "and", "so", "it", "goes"]


@pytest.fixture
def reel():
    return Reel([testing.say(WORDS, gap_ms=80)], pause_s=0.0, seed=0)


def play(target, reel, *bookings):
    return load.play(target, reel, list(bookings), 20, 0, machine.Process())


def test_streams_of_an_engine(reel):
    """Words come out, lag is above nothing and below what a second-long hang would be."""
    with testing.oracle_engine(EngineConfig(n_slots=2, threads=1)) as engine:
        got = play(EngineTarget(engine, NO_VAD), reel, *load.level(2, 1.6, 0.2))
    assert [o.end for o in got.outcomes] == [End.DONE, End.DONE]
    assert all(o.n_words >= 2 for o in got.outcomes)
    assert [o.audio_s for o in got.outcomes] == [1.6, 1.6]
    lags = [lag for o in got.outcomes for _, lag in o.lags]
    assert min(lags) >= 0.0
    assert got.wall_s >= 1.7
    assert all(o.compute_s is not None for o in got.outcomes)


def test_a_slow_engine_lags_by_what_it_is_slow(reel, monkeypatch):
    """Each step takes 0.25 s: no event of a lone stream can be quicker."""
    run = testing.OracleBatch.run

    def slow(batch, sessions):
        time.sleep(0.25)
        return run(batch, sessions)

    monkeypatch.setattr(testing.OracleBatch, "run", slow)
    with testing.oracle_engine(EngineConfig(n_slots=1, threads=1)) as engine:
        (got,) = play(EngineTarget(engine, NO_VAD), reel, load.Booking(0.0, 1.2)).outcomes
    lags = [lag for _, lag in got.lags]
    assert min(lags) >= 0.25
    assert got.compute_s >= 0.25 * 3


def test_streams_beyond_the_slots_are_refused(reel):
    with testing.oracle_engine(EngineConfig(n_slots=1, threads=1)) as engine:
        got = play(EngineTarget(engine, NO_VAD), reel, *load.level(2, 0.8, 0.1))
    figures = load.figures(got, only_together=False)
    assert (figures["refused"], figures["dropped"]) == (1, 0)
    assert "slots" in figures["reasons"][0]


def test_a_stream_that_is_not_heard_in_time_is_dropped(reel, monkeypatch):
    """A step of 0.7 s and a backlog of 0.7 s: the third chunk finds no room."""
    monkeypatch.setattr(testing.OracleBatch, "run", lambda *_: time.sleep(1.0))
    with testing.oracle_engine(EngineConfig(n_slots=1, threads=1, backlog_s=0.7)) as engine:
        (got,) = play(EngineTarget(engine, NO_VAD), reel, load.Booking(0.0, 3.0)).outcomes
    assert got.end is End.DROPPED
    assert got.audio_s < 3.0


@pytest.fixture
def server():
    from sparqle_stream import server as servers

    with Engine(
        testing.oracle_model(), EngineConfig(n_slots=2, threads=1), testing.OracleBatch
    ) as engine:
        cfg = servers.ServerConfig(port=0, drain_s=0.0, defaults=NO_VAD)
        with servers.background(engine, cfg) as url:
            yield url


def test_streams_of_our_server(server, reel):
    got = play(StreamTarget(server), reel, *load.level(3, 1.2, 0.2))
    figures = load.figures(got, only_together=False)
    assert (figures["refused"], figures["dropped"]) == (1, 0)
    assert "slots" in figures["reasons"][0]
    assert figures["words"] >= 2
    assert figures["lag_ms"]["n"] >= 2
    assert min(lag for o in got.outcomes for _, lag in o.lags) >= 0.0
    assert {o.model for o in got.outcomes} == {"tiny", ""}


@pytest.fixture
def speaking(tiny):
    """A server of the tiny model with two slots."""
    from sparqle_stream import server as servers

    cfg = servers.ServerConfig(port=0, drain_s=0.0)
    with (
        Engine(tiny, EngineConfig(n_slots=2, threads=1)) as engine,
        servers.background(engine, cfg) as url,
    ):
        yield url


@pytest.mark.parametrize("name", DIALECTS)
def test_streams_in_the_dialects_of_others(speaking, clip, name):
    """Real speech, since most of them always have a detector."""
    reel = Reel([clip[: 4 * 16_000]], pause_s=0.0, seed=0)
    target = SocketTarget(speaking, DIALECTS[name], "tiny")
    got = play(target, reel, *load.level(3, 2.5, 0.2))
    figures = load.figures(got, only_together=False)
    assert (figures["refused"], figures["dropped"]) == (1, 0), figures["reasons"]
    done = [o for o in got.outcomes if o.end is End.DONE]
    assert all(o.n_words >= 1 for o in done)
    assert all(len(o.lags) >= 1 for o in done)
    assert all(lag > -0.1 for o in done for _, lag in o.lags)
    assert figures["rtf_per_stream"] is None
    assert target.lag_from == DIALECTS[name].LAG_FROM


def test_the_dialects_on_offer_are_those_there_are():
    assert tuple(DIALECTS) == throughput.OTHERS


# --- the command -------------------------------------------------------------------------------


@pytest.fixture
def folder(make_folder):
    return make_folder("sets/x", [{"said": " ".join(WORDS), "text": "x"}])


SHORT = [
    "--seconds",
    "1.3",
    "--stagger-s",
    "0.2",
    "--vad",
    "off",
    "--threads",
    "1",
    "--pause-s",
    "0",
]


@pytest.fixture
def run(oracle, idle, monkeypatch, capsys, folder):
    monkeypatch.setattr("sparqle_stream.models.load", lambda *_, **__: oracle)
    monkeypatch.setattr("bench.throughput.WARM_UP_S", 0.3)
    monkeypatch.setattr("bench.bounds.PROBE_BYTES", 1 << 20)

    def run(*arguments: str) -> dict:
        assert throughput.main([str(folder), *SHORT, *arguments]) == 0
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    return run


@pytest.mark.parametrize("where", [[], ["--server"]], ids=["engine", "server"])
def test_more_and_more_streams(run, where):
    result = run("--most", "2", "--limit-ms", "60000", *where)
    assert result["streams_held"] == 2
    assert result["is_limited_by_most"]
    assert result["streams_per_core"] == round(2 / n_cores(), 2)
    assert [one["streams"] for one in result["levels"]] == [1, 2]
    assert all(one["kept_up"] for one in result["levels"])
    assert all(one["lag_ms"]["n"] for one in result["levels"])
    assert result["load"]["seed"] == 0
    assert result["bound"]["rtf_at_least"] > 0
    assert result["timing"]["others_share_before"] == 0.0


@pytest.mark.parametrize("name", DIALECTS)
def test_more_and_more_streams_in_the_dialects_of_others(idle, monkeypatch, capsys, tiny, name):
    """Real speech; vLLM's says its one lag once all audio has come, and OpenAI's nearly so."""
    monkeypatch.setattr("sparqle_stream.models.load", lambda *_, **__: tiny)
    monkeypatch.setattr("bench.throughput.WARM_UP_S", 0.3)
    monkeypatch.setattr("bench.bounds.PROBE_BYTES", 1 << 20)
    most = 2 if name == "vllm" else 1
    arguments = ["--server", "--dialect", name, "--most", str(most), "--limit-ms", "60000"]
    arguments += ["--seconds", "2.5", "--stagger-s", "0.2", "--threads", "1", "--pause-s", "0"]
    assert throughput.main(arguments) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["streams_held"] == most
    assert [one["without_lag"] for one in result["levels"]] == [0] * most
    assert all(one["lag_ms"]["n"] >= one["streams"] for one in result["levels"])


def test_a_server_that_frees_its_slots_late_refuses_no_level(run, monkeypatch):
    """With as many slots as streams, the next level finds those of the last one free."""
    serve = Connection.run

    async def lingering(self, subprotocol=None):
        await serve(self, subprotocol)
        await asyncio.sleep(0.5)

    monkeypatch.setattr(Connection, "run", lingering)
    result = run("--most", "2", "--limit-ms", "60000", "--server")
    assert [(one["refused"], one["kept_up"]) for one in result["levels"]] == [(0, True)] * 2


def test_a_level_of_which_nothing_is_heard_ends_the_search(run, monkeypatch):
    """What was measured before it is not lost."""
    figures = load.figures

    def deaf(played, **options):
        if len(played.outcomes) > 1:
            for one in played.outcomes:
                one.lags.clear()
        return figures(played, **options)

    monkeypatch.setattr(load, "figures", deaf)
    result = run("--most", "2", "--limit-ms", "60000")
    assert result["streams_held"] == 1
    assert [one["without_lag"] for one in result["levels"]] == [0, 2]
    assert [one["kept_up"] for one in result["levels"]] == [True, False]


def test_a_run_of_which_nothing_is_heard_is_an_error(run, monkeypatch, capsys, folder):
    figures = load.figures
    monkeypatch.setattr(
        load,
        "figures",
        lambda played, **options: figures(
            replace(played, outcomes=[replace(o, lags=[]) for o in played.outcomes]), **options
        ),
    )
    assert throughput.main([str(folder), *SHORT, "--most", "2"]) == 2
    assert "nothing was captioned" in capsys.readouterr().err


def test_a_limit_that_nobody_holds(run):
    result = run("--most", "4", "--limit-ms", "0.000001")
    assert (result["streams_held"], result["streams_per_core"]) == (0, 0.0)
    assert [one["streams"] for one in result["levels"]] == [1]
    assert not result["is_limited_by_most"]


def test_streams_that_come_and_go(run):
    result = run(
        *("--arrivals", "200", "--mean-seconds", "0.5", "--most", "1", "--seed", "0"),
        *("--limit-ms", "60000", "--seconds", "1.5"),
    )
    came = load.arrivals(200, 0.5, 1.5, seed=0)
    assert result["arrivals"]["streams"] == len(came) >= 2
    assert result["arrivals"]["taken_at_once_most"] == 1
    assert result["arrivals"]["refused"] >= 1  # they overlap and there is one slot
    assert not result["arrivals"]["kept_up"]
    assert "levels" not in result


def test_a_server_that_runs_elsewhere(server, idle, capsys, folder):
    """Nothing is known of its CPU and memory, and no weights are loaded here."""
    arguments = ["--url", server, "--most", "1", "--limit-ms", "60000", *SHORT]
    assert throughput.main([str(folder), *arguments]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["settings"]["model"] == "tiny"
    assert result["machine"]["weights_hash"] == ""
    assert result["levels"][0]["cpu_cores"] is None
    assert result["memory_per_stream_mb"] is None
    assert result["streams_held"] == 1
    assert server not in json.dumps(result)


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["--seconds", "0"], "--seconds 0"),
        (["--most", "-1"], "--most -1"),
        (["--dialect", "openai"], "needs a server"),
        (["--dialect", "deepgram"], "needs a server"),
        (["--server-pid", "1"], "--url"),
        (["--stagger-s", "40"], "never run together"),
        (["--plot", "x.pdf"], "no PNG"),
        (["--url", "ws://127.0.0.1:1"], "the first stream was refused"),
    ],
)
def test_errors_say_what_to_do(idle, capsys, arguments, what):
    assert throughput.main(arguments) == 2
    said = capsys.readouterr()
    assert what in said.err
    assert "hint: " in said.err
    assert said.out == ""


def test_a_busy_machine_is_refused(monkeypatch, capsys):
    monkeypatch.setattr("bench.machine.busy_share", lambda: 0.6)
    assert throughput.main(["--model", "no-such-model"]) == 2
    assert "--force" in capsys.readouterr().err


def test_the_bound_is_bytes_over_bandwidth(tiny):
    """At 2 GB/s the weights of the tiny model take half their megabytes in milliseconds."""
    from bench import bounds

    got = bounds.of_chunk(tiny, 320, read_gb_s=2.0)
    parts = {"encoder": tiny.encoder, "ctc": tiny.ctc, "qformer": tiny.qformer, "llm": tiny.llm}
    n_all = sum(p.numel() for part in parts.values() for p in part.parameters())
    n_embedding = tiny.llm.tokens.weight.numel()
    megabytes = sum(got[f"{part}_mb"] for part in parts)
    buffers = sum(b.nbytes for part in parts.values() for b in part.buffers()) / 1e6
    assert megabytes == pytest.approx(4e-6 * (n_all - n_embedding) + buffers, abs=0.25)
    assert got["vocabulary_mb"] == round(4e-6 * n_embedding, 1)
    assert got["chunk_ms_at_least"] == pytest.approx(megabytes / 2, abs=0.15)
    assert got["rtf_at_least"] == pytest.approx(got["chunk_ms_at_least"] / 320, abs=1e-3)


def test_bandwidth_is_that_of_the_threads_of_a_stream(tiny, monkeypatch):
    """And torch has as many threads after it as before."""
    import torch

    from bench import bounds

    before, summed_with = torch.get_num_threads(), []

    def seconds_to_sum(block):
        summed_with.append(torch.get_num_threads())
        return 1e-3

    monkeypatch.setattr(bounds, "_seconds_to_sum", seconds_to_sum)
    assert bounds.read_gigabytes_per_s(1, 1 << 20, 2) == pytest.approx((1 << 20) / 1e6)
    monkeypatch.setattr(bounds, "PROBE_BYTES", 1 << 20)
    torch.set_num_threads(2)
    try:
        for is_shared in (True, False):
            bounds.bandwidth_of_stream(SimpleNamespace(is_shared=is_shared))
    finally:
        torch.set_num_threads(before)
    assert summed_with == [1] * 2 + [1] * 5 + [2] * 5


def test_a_packet_is_sent_once_its_last_sample_is_spoken(reel):
    """What arrives is never earlier than it could have been spoken."""
    from bench.targets import paced

    outcome = Outcome()

    async def collect():
        return [
            (len(packet), time.perf_counter() - outcome.began_at)
            async for packet in paced(reel.packets(0, 3200, 1600), outcome)
        ]

    got = asyncio.run(collect())
    assert [n for n, _ in got] == [1600, 1600]
    assert [at >= due for (_, at), due in zip(got, (0.1, 0.2), strict=True)] == [True, True]
    assert outcome.audio_s == 0.2
    latest = max(at - due for (_, at), due in zip(got, (0.1, 0.2), strict=True))
    assert 0.0 <= outcome.late_s <= latest
