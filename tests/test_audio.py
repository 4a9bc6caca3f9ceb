"""Audio: packets in any cut, encoding, rate; files in any container; and everything that is not."""

from __future__ import annotations

import errno
import io
import logging
import os
import pathlib
import struct
import threading
import tracemalloc
import wave
from fractions import Fraction
from typing import TYPE_CHECKING

import av
import numpy as np
import pytest

from sparqle_stream import audio
from sparqle_stream.audio import AudioFormat
from sparqle_stream.errors import AudioFormatError

if TYPE_CHECKING:
    from pathlib import Path

RATES_HZ = (8_000, 11_025, 16_000, 22_050, 24_000, 32_000, 44_100, 48_000)
# Measured lag of the resampler in samples at 16 kHz; its window never holds more.
LAG_SAMPLES = {8_000: 480, 11_025: 349, 22_050: 175, 24_000: 160, 32_000: 120, 44_100: 219}


def run(fmt: AudioFormat, packets: list[bytes]) -> tuple[audio.AudioState, np.ndarray]:
    """All packets, then the end -> (state before the end, PCM)."""
    state, out = audio.init_state(fmt), []
    for packet in packets:
        state, pcm = audio.step(fmt, state, packet)
        out.append(pcm)
    out.append(audio.finish(fmt, state))
    return state, np.concatenate(out)


def tone(hz: float, rate_hz: int, seconds: float, peak: float = 0.5) -> np.ndarray:
    return peak * np.sin(2 * np.pi * hz * np.arange(int(rate_hz * seconds)) / rate_hz)


def level_of(pcm: np.ndarray, hz: float) -> float:
    """Amplitude of one tone in the middle of a signal at 16 kHz."""
    middle = pcm[2_000:-2_000]
    window = np.hanning(len(middle))
    carrier = np.exp(-2j * np.pi * hz * np.arange(len(middle)) / 16_000)
    return float(2 * np.abs(np.sum(middle * window * carrier)) / window.sum())


# Packets


@pytest.mark.parametrize("encoding", sorted(audio.SAMPLE_BYTES))
@pytest.mark.parametrize("rate_hz", RATES_HZ)
def test_any_cut_equals_one_call(encoding, rate_hz):
    """Random bytes (NaN and infinities among the floats), cut at random, also inside a sample."""
    for channels in (1, 2, 3, 12):
        rng = np.random.default_rng(rate_hz + channels)
        fmt = AudioFormat(encoding, rate_hz, channels)
        raw = rng.bytes(int(rng.integers(3_000)) * fmt.row_bytes + int(rng.integers(fmt.row_bytes)))
        cuts = np.sort(rng.integers(0, len(raw) + 1, size=40)).tolist()
        pieces = [raw[a:b] for a, b in zip([0, *cuts], [*cuts, len(raw)], strict=True)]
        whole_state, whole = run(fmt, [raw])
        cut_state, cut = run(fmt, pieces)
        np.testing.assert_array_equal(cut, whole)
        assert (cut_state.odd, cut_state.n_in, cut_state.n_out) == (
            whole_state.odd,
            whole_state.n_in,
            whole_state.n_out,
        )
        assert whole.dtype == np.float32
        assert np.isfinite(whole).all()
        assert np.abs(whole).max(initial=0) <= 1


@pytest.mark.parametrize("size", [1, 7, 160, 4_096])
def test_packets_of_one_size_equal_one_call(size):
    fmt = AudioFormat("s16le", 44_100, 2)
    raw = np.random.default_rng(size).bytes(6_000)
    _, whole = run(fmt, [raw])
    _, cut = run(fmt, [raw[at : at + size] for at in range(0, len(raw), size)])
    np.testing.assert_array_equal(cut, whole)


@pytest.mark.parametrize("rate_hz", RATES_HZ)
def test_resampling_keeps_tones_time_and_length(rate_hz):
    """Two tones under 3.6 kHz come out as they went in, in phase, and nothing else is added."""
    want = tone(440, 16_000, 2, 0.3) + tone(3_400, 16_000, 2, 0.2)
    sent = tone(440, rate_hz, 2, 0.3) + tone(3_400, rate_hz, 2, 0.2)
    _, pcm = run(AudioFormat("f32le", rate_hz), [sent.astype("<f4").tobytes()])
    assert abs(len(pcm) - 32_000) <= 1
    assert level_of(pcm, 440) == pytest.approx(0.3, abs=1e-4)
    assert level_of(pcm, 3_400) == pytest.approx(0.2, abs=1e-4)
    shift = np.arange(-5, 6)
    fit = [np.dot(pcm[4_000 + d : 28_000 + d], want[4_000:28_000]) for d in shift]
    assert abs(shift[int(np.argmax(fit))]) <= 2  # 0.13 ms


@pytest.mark.parametrize("rate_hz", [22_050, 24_000, 32_000, 44_100, 48_000])
def test_what_16_khz_cannot_hold_does_not_fold_back(rate_hz):
    sent = tone(9_500, rate_hz, 1)
    _, pcm = run(AudioFormat("f32le", rate_hz), [sent.astype("<f4").tobytes()])
    assert np.abs(pcm[2_000:-2_000]).max() < 1e-4


@pytest.mark.parametrize("rate_hz", sorted(LAG_SAMPLES))
def test_the_lag_is_short_and_does_not_grow(rate_hz):
    """20 s in 10 ms packets: what the resampler holds back stays what it was at the start."""
    fmt = AudioFormat("s16le", rate_hz)
    state, packet = audio.init_state(fmt), bytes(2 * (rate_hz // 100))
    lags = []
    for _ in range(2_000):
        state, _ = audio.step(fmt, state, packet)
        lags.append(state.n_in * 16_000 / rate_hz - state.n_out)
    assert max(lags) <= LAG_SAMPLES[rate_hz]
    assert max(lags[-100:]) <= max(lags[100:200]) + 1


def test_s16le_is_exact():
    values = np.array([-32_768, -1, 0, 1, 32_767], "<i2")
    _, pcm = run(AudioFormat(), [values.tobytes()])
    np.testing.assert_array_equal(pcm, values / 32_768)


@pytest.mark.parametrize("encoding", ["mulaw", "alaw"])
def test_g711_equals_ffmpeg(encoding):
    """Every byte against an independent decoder."""
    codec = av.CodecContext.create(f"pcm_{encoding}", "r")
    codec.sample_rate, codec.layout = 8_000, "mono"
    (frame,) = codec.decode(av.Packet(bytes(range(256))))
    table = audio.mulaw_table() if encoding == "mulaw" else audio.alaw_table()
    np.testing.assert_array_equal(table, frame.to_ndarray()[0] / 32_768)


def test_samples_that_are_not_numbers_become_zero_and_loud_ones_are_clipped():
    sent = np.array([np.nan, np.inf, -np.inf, 3e38, -1.5, 0.25], "<f4")
    _, pcm = run(AudioFormat("f32le"), [sent.tobytes()])
    np.testing.assert_array_equal(pcm, np.array([0, 0, 0, 1, -1, 0.25], np.float32))


def test_a_full_scale_square_wave_does_not_leave_the_range():
    """A steep filter overshoots by 18 % at the edges of a square wave: Gibbs."""
    square = np.sign(tone(100, 48_000, 0.5)).astype("<f4")
    _, pcm = run(AudioFormat("f32le", 48_000), [square.tobytes()])
    assert np.abs(pcm).max() == 1


def test_channels_are_mixed_as_their_mean():
    rows = np.array([[0.5, -0.5, 0.75], [0.25, 0.25, 0.25]], "<f4")
    _, pcm = run(AudioFormat("f32le", channels=3), [rows.tobytes()])
    np.testing.assert_allclose(pcm, [0.25, 0.25], atol=1e-7)


def test_odd_bytes_wait_and_are_dropped_at_the_end():
    fmt = AudioFormat("s16le", channels=2)
    state, pcm = audio.step(fmt, audio.init_state(fmt), b"\x00\x40\x00\x40\x00\x40\x00")
    np.testing.assert_array_equal(pcm, [0.5])
    assert state.odd == b"\x00\x40\x00"
    state, pcm = audio.step(fmt, state, b"\x40")
    np.testing.assert_array_equal(pcm, [0.5])
    state, pcm = audio.step(fmt, state, b"\x40")
    assert len(pcm) == 0
    assert len(audio.finish(fmt, state)) == 0


def test_flush_empties_the_resampler_and_the_stream_goes_on():
    fmt = AudioFormat("f32le", 8_000)
    raw = tone(440, 8_000, 1).astype("<f4").tobytes()
    state, before = audio.step(fmt, audio.init_state(fmt), raw)
    state, tail = audio.flush(fmt, state)
    assert len(before) + len(tail) == 16_000 == state.n_out
    assert np.abs(tail[:300]).max() > 0.45  # the tone, not padding
    state, more = audio.step(fmt, state, raw)
    assert len(more) + len(audio.finish(fmt, state)) == 16_000


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"encoding": "mp3"}, "unknown audio encoding 'mp3'"),
        ({"rate_hz": 7_999}, "7999 Hz"),
        ({"rate_hz": 96_000}, "96000 Hz"),
        ({"channels": 0}, "0 channels"),
        ({"channels": 65}, "65 channels"),
    ],
)
def test_formats_that_cannot_work_are_refused_with_a_hint(change, said):
    with pytest.raises(AudioFormatError, match=said) as caught:
        AudioFormat(**change)
    assert caught.value.hint


# Files

CODECS = {  # name: codec, rate, layout
    "a.wav": ("pcm_s16le", 44_100, "stereo"),
    "u8.wav": ("pcm_u8", 11_025, "mono"),
    "s24.wav": ("pcm_s24le", 96_000, "stereo"),
    "f64.wav": ("pcm_f64le", 22_050, "mono"),
    "mulaw.wav": ("pcm_mulaw", 8_000, "mono"),
    "surround.flac": ("flac", 48_000, "5.1"),
    "a.flac": ("flac", 16_000, "mono"),
    "a.ogg": ("libopus", 48_000, "mono"),
    "a.mp3": ("libmp3lame", 44_100, "stereo"),
    "a.m4a": ("aac", 44_100, "stereo"),
    "a.webm": ("libopus", 48_000, "stereo"),
    "a.mp4": ("aac", 48_000, "stereo"),
}


def encode(path: Path, pcm: np.ndarray, codec: str, rate_hz: int, layout: str) -> None:
    """pcm (S,) at `rate_hz`, the same in all channels; .mp4 gets a picture track too."""
    n_channels = av.AudioLayout(layout).nb_channels
    frame = av.AudioFrame.from_ndarray(
        np.repeat(pcm[None].astype(np.float32), n_channels, axis=0), format="fltp", layout=layout
    )
    frame.sample_rate, frame.pts, frame.time_base = rate_hz, 0, Fraction(1, rate_hz)
    with av.open(str(path), "w") as file:
        stream = file.add_stream(codec, rate=rate_hz, layout=layout)
        if path.suffix == ".mp4":
            add_pictures(file)
        size = stream.codec_context.frame_size or 1_024
        fit = av.AudioResampler(stream.format, layout, rate_hz, frame_size=size)
        for piece in [*fit.resample(frame), *fit.resample(None), None]:
            file.mux(stream.encode(piece))


def write_wav(path: Path, minutes: int) -> None:
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, 16_000, 0, "NONE", ""))
        minute = (8_000 * tone(440, 16_000, 60)).astype("<i2").tobytes()
        for _ in range(minutes):
            file.writeframesraw(minute)


def add_pictures(file: av.container.OutputContainer) -> None:
    stream = file.add_stream("mpeg4", rate=10)
    stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
    for level in range(20):
        picture = av.VideoFrame.from_ndarray(np.full((64, 64, 3), 10 * level, np.uint8))
        picture.pts, picture.time_base = level, Fraction(1, 10)
        file.mux(stream.encode(picture))
    file.mux(stream.encode(None))


@pytest.mark.parametrize("name", CODECS)
def test_a_file_of_any_container_is_its_sound(name, tmp_path, caplog):
    """The tone comes back at its level and its start where it was (chirp: one best alignment)."""
    codec, rate_hz, layout = CODECS[name]
    at_s = np.arange(2 * rate_hz) / rate_hz
    chirp = 0.5 * np.sin(2 * np.pi * (200 * at_s + 450 * at_s**2))  # 200 .. 2000 Hz
    encode(tmp_path / name, chirp, codec, rate_hz, layout)
    pcm = audio.read_file(tmp_path / name)
    at_s = np.arange(32_000) / 16_000
    want = 0.5 * np.sin(2 * np.pi * (200 * at_s + 450 * at_s**2))
    assert 32_000 - 2 <= len(pcm) <= 32_000 + 1_024  # AAC pads its last frame
    fit = [np.dot(pcm[4_000 + d : 28_000 + d], want[4_000:28_000]) for d in range(-500, 501)]
    assert abs(int(np.argmax(fit)) - 500) <= 2
    level = max(fit) / np.dot(want[4_000:28_000], want[4_000:28_000])
    assert level == pytest.approx(1, abs=0.02 if name != "a.mp3" else 0.07)  # LAME scales by 0.95
    assert audio.file_seconds(tmp_path / name) == pytest.approx(2, abs=0.1)
    assert not caplog.records


@pytest.mark.parametrize("block", [100, 1_000, 16_000, 100_000])
def test_streaming_a_file_equals_reading_it(block, tmp_path):
    encode(tmp_path / "a.mp3", tone(440, 44_100, 2), *CODECS["a.mp3"])
    pieces = list(audio.stream_file(tmp_path / "a.mp3", block))
    assert all(len(piece) == block for piece in pieces[:-1])
    assert 0 < len(pieces[-1]) <= block
    np.testing.assert_array_equal(np.concatenate(pieces), audio.read_file(tmp_path / "a.mp3"))


def test_a_file_equals_its_bytes_sent_as_packets(tmp_path):
    encode(tmp_path / "a.wav", tone(440, 44_100, 1), *CODECS["a.wav"])
    with wave.open(str(tmp_path / "a.wav")) as file:
        raw = file.readframes(file.getnframes())
    _, sent = run(AudioFormat("s16le", 44_100, 2), [raw])
    np.testing.assert_array_equal(audio.read_file(tmp_path / "a.wav"), sent)


UNSURE = ("a.wav", "a.ogg")


@pytest.mark.parametrize("name", ["a.wav", "a.flac", "a.ogg", "a.mp3", "a.webm"])
def test_a_truncated_file_gives_what_is_there(name, tmp_path, caplog):
    """Three fifths of the bytes: most of that sound comes out, equal to the whole file's start.

    A warning tells of it, except where the size is all that there is to know the length by.
    """
    codec, rate_hz, layout = CODECS[name]
    noise = np.random.default_rng(1).uniform(-0.3, 0.3, 4 * rate_hz)
    encode(tmp_path / name, noise, codec, rate_hz, layout)
    raw = (tmp_path / name).read_bytes()
    whole = audio.read_file(tmp_path / name)
    assert not caplog.records
    (tmp_path / name).write_bytes(raw[: len(raw) * 3 // 5])
    pcm = audio.read_file(tmp_path / name)
    assert [name in record.message for record in caplog.records] == [True] * (name not in UNSURE)
    assert 0.3 * len(whole) < len(pcm) < 0.7 * len(whole)
    np.testing.assert_allclose(pcm[:16_000], whole[:16_000], atol=1e-6)


def test_a_film_may_outlast_its_sound(tmp_path, caplog):
    """Pictures for 2 s, sound for half a second: nothing is missing."""
    encode(tmp_path / "a.mp4", tone(440, 48_000, 1)[:24_000], *CODECS["a.mp4"])
    assert len(audio.read_file(tmp_path / "a.mp4")) < 16_000
    assert not caplog.records


def test_damage_inside_a_file_costs_only_what_was_damaged(tmp_path, caplog):
    encode(tmp_path / "a.mp3", tone(440, 44_100, 4), *CODECS["a.mp3"])
    raw = bytearray((tmp_path / "a.mp3").read_bytes())
    raw[len(raw) // 2 : len(raw) // 2 + 2_000] = np.random.default_rng(2).bytes(2_000)
    (tmp_path / "a.mp3").write_bytes(raw)
    with caplog.at_level(logging.WARNING):
        pcm = audio.read_file(tmp_path / "a.mp3")
    assert len(pcm) > 3 * 16_000
    assert level_of(pcm[:24_000], 440) == pytest.approx(0.5, abs=0.05)
    assert level_of(pcm[-20_000:], 440) == pytest.approx(0.5, abs=0.05)
    assert "a.mp3" in caplog.text


class FailingFile(io.BufferedReader):
    """A disk that dies in the middle of a file."""

    def read(self, size: int | None = -1) -> bytes:
        if self.tell() > 8_000_000:
            raise OSError(errno.EIO, "Input/output error")
        return super().read(size)


def test_a_disk_that_dies_gives_what_was_read(tmp_path, monkeypatch, caplog):
    write_wav(tmp_path / "a.wav", 6)
    whole = audio.read_file(tmp_path / "a.wav")
    monkeypatch.setattr(
        pathlib.Path, "open", lambda path, mode: FailingFile(io.FileIO(path, mode[0]))
    )
    with caplog.at_level(logging.WARNING):
        pcm = audio.read_file(tmp_path / "a.wav")
    assert 0.5 * len(whole) < len(pcm) < 0.8 * len(whole)
    np.testing.assert_array_equal(pcm, whole[: len(pcm)])
    assert "breaks off (Input/output error)" in caplog.text


def bad_files(folder: Path) -> dict[str, tuple[Path, str]]:
    """What is wrong -> (path, what the error must say)."""
    encode(folder / "ok.wav", tone(440, 8_000, 1), "pcm_s16le", 8_000, "mono")
    encode(folder / "ok.mp4", tone(440, 48_000, 1), *CODECS["a.mp4"])
    with av.open(str(folder / "silent.mp4"), "w") as file:
        add_pictures(file)
    (folder / "folder").mkdir()
    contents = {
        "empty.wav": b"",
        "three": b"abc",
        "letter.txt": b"Dear Sir or Madam,\nthis is not a recording.\n" * 40,
        "letter.wav": b"Dear Sir or Madam,\nthis is not a recording.\n" * 40,
        "header.wav": (folder / "ok.wav").read_bytes()[:44],
        "cut.mp4": (folder / "ok.mp4").read_bytes()[:3_000],  # the index was at the end
        "list.m3u8": b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nok.wav\n#EXT-X-ENDLIST\n",
        "list.ffconcat": b"ffconcat version 1.0\nfile ok.wav\n",
    }
    for name, raw in contents.items():
        (folder / name).write_bytes(raw)
    said = dict.fromkeys(contents, "not an audio or video file|no sound")
    said |= {"empty.wav": "is empty", "silent.mp4": "has no sound", "folder": "is a directory"}
    said |= {"gone.wav": "there is no file", "bad\0name": "cannot be read"}
    return {name: (folder / name, pattern) for name, pattern in said.items()}


def test_files_without_sound_say_so_in_one_line(tmp_path, monkeypatch):
    """Also playlists: a file must not lead to other files."""
    monkeypatch.chdir(tmp_path)
    for name, (path, said) in bad_files(tmp_path).items():
        with pytest.raises(AudioFormatError, match=said) as caught:
            audio.read_file(path)
        assert caught.value.hint, name
        assert "\n" not in str(caught.value), name


@pytest.mark.parametrize("name", ["http://127.0.0.1:9/a.wav", "concat:ok.wav|ok.wav", "pipe:0"])
def test_a_name_is_never_a_protocol(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AudioFormatError, match="there is no file"):
        audio.read_file(name)
    with pytest.raises(AudioFormatError, match="there is no file"):
        audio.file_seconds(name)


def test_a_name_with_a_colon_is_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    encode(tmp_path / "ok.wav", tone(440, 8_000, 1), "pcm_s16le", 8_000, "mono")
    os.rename("ok.wav", "http:take 2.wav")
    assert len(audio.read_file("http:take 2.wav")) == 16_000


def test_a_consumer_that_stops_early_closes_the_file(tmp_path):
    """Warnings are errors here: a file left open would fail the test."""
    encode(tmp_path / "a.wav", tone(440, 44_100, 2), *CODECS["a.wav"])
    pieces = audio.stream_file(tmp_path / "a.wav", 160)
    assert len(next(pieces)) == 160
    pieces.close()
    os.remove(tmp_path / "a.wav")


def test_streaming_a_long_file_keeps_little_in_memory(tmp_path):
    """4 minutes (15 MB as PCM) pass through less than 2 MB."""
    write_wav(tmp_path / "long.wav", 4)
    next(audio.stream_file(tmp_path / "long.wav"))  # imports are not what is measured
    tracemalloc.start()
    n_samples = sum(len(pcm) for pcm in audio.stream_file(tmp_path / "long.wav"))
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert n_samples == 4 * 60 * 16_000
    assert peak_bytes < 2_000_000


def test_a_name_that_no_file_can_have_is_no_pipe():
    """To ask is an error of the system; what is wrong is said when it is opened."""
    name = 300 * "a"
    assert not audio.is_pipe(name)
    with pytest.raises(AudioFormatError, match="aaa"):
        audio.read_file(name)


def test_samples_of_64_bits_are_refused_in_one_line(tmp_path):
    path = tmp_path / "x.wav"
    data = np.zeros(1600, "<i8").tobytes()
    form = struct.pack("<HHIIHH", 1, 1, 16_000, 128_000, 8, 64)
    chunks = b"WAVEfmt " + struct.pack("<I", 16) + form + b"data" + struct.pack("<I", len(data))
    path.write_bytes(b"RIFF" + struct.pack("<I", len(chunks) + len(data)) + chunks + data)
    with pytest.raises(AudioFormatError, match="s64"):
        audio.read_file(path)


@pytest.mark.timeout(60)  # who opens a pipe once more waits for a writer that has gone
def test_a_pipe_that_has_a_name_is_read_once(clip_path, tmp_path):
    """As in `sparqle-stream <(curl ...)`: to ask how long it is must not take its beginning."""
    name = tmp_path / "pipe.ogg"
    os.mkfifo(name)
    writer = threading.Thread(target=lambda: name.write_bytes(clip_path.read_bytes()), daemon=True)
    writer.start()
    assert audio.file_seconds(name) is None
    assert len(audio.read_file(name)) == pytest.approx(len(audio.read_file(clip_path)), abs=1)
    writer.join(10)
