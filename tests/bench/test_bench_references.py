"""References: other recognisers on the same files, published figures, their table on the page."""

from __future__ import annotations

import json

import pytest

from bench import accuracy, conditions, long_form, manifests, peers, references, report, scoring
from bench.peers import PEERS
from bench.settings import Settings

QUICK = Settings(vad="off", dtype="float32")


@pytest.fixture
def speech(make_folder):
    said = [("good day to all", "good day to all", "ann"), ("good day", "good night", "bob")]
    return make_folder(
        "sets/speech", [{"said": s, "text": text, "speaker": who} for s, text, who in said]
    )


@pytest.fixture
def parrot(monkeypatch):
    """A recogniser that always says the same; the lengths of what it heard."""
    heard: list[int] = []

    def hear(pcm, n_tokens):
        heard.append(len(pcm))
        return "good day"

    peer = peers.Peer("says good day", ("numpy",), lambda wanted: hear, has_real_weights=True)
    monkeypatch.setitem(PEERS, "parrot", peer)
    return heard


def test_only_recognisers_with_weights_can_be_asked():
    assert references.names() == ["pocketsphinx"]


def test_a_reference_hears_the_same_recordings(oracle, idle, speech, parrot):
    """'good day' against four and two words: two are missing, one is wrong; of six that is half.

    Under a condition it hears that; joined recordings are left to ours, beside their cut.
    """
    clean = manifests.read(speech)
    sets = [clean, conditions.under(clean, conditions.make("telephone"))]
    sets.append(long_form.joined(clean, 60.0, 0.16))
    result = accuracy.measure(oracle, QUICK, sets, with_ctc=False, reference=["parrot"])
    rows = [one for one in result["references"] if not one.get("published")]
    assert [(one["set"], one["condition"]) for one in rows] == [
        ("sets/speech", "clean"),
        ("sets/speech", "telephone"),
    ]
    for one in rows:
        counts = ("words", "substitutions", "deletions", "insertions", "utterances")
        assert [one[c] for c in counts] == [6, 1, 2, 0, 2]
        assert one["wer_percent"] == 50.0
        assert one["version"].startswith("numpy ")
        assert one["rtf"] >= 0
    lengths = [len(one.pcm()) for one in clean.recordings]
    assert parrot == 2 * [lengths[0], *lengths]  # the first one also to warm up
    page = report.render([("x.json", json.loads(json.dumps(result)))])
    assert "## Beside references" in page
    assert "| parrot: says good day | sets/speech | telephone | 50.0 |" in page
    assert "| Moonshine tiny, **published** | LibriSpeech test-clean | clean | 4.52 | - |" in page
    ours = "| ours: sparqle-base-en, chunk 320 ms, delay 240 ms, VAD off, float32 |"
    assert page.count(ours) == 2


def test_published_figures_name_their_source():
    rows = references.published()
    assert {one["set"] for one in rows} == {references.CLEAN, references.OTHER}
    for one in rows:
        assert one["published"]
        assert one["source"]
        assert 0 < one["wer_percent"] < 30
    for name in ("Whisper tiny.en", "Whisper base.en", "Moonshine tiny", "Moonshine base"):
        assert sum(one["system"] == name for one in rows) == 2


def test_published_rows_stand_once_on_the_page(oracle, idle, speech, parrot):
    sets = [manifests.read(speech)]
    result = accuracy.measure(oracle, QUICK, sets, with_ctc=False, reference=["parrot"])
    result = json.loads(json.dumps(result))
    page = report.render([("x.json", result), ("y.json", result)])
    assert page.count("| Moonshine tiny, **published** | LibriSpeech test-clean |") == 1


def test_a_page_without_any_has_no_section(oracle, idle, speech):
    result = accuracy.measure(oracle, QUICK, [manifests.read(speech)], with_ctc=False)
    page = report.render([("x.json", json.loads(json.dumps(result)))])
    for section in ("Beside references", "Conditions", "Long form", "Delay and chunk"):
        assert f"## {section}" not in page


def test_long_form_is_on_the_page(oracle, idle, speech):
    long = long_form.joined(manifests.read(speech), 60.0, 0.16)
    result = accuracy.measure(oracle, QUICK, [long], with_ctc=False)
    page = report.render([("x.json", json.loads(json.dumps(result)))])
    assert "## Long form" in page
    assert "| 0, 1 | 2, 2 s | 16.7 | 16.7 | **1.00** | `x.json` |" in page


@pytest.mark.parametrize("name", ["sparqle", "transformers-tiny-offline", "nobody"])
def test_an_unknown_reference_is_refused(idle, speech, capsys, name):
    """Ours, and peers whose weights are random, are no references."""
    assert accuracy.main([str(speech), "--reference", name]) == 2
    said = capsys.readouterr().err
    assert f"unknown reference '{name}'" in said
    assert "hint: pocketsphinx" in said


def test_a_reference_that_is_not_installed(idle, monkeypatch, speech, capsys):
    """Said in one line with the way out, before anything is loaded."""
    absent = peers.Peer("x", ("no-such-package",), lambda wanted: None, has_real_weights=True)
    monkeypatch.setitem(PEERS, "pocketsphinx", absent)
    assert accuracy.main([str(speech), "--reference", "pocketsphinx"]) == 2
    said = capsys.readouterr().err
    assert "error: pocketsphinx needs no-such-package" in said
    assert "hint: pip install -e .[peers]" in said


# --- ratios ------------------------------------------------------------------------------------


def tally(errors: int, words: int = 10) -> scoring.Tally:
    return scoring.Tally(utterances=1, words=words, substitutions=errors)


def test_a_ratio_by_hand():
    """4 of 20 wrong instead of 2 of 20: twice; drawn together every group says the same."""
    found = scoring.ratio([(tally(2), tally(1)), (tally(2), tally(1))])
    assert found == {"ratio": 2.0, "ratio_interval_95": [2.0, 2.0]}
    few, many = scoring.ratio([(tally(2), tally(1)), (tally(6), tally(1))])["ratio_interval_95"]
    assert (few, many) == (2.0, 6.0)


def test_a_ratio_of_one_group_has_no_interval():
    assert scoring.ratio([(tally(3), tally(2))]) == {"ratio": 1.5, "ratio_interval_95": None}


def test_nothing_to_divide_by():
    """Nothing wrong on the other side, in all or in some of the draws; and no words at all."""
    assert scoring.ratio([(tally(3), tally(0))]) == {"ratio": None, "ratio_interval_95": None}
    some = scoring.ratio([(tally(3), tally(0)), (tally(3), tally(3))])
    assert some == {"ratio": 2.0, "ratio_interval_95": None}
    nothing = scoring.ratio([(tally(0, 0), tally(0, 0))])
    assert nothing == {"ratio": None, "ratio_interval_95": None}
