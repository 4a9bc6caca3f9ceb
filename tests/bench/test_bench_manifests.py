"""Manifests: what is read, what is left out, and errors with the number of the line."""

from __future__ import annotations

import json

import pytest

from bench import manifests
from sparqle_stream.errors import ConfigError


def write(folder, entries) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    lines = [entry if isinstance(entry, str) else json.dumps(entry) for entry in entries]
    (folder / "manifest.jsonl").write_text("\n".join(lines) + "\n")


def test_a_folder_becomes_recordings(tmp_path):
    folder = tmp_path / "dev" / "varied"
    write(
        folder,
        [
            {
                "id": "a1",
                "audio": "audio/a1.opus",
                "text": "Hi.",
                "speaker": "s1",
                "corpus": "cv",
            },
            "",
            {"audio": "b/noise.wav", "text": ""},
        ],
    )
    got = manifests.read(folder)
    assert got.name == "dev/varied"
    assert got.n_all == 2
    first, second = got.recordings
    assert (first.id, first.path, first.text) == ("a1", folder / "audio/a1.opus", "Hi.")
    assert (first.speaker, second.speaker) == ("s1", "")
    assert second.id == "b/noise"
    assert got.corpora == ["cv"]


def test_a_part_of_a_folder_says_what_it_is_a_part_of(tmp_path):
    write(tmp_path, [{"audio": f"{i}.wav", "text": "x"} for i in range(10)])
    assert [r.id for r in manifests.read(tmp_path, every=4).recordings] == ["0", "4", "8"]
    few = manifests.read(tmp_path, limit=2)
    assert [r.id for r in few.recordings] == ["0", "1"]
    assert few.n_all == 10
    assert few.fingerprint == manifests.read(tmp_path).fingerprint


def test_the_fingerprint_changes_with_a_text(tmp_path):
    write(tmp_path, [{"audio": "a.wav", "text": "one"}])
    before = manifests.read(tmp_path).fingerprint
    write(tmp_path, [{"audio": "a.wav", "text": "two"}])
    assert manifests.read(tmp_path).fingerprint != before


@pytest.mark.parametrize(
    ("bad", "what"),
    [
        ("not json", "line 2"),
        ('{"audio": "a.wav"}', "'text'"),
        ('{"text": "x"}', "'audio'"),
        ('["a.wav", "x"]', "line 2"),
        ('{"audio": "a.wav", "text": null}', "not a string"),
    ],
)
def test_a_line_that_cannot_be_used_is_named(tmp_path, bad, what):
    write(tmp_path, [{"audio": "a.wav", "text": "x"}, bad])
    with pytest.raises(ConfigError, match=what) as refused:
        manifests.read(tmp_path)
    assert "line 2" in refused.value.message


@pytest.mark.parametrize(("every", "limit"), [(0, None), (-1, None), (1, 0)])
def test_a_part_must_be_something(tmp_path, every, limit):
    with pytest.raises(ConfigError, match="nothing"):
        manifests.read(tmp_path, every, limit)


def test_a_recording_that_is_missing_is_said_at_once(tmp_path):
    write(tmp_path, [{"audio": "a.wav", "text": "x"}, {"audio": "b.wav", "text": "x"}])
    (tmp_path / "a.wav").write_bytes(b"RIFF")
    with pytest.raises(ConfigError, match=r"b\.wav"):
        manifests.require_files([manifests.read(tmp_path)])
    manifests.require_files([manifests.read(tmp_path, limit=1)])


def test_no_manifest_and_an_empty_one_are_errors(tmp_path):
    with pytest.raises(ConfigError, match="no manifest.jsonl"):
        manifests.read(tmp_path)
    write(tmp_path, [])
    with pytest.raises(ConfigError, match="no recordings"):
        manifests.read(tmp_path)


def test_noise_in_which_somebody_speaks_is_refused(tmp_path):
    write(tmp_path, [{"audio": "a.wav", "text": ""}])
    manifests.require_noise(manifests.read(tmp_path))
    write(tmp_path, [{"audio": "a.wav", "text": ""}, {"audio": "b.wav", "text": "hello"}])
    with pytest.raises(ConfigError, match="b in"):
        manifests.require_noise(manifests.read(tmp_path))


def test_the_bundled_clip_has_sound_and_text():
    (clip,) = manifests.bundled().recordings
    assert clip.path.stat().st_size > 10_000
    assert len(clip.text.split()) > 10


def test_files_have_no_texts(tmp_path):
    got = manifests.of_files([tmp_path / "x.wav", tmp_path / "y.ogg"])
    assert [(r.id, r.text) for r in got.recordings] == [("x", ""), ("y", "")]


def test_who_has_no_id_is_named_after_its_path(tmp_path):
    """Names of files are there twice; a part of the folder has the same ids as the whole."""
    paths = ["a/1.wav", "b/1.wav", "b/2.wav", f"{tmp_path}/c/3.wav"]
    write(tmp_path, [{"audio": path, "text": ""} for path in paths])
    assert [r.id for r in manifests.read(tmp_path).recordings] == ["a/1", "b/1", "b/2", "c/3"]
    assert [r.id for r in manifests.read(tmp_path, limit=1).recordings] == ["a/1"]


def test_an_id_that_was_given_twice_is_refused(tmp_path):
    write(tmp_path, [{"id": "x", "audio": f"{i}.wav", "text": ""} for i in range(2)])
    with pytest.raises(ConfigError, match="2 recordings have the id 'x'") as refused:
        manifests.read(tmp_path)
    assert str(tmp_path) in refused.value.message
    write(tmp_path, [{"audio": "1.wav", "text": ""}] * 3)
    with pytest.raises(ConfigError, match="3 recordings have the id '1'"):
        manifests.read(tmp_path)
