"""corpus.py: packs come back as they were written; files are decoded to 16 kHz mono."""

from __future__ import annotations

import wave

import numpy as np
import pytest

from sparqle_stream.errors import AudioFormatError, ConfigError
from training.corpus import Pack, PackWriter, after, decode_all, decode_file
from training.manifests import Recording

FACTS = {"speaker": "s1", "corpus": "c", "licence": "CC0"}


def write_wav(path, pcm, rate_hz):
    """pcm (S, channels) int16."""
    with wave.open(str(path), "wb") as out:
        out.setnchannels(pcm.shape[1])
        out.setsampwidth(2)
        out.setframerate(rate_hz)
        out.writeframes(pcm.tobytes())


def test_a_pack_comes_back_as_it_was_written(tmp_path):
    rng = np.random.default_rng(0)
    clips = [rng.integers(-32768, 32768, n, dtype=np.int16) for n in (1, 160, 0, 4097)]
    with PackWriter(tmp_path / "a") as writer:
        for i, pcm in enumerate(clips):
            writer.add(pcm, id=f"clip-{i}", text="Ünïcode\u2028text", **FACTS)
    pack = Pack(tmp_path / "a")
    assert [c.id for c in pack.clips] == ["clip-0", "clip-1", "clip-2", "clip-3"]
    assert pack.clips[3].text == "Ünïcode\u2028text"
    assert pack.clips[3].seconds == 4097 / 16_000
    for clip, pcm in zip(pack.clips, clips, strict=True):
        np.testing.assert_array_equal(pack.pcm(clip), pcm.astype(np.float32) / 32768)


def test_a_pack_with_an_unknown_fact_is_refused(tmp_path):
    with PackWriter(tmp_path) as writer, pytest.raises(TypeError, match="speeker"):
        writer.add(np.zeros(1, np.int16), id="a", text="", speeker="s", corpus="", licence="")


@pytest.mark.parametrize("rate_hz", [8_000, 16_000, 44_100])
def test_files_become_16_khz_mono(tmp_path, rate_hz):
    """Two seconds of 440 Hz in two channels, at half level once they are mixed."""
    t = np.arange(2 * rate_hz) / rate_hz
    tone = 16_000 * np.sin(2 * np.pi * 440 * t)
    write_wav(tmp_path / "a.wav", np.stack([tone, 0 * tone], axis=1).astype(np.int16), rate_hz)
    pcm = decode_file(tmp_path / "a.wav")
    assert pcm.dtype == np.int16
    assert abs(len(pcm) - 32_000) < 100
    middle = pcm[8_000:24_000].astype(np.float64)
    spectrum = np.abs(np.fft.rfft(middle))
    assert spectrum.argmax() == 440
    assert middle.max() == pytest.approx(8_000, rel=0.03)


def test_a_file_at_16_khz_is_not_touched(tmp_path):
    pcm = np.random.default_rng(0).integers(-32768, 32768, (5_000, 1), dtype=np.int16)
    write_wav(tmp_path / "a.wav", pcm, 16_000)
    np.testing.assert_array_equal(decode_file(tmp_path / "a.wav"), pcm[:, 0])


def some(n: int) -> list[np.ndarray]:
    rng = np.random.default_rng(1)
    return [rng.integers(-9, 9, 50 + i, dtype=np.int16) for i in range(n)]


def write(folder, clips, *, resume=False, until=None):
    """Writes what is not there yet; dies before clip `until`."""
    with PackWriter(folder, resume=resume) as writer:
        for i in range(int(writer.last_id or -1) + 1, len(clips)):
            if i == until:
                raise KeyboardInterrupt
            writer.add(clips[i], id=str(i), text="", **FACTS)


def test_a_pack_that_was_cut_short_is_gone_on_with(tmp_path):
    clips = some(6)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, clips, until=4)
    assert not (tmp_path / "index.jsonl").exists(), "nobody may take it for whole"
    write(tmp_path, clips, resume=True)
    pack = Pack(tmp_path)
    assert [clip.id for clip in pack.clips] == list("012345")
    for clip, pcm in zip(pack.clips, clips, strict=True):
        np.testing.assert_array_equal(pack.pcm(clip) * 32768, pcm)
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize(("n_audio", "n_index"), [(7, 0), (0, 7), (150, 300)])
def test_a_pack_goes_on_from_its_last_whole_clip(tmp_path, n_audio, n_index):
    """Killed by the system: the last bytes of audio and of the index were never written."""
    clips = some(6)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, clips, until=5)
    for name, n in (("audio.i16.part", n_audio), ("index.jsonl.part", n_index)):
        raw = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(raw[: len(raw) - n])
    write(tmp_path, clips, resume=True)
    pack = Pack(tmp_path)
    assert [clip.id for clip in pack.clips] == list("012345")
    for clip, pcm in zip(pack.clips, clips, strict=True):
        np.testing.assert_array_equal(pack.pcm(clip) * 32768, pcm)


def test_without_resume_it_begins_anew(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, some(6), until=4)
    write(tmp_path, some(2))
    assert [clip.length for clip in Pack(tmp_path).clips] == [50, 51]


def test_a_pack_is_not_written_over(tmp_path):
    write(tmp_path, some(2))
    for resume in (False, True):
        with pytest.raises(ConfigError, match="there is a pack in"):
            PackWriter(tmp_path, resume=resume)


def recordings(folder, names):
    return [
        Recording(
            id=name, path=folder / f"{name}.wav", text="", speaker="s", corpus="c", licence=""
        )
        for name in names
    ]


def test_what_is_left_begins_behind_the_last_clip(tmp_path):
    todo = recordings(tmp_path, ["a", "b", "a", "c"])
    assert [one.id for one in after(todo, "b")] == ["a", "c"]
    assert [one.id for one in after(todo, "a")] == ["c"]
    assert list(after(todo, "")) == todo
    with pytest.raises(ConfigError, match="ends with 'elsewhere'"):
        after(todo, "elsewhere")


def test_a_damaged_file_is_left_out_unless_it_is_the_first(tmp_path, caplog):
    todo = recordings(tmp_path, ["a", "b", "c"])
    for name in "ac":
        write_wav(tmp_path / f"{name}.wav", np.ones((800, 1), np.int16), 16_000)
    (tmp_path / "b.wav").write_text("no sound")
    assert [one.id for one, _ in decode_all(todo)] == ["a", "c"]
    assert "left out: " in caplog.text
    with pytest.raises(AudioFormatError, match="cannot be decoded"):
        list(decode_all(todo[1:]))


def test_packs_are_mapped_not_read(tmp_path):
    with PackWriter(tmp_path) as writer:
        writer.add(np.ones(16_000, np.int16), id="a", text="", **FACTS)
    assert isinstance(Pack(tmp_path).samples, np.memmap)


def test_a_file_that_is_no_sound_is_told(tmp_path):
    (tmp_path / "a.wav").write_text("no sound")
    for name in ("a.wav", "none.wav"):
        with pytest.raises(AudioFormatError, match=rf"{name} cannot be decoded"):
            decode_file(tmp_path / name)


def test_a_damaged_file_is_no_end_for_a_run_that_goes_on(tmp_path):
    todo = recordings(tmp_path, ["b", "c"])
    (tmp_path / "b.wav").write_text("no sound")
    write_wav(tmp_path / "c.wav", np.ones((800, 1), np.int16), 16_000)
    assert [one.id for one, _ in decode_all(todo, is_any=True)] == ["c"]


def test_a_pack_without_audio_is_told(tmp_path):
    write(tmp_path, [])
    with pytest.raises(ConfigError, match="is empty"):
        Pack(tmp_path)
