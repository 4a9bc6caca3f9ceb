"""The report's sections for throughput and soak, and plots: every figure is where it belongs."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
from bench_card import CARD
from test_bench_report import ACCURACY, LATENCY, SETTINGS, rows

from bench import flat, plots, report
from bench.delays import percentiles_ms
from sparqle_stream.config_json import read_json
from sparqle_stream.errors import ConfigError, MissingExtraError

TIMING = {"machine_was_busy": False, "others_share_before": 0.02, "others_share_during": 0.0}


def level(n: int, **fields) -> dict:
    fixed = {
        "streams": n,
        "lag_ms": percentiles_ms([0.011, 0.022, 0.4 * n]),
        "refused": 0,
        "dropped": 0,
        "reasons": [],
        "words": 10 * n,
        "audio_seconds": 30.0 * n,
        "rtf_per_stream": 0.0777,
        "cpu_cores": 0.25 * n,
        "cpu_seconds_per_audio_second": 0.25,
        "rss_mb": 800.0 + 7 * n,
        "latest_packet_ms": 3.0,
        "kept_up": True,
    }
    return fixed | fields


LOAD = {
    "through": "the engine, in process",
    "lag_from": "the second of the stream that an event needed",
    "limit_ms": 320.0,
    "seconds": 30.0,
    "arrivals_per_minute": None,
    "mean_seconds": None,
}
THROUGHPUT = {
    "bench": "throughput",
    "settings": SETTINGS,
    "load": LOAD,
    "machine": CARD,
    "sets": [{"name": "demo", "recordings": 1}],
    "timing": TIMING,
    "bound": {"read_gb_per_s": 20.0, "chunk_ms_at_least": 7.7, "rtf_at_least": 0.0241},
    "streams_held": 9,
    "is_limited_by_most": False,
    "streams_per_core": 4.5,
    "memory_per_stream_mb": 7.0,
    "levels": [level(1), level(9), level(10, kept_up=False, refused=2, dropped=3)],
}
SAMPLES = [
    {
        "audio_seconds": 360.0 * i,
        "cycles": 4 * i,
        "rss_mb": 801.5,
        "state_bytes": 123_456,
        "chunk_ms": 31.0 + 4 * i,
        "open_files": 20,
        "threads": 5,
        "streams_open": 0,
    }
    for i in range(1, 11)
]
SOAK = {
    "bench": "soak",
    "settings": SETTINGS,
    "load": {"through": "the engine, in process", "longest_s": 600.0},
    "machine": CARD,
    "sets": [{"name": "demo", "recordings": 1}],
    "timing": TIMING,
    "audio_seconds": 3600.0,
    "cycles": 40,
    "words": 1000,
    "failed": 0,
    "times_real_time": 9.87,
    "is_flat": False,
    "flat": flat.flatness(SAMPLES),
    "samples": SAMPLES,
}


def test_figures_of_throughput_are_on_the_page():
    page = report.render([("t.json", THROUGHPUT)])
    assert "**9 streams** held (4.5 per core), 7.0 MB for each further one" in page
    assert "limit 320 ms" in page
    assert (
        "at 20.0 GB/s the weights, read once, take 7.7 ms (RTF 0.024 if all chunks were such"
        in page
    )
    assert rows(page, "10")[0] == [
        *("10", "no", "22", "3602", "3920", "4000"),
        *("0.078", "2.50", "870", "2", "3", "100"),
    ]
    assert [row[1] for n in ("1 ", "9") for row in rows(page, n)] == ["yes", "yes"]
    assert "machine A." in page
    told = level(11, kept_up=False, without_lag=4)
    page = report.render([("t.json", THROUGHPUT | {"levels": [level(1, without_lag=0), told]})])
    assert [rows(page, n)[0][1] for n in ("1 ", "11")] == ["yes", "no; without a lag: 4"]
    held = copy.deepcopy(THROUGHPUT) | {"is_limited_by_most": True}
    assert "**9 or more streams** held" in report.render([("t.json", held)])


def test_an_open_loop_is_on_the_page():
    came = level(20, refused=4) | {
        "offered_at_once_mean": 5.5,
        "taken_at_once_mean": 4.4,
        "taken_at_once_most": 7,
    }
    load = LOAD | {"arrivals_per_minute": 12.0, "mean_seconds": 20.0}
    result = {k: THROUGHPUT[k] for k in ("bench", "settings", "machine", "sets", "timing")}
    page = report.render([("a.json", result | {"load": load, "arrivals": came, "bound": None})])
    assert "open loop: 12 streams a minute that stay 20 s on average, for 30 s" in page
    assert rows(page, "20")[0][0] == "20 came; at once 4.4 on average, 7 at most"
    assert rows(page, "20")[0][9] == "4"


def test_figures_of_soak_are_on_the_page():
    page = report.render([("s.json", SOAK)])
    assert "**not flat**: 1.00 h of audio in 40 streams, 9.9 times real time, 0 failed" in page
    assert rows(page, "state bytes")[0][1:3] == ["123,456", "123,456"]
    # 8 samples from 43 to 71 ms are kept: 28 ms more, 20 % of the median 57 are allowed.
    assert rows(page, "time of a chunk")[0][1:] == ["43", "71", "71", "28", "11.4", "**no**"]
    assert rows(page, "resident memory")[0][-1] == "yes"
    more = {"why": "grown: chunk_ms", "interrupted": True}
    page = report.render([("s.json", SOAK | more)])
    assert "**not flat** (grown: chunk_ms); **interrupted**: 1.00 h of audio" in page
    short = SOAK | {"flat": flat.flatness(SAMPLES[:3]), "is_flat": None}
    page = report.render([("s.json", short)])
    assert "too short to say" in page
    assert rows(page, "resident memory")[0][1:] == ["-"] * 6


@pytest.mark.parametrize("result", [THROUGHPUT, SOAK], ids=["throughput", "soak"])
def test_a_busy_machine_is_said(result):
    busy = result | {"timing": TIMING | {"machine_was_busy": True, "others_share_before": 0.5}}
    assert "machine was busy" not in report.render([("r.json", result)])
    assert "**the machine was busy** (50% of it taken before" in report.render([("r.json", busy)])
    # An older result, which only looked before the run.
    later = result | {"timing": TIMING | {"machine_was_busy": False, "others_share_during": 0.4}}
    assert "**the machine was busy**" in report.render([("r.json", later)])


def test_the_bound_of_a_gpu_is_not_that_of_the_hosts_memory():
    settings = THROUGHPUT["settings"] | {"compute": "cuda"}
    assert "The bound" not in report.render([("t.json", THROUGHPUT | {"settings": settings})])


KERNELS = {
    "bench": "kernels",
    "checks": [{"op": "log_mel", "case": "c", "dtype": "float32", "is_green": True}],
    "is_green": True,
    "copy_gb_per_s": 4000,
    "matrix_tflops": 650.5,
    "rows": [
        {
            "op": "log_mel",
            "case": "c",
            "dtype": "bfloat16",
            "streams": 64,
            "ms": {"triton": 0.0125, "eager": 0.05, "compiled": None},
            "share_of_copy": 0.755,
            "share_of_matrix": 0.02,
            "speedup": 4.0,
        }
    ],
    "gpu": "Example GPU",
    "versions": {"torch": "2.13.0"},
    "commit": "0123456789ab",
}


def test_figures_of_kernels_are_on_the_page():
    page = report.render([("k.json", KERNELS)])
    assert "Example GPU; a copy 4000 GB/s, matrix product 650.5 TFLOP/s; 1 comparisons, all" in page
    assert rows(page, "log_mel")[0] == [
        *("log_mel", "c", "64", "bfloat16", "0.0125", "-", "0.0500"),
        *("4.00 times", "76%", "2%"),
    ]
    wrong = [KERNELS["checks"][0] | {"is_green": False}]
    red = {"bench": "kernels", "checks": wrong, "is_green": False}
    assert "**wrong: log_mel (c, float32)**" in report.render([("k.json", red)])


# --- plots -------------------------------------------------------------------------------------

COMPARE = {
    "bench": "compare",
    "settings": SETTINGS,
    "timing": TIMING,
    "engines": {"sparqle": {"turns": [{"rtf": 0.1}]}, "peer": {"turns": [{"rtf": 0.4}]}},
}


RESULTS = sorted(Path(plots.__file__).with_name("results").glob("*.json"))


@pytest.mark.parametrize(
    "result",
    [ACCURACY, LATENCY, THROUGHPUT, SOAK, COMPARE, *map(read_json, RESULTS)],
    ids=lambda result: result["bench"],
)
def test_every_result_can_be_drawn(result, tmp_path):
    """Also all that are published."""
    pytest.importorskip("matplotlib", reason="not installed (pip install -e .[plot])")
    path = tmp_path / "x.png"
    plots.require(path)
    plots.draw(result, path)
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert path.stat().st_size > 5_000


def test_every_benchmark_can_draw():
    """`--plot` is no promise of some of them."""
    folder = Path(plots.__file__).parent
    drawn = {path.stem for path in folder.glob("*.py") if "plots.add_option(" in path.read_text()}
    assert drawn == set(plots._DRAW)
    assert drawn >= {json.loads(path.read_text())["bench"] for path in RESULTS}


def test_a_curve_has_the_figures(monkeypatch):
    """What is drawn of throughput: p50, p95 and the maximum of the lag over the streams."""
    figures = pytest.importorskip(
        "matplotlib.figure", reason="not installed (pip install -e .[plot])"
    )
    figure = figures.Figure()
    plots._throughput(figure, THROUGHPUT)
    (axes,) = figure.axes
    drawn = {line.get_label(): list(line.get_ydata()) for line in axes.lines}
    assert drawn["lag p95"] == [one["lag_ms"]["p95"] for one in THROUGHPUT["levels"]]
    assert list(axes.lines[0].get_xdata()) == [1, 9, 10]
    assert drawn["limit"] == [320.0, 320.0]


def test_a_plot_that_cannot_be_drawn_is_said_first(monkeypatch, tmp_path):
    with pytest.raises(ConfigError, match="no PNG"):
        plots.require(tmp_path / "x.svg")
    with pytest.raises(ConfigError, match="there is no folder"):
        plots.require(tmp_path / "no" / "x.png")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match="matplotlib"):
        plots.require(tmp_path / "x.png")
    plots.require(None)


def test_no_plot_needs_no_matplotlib():
    """Benchmarks run, and their help is printed, where it is not installed."""
    code = (
        "import sys; sys.modules['matplotlib'] = None\n"
        "from bench import plots; plots.require(None); plots.draw({'bench': 'soak'}, None)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
