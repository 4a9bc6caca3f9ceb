"""label.py: what is read into recordings, and what of it is believed."""

from __future__ import annotations

import json
import math
import wave

import numpy as np
import pytest
import torch
from lexicons import lexicon_of

from sparqle_stream import testing
from training import label as labels
from training import manifests
from training.corpus import Pack

TEXTS = [["bad", "day"], ["day", "bad", "day"], ["bad"]]


@pytest.fixture(scope="module")
def lexicon():
    return lexicon_of(TEXTS)


def spelled(*words: str, sure: float) -> np.ndarray:
    """(T, V): every piece of the words for a frame, a blank after it."""
    pieces = testing.tiny_pieces()
    path = [i for word in words for piece in pieces.encode(word) for i in (piece, 0)]
    rest = (1.0 - sure) / (pieces.size - 1)
    probs = np.full((len(path), pieces.size), rest, np.float32)
    probs[range(len(path)), path] = sure
    return np.log(probs)


def test_the_reading_is_that_of_the_beam(lexicon):
    assert labels.read(spelled("bad", "day", sure=0.9), lexicon) == "bad day"
    assert labels.read(spelled(sure=0.9), lexicon) == ""


def test_sureness_is_the_text_s_share_of_what_was_heard():
    pieces = testing.tiny_pieces()
    clear, dim = (spelled("bad", "day", sure=sure) for sure in (0.99, 0.6))
    assert labels.sureness(clear, "bad day", pieces) == pytest.approx(2 * math.log(0.99), abs=1e-3)
    assert labels.sureness(dim, "bad day", pieces) == pytest.approx(2 * math.log(0.6), abs=1e-3)
    assert labels.sureness(clear, "day day", pieces) < labels.sureness(dim, "bad day", pieces)
    assert labels.sureness(clear, "", pieces) == -np.inf


@pytest.fixture
def run(tmp_path, lexicon, monkeypatch):
    """Labels three recordings into `out`, of which one is sure; with further options."""
    rows = []
    for i in range(3):
        with wave.open(str(tmp_path / f"{i}.wav"), "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(16_000)
            file.writeframes((np.arange(16_000 + 640 * i) % 100).astype("<i2").tobytes())
        rows.append({"id": str(i), "audio": f"{i}.wav", "text": "", "speaker": f"s{i}"})
    lines = "\n".join(json.dumps(row) for row in rows)
    (tmp_path / manifests.MANIFEST).write_text(lines)
    heard = [spelled("bad", sure=0.99), spelled("day", sure=0.3), spelled(sure=0.9)]
    monkeypatch.setattr(labels, "load_ear", lambda *_: (None, None))
    monkeypatch.setattr(
        labels,
        "posteriors",
        lambda _encoder, _head, pcm, *_: (
            (i, torch.from_numpy(heard[(len(x) - 16_000) // 640])) for i, x in enumerate(pcm)
        ),
    )
    monkeypatch.setattr(labels.CtcPieces, "load", lambda _: testing.tiny_pieces())
    monkeypatch.setattr(labels.Lexicon, "load", lambda *_: lexicon)
    given = ["--ear", "ear", "--pieces", "pieces", "--words", "words"]

    def run(*more: str) -> None:
        argv = ["label", str(tmp_path / "out"), str(tmp_path), *given, *more]
        monkeypatch.setattr("sys.argv", argv)
        labels.main()

    return run


def test_nothing_that_is_sure_is_said(run, capsys):
    run("--least", "0")
    assert "0 of 3 recordings, 0.00 h" in capsys.readouterr().out


def test_a_damaged_file_costs_itself_wherever_it_lies(run, tmp_path, monkeypatch, capsys):
    """Also at the beginning of what is heard at once."""
    monkeypatch.setattr(labels, "HEARD_AT_ONCE", 1)
    (tmp_path / "1.wav").write_text("no sound")
    run()
    assert "1 of 3 recordings" in capsys.readouterr().out


def test_a_pack_has_what_was_sure(run, tmp_path, capsys):
    """Texts of the manifest are not looked at; the audio is kept as it was."""
    run()
    pack = Pack(tmp_path / "out")
    assert [(clip.id, clip.text, clip.speaker) for clip in pack.clips] == [("0", "bad", "s0")]
    assert np.array_equal(pack.samples, np.arange(16_000) % 100)
    assert "1 of 3 recordings" in capsys.readouterr().out


def test_labelling_goes_on_without_loss_where_it_was_killed(run, tmp_path, monkeypatch):
    """Recordings are heard by their length and written in their order: the last one tells."""
    heard_in_order, sureness, n_read = labels.posteriors, labels.sureness, []

    def heard(*args):
        return reversed(list(heard_in_order(*args)))

    def killed(*args):
        n_read.append(args)
        if len(n_read) == 3:
            raise KeyboardInterrupt
        return sureness(*args)

    monkeypatch.setattr(labels, "posteriors", heard)
    monkeypatch.setattr(labels, "sureness", killed)
    with pytest.raises(SystemExit, match="130"):
        run("--least", "-99")
    run("--least", "-99", "--resume")
    assert [clip.id for clip in Pack(tmp_path / "out").clips] == ["0", "1"]


def test_a_manifest_without_recordings_is_refused(run, tmp_path, capsys):
    (tmp_path / manifests.MANIFEST).write_text("")
    with pytest.raises(SystemExit, match="2"):
        run()
    assert "error: there are no recordings in" in capsys.readouterr().err
