"""bench.flips: frames, words and WER of two precisions, worked out by hand and on a tiny model."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from bench import flips, manifests, scoring
from bench.captioned import Captioned
from bench.scoring import Tally
from bench.settings import Settings
from sparqle_stream import testing
from sparqle_stream.config import StreamOptions, VadConfig
from sparqle_stream.errors import ConfigError
from sparqle_stream.messages import Done, Final
from sparqle_stream.onnx_cpu import model as onnx_model
from sparqle_stream.onnx_cpu.export import export
from sparqle_stream.onnx_cpu.settings import INDEX

QUICK = Settings(vad="off", dtype="int8", backend="onnx")


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """The tiny model in int8 and in float32, both as graphs."""
    tiny, found = testing.tiny_model(), []
    for dtype in ("int8", "float32"):
        folder = tmp_path_factory.mktemp(dtype) / "tiny"
        export(tiny, folder, dtype)
        found.append(onnx_model.load(folder, tokenizer=tiny.tokenizer))
    return tuple(found)


@pytest.fixture
def speech(make_folder):
    """Four recordings of two speakers; `writes` says what is captioned of them."""
    return make_folder(
        "sets/speech",
        [
            {"said": "good day to all", "text": "GOOD DAY TO ALL", "speaker": "ann"},
            {"said": "good day", "text": "Good day.", "speaker": "bob"},
            {"said": "to all", "text": "to all", "speaker": "bob"},
            {"said": "all of it", "text": "all of it", "speaker": "ann"},
        ],
    )


@pytest.fixture
def writes(monkeypatch):
    """Takes what each of two models writes of the recordings, in order; the ear hears nothing."""

    def use(*texts: list[str]) -> None:
        sides = iter(texts)

        def caption(_engine, _wanted, of_set):
            done = Done(1.0, 1.0, 0.1)
            return [
                Captioned(recording, [Final(" " + text, (), 0, 1.0), done])
                for recording, text in zip(of_set.recordings, next(sides), strict=True)
            ]

        monkeypatch.setattr("bench.captioned.caption", caption)
        monkeypatch.setattr(flips, "frames_heard", lambda *_: flips.Frames(10, 1, 0.5))

    return use


# --- arithmetic ----------------------------------------------------------------------------------


def test_frames_and_divergence_by_hand():
    """ln 2 where half of a certainty is lost, (ln 4/3) / 2 where a coin is loaded."""
    tiny = 1e-30
    exact = np.log(np.array([[1 - tiny, tiny], [0.5, 0.5], [0.9, 0.1]], np.float32))
    rounded = np.log(np.array([[0.5, 0.5], [0.25, 0.75], [0.9, 0.1]], np.float32))
    got = flips.frames_of(rounded, exact)
    assert (got.frames, got.changed) == (3, 1)
    assert got.nats == pytest.approx(np.log(2) + np.log(4 / 3) / 2, rel=1e-5)
    twice = got + got
    assert flips._ear(twice) == {
        "frames": 6,
        "frames_changed": 2,
        "frames_changed_percent": 33.333,
        "nats_per_frame": float(f"{got.nats / 3:.3g}"),
    }


@pytest.mark.parametrize(
    ("one", "other", "n"),
    [
        ("", "", 0),
        ("a b c", "a b c", 0),
        ("", "a b", 2),
        ("a b c", "a c", 1),
        ("a b c d", "b c d e", 2),
        ("a b c", "x b y", 2),
        ("b a", "a b", 2),
    ],
)
def test_edits_by_hand(one, other, n):
    assert flips.n_edits(one.split(), other.split()) == n
    assert flips.n_edits(other.split(), one.split()) == n


def tally(errors: int, words: int = 10) -> Tally:
    return Tally(utterances=1, words=words, substitutions=errors)


def test_a_difference_is_paired():
    """Both sides vary much, and together: only what they differ by is by chance."""
    alike = [(tally(n), tally(n)) for n in (0, 9, 0, 9, 3)]
    assert scoring.difference(alike) == {"points": 0.0, "interval_95": [0.0, 0.0]}
    worse = [(tally(n + 1), tally(n)) for n in (0, 8, 0, 8, 3)]
    assert scoring.difference(worse) == {"points": 10.0, "interval_95": [10.0, 10.0]}


def test_the_interval_of_a_difference():
    """One of four has two errors more, two of 100 words in all: seen none to four times."""
    groups = [(tally(2, 25), tally(0, 25)), *[(tally(1, 25), tally(1, 25))] * 3]
    got = scoring.difference(groups)
    assert got["points"] == 2.0
    low, high = got["interval_95"]
    assert low == 0.0
    assert high == 6.0  # P(all four) = 1/256, P(three or more) = 13/256
    assert scoring.difference(groups) == got  # seeded
    assert scoring.difference(groups[:1])["interval_95"] is None


# --- sets ----------------------------------------------------------------------------------------


def test_figures_of_known_transcripts(writes, speech, tiny):
    writes(
        ["Good day to Al", "Good day.", "to all", "all of"],  # one word another, one left out
        ["good day, to all", "Good day.", "to all", "all of it"],
    )
    (got,) = flips.measure((tiny, tiny), QUICK, [manifests.read(speech)])
    said, scored = got["captions"], got["accuracy"]
    assert (said["words"], said["words_changed"], said["texts_changed"]) == (11, 2, 2)
    assert said["flip_rate_percent"] == pytest.approx(100 * 2 / 11, abs=0.01)
    # 'Good' for 'good' and 'day' for 'day,' as well
    assert (said["words_as_written"], said["words_changed_as_written"]) == (11, 4)
    assert scored["wer_percent"] == scored["difference"]["points"] == pytest.approx(18.18, abs=0.01)
    assert scored["wer_float32_percent"] == 0.0
    low, high = scored["difference"]["interval_95_speakers"]
    assert (low, high) == (0.0, pytest.approx(100 * 2 / 7, abs=0.01))  # bob alone, ann alone
    assert got["ear"]["frames"] == 40
    assert got["ear"]["frames_changed_percent"] == 10.0
    assert (got["name"], got["recordings"], got["failed"]) == ("sets/speech", 4, 0)


def test_without_texts_there_is_no_wer(writes, tiny, speech):
    files = manifests.of_files(sorted((speech / "audio").iterdir())[:1])
    writes(["so it is"], ["so is it"])
    (got,) = flips.measure((tiny, tiny), QUICK, [files])
    assert got["accuracy"] is None
    assert got["captions"]["words_changed"] == 2


def test_a_model_does_not_differ_from_itself(pair, speech):
    of_set = manifests.read(speech, limit=2)
    (got,) = flips.measure((pair[1], pair[1]), replace(QUICK, dtype="float32"), [of_set])
    assert got["ear"]["frames"] > 20
    assert (got["ear"]["frames_changed"], got["ear"]["nats_per_frame"]) == (0, 0.0)
    assert got["captions"]["words_as_written"] > 0
    assert (got["captions"]["texts_changed"], got["captions"]["words_changed"]) == (0, 0)
    assert got["accuracy"]["difference"]["points"] == 0.0


def test_a_tiny_model_in_eight_bits(pair, clip):
    """Near float32, and not it; the same segments for both, of a detector too."""
    for options in (StreamOptions(vad=VadConfig(kind="off")), StreamOptions()):
        got = flips.frames_heard(pair, options, clip[:80_000])
        assert got.frames > 100
        assert 0 < got.nats / got.frames < 0.02
        assert 0 <= got.changed < 0.1 * got.frames


# --- command -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "comes_to"),
    [
        ({}, ("onnx", "int8")),
        ({"dtype": "float32"}, ("onnx", "float32")),
        ({"backend": "torch", "dtype": "bfloat16"}, ("torch", "bfloat16")),
    ],
)
def test_two_precisions_of_one_backend(asked, comes_to):
    rounded, exact = flips.both_of(Settings(**asked))
    assert (rounded.backend, rounded.dtype) == comes_to
    assert exact == replace(rounded, dtype="float32")


def test_a_folder_of_graphs_has_only_one(tmp_path, capsys):
    (tmp_path / INDEX).write_text("{}")
    with pytest.raises(ConfigError, match="graphs of one precision"):
        flips.both_of(Settings(model=str(tmp_path)))
    assert flips.main(["--model", str(tmp_path)]) == 2
    assert "hint: name the model folder" in capsys.readouterr().err


def test_a_busy_machine_is_refused(monkeypatch, capsys):
    monkeypatch.setattr("bench.machine.busy_share", lambda: 0.8)
    monkeypatch.setattr(Settings, "load_model", lambda _: pytest.fail("a model was loaded"))
    assert flips.main([]) == 2
    assert "take 80%" in capsys.readouterr().err


def test_the_result_and_its_page(idle, pair, speech, monkeypatch, capsys):
    from bench.report_start import flips as section
    from bench.tables import Machines

    monkeypatch.setattr(Settings, "load_model", lambda s: pair[s.dtype == "float32"])
    assert flips.main([str(speech), "--vad", "off", "--limit", "2"]) == 0
    result = json.loads(capsys.readouterr().out.strip().rpartition("\n")[2])
    assert result["settings"]["dtype"] == "int8"
    assert result["settings"]["against"] == "float32"
    assert result["machine"]["weights_hash"] == pair[0].weights_hash
    of_set = result["sets"][0]
    assert (of_set["recordings"], of_set["recordings_in_manifest"]) == (2, 4)
    page = "\n".join(section([("flips.json", result)], Machines()))
    assert "| sets/speech | sparqle-base-en, chunk 320 ms" in page
    assert ", int8 against float32 | 2 of 4 |" in page
    assert f"| **{of_set['captions']['flip_rate_percent']:.2f} %** of " in page
    assert "goal at most 0.3 |" in page
    of_set["accuracy"] = None
    assert "| - | - | - | `flips.json`" in "\n".join(section([("flips.json", result)], Machines()))


def test_the_page_shows_the_wider_interval():
    from bench.report_start import _difference

    found = {"points": 0.2, "interval_95": [-0.1, 0.5], "interval_95_speakers": [-0.3, 0.7]}
    assert _difference({"difference": found}, flips.GOALS).startswith("**+0.20** (-0.30 .. +0.70)")
    found["interval_95_speakers"] = [0.2, 0.2]  # two speakers who happen to be alike
    assert "(-0.10 .. +0.50)" in _difference({"difference": found}, flips.GOALS)
    found["interval_95_speakers"] = None
    assert "(-0.10 .. +0.50)" in _difference({"difference": found}, flips.GOALS)
