"""corpus.py: packs come back as they were written; files are decoded to 16 kHz mono."""

from __future__ import annotations

import wave

import numpy as np
import pytest

from sparqle_stream.errors import AudioFormatError
from training.corpus import Pack, PackWriter, decode_file

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
    writer = PackWriter(tmp_path / "a")
    for i, pcm in enumerate(clips):
        writer.add(pcm, id=f"clip-{i}", text="Ünïcode\u2028text", **FACTS)
    writer.close()
    pack = Pack(tmp_path / "a")
    assert [c.id for c in pack.clips] == ["clip-0", "clip-1", "clip-2", "clip-3"]
    assert pack.clips[3].text == "Ünïcode\u2028text"
    assert pack.clips[3].seconds == 4097 / 16_000
    for clip, pcm in zip(pack.clips, clips, strict=True):
        np.testing.assert_array_equal(pack.pcm(clip), pcm.astype(np.float32) / 32768)


def test_a_pack_with_an_unknown_fact_is_refused(tmp_path):
    writer = PackWriter(tmp_path)
    with pytest.raises(TypeError, match="speeker"):
        writer.add(np.zeros(1, np.int16), id="a", text="", speeker="s", corpus="", licence="")
    writer.close()


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


def test_packs_are_mapped_not_read(tmp_path):
    writer = PackWriter(tmp_path)
    writer.add(np.ones(16_000, np.int16), id="a", text="", **FACTS)
    writer.close()
    assert isinstance(Pack(tmp_path).samples, np.memmap)


def test_a_file_that_is_no_sound_is_told(tmp_path):
    (tmp_path / "a.wav").write_text("no sound")
    for name in ("a.wav", "none.wav"):
        with pytest.raises(AudioFormatError, match=rf"{name} cannot be decoded"):
            decode_file(tmp_path / name)
