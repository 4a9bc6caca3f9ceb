"""Accuracy: an engine that writes what was spelled is scored against references made wrong."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial

import pytest
from bench_broken import BrokenBatch

from bench import accuracy, long_form, manifests, report
from bench.settings import Settings
from sparqle_stream import testing
from sparqle_stream.engine import Engine

QUICK = Settings(vad="off", dtype="float32")


@pytest.fixture
def speech(make_folder):
    """Ten words of reference in four recordings of two speakers, with four errors."""
    return make_folder(
        "sets/speech",
        [
            {"said": "good day to all", "text": "GOOD DAY TO ALL", "speaker": "ann"},
            {"said": "good day", "text": "Good night.", "speaker": "bob"},  # substituted, the last
            {"said": "to all", "text": "to us all", "speaker": "bob"},  # deleted
            {"said": "all of it", "text": "all", "speaker": "ann"},  # inserted twice
        ],
    )


@pytest.fixture
def noise(make_folder):
    return make_folder(
        "sets/noise",
        [{"said": "", "text": ""}, {"said": "hm", "text": ""}, {"said": "", "text": ""}],
    )


def test_errors_of_a_known_transcript(oracle, idle, speech, noise):
    sets = [manifests.read(speech), manifests.read(noise)]
    result = accuracy.measure(oracle, QUICK, sets, with_ctc=False)
    spoken, noisy = result["sets"]
    assert spoken["name"] == "sets/speech"
    assert (spoken["revisions"], spoken["failed"]) == (0, 0)
    figures = spoken["speech"]
    counts = ("words", "substitutions", "deletions", "insertions", "utterances")
    assert [figures[c] for c in counts] == [10, 1, 1, 2, 4]
    assert figures["wer_percent"] == 40.0
    assert figures["last_word_recall_percent"] == 75.0
    assert {name: s["wer_percent"] for name, s in figures["speakers"].items()} == {
        "ann": 40.0,
        "bob": 40.0,
    }
    assert figures["delays_stream_time"]["emission_ms"]["n"] == 11
    assert "noise" not in spoken
    assert "speech" not in noisy
    assert noisy["noise"]["false_words"] == 1
    minutes = (2 * 1.0 + 0.04 * 3 + 0.16) / 60
    assert noisy["noise"]["false_words_per_minute"] == pytest.approx(1 / minutes, rel=0.01)
    assert noisy["noise"]["worst"] == {"r1": {"words": 1, "first": "hm"}}


def test_the_result_says_what_it_was_measured_with(oracle, idle, speech):
    result = accuracy.measure(oracle, QUICK, [manifests.read(speech, limit=1)], with_ctc=False)
    assert result["machine"]["weights_hash"] == oracle.weights_hash
    assert result["settings"]["vad"] == "off"
    assert result["sets"][0]["recordings_in_manifest"] == 4
    timing = result["timing"]
    assert timing["audio_seconds"] == pytest.approx(0.04 + 0.04 * 12 + 0.16 * 4, abs=0.01)
    assert timing["rtf"] == pytest.approx(
        timing["compute_seconds"] / timing["audio_seconds"], abs=0.05
    )
    assert not timing["machine_was_busy"]


def test_a_busy_machine_is_refused_or_noted(oracle, monkeypatch, speech, capsys):
    monkeypatch.setattr("bench.machine.busy_share", lambda: 0.8)
    monkeypatch.setattr("sparqle_stream.models.load", lambda *_, **__: oracle)
    arguments = [str(speech), "--vad", "off", "--without-ctc"]
    assert accuracy.main(arguments) == 2
    assert "--force" in capsys.readouterr().err
    assert accuracy.main([*arguments, "--force"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["timing"]["machine_was_busy"]
    assert result["timing"]["others_share_before"] == 0.8


def comparable(result) -> list[dict]:
    return [
        {key: value for key, value in s.items() if key not in ("rtf", "compute_seconds")}
        for s in result["sets"]
    ]


def test_streams_at_once_change_nothing_but_the_time(tiny, idle, speech):
    """The tiny model writes nonsense that depends on every bit it hears."""
    sets = [manifests.read(speech)]
    alone = accuracy.measure(tiny, QUICK, sets)
    together = accuracy.measure(tiny, replace(QUICK, n_streams=3), sets)
    assert alone["sets"][0]["speech"]["insertions"] + alone["sets"][0]["speech"]["words"] > 0
    assert comparable(together) == comparable(alone)


def test_the_page_can_be_made_of_the_result(tiny, idle, speech, noise):
    result = accuracy.measure(tiny, QUICK, [manifests.read(speech), manifests.read(noise)])
    page = report.render([("x.json", json.loads(json.dumps(result)))])
    figures = result["sets"][0]["speech"]
    assert f"**{figures['wer_percent']:.1f}**" in page
    assert f"| {figures['greedy_ctc']['wer_percent']:.1f} |" in page
    assert figures["writing"] is None  # references in small letters


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_stream_that_fails_counts_as_nothing_written(monkeypatch, idle, make_folder):
    """A crash must not take its recording out of the figure."""
    broken = partial(Engine, make_slots=BrokenBatch)
    monkeypatch.setattr("sparqle_stream.engine.Engine", broken)
    folder = make_folder(
        "sets/q", [{"said": "all day", "text": "all day"}, {"said": "aqua", "text": "aqua park"}]
    )
    result = accuracy.measure(testing.oracle_model(), QUICK, [manifests.read(folder)])
    (of_set,) = result["sets"]
    assert of_set["failed"] == 1
    assert (of_set["speech"]["words"], of_set["speech"]["deletions"]) == (4, 2)
    seconds = 0.04 + 6 * 0.04 + 2 * 0.16  # of the other one: RTF is of what was captioned
    assert of_set["audio_seconds"] == pytest.approx(seconds, abs=0.01)


@pytest.fixture
def command(oracle, monkeypatch, speech, capsys):
    """The command on the folder of speech: status, result (if one was printed) and stderr."""
    monkeypatch.setattr("sparqle_stream.models.load", lambda *_, **__: oracle)

    def command(*arguments: str) -> tuple[int, dict, str]:
        status = accuracy.main([str(speech), "--vad", "off", *arguments])
        out, err = capsys.readouterr()
        return status, json.loads(out.splitlines()[-1]) if out else {}, err

    return command


def test_transcripts_stand_side_by_side(command, idle, tmp_path):
    path = tmp_path / "texts.jsonl"
    assert command("--without-ctc", "--transcripts", str(path))[0] == 0
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(x["id"], x["reference"], x["text"]) for x in lines[:2]] == [
        ("r0", "GOOD DAY TO ALL", "good day to all"),
        ("r1", "Good night.", "good day"),
    ]
    assert [w["word"] for w in lines[1]["words"]] == ["good", "day"]


def test_the_command_prints_one_json_document(idle, speech, noise, tmp_path, capsys):
    output = tmp_path / "results" / "x.json"
    arguments = [str(speech), "--noise", str(noise), "--model", "random:tiny", "--vad", "off"]
    assert accuracy.main([*arguments, "--limit", "1", "--output", str(output)]) == 0
    said = capsys.readouterr()
    result = json.loads(said.out.splitlines()[-1])
    assert result == json.loads(output.read_text())
    assert [s["recordings"] for s in result["sets"]] == [1, 1]
    assert "captions sets/speech" in said.err
    assert str(tmp_path) not in output.read_text()


def test_offline_is_the_longest_chunk_and_delay(oracle, idle, speech):
    assert QUICK.mode == "streaming"
    wanted = QUICK.offline()
    assert (wanted.chunk_ms, wanted.delay_ms, wanted.mode) == (1280, 960, "offline")
    result = accuracy.measure(oracle, wanted, [manifests.read(speech)], with_ctc=False)
    assert (result["mode"], result["settings"]["chunk_ms"]) == ("offline", 1280)
    assert result["sets"][0]["speech"]["wer_percent"] == 40.0  # the oracle hears no worse
    page = report.render([("x.json", json.loads(json.dumps(result)))])
    assert "longest chunk and delay: sparqle-base-en" in page
    assert "offline" not in page  # it streams as well


def test_long_form_is_scored_as_one_text_beside_its_utterances(oracle, idle, speech):
    """No speaker has a minute, so one recording goes across both.

    Ann's come first: 'good day to all all of it good day to all' against 'GOOD DAY TO ALL all Good
    night. to us all' has the same 4 errors of 10 words.
    """
    long = long_form.joined(manifests.read(speech), 60.0, 0.32)
    result = accuracy.measure(oracle, QUICK, [long], with_ctc=False)
    cut, of_set = result["sets"]
    assert (cut["recordings"], of_set["recordings"]) == (4, 1)
    assert cut["name"] == "sets/speech"
    figures = of_set["speech"]
    counts = ("words", "substitutions", "deletions", "insertions", "utterances")
    assert [figures[c] for c in counts] == [10, 1, 1, 2, 1]
    assert [cut["speech"][c] for c in counts] == [10, 1, 1, 2, 4]
    assert of_set["name"] == "sets/speech, joined to 60 s"
    ratio = {"wer_percent": 40.0, "ratio": 1.0, "ratio_interval_95": None, "drawn_from": 1}
    assert figures["to_cut"] == ratio
    told = of_set["long_form"]
    assert (told["joined_to_s"], told["pause_s"], told["shorter"]) == (60.0, 0.32, 1)
    assert (told["of_one_speaker"], told["across_speakers"]) == (0, 1)
    assert "long_form" not in cut


def test_the_command_joins_speech_and_leaves_noise(idle, speech, noise, capsys):
    """To two lengths: the utterances run once."""
    arguments = [str(speech), "--noise", str(noise), "--model", "random:tiny", "--vad", "off"]
    more = ["--long-form", "0.5", "60", "--pause-s", "0.16", "--offline", "--without-ctc"]
    assert accuracy.main([*arguments, *more]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    names = [(s["name"], s["recordings"]) for s in result["sets"]]
    assert names == [
        ("sets/speech", 4),
        ("sets/speech, joined to 0.5 s", 4),
        ("sets/speech, joined to 60 s", 1),
        ("sets/noise", 3),
    ]
    assert result["mode"] == "offline"


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["nowhere"], "manifest.jsonl"),
        (["--chunk-ms", "100"], "--chunk-ms 100"),
        (["--batch", "0"], "--batch 0"),
        (["--model", "no-such-model"], "no-such-model"),
    ],
)
def test_errors_say_what_to_do(idle, capsys, arguments, what):
    assert accuracy.main(arguments) == 2
    said = capsys.readouterr()
    assert what in said.err
    assert "hint: " in said.err
    assert said.out == ""


def test_without_a_folder_it_is_the_bundled_clip(oracle, monkeypatch, idle, capsys):
    """`make bench` works on a machine without any corpus."""
    monkeypatch.setattr("sparqle_stream.models.load", lambda *_, **__: oracle)
    assert accuracy.main(["--vad", "off", "--without-ctc"]) == 0
    (of_set,) = json.loads(capsys.readouterr().out.splitlines()[-1])["sets"]
    assert (of_set["name"], of_set["recordings"]) == ("demo", 1)
    assert of_set["speech"]["words"] > 20


def test_speech_is_not_taken_as_noise(speech, capsys):
    assert accuracy.main(["--noise", str(speech)]) == 2
    assert "is no noise" in capsys.readouterr().err


def test_two_recordings_of_noise_with_one_id_are_two(oracle, idle, noise):
    of_set = manifests.read(noise)
    ids = tuple(replace(r, id="same") for r in of_set.recordings)
    twice = replace(of_set, recordings=(*ids, of_set.recordings[1]))
    result = accuracy.measure(oracle, QUICK, [twice], with_ctc=False)
    told = result["sets"][0]["noise"]
    assert (told["false_words"], told["recordings_with_words"]) == (2, 2)


def interrupt(monkeypatch, after: int) -> None:
    """Ctrl-C after so many recordings that were captioned, of whatever sets."""
    left = [after]

    def with_bar(items, name, n):
        for item in items:
            if not left[0]:
                raise KeyboardInterrupt
            left[0] -= 1
            yield item

    monkeypatch.setattr("bench.captioned.with_bar", with_bar)


def test_ctrl_c_leaves_what_was_done(command, idle, noise, monkeypatch, tmp_path):
    """All of the clean speech, and of the quiet one two recordings, with 6 words; no noise."""
    interrupt(monkeypatch, 6)
    path = tmp_path / "x.jsonl"
    more = ["--condition", "clean,quiet", "--noise", str(noise), "--transcripts", str(path)]
    status, result, err = command(*more)
    assert status == 130
    assert "interrupted" in err
    assert result["interrupted"] is True
    clean, quiet = result["sets"]
    assert (clean["recordings"], clean["speech"]["wer_percent"]) == (4, 40.0)
    assert "interrupted" not in clean
    assert (quiet["recordings"], quiet["recordings_in_manifest"]) == (2, 4)
    assert quiet["interrupted"] is True
    assert (quiet["speech"]["words"], quiet["speech"]["utterances"]) == (6, 2)
    assert "to_clean" not in quiet["speech"]
    assert "greedy_ctc" not in clean["speech"]
    assert len(path.read_text().splitlines()) == 6
    page = report.render([("x.json", result)])
    assert "2 of 4, **interrupted**" in page
    assert "`x.json` (**interrupted**)" in page


def test_ctrl_c_before_anything_was_done_is_no_result(command, idle, monkeypatch):
    interrupt(monkeypatch, 0)
    assert command("--without-ctc") == (130, {}, "interrupted\n")


def test_ctrl_c_while_the_ear_is_asked_leaves_the_captions(command, idle, monkeypatch):
    def hear(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("bench.accuracy.hear", hear)
    status, result, _ = command()
    assert (status, result["interrupted"]) == (130, True)
    assert result["sets"][0]["speech"]["wer_percent"] == 40.0
    assert "greedy_ctc" not in result["sets"][0]["speech"]


def test_transcripts_that_cannot_be_written_are_told_first(command, idle, tmp_path):
    (tmp_path / "a-file").touch()
    status, result, err = command("--transcripts", str(tmp_path / "a-file" / "x.jsonl"))
    assert (status, result) == (2, {})
    assert "check --transcripts" in err


def test_transcripts_that_fail_later_do_not_cost_the_result(command, idle):
    status, result, err = command("--without-ctc", "--transcripts", "/dev/full")
    assert status == 2
    assert "cannot write /dev/full" in err
    assert result["sets"][0]["speech"]["wer_percent"] == 40.0
