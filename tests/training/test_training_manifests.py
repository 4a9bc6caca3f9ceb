"""prepare pack: manifests of ours and lhotse's become one pack, sample by sample."""

from __future__ import annotations

import gzip
import json
import sys

import numpy as np
import pytest

from sparqle_stream.errors import ConfigError
from training import prepare
from training.corpus import Pack, PackWriter
from training.manifests import read, read_all

# What lhotse 1.33 wrote for `MonoCut.to_dict` of a second half of a recording, but for the paths.
CUT = {
    "id": "one-2",
    "start": 0.5,
    "duration": 0.25,
    "channel": 0,
    "supervisions": [
        {
            "id": "one-2-s",
            "recording_id": "one",
            "start": 0.0,
            "duration": 0.25,
            "channel": 0,
            "text": "half of it",
            "language": "English",
            "speaker": "s7",
            "custom": {"translated_text": {"de": "die Hälfte"}, "answer": "yes"},
        }
    ],
    "recording": {
        "id": "one",
        "sources": [{"type": "file", "channels": [0], "source": "one.wav"}],
        "sampling_rate": 16000,
        "num_samples": 16000,
        "duration": 1.0,
        "channel_ids": [0],
    },
    "type": "MonoCut",
}


def write_wav(path, pcm):
    import wave

    with wave.open(str(path), "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(2)
        out.setframerate(16_000)
        out.writeframes(pcm.tobytes())


@pytest.fixture
def ramp(tmp_path):
    """A second that counts its samples, as one.wav."""
    pcm = np.arange(16_000, dtype=np.int16)
    write_wav(tmp_path / "one.wav", pcm)
    return pcm


def pack(monkeypatch, *argv):
    monkeypatch.setattr(sys, "argv", ["prepare", "pack", *map(str, argv)])
    prepare.main()
    return Pack(argv[0])


@pytest.mark.parametrize("name", ["cuts.jsonl", "my_cuts_train.jsonl.gz"])
def test_cuts_of_lhotse_are_parts_of_recordings(tmp_path, ramp, monkeypatch, name):
    first = CUT | {"id": "one-1", "start": 0.0, "supervisions": []}
    raw = "".join(json.dumps(cut) + "\n" for cut in (first, CUT)).encode()
    (tmp_path / name).write_bytes(gzip.compress(raw) if name.endswith("gz") else raw)
    for i, source in enumerate((tmp_path, tmp_path / name)):  # the folder, or the file itself
        made = pack(monkeypatch, tmp_path / f"pack{i}", source)
        assert [c.id for c in made.clips] == ["one-1", "one-2"]
        assert [c.text for c in made.clips] == ["", "half of it"]
        assert made.clips[1].speaker == "s7"
        assert made.clips[1].targets == {"translate to de": "die Hälfte", "answer": "yes"}
        heard = [np.rint(made.pcm(c) * 32768).astype(int) for c in made.clips]
        np.testing.assert_array_equal(heard[0], ramp[:4000])
        np.testing.assert_array_equal(heard[1], ramp[8000:12000])


def test_our_manifest_carries_everything(tmp_path, ramp, monkeypatch):
    row = {"id": "a", "audio": "one.wav", "text": "so", "speaker": "s", "corpus": "c"}
    row |= {"licence": "CC0", "translations": {"fr": "donc"}}
    (tmp_path / "manifest.jsonl").write_text(json.dumps(row) + "\n")
    (clip,) = pack(monkeypatch, tmp_path / "pack", tmp_path).clips
    assert (clip.text, clip.speaker, clip.corpus, clip.licence) == ("so", "s", "c", "CC0")
    assert (clip.length, clip.targets) == (16_000, {"translate to fr": "donc"})


def test_what_cannot_be_read_is_one_line(tmp_path, ramp, monkeypatch, capsys):
    del ramp
    (tmp_path / "cuts.jsonl").write_text(json.dumps({"id": "m", "tracks": []}) + "\n")
    with pytest.raises(SystemExit) as exit_:
        pack(monkeypatch, tmp_path / "pack", tmp_path)
    assert exit_.value.code == 2
    err = capsys.readouterr().err.splitlines()
    assert err[0].startswith("error: line 1 of cuts.jsonl cannot be used")
    assert err[1].startswith("hint: ")


def test_lhotse_writes_what_is_read(tmp_path, ramp):
    """The real package, where it is installed: cuts of its recordings and supervisions."""
    lhotse = pytest.importorskip("lhotse")
    recording = lhotse.Recording.from_file(tmp_path / "one.wav")
    said = lhotse.SupervisionSegment("s", "one", 0.5, 0.25, text="half of it", speaker="s7")
    said.custom = {"translated_text": {"de": "die Hälfte"}}
    recordings = lhotse.RecordingSet.from_recordings([recording])
    supervisions = lhotse.SupervisionSet.from_segments([said])
    cuts = lhotse.CutSet.from_manifests(recordings, supervisions).trim_to_supervisions()
    cuts.to_file(tmp_path / "cuts.jsonl.gz")
    (one,) = read(tmp_path)[1]
    assert (one.text, one.speaker, one.start_s, one.seconds) == ("half of it", "s7", 0.5, 0.25)
    assert one.targets == (("translate to de", "die Hälfte"),)
    np.testing.assert_array_equal(np.rint(one.pcm() * 32768), ramp[8000:12000])


def lines(folder, *rows):
    text = "".join(json.dumps({"text": ""} | row) + "\n" for row in rows)
    (folder / "manifest.jsonl").write_text(text)


def test_recordings_without_ids_have_those_of_their_paths(tmp_path):
    """Names of files are there twice, and ids tell what was done: clips were lost and doubled."""
    lines(tmp_path, {"audio": "spk1/000.wav"}, {"audio": "spk2/000.wav"}, {"audio": "./a", "id": 7})
    assert [one.id for one in read_all([tmp_path])] == ["spk1/000", "spk2/000", "7"]


def test_an_id_that_is_there_twice_is_refused(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    lines(tmp_path, {"audio": "1.wav", "id": "x"}, {"audio": "2.wav", "id": "x"})
    lines(tmp_path / "a", {"audio": "1.wav"})
    lines(tmp_path / "b", {"audio": "1.wav"})
    with pytest.raises(ConfigError, match="2 recordings have the id 'x'"):
        read_all([tmp_path])
    with pytest.raises(ConfigError, match="2 recordings have the id '1'"):
        read_all([tmp_path / "a", tmp_path / "b"])


def test_an_empty_manifest_makes_no_pack(tmp_path, monkeypatch, capsys):
    lines(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        pack(monkeypatch, tmp_path / "pack", tmp_path)
    assert "error: there are no recordings in" in capsys.readouterr().err
    assert not (tmp_path / "pack").exists()


def test_packing_goes_on_with_a_damaged_file(tmp_path, ramp, monkeypatch, caplog):
    lines(tmp_path, {"audio": "one.wav"}, {"audio": "bad.wav"}, {"audio": "two.wav"})
    (tmp_path / "bad.wav").write_text("no sound")
    write_wav(tmp_path / "two.wav", ramp[:9])
    facts = {"text": "", "speaker": "", "corpus": "", "licence": ""}
    writer = PackWriter(tmp_path / "pack")
    writer.add(ramp, id="one", **facts)
    writer.__exit__(KeyboardInterrupt)
    made = pack(monkeypatch, tmp_path / "pack", tmp_path, "--resume")
    assert [clip.id for clip in made.clips] == ["one", "two"]
    assert "left out: " in caplog.text
