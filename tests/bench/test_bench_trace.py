"""Traces: spans where the time was spent, in the format that viewers read."""

from __future__ import annotations

import json

import pytest

from bench import latency, report
from bench.players import VirtualEngine
from bench.trace import Trace
from bench.traced import traced_engine
from sparqle_stream import testing
from sparqle_stream.config import EngineConfig, StreamOptions, VadConfig
from sparqle_stream.engine import Engine
from sparqle_stream.messages import Final

NO_VAD = StreamOptions(vad=VadConfig(kind="off"))
CFG = EngineConfig(n_slots=1, threads=1)
STAGES = ["features", "encoder", "ctc", "qformer", "captions", "llm"]


def spans(trace: Trace, name: str = "") -> list[dict]:
    events = trace.as_json()["traceEvents"]
    return [e for e in events if e["ph"] == "X" and name in ("", e["name"])]


def test_spans_by_hand():
    """Origin 10: at 10.5 s something of 20 ms begins; stages of 2 and 3 ms end at 10.515."""
    trace = Trace(origin=10.0)
    trace.span("chunk", 10.5, 0.02, rows=[0, 3])
    assert trace.stages(10.515, {"encoder": 0.002, "llm": 0.003}) == pytest.approx(10.51)
    trace.mark("final", 10.52, words=2)
    document = json.loads(json.dumps(trace.as_json()))
    assert document["displayTimeUnit"] == "ms"
    thread, chunk, encoder, llm, final = document["traceEvents"]
    assert thread["ph"] == "M"
    assert (chunk["ph"], chunk["ts"], chunk["dur"]) == ("X", 500_000.0, 20_000.0)
    assert chunk["args"] == {"rows": [0, 3]}
    assert (encoder["ts"], encoder["dur"]) == (510_000.0, 2_000.0)
    assert (llm["ts"], llm["dur"]) == (512_000.0, 3_000.0)
    assert (final["ph"], final["ts"]) == ("i", 520_000.0)
    assert {e["pid"] for e in document["traceEvents"]} == {1}


def inside(inner: dict, outer: dict) -> bool:
    slack = 1.0  # microseconds: times are rounded
    return (
        inner["ts"] >= outer["ts"] - slack
        and inner["ts"] + inner["dur"] <= outer["ts"] + outer["dur"] + slack
    )


def test_a_traced_engine_says_where_its_chunks_spend_their_time(tiny, clip):
    """Every chunk has all stages inside it, they follow one another and fill most of it."""
    trace, pcm = Trace(), clip[: 2 * 16_000]
    with traced_engine(tiny, CFG, trace) as engine:
        traced = engine.transcribe(pcm, NO_VAD)
        n_chunks = engine.metrics().chunks
    with Engine(tiny, CFG) as plain:
        wanted = plain.transcribe(pcm, NO_VAD)
    texts = [[e.text for e in events if isinstance(e, Final)] for events in (traced, wanted)]
    assert texts[0] == texts[1] != []
    chunks = spans(trace, "chunk")
    assert len(chunks) == n_chunks >= 6
    assert spans(trace, "vad")
    for chunk in chunks:
        assert chunk["args"]["rows"] == [0]
        parts = [s for s in spans(trace) if s is not chunk and inside(s, chunk)]
        names = [s["name"] for s in sorted(parts, key=lambda s: s["ts"])]
        assert [n for n in names if n in STAGES] == STAGES
        assert names[0] == "begin"
        assert names[-1] == "words"
        assert sum(s["dur"] for s in parts) == pytest.approx(chunk["dur"], rel=0.2, abs=2000)


def test_a_virtual_trace_is_on_the_streams_own_clock(tiny, clip):
    """The first chunk begins when it is heard, at 0.32 s; the second stream after the first."""
    trace, pcm = Trace(0.0), clip[:16_000]
    player = VirtualEngine(tiny, CFG, trace)
    first = player.play(pcm, NO_VAD)
    n_first = len(spans(trace, "chunk"))
    player.play(pcm, NO_VAD)
    chunks = spans(trace, "chunk")
    assert n_first == len(first.chunk_seconds) == len(chunks) - n_first
    assert chunks[0]["ts"] >= 320_000.0
    assert [c["dur"] for c in chunks[:n_first]] == pytest.approx(
        [1e6 * s for s in first.chunk_seconds], abs=0.1
    )
    end_us = 1e6 * first.arrivals[-1][0]
    assert chunks[n_first]["ts"] >= end_us + 319_999.0
    names = [s["name"] for s in spans(trace) if inside(s, chunks[0]) and s is not chunks[0]]
    assert names == ["begin", *STAGES, "words"]


@pytest.mark.parametrize("where", ["--virtual", ""])
def test_the_command_writes_a_trace(tiny, idle, make_folder, monkeypatch, tmp_path, capsys, where):
    monkeypatch.setattr("sparqle_stream.models.load", lambda *_, **__: tiny)
    folder = make_folder("sets/one", [{"said": "good day to all", "text": ""}])
    path = tmp_path / "traces" / "out.json"
    arguments = [str(folder), "--vad", "off", "--threads", "1", "--trace", str(path)]
    assert latency.main([*arguments, *where.split()]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    events = json.loads(path.read_text())["traceEvents"]
    n_chunks = sum(e["name"] == "chunk" for e in events)
    assert n_chunks >= result["chunk_compute_ms"]["n"] > 0  # the warm-up is in the trace, too
    assert {"vad", "encoder", "llm", "words"} <= {e["name"] for e in events}
    assert result["traced"] is True
    assert ", traced, which costs a little" in report.render([("x.json", result)])


@pytest.mark.parametrize("option", ["--trace", "--plot"])
def test_a_place_that_cannot_be_is_told_before_anything_is_played(idle, tmp_path, capsys, option):
    if option == "--plot":
        pytest.importorskip("matplotlib", reason="not installed (pip install -e .[plot])")
    (tmp_path / "x.png").mkdir()
    assert latency.main(["--model", "no-such-model", option, str(tmp_path / "x.png")]) == 2
    said = capsys.readouterr()
    assert f"{option} {tmp_path / 'x.png'} is a folder" in said.err
    assert said.out == ""


def test_a_trace_that_cannot_be_written_does_not_cost_the_result(
    tiny, idle, make_folder, monkeypatch, capsys
):
    monkeypatch.setattr("sparqle_stream.models.load", lambda *_, **__: tiny)
    folder = make_folder("sets/one", [{"said": "good day to all", "text": ""}])
    arguments = [str(folder), "--vad", "off", "--virtual", "--trace", "/dev/full"]
    assert latency.main(arguments) == 2
    said = capsys.readouterr()
    assert json.loads(said.out.splitlines()[-1])["bench"] == "latency"
    assert "error: cannot write /dev/full" in said.err
    assert "hint: check --trace" in said.err


def test_a_server_elsewhere_cannot_be_traced(idle, tmp_path, capsys):
    assert latency.main(["--url", "ws://127.0.0.1:1", "--trace", str(tmp_path / "x.json")]) == 2
    assert "cannot be traced" in capsys.readouterr().err


def test_tracing_uses_the_slots_it_is_given():
    trace = Trace()
    with traced_engine(testing.oracle_model(), CFG, trace, testing.OracleBatch) as engine:
        events = engine.transcribe(testing.say(["good", "day"]), NO_VAD)
    assert "".join(e.text for e in events if isinstance(e, Final)).split() == ["good", "day"]
    assert len(spans(trace, "chunk")) == len(spans(trace, "words")) > 0
