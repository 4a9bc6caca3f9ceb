"""The report: every figure of a result is on the page, with where it comes from."""

from __future__ import annotations

import copy
import json
import re

import bench_card
import pytest

from bench import report
from bench.delays import percentiles_ms
from sparqle_stream.errors import ConfigError

CARD = bench_card.CARD | {
    "cpu_flags": ["avx512f"],
    "cores": 4,
    "memory_gb": 16.5,
    "versions": {"torch": "2.13.0"},
    "weights_hash": "feedbeef00112233",
}
SETTINGS = {
    "model": "sparqle-base-en",
    "llm": None,
    "chunk_ms": 320,
    "delay_ms": 240,
    "vad": "silero",
    "dtype": "float32",
    "n_streams": 4,
}
TIMING = {
    "audio_seconds": 600.0,
    "rtfx": 15.21,
    "rtf": 0.1234,
    "peak_rss_mb": 801.4,
    "machine_was_busy": False,
    "others_share_before": 0.01,
    "wall_seconds": 80.0,
    "pace": "virtual",
    "through": "the engine, in process",
}
DELAYS = {
    "emission_ms": percentiles_ms([0.301, 0.411]),
    "first_word_ms": percentiles_ms([0.522]),
    "end_of_speech_to_final_ms": percentiles_ms([0.633]),
}
COUNTS = {"words": 100, "substitutions": 11, "deletions": 7, "insertions": 5, "utterances": 90}
SPEECH = COUNTS | {
    "wer_percent": 23.0,
    "last_word_recall_percent": 77.7,
    "wer_interval_95": [20.0, 26.0],
    "wer_interval_95_speakers": [18.5, 29.25],
    "speakers": {"s1": COUNTS | {"wer_percent": 31.0}, "s2": COUNTS | {"wer_percent": 15.0}},
    "delays_stream_time": DELAYS,
    "words_with_unsure_end": 0,
    "greedy_ctc": COUNTS | {"wer_percent": 35.5},
    "writing": None,
}
WRITING = {
    "words": 93,
    "capitals": 31,
    "capital_precision_percent": 91,
    "capital_recall_percent": 83,
    "marks": 17,
    "mark_precision_percent": 64,
    "mark_recall_percent": 46,
}
NOISE = {"minutes": 12.0, "false_words": 18, "false_words_per_minute": 1.5}


def of_set(name: str, **parts) -> dict:
    fixed = {"name": name, "recordings": 9, "recordings_in_manifest": 9, "failed": 0}
    return fixed | {"revisions": 0, "corpora": ["librispeech"]} | parts


ACCURACY = {
    "bench": "accuracy",
    "settings": SETTINGS,
    "machine": CARD,
    "timing": TIMING,
    "sets": [of_set("test/read", speech=SPEECH), of_set("noise/eval", noise=NOISE)],
}
LATENCY = {
    "bench": "latency",
    "settings": SETTINGS,
    "machine": CARD,
    "timing": TIMING,
    "sets": [{"name": "demo", "recordings": 1}],
    "algorithmic": DELAYS,
    "with_compute": DELAYS,
    "chunk_compute_ms": percentiles_ms([0.0444]),
    "stage_ms": {"encoder": percentiles_ms([0.0111, 0.0222])},
    "stage_ms_per_audio_second": {"encoder": 33.3, "llm": 55.5},
    "audio_seconds": 60.0,
    "rtf": 0.0987,
    "latest_packet_ms": 2.0,
    "words_with_unsure_end": 0,
    "lagging": {
        "algorithmic": {"recordings": 1, "al_ms": 901.2, "laal_ms": 955.5, "dal_ms": 1010.1},
        "with_compute": {"recordings": 1, "al_ms": 971.2, "laal_ms": 1025.5, "dal_ms": 1080.1},
    },
    "aligned": {
        "algorithmic_ms": percentiles_ms([0.377]),
        "with_compute_ms": percentiles_ms([0.444]),
    },
    "bound": {"read_gb_per_s": 20.0, "chunk_ms_at_least": 7.7, "rtf_at_least": 0.0241},
}


def rows(page: str, start: str) -> list[list[str]]:
    """Cells of the table rows that begin with a cell."""
    lines = [line for line in page.splitlines() if line.startswith(f"| {start}")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def test_figures_of_accuracy_are_on_the_page():
    page = report.render([("read.json", ACCURACY)])
    ((source, settings, files, words, wer, ctc, errors, last, emission, end, run),) = rows(
        page, "test/read"
    )
    assert source == "test/read (librispeech, 2 speakers)"
    assert settings == "sparqle-base-en, chunk 320 ms, delay 240 ms, VAD silero, float32"
    assert (files, words, wer) == ("9", "100", "**23.0** (18.5 .. 29.2)")
    assert (ctc, errors, last) == ("35.5", "11 / 7 / 5", "77.7 %")
    assert (emission, end, run) == ("356, 400 ms", "633, 633 ms", "`read.json`")
    ((*_, minutes, n_false, a_minute, _),) = rows(page, "noise/eval")
    assert (minutes, n_false, a_minute) == ("12.0", "18", "**1.50**")
    ((_, revisions, streams, audio, rtf, rtfx, memory, weights, commit, machine),) = rows(
        page, "`read.json`"
    )
    assert (revisions, streams, audio) == ("0", "4", "10.0 min")
    assert (rtf, rtfx, memory) == ("0.123", "15.2", "801 MB")
    assert (weights, commit, machine) == ("`feedbeef0011`", "`0123456789ab`", "A")


@pytest.mark.parametrize(
    ("n_speakers", "by_speaker", "by_utterance", "n_utterances", "shown"),
    [
        (2, [12.3, 13.0], [10.1, 15.6], 98, "(10.1 .. 15.6)"),  # of two speakers it is too narrow
        (9, [12.3, 13.0], [10.1, 15.6], 98, "(10.1 .. 15.6)"),
        (10, [12.3, 13.0], [10.1, 15.6], 98, "(12.3 .. 13.0)"),
        (2, [7.3, 15.2], [10.1, 14.9], 98, "(7.3 .. 15.2)"),
        (1, None, [10.1, 15.6], 10, "(10.1 .. 15.6)"),
        (2, [12.3, 13.0], [10.1, 15.6], 9, ""),  # two long recordings of two speakers
        (1, None, None, 1, ""),
    ],
)
def test_an_interval_is_of_ten_speakers_or_the_wider(
    n_speakers, by_speaker, by_utterance, n_utterances, shown
):
    result = copy.deepcopy(ACCURACY)
    one = SPEECH["speakers"]["s1"]
    result["sets"][0]["speech"] |= {
        "utterances": n_utterances,
        "speakers": {f"s{i}": one for i in range(n_speakers)},
        "wer_interval_95": by_utterance,
        "wer_interval_95_speakers": by_speaker,
    }
    (row,) = rows(report.render([("r.json", result)]), "test/read")
    assert row[4] == f"**23.0** {shown}".strip()


@pytest.mark.parametrize(("n_speakers", "is_shown"), [(9, False), (10, True), (1, True)])
def test_the_interval_of_a_ratio_is_of_ten_or_more(n_speakers, is_shown):
    """Of one speaker the 90 utterances were drawn."""
    result = copy.deepcopy(ACCURACY)
    to_clean = {"wer_percent": 20.0, "ratio": 1.15, "ratio_interval_95": [1.05, 1.25]}
    result["sets"][0] |= {"condition": "quiet"}
    result["sets"][0]["speech"] |= {
        "speakers": {f"s{i}": SPEECH["speakers"]["s1"] for i in range(n_speakers)},
        "to_clean": to_clean,
    }
    page = report.render([("r.json", result)])
    (row,) = [row for row in rows(page, "test/read") if row[1] == "quiet"]
    assert row[6] == ("**1.15** (1.05 .. 1.25)" if is_shown else "**1.15**")


def test_the_interval_over_joined_recordings_is_of_ten_or_more():
    result = copy.deepcopy(ACCURACY)
    facts = {"of_one_speaker": 1, "across_speakers": 1, "shortest_s": 200.0, "longest_s": 600.0}
    result["sets"][0] |= {"condition": "clean", "long_form": facts}
    to_cut = {"wer_percent": 20.0, "ratio": 1.15, "ratio_interval_95": [1.05, 1.25]}
    for n, told in ((9, "**1.15**"), (10, "**1.15** (1.05 .. 1.25)")):
        result["sets"][0]["speech"] |= {"utterances": n, "to_cut": to_cut}
        page = report.render([("r.json", result)])
        assert [r[-2] for r in rows(page, "test/read |") if r[2] == "1, 1"] == [told]


@pytest.mark.parametrize(
    ("n", "p95", "p99"), [(19, "-", "-"), (20, "100", "-"), (99, "100", "-"), (100, "100", "100")]
)
def test_percentiles_are_of_enough_values(n, p95, p99):
    result = LATENCY | {"chunk_compute_ms": percentiles_ms([0.1] * n)}
    ((*_, got_95, got_99, longest),) = rows(report.render([("r.json", result)]), "chunk |")
    assert (got_95, got_99, longest) == (p95, p99, "100")


def test_aligned_rows_say_of_how_many_words():
    result = copy.deepcopy(LATENCY)
    result["aligned"] |= {"words_said": 7, "recordings_left_out": 0}
    page = report.render([("r.json", result)])
    assert rows(page, "emission, aligned ends, heard (1 of 7 words said) |")
    result["aligned"] |= {
        "recordings_left_out": 2,
        "first_word_algorithmic_ms": percentiles_ms([0.511]),
        "first_word_with_compute_ms": percentiles_ms([0.622]),
    }
    page = report.render([("r.json", result)])
    label = "emission, aligned ends, clock (1 of 7 words said) (files left out: 2)"
    assert rows(page, label)[0][2] == "444"
    assert rows(page, "first word, aligned starts, heard")[0][1:3] == ["1", "511"]
    assert rows(page, "first word, aligned starts, clock")[0][1:3] == ["1", "622"]
    assert "aligned starts, " not in report.render([("r.json", LATENCY)])


def test_capitals_and_marks_are_on_the_page_where_a_reference_has_them():
    result = copy.deepcopy(ACCURACY)
    assert "Capitals" not in report.render([("r.json", result)])
    result["sets"][0]["speech"]["writing"] = WRITING
    page = report.render([("r.json", result)])
    assert ["93", "91, 83 % of 31", "64, 46 % of 17", "`r.json`"] in [
        row[2:] for row in rows(page, "test/read")
    ]


def test_speakers_are_listed_from_the_best_to_the_worst():
    page = report.render([("read.json", ACCURACY)])
    assert "2 speakers of test/read" in page
    assert [row[0] for row in rows(page, "s")][-2:] == ["s2", "s1"]


def test_figures_of_latency_are_on_the_page():
    page = report.render([("live.json", LATENCY)])
    assert rows(page, "emission, heard")[0][1:] == ["2", "356", "400", "-", "-", "411"]
    assert rows(page, "end of speech to final, clock")[0][2] == "633"
    assert rows(page, "chunk |")[0] == ["chunk", "1", "44", "44", "-", "-", "44"]
    assert "encoder 33.3 ms, llm 55.5 ms" in page
    assert rows(page, "of a chunk: encoder")[0][1:3] == ["2", "17"]
    assert "RTF **0.099**" in page
    assert rows(page, "emission, aligned ends, heard")[0][1:3] == ["1", "377"]
    assert rows(page, "emission, aligned ends, clock")[0][1:3] == ["1", "444"]
    assert rows(page, "heard") == [["heard", "901", "956", "1010"]]
    assert rows(page, "clock") == [["clock", "971", "1026", "1080"]]
    assert (
        "at 20.0 GB/s the weights, read once, take 7.7 ms (RTF 0.024 if all chunks were such"
        in page
    )
    assert "`feedbeef0011`" in page
    assert "`0123456789ab`" in page


def test_a_part_of_a_folder_and_failures_are_said():
    result = copy.deepcopy(ACCURACY)
    result["sets"][0] |= {"recordings": 3, "failed": 1}
    ((_, _, files, *_),) = rows(report.render([("r.json", result)]), "test/read")
    assert files == "3 of 9, 1 failed"


@pytest.mark.parametrize("result", [ACCURACY, LATENCY], ids=["accuracy", "latency"])
def test_a_busy_machine_is_said_beside_the_figure(result):
    busy = result | {"timing": TIMING | {"machine_was_busy": True, "others_share_before": 0.93}}
    assert "machine was busy" not in report.render([("r.json", result)])
    assert "machine was busy" in report.render([("r.json", busy)])


def test_guessed_word_ends_are_said_beside_the_delays():
    result = copy.deepcopy(ACCURACY)
    result["sets"][0]["speech"]["words_with_unsure_end"] = 1
    for page in (
        report.render([("r.json", result)]),
        report.render([("r.json", LATENCY | {"words_with_unsure_end": 1})]),
    ):
        assert "(1 of 2 word ends are guesses)" in page
    assert "guesses" not in report.render([("a.json", ACCURACY), ("b.json", LATENCY)])


def test_every_table_has_as_many_cells_as_columns():
    page = report.render([("read.json", ACCURACY), ("live.json", LATENCY)])
    width = None
    for line in page.splitlines():
        if not line.startswith("|"):
            width = None
            continue
        n = len(re.findall(r" \| ", line))
        assert width in (None, n), line
        width = n


def test_machines_get_letters_once_each():
    other = copy.deepcopy(ACCURACY)
    other["machine"]["cpu"] = "Another CPU"
    page = report.render([("a.json", ACCURACY), ("b.json", other), ("c.json", ACCURACY)])
    assert [row[-1] for name in "abc" for row in rows(page, f"`{name}.json`")] == ["A", "B", "A"]
    assert "- **A**: Example CPU (avx512f), 2 of 4 cores, threads: 2" in page
    assert "- **B**: Another CPU" in page
    assert page.count("Example CPU") == 1


def test_what_is_missing_shows_as_a_dash():
    result = copy.deepcopy(ACCURACY)
    speech = result["sets"][0]["speech"]
    del speech["greedy_ctc"]
    speech |= {"wer_interval_95": None, "wer_interval_95_speakers": None}
    speech["delays_stream_time"] = dict.fromkeys(DELAYS, percentiles_ms([]))
    result["sets"][1]["noise"]["false_words_per_minute"] = None
    result["timing"]["rtf"] = None
    page = report.render([("r.json", result)])
    (row,) = rows(page, "test/read")
    assert row[4:6] == ["**23.0**", "-"]
    assert row[8] == "-, - ms"


def test_an_unknown_bench_is_an_error_and_not_a_gap():
    with pytest.raises(ConfigError, match=r"x\.json.*'sulk'"):
        report.render([("x.json", {"bench": "sulk"})])


@pytest.fixture
def results(tmp_path):
    folder = tmp_path / "results"
    folder.mkdir()
    (folder / "b.json").write_text(json.dumps(LATENCY))
    (folder / "a.json").write_text(json.dumps(ACCURACY))
    return folder


def run(results, page, *more: str) -> int:
    return report.main(["--results", str(results), "--output", str(page), *more])


def test_the_command_writes_the_page_and_checks_it(results, tmp_path, capsys):
    page = tmp_path / "docs" / "performance.md"
    assert run(results, page, "--check") == report.EXIT_DIFFERS
    assert not page.exists()
    assert run(results, page) == 0
    assert page.read_text() == report.render([("a.json", ACCURACY), ("b.json", LATENCY)])
    assert run(results, page, "--check") == 0
    page.write_text(page.read_text().replace("23.0", "13.0"))
    assert run(results, page, "--check") == report.EXIT_DIFFERS
    assert "performance.md" in capsys.readouterr().err


@pytest.mark.parametrize(("text", "what"), [("{", "a.json is not JSON"), (None, "no results")])
def test_results_that_cannot_be_read_are_named(tmp_path, capsys, text, what):
    if text is not None:
        (tmp_path / "a.json").write_text(text)
    assert run(tmp_path, tmp_path / "page.md") == report.EXIT_USER_ERROR
    said = capsys.readouterr().err
    assert what in said
    assert "hint: " in said


def test_the_committed_page_is_what_the_committed_results_say():
    if not list(report.RESULTS.glob("*.json")):
        pytest.skip("no results are committed yet")
    assert report.main(["--check"]) == 0
