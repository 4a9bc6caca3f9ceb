"""Manifests of others, parts of files, and recordings in a row."""

from __future__ import annotations

import gzip
import json

import numpy as np
import pytest
from bench_wav import write_wav

from bench import long_form, manifests
from bench.manifests import Recording, RecordingSet
from sparqle_stream.errors import ConfigError


def ramp(first: int, n: int) -> np.ndarray:
    """n samples that count from `first` on, in steps of 16-bit audio."""
    return (np.arange(first, first + n) / 32768).astype(np.float32)


def counts(pcm: np.ndarray) -> list[int]:
    return np.rint(pcm * 32768).astype(int).tolist()


@pytest.fixture
def librispeech(tmp_path):
    folder = tmp_path / "test-clean"
    for speaker, chapter, lines in (
        ("84", "121123", ["0000 GO DO YOU HEAR", "0001 BUT IN LESS THAN FIVE MINUTES"]),
        ("61", "70968", ["0000 HE BEGAN A CONFUSED COMPLAINT"]),
    ):
        place = folder / speaker / chapter
        place.mkdir(parents=True)
        name = f"{speaker}-{chapter}"
        (place / f"{name}.trans.txt").write_text("".join(f"{name}-{x}\n" for x in lines))
        for line in lines:
            write_wav(place / f"{name}-{line[:4]}.wav", ramp(0, 800))
    return folder


def test_a_librispeech_folder(librispeech):
    found = manifests.read(librispeech)
    assert [(r.id, r.speaker, r.text) for r in found.recordings] == [
        ("61-70968-0000", "61", "HE BEGAN A CONFUSED COMPLAINT"),
        ("84-121123-0000", "84", "GO DO YOU HEAR"),
        ("84-121123-0001", "84", "BUT IN LESS THAN FIVE MINUTES"),
    ]
    assert found.corpora == ["librispeech"]
    assert found.n_all == 3
    manifests.require_files([found])
    assert manifests.read(librispeech, every=2).n_all == 3
    assert len(manifests.read(librispeech, every=2).recordings) == 2


def test_a_recording_of_librispeech_that_is_missing_is_named(librispeech):
    next(librispeech.rglob("*0001.wav")).unlink()
    with pytest.raises(ConfigError, match=r"84-121123-0001\.flac"):
        manifests.require_files([manifests.read(librispeech)])


def recording(name: str, **fields) -> dict:
    source = {"type": "file", "channels": [0], "source": f"{name}.wav"}
    return {"id": name, "sources": [source], "sampling_rate": 16_000, "duration": 0.1} | fields


def supervision(name: str, start: float, text: str | None, **fields) -> dict:
    fixed = {"id": name, "recording_id": "a", "start": start, "duration": 0.02, "channel": 0}
    return fixed | {"text": text, "speaker": "ann"} | fields


def write_lines(path, entries, *, zipped=False) -> None:
    data = "".join(json.dumps(entry) + "\n" for entry in entries).encode()
    path.write_bytes(gzip.compress(data) if zipped else data)


@pytest.mark.parametrize("zipped", [False, True])
def test_cuts_of_lhotse(tmp_path, zipped):
    write_wav(tmp_path / "a.wav", ramp(0, 1600))
    said = [supervision("s2", 0.03, "day"), supervision("s1", 0.0, "good")]
    cut = {"id": "c", "start": 0.05, "duration": 0.025, "channel": 0, "type": "MonoCut"}
    cuts = [
        cut | {"supervisions": said, "recording": recording("a")},
        cut | {"id": "quiet", "supervisions": [], "recording": recording("a")},
    ]
    write_lines(tmp_path / f"cuts_test.jsonl{'.gz' if zipped else ''}", cuts, zipped=zipped)
    first, quiet = manifests.read(tmp_path).recordings
    assert (first.id, first.text, first.speaker) == ("c", "good day", "ann")
    assert counts(first.pcm()) == list(range(800, 1200))  # 25 ms from 50 ms on
    assert first.length_s() == 0.025
    assert (quiet.text, quiet.speaker) == ("", "")


def test_recordings_and_supervisions_of_lhotse(tmp_path):
    write_wav(tmp_path / "a.wav", ramp(0, 1600))
    write_lines(tmp_path / "recordings.jsonl", [recording("a"), recording("b")])
    said = [supervision("s1", 0.01, "good day"), supervision("s2", 0.05, None, speaker=None)]
    write_lines(tmp_path / "supervisions.jsonl.gz", said, zipped=True)
    first, second = manifests.read(tmp_path).recordings
    assert (first.id, first.text, first.speaker) == ("s1", "good day", "ann")
    assert counts(first.pcm()) == list(range(160, 480))
    assert (second.text, second.speaker) == ("", "")


@pytest.mark.parametrize(
    "broken",
    [
        recording("a", sources=[]),
        recording("a", sources=[{"type": "url", "channels": [0], "source": "http://x"}]),
        recording("a", sources=[{"type": "file", "channels": [0, 1], "source": "a.wav"}]),
    ],
)
def test_what_cannot_be_used_is_named_with_its_line(tmp_path, broken):
    write_lines(tmp_path / "recordings.jsonl", [broken])
    write_lines(tmp_path / "supervisions.jsonl", [supervision("s1", 0.0, "x")])
    with pytest.raises(ConfigError, match=r"line 1 of supervisions\.jsonl"):
        manifests.read(tmp_path)


def test_lines_that_are_no_json(tmp_path):
    (tmp_path / "cuts.jsonl").write_text('{"id"\n')
    with pytest.raises(ConfigError, match=r"line 1 of cuts\.jsonl is not JSON"):
        manifests.read(tmp_path)


def test_a_folder_without_anything(tmp_path):
    with pytest.raises(ConfigError, match="LibriSpeech"):
        manifests.read(tmp_path)


# --- long-form ---------------------------------------------------------------------------------


def clip(tmp_path, name: str, speaker: str, n: int, text: str = "x") -> Recording:
    path = tmp_path / f"{name}.wav"
    write_wav(path, ramp(1000 * int(name), n))
    return Recording(name, path, text, speaker)


def test_neighbours_of_a_speaker_are_joined(tmp_path):
    """0.1 s each, wanted 0.25 s with pauses of 0.05 s: two and a pause are just that. What is left
    of ann is too short and goes on with what cal has; what is no speech stays out.
    """
    speakers = [("1", "ann"), ("2", "ann"), ("3", "ann"), ("4", "bob"), ("5", "bob"), ("7", "cal")]
    clips = [clip(tmp_path, name, speaker, 1600, f"t{name}") for name, speaker in speakers]
    noise = clip(tmp_path, "6", "bob", 1600, "")
    long = long_form.joined(RecordingSet("sets/x", (*clips, noise), "f", 7), 0.25, 0.05)
    assert [r.text for r in long.recordings] == ["t1 t2", "t4 t5", "t3 t7"]
    assert [r.speaker for r in long.recordings] == ["ann", "bob", "ann+1"]
    assert [r.id for r in long.recordings] == ["1+1", "4+1", "3+1"]
    assert long.n_all == 3
    assert long.name == "sets/x, joined to 0.25 s"
    assert long.cut == RecordingSet("sets/x", tuple(clips), "f", 7)
    first = long.recordings[0]
    assert first.length_s() == pytest.approx(0.25)
    pcm = counts(first.pcm())
    assert pcm == [*range(1000, 2600), *[0] * 800, *range(2000, 3600)]
    manifests.require_files([long])
    assert long_form.facts(long) == {
        "joined_to_s": 0.25,
        "pause_s": 0.05,
        "recordings": 3,
        "of_one_speaker": 2,
        "across_speakers": 1,
        "shorter": 0,
        "shortest_s": 0.2,
        "longest_s": 0.2,
    }


def test_speakers_with_too_little_are_joined_with_others_and_the_end_is_short(tmp_path):
    """Nobody has 0.3 s: 1 to 3 are, 4 stands alone. Who speaks in 4 and 5 is not known."""
    speakers = [("1", "ann"), ("2", "bob"), ("3", "cal"), ("4", ""), ("5", "")]
    clips = [clip(tmp_path, name, speaker, 1600, f"t{name}") for name, speaker in speakers]
    long = long_form.joined(RecordingSet("sets/x", tuple(clips), "f", 5), 0.3, 0.0)
    assert [r.text for r in long.recordings] == ["t1 t2 t3", "t4 t5"]
    assert [r.speaker for r in long.recordings] == ["ann+2", ""]
    told = long_form.facts(long)
    counts = ("of_one_speaker", "across_speakers", "shorter")
    assert [told[c] for c in counts] == [0, 2, 1]


@pytest.mark.parametrize(("seconds", "pause_s"), [(0.0, 0.5), (-1.0, 0.5), (9.0, -0.1)])
def test_lengths_that_make_no_sense(tmp_path, seconds, pause_s):
    one = RecordingSet("n", (clip(tmp_path, "1", "", 160),), "f", 1)
    with pytest.raises(ConfigError, match="nothing can be joined"):
        long_form.joined(one, seconds, pause_s)


def test_a_missing_part_is_named(tmp_path):
    clips = [clip(tmp_path, name, "ann", 1600) for name in "12"]
    long = long_form.joined(RecordingSet("sets/x", tuple(clips), "f", 2), 10.0, 0.0)
    clips[1].path.unlink()
    with pytest.raises(ConfigError, match=r"2\.wav"):
        manifests.require_files([long])


def test_noise_alone_cannot_be_joined(tmp_path):
    with pytest.raises(ConfigError, match="no texts"):
        long_form.joined(RecordingSet("n", (clip(tmp_path, "1", "", 160, ""),), "f", 1), 9.0, 0.0)
