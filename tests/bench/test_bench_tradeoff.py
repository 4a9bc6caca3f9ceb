"""Trade-off: the grid, one cell, going on with a partial result, the page and the plot."""

from __future__ import annotations

import copy
import json

import pytest
from bench_card import CARD

from bench import manifests, plots, report, scoring, tradeoff
from bench.settings import Settings
from sparqle_stream.errors import ConfigError

QUICK = Settings(vad="off", dtype="float32")


@pytest.fixture
def speech(make_folder):
    return make_folder(
        "sets/speech",
        [
            {"said": "good day to all", "text": "good day to all", "speaker": "ann"},
            {"said": "good day", "text": "good night", "speaker": "bob"},
        ],
    )


@pytest.fixture
def loaded(oracle, monkeypatch):
    """The oracle is what the command loads."""
    monkeypatch.setattr("sparqle_stream.models.load", lambda *_, **__: oracle)
    return oracle


def test_the_grid_has_every_pair_once():
    cells = tradeoff.grid(QUICK, [80, 320, 80], [0, 960])
    pairs = [(one.chunk_ms, one.delay_ms) for one in cells]
    assert pairs == [(80, 0), (80, 960), (320, 0), (320, 960)]
    assert {one.vad for one in cells} == {"off"}
    assert len(tradeoff.grid(QUICK, tradeoff.CHUNKS_MS, tradeoff.DELAYS_MS)) == 25


@pytest.mark.parametrize(("chunks", "delays"), [([100], [0]), ([80], [-80]), ([80], [2000])])
def test_a_grid_beyond_the_engine_is_refused(chunks, delays):
    with pytest.raises(ConfigError):
        tradeoff.grid(QUICK, chunks, delays)


def test_the_engine_gets_what_the_cell_says(oracle, idle, speech):
    """One of six words is wrong; longer chunks and delays wait longer."""
    sets, scorer = [manifests.read(speech)], scoring.Scorer()
    quick, slow = (
        tradeoff.cell(oracle, one, sets, scorer)
        for one in (*tradeoff.grid(QUICK, [80], [0]), *tradeoff.grid(QUICK, [640], [960]))
    )
    assert (slow["chunk_ms"], slow["delay_ms"]) == (640, 960)
    of_quick, of_slow = quick["sets"][0], slow["sets"][0]
    assert of_quick["wer_percent"] == of_slow["wer_percent"] == pytest.approx(100 / 6, abs=0.01)
    emission = [one["delays_stream_time"]["emission_ms"] for one in (of_quick, of_slow)]
    assert emission[0]["n"] == emission[1]["n"] == 6
    assert emission[0]["p50"] < emission[1]["p50"]
    assert quick["timing"]["rtf"] > 0
    assert not quick["timing"]["machine_was_busy"]


def run(speech, path, *more: str) -> int:
    arguments = [str(speech), "--vad", "off", "--dtype", "float32", "--chunks", "160", "320"]
    return tradeoff.main([*arguments, "--resume", str(path), *more])


def test_a_run_that_was_stopped_goes_on(loaded, idle, speech, tmp_path, monkeypatch, capsys):
    """It breaks off after two of four cells; the same command runs the other two and no more."""
    path = tmp_path / "grid.json"
    ran: list[tuple[int, int]] = []
    measure = tradeoff.cell

    def cell(model, wanted, *rest):
        if len(ran) == 2:
            raise KeyboardInterrupt
        ran.append((wanted.chunk_ms, wanted.delay_ms))
        return measure(model, wanted, *rest)

    monkeypatch.setattr(tradeoff, "cell", cell)
    assert run(speech, path, "--delays", "0", "240") == 130
    part = json.loads(path.read_text())
    assert len(part["cells"]) == 2
    assert part["grid"] == [[160, 0], [160, 240], [320, 0], [320, 240]]
    assert "**2 of 4 cells so far**" in report.render([("grid.json", part)])
    ran.clear()
    assert run(speech, path, "--delays", "0", "240") == 0
    assert ran == [(320, 0), (320, 240)]
    whole = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert whole == json.loads(path.read_text())
    assert [(c["chunk_ms"], c["delay_ms"]) for c in whole["cells"]] == [
        *((160, 0), (160, 240), (320, 0), (320, 240))
    ]
    assert whole["cells"][:2] == part["cells"]
    assert not list(tmp_path.glob("*.part"))


def test_a_grid_is_widened(loaded, idle, speech, tmp_path):
    path = tmp_path / "grid.json"
    assert run(speech, path, "--delays", "240") == 0
    assert run(speech, path, "--delays", "0") == 0
    result = json.loads(path.read_text())
    assert result["grid"] == [[160, 0], [160, 240], [320, 0], [320, 240]]
    assert len(result["cells"]) == 4


@pytest.mark.parametrize(
    ("more", "what"),
    [
        (["--vad", "webrtc"], "other settings"),
        (["--limit", "1"], "other recordings"),
        (["--chunks", "100"], "100"),
        (["--plot", "x.pdf"], "no PNG"),
    ],
)
def test_cells_that_cannot_be_compared_stay_apart(
    loaded, idle, speech, tmp_path, capsys, more, what
):
    path = tmp_path / "grid.json"
    assert run(speech, path, "--delays", "0") == 0
    before = path.read_text()
    assert run(speech, path, "--delays", "80", *more) == 2
    said = capsys.readouterr().err
    assert what in said
    assert "hint: " in said
    assert path.read_text() == before


@pytest.mark.parametrize("text", ["{", '{"bench": "soak"}', "[]"])
def test_a_file_of_something_else_is_not_touched(loaded, idle, speech, tmp_path, capsys, text):
    path = tmp_path / "other.json"
    path.write_text(text)
    assert run(speech, path, "--delays", "0") == 2
    assert "is no result of bench.tradeoff" in capsys.readouterr().err
    assert path.read_text() == text


def test_noise_has_no_trade_off(loaded, idle, make_folder, tmp_path, capsys):
    folder = make_folder("sets/noise", [{"said": "", "text": ""}])
    assert run(folder, tmp_path / "grid.json") == 2
    assert "has no texts" in capsys.readouterr().err


def test_a_busy_machine_is_refused_or_noted(loaded, monkeypatch, speech, tmp_path, capsys):
    monkeypatch.setattr("bench.machine.busy_share", lambda: 0.8)
    path = tmp_path / "grid.json"
    assert run(speech, path, "--delays", "0") == 2
    assert not path.exists()
    assert run(speech, path, "--delays", "0", "--force") == 0
    assert json.loads(path.read_text())["timing"]["machine_was_busy"]


# --- the page and the plot ---------------------------------------------------------------------


def cell(chunk_ms: int, delay_ms: int, wer: float, p50: float | None) -> dict:
    emission = {"n": 9, "p50": p50, "p90": p50 and p50 + 200}
    of_set = {"name": "dev/x", "wer_percent": wer, "failed": 0}
    timing = {"rtf": 0.15, "machine_was_busy": False, "others_share_before": 0.0}
    return {
        "chunk_ms": chunk_ms,
        "delay_ms": delay_ms,
        "commit": "0123456789ab",
        "timing": timing | {"wall_seconds": 9.0},
        "sets": [of_set | {"delays_stream_time": {"emission_ms": emission}}],
    }


RESULT = {
    "bench": "tradeoff",
    "settings": {"model": "m", "llm": None, "vad": "silero", "dtype": "int8", "n_streams": 8},
    "machine": CARD | {"weights_hash": "feedbeef00112233"},
    "timing": {"machine_was_busy": False, "others_share_before": 0.0},
    "sets": [{"name": "dev/x", "recordings": 35}],
    "grid": [[80, 0], [80, 240], [320, 0], [320, 240]],
    "cells": [cell(80, 0, 60.0, 130.0), cell(80, 240, 50.5, 380.0), cell(320, 0, 55.0, None)],
}


def test_the_page_has_a_table_of_chunks_and_delays():
    page = report.render([("t.json", RESULT | {"plot": "tradeoff.png"})])
    assert "| chunk | delay 0 ms | delay 240 ms |" in page
    assert "| 80 ms | **60.0**; 130, 330; 0.150 | **50.5**; 380, 580; 0.150 |" in page
    assert "| 320 ms | **55.0**; -, -; 0.150 | - |" in page
    assert "![WER over emission delay](tradeoff.png)" in page
    assert "**3 of 4 cells so far**" in page
    assert "`feedbeef0011`" in page
    assert "dev/x (files: 35):" in page
    assert "cells also of" not in page


def test_the_page_says_what_changed_under_way():
    result = copy.deepcopy(RESULT)
    result["cells"][1]["commit"] = "ba9876543210"
    page = report.render([("t.json", result)])
    assert "cells also of `ba9876543210`" in page
    assert "tradeoff.png" not in page


def test_the_worst_timing_is_that_of_all():
    busy = cell(320, 240, 40.0, 500.0)
    busy["timing"] |= {"machine_was_busy": True, "others_share_before": 0.5}
    result = tradeoff.with_cell(RESULT, busy)
    assert result["timing"] == {
        "machine_was_busy": True,
        "others_share_before": 0.5,
        "wall_seconds": 36.0,
    }


def test_a_line_for_each_chunk(tmp_path):
    figures = pytest.importorskip(
        "matplotlib.figure", reason="not installed (pip install -e .[plot])"
    )
    figure = figures.Figure()
    plots._tradeoff(figure, RESULT)
    (axes,) = figure.axes
    (line,) = axes.lines  # nothing was said with chunks of 320 ms
    assert (list(line.get_xdata()), list(line.get_ydata())) == ([130.0, 380.0], [60.0, 50.5])
    assert line.get_label() == "80 ms"
    path = tmp_path / "tradeoff.png"
    plots.draw(RESULT, path)
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
