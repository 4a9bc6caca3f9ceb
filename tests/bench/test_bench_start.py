"""bench.start: what a process writes is timed, what it held is found, what fails is no figure."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace

import pytest

from bench import machine, start
from bench.settings import Settings
from sparqle_stream import arguments
from sparqle_stream.errors import ConfigError
from sparqle_stream.onnx_cpu import model as onnx_model
from sparqle_stream.onnx_cpu.export import export

HELD = 300 << 20  # bytes, given back long before the end
CAPTIONER = f"""
import sys, time
say = lambda text: print(text, end="", flush=True)
time.sleep(0.2)
held = bytearray({HELD})
held[::4096] = b"x" * len(held[::4096])
time.sleep(0.1)
del held
say("WEBVTT\\n\\n")
time.sleep(0.3)
say("00:00:00.500 --> ")
time.sleep(0.3)
say("00:00:02.000\\nso it")
time.sleep(1.0)
say(" is\\n\\n00:00:02.000 --> 00:00:03.000\\ntold\\n\\n")
time.sleep(0.3)
"""


def program(code: str) -> list[str]:
    return [sys.executable, "-S", "-c", code]


def test_moments_and_memory_of_a_process():
    """A word that came in part is a caption; times without words are none."""
    got = start.watch(program(CAPTIONER))
    assert got.first_cue == "00:00:00.500 --> 00:00:02.000"
    assert got.loaded_s > 0.3
    assert 0.6 <= got.first_caption_s - got.loaded_s < 1.4
    assert got.whole_s - got.first_caption_s > 0.8
    assert HELD / 1e6 < got.peak_rss_mb < HELD / 1e6 + 60


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("print('WEBVTT\\n\\n1 --> 2\\nso\\n'); raise SystemExit(3)", "status 3"),
        ("print('WEBVTT\\n\\n')", "captioned nothing"),
        ("print('1 --> 2\\nso\\n')", "captioned nothing"),  # not WebVTT
        ("import time; time.sleep(60)", "not done after 1 s"),
        ("import os, time; os.close(1); time.sleep(60)", "not done after 1 s"),
    ],
)
def test_a_run_that_went_wrong_is_no_figure(code, said):
    with pytest.raises(ConfigError, match=said):
        start.watch(program(code), limit_s=1.0)


def test_the_last_line_of_its_errors_is_the_hint():
    with pytest.raises(ConfigError) as caught:
        start.watch(program("import sys; sys.exit('error: no model\\nhint: pull it')"))
    assert caught.value.hint == "hint: pull it"


def test_defaults_of_the_user_do_not_count(monkeypatch):
    monkeypatch.setenv("SPARQLE_CHUNK_MS", "1280")
    monkeypatch.setenv("SPARQLE_HOME", "somewhere")
    code = (
        "import os; mine = {k: v for k, v in os.environ.items() if 'SPARQLE' in k}\n"
        "assert mine == {'SPARQLE_HOME': 'somewhere'}, mine\n"
        "print('WEBVTT\\n\\n1 --> 2\\nso\\n')"
    )
    assert start.watch(program(code)).first_cue == "1 --> 2"


def test_a_process_that_is_gone_holds_nothing():
    assert start.peak_mb(os.getpid()) == pytest.approx(machine.peak_rss_mb(), rel=0.02)
    assert start.peak_mb(2**22 + 1) == 0.0


def test_every_setting_is_in_the_command(tmp_path):
    """As the product itself reads them."""
    wanted = Settings(
        model="m", llm="l", chunk_ms=640, delay_ms=80, vad="off", vad_stop_ms=96, threads=1
    )
    wanted = replace(wanted, dtype="float32", backend="torch")
    python, option, module, *argv = start.command(wanted, tmp_path / "a.ogg")
    assert [python, option, module] == [sys.executable, "-m", "sparqle_stream.cli"]
    args = arguments.parser_for("").parse(argv, {})
    assert args.files == [str((tmp_path / "a.ogg").resolve())]
    assert (args.model, args.llm, args.chunk_ms, args.delay_ms) == ("m", "l", 640, 80)
    assert (args.vad, args.vad_stop, args.threads, args.format) == ("off", 96, 1, "vtt")
    assert (args.dtype, args.backend, args.compute) == ("float32", "torch", "cpu")


def test_the_bound_counts_what_loading_reads(tiny, tmp_path):
    export(tiny, tmp_path / "tiny", "int8")
    loaded = onnx_model.load(tmp_path / "tiny", tokenizer=tiny.tokenizer)
    n_bytes = start.bytes_to_read(loaded)
    weights = sum(n for part, n in loaded.weight_bytes().items() if part != "vocabulary")
    everything = sum(file.stat().st_size for file in loaded.folder.iterdir())
    assert weights < n_bytes < everything
    (tmp_path / "tiny" / "words.safetensors").write_bytes(b"12345")
    assert start.bytes_to_read(loaded) == n_bytes + 5
    facts = start.bound(loaded)
    assert facts["seconds_at_least"] == pytest.approx(
        n_bytes / 1e9 / facts["read_gb_per_s"], rel=0.05
    )


def runs(*captions: float) -> list[start.Run]:
    return [start.Run(s / 2, s, 2 * s, 100 * s, "0:01 --> 0:02") for s in captions]


def test_spreads_of_the_runs():
    got = start.figures(runs(3.0, 1.0, 8.0))
    assert got["first_caption_s"] == {"median": 3.0, "min": 1.0, "max": 8.0}
    assert got["peak_rss_mb"] == {"median": 300.0, "min": 100.0, "max": 800.0}
    assert got["loaded_s"]["median"] == 1.5


def test_the_warm_up_does_not_count(tiny, idle, monkeypatch, capsys):
    taken = iter(runs(9.0, 1.0, 2.0, 3.0))
    monkeypatch.setattr(start, "watch", lambda _: next(taken))
    monkeypatch.setattr("sparqle_stream.models.load", lambda *_, **__: tiny)
    assert start.main(["--model", "random:tiny", "--runs", "3"]) == 0
    result = json.loads(capsys.readouterr().out.strip().rpartition("\n")[2])
    assert result["first_caption_s"] == {"median": 2.0, "min": 1.0, "max": 3.0}
    assert result["warm_up_first_caption_s"] == 9.0
    assert result["settings"]["runs"] == 3
    assert result["machine"]["weights_hash"] == tiny.weights_hash
    assert next(taken, None) is None


@pytest.mark.parametrize(
    ("argv", "said"), [(["--runs", "0"], "--runs 0"), (["none.wav"], "none.wav"), ([], "takes 80%")]
)
def test_what_is_refused(monkeypatch, capsys, argv, said):
    busy = 0.8 if not argv else 0.0
    monkeypatch.setattr("bench.machine.busy_share", lambda: busy)
    monkeypatch.setattr(Settings, "load_model", lambda _: pytest.fail("a model was loaded"))
    assert start.main(argv) == 2
    assert said.replace("takes", "take") in capsys.readouterr().err


@pytest.mark.slow
def test_the_product_itself(clip_path):
    """A tiny model of noise writes something, and in a pipe it is seen before the end."""
    wanted = Settings(model="random:tiny", vad="off", backend="torch")
    got = start.watch(start.command(wanted, clip_path))
    assert 0 < got.loaded_s < got.first_caption_s < got.whole_s
    assert got.peak_rss_mb > 50


def test_the_page_shows_both_goals():
    from bench.report_start import start as section
    from bench.tables import Machines

    result = {
        "settings": Settings(dtype="int8", backend="onnx").summary() | {"runs": 3},
        "machine": machine.card("0123456789abcdef", 2),
        "timing": {"others_share_before": 0.4, "machine_was_busy": True},
        "recording": {"name": "demo", "seconds": 16.75},
        "first_cue": "00:00:00.620 --> 00:00:06.140",
        "bound": {"read_mb": 164.9, "read_gb_per_s": 11.7, "seconds_at_least": 0.0141},
        "goals": start.GOALS,
    } | start.figures(runs(3.0, 1.0, 8.0))
    page = "\n".join(section([("start.json", result)], Machines()))
    assert "| **3.00 s (1.00 .. 8.00)**, goal 4 s; cue 00:00:00.620 to 00:00:06.140 |" in page
    assert "| **300 MB (100 .. 800)**, goal 800 MB |" in page
    assert "| 0.014 s: 165 MB at 11.7 GB/s |" in page
    assert "**the machine was busy** (40% of it taken before" in page
