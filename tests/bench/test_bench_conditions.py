"""Conditions: levels, bands and noise are what they claim, the same for the same recording."""

from __future__ import annotations

import json

import numpy as np
import pytest
from bench_wav import write_wav

from bench import accuracy, conditions, manifests, report
from bench.conditions import SNR_DB
from bench.manifests import Recording, RecordingSet
from bench.settings import Settings
from sparqle_stream import audio
from sparqle_stream.config import SAMPLE_RATE_HZ
from sparqle_stream.errors import ConfigError

SECOND = SAMPLE_RATE_HZ
QUICK = Settings(vad="off", dtype="float32")


def tone(hz: float, n: int = SECOND, level: float = 0.25) -> np.ndarray:
    return (level * np.sin(2 * np.pi * hz * np.arange(n) / SAMPLE_RATE_HZ)).astype(np.float32)


def db(pcm: np.ndarray) -> float:
    return 10 * float(np.log10(np.mean(np.square(pcm, dtype=np.float64)) + 1e-12))


def test_quiet_is_30_db_lower_in_16_bits():
    low = conditions.quiet(tone(440))
    assert db(low) - db(tone(440)) == pytest.approx(-30, abs=0.01)
    np.testing.assert_array_equal(low * 32_768, np.rint(low * 32_768))
    assert low.dtype == np.float32


@pytest.mark.parametrize("encode", [0.0, 1.0, -1.0, 0.1, -0.003])
def test_mulaw_bytes_are_the_nearest(encode):
    (code,) = conditions.mulaw_bytes(np.array([encode], np.float32))
    table = audio.mulaw_table()
    assert abs(table[code] - encode) == np.abs(table - np.float32(encode)).min()


def test_every_mulaw_byte_comes_back_but_for_the_second_zero():
    table = audio.mulaw_table()
    codes = np.frombuffer(conditions.mulaw_bytes(table), np.uint8)
    np.testing.assert_array_equal(table[codes], table)


@pytest.mark.parametrize(("hz", "least", "most"), [(1000, -0.5, 0.5), (3200, -1, 0.5)])
def test_a_telephone_passes_its_band(hz, least, most):
    heard = conditions.telephone(tone(hz))[SECOND // 4 : -SECOND // 4]
    assert least < db(heard) - db(tone(hz)) < most


@pytest.mark.parametrize("hz", [60, 200, 3600, 5000, 7000])
def test_a_telephone_stops_the_rest(hz):
    """What remains is mu-law's own grain."""
    heard = conditions.telephone(tone(hz))[SECOND // 4 : -SECOND // 4]
    assert db(heard) - db(tone(hz)) < -35


@pytest.mark.parametrize("n", [0, 1, 2, 333, 16_001])
def test_a_telephone_keeps_length_and_time(n):
    pcm = tone(800, n)
    heard = conditions.telephone(pcm)
    assert heard.shape == pcm.shape
    if n > SECOND:
        lags = np.arange(-9, 10)  # less than half a period
        middle = slice(4000, 12_000)
        match = [np.dot(np.roll(heard, -lag)[middle], pcm[middle]) for lag in lags]
        assert lags[int(np.argmax(match))] == 0


def test_a_click_stays_where_it_was():
    pcm = np.zeros(SECOND, np.float32)
    pcm[8000:8016] = 0.5
    assert abs(int(np.argmax(np.abs(conditions.telephone(pcm)))) - 8008) < 16


def test_noise_is_10_db_under_the_speech():
    speech = tone(440)
    change = conditions.make("noise10").change
    noise = change(speech, "a") - speech
    assert db(speech) - db(noise) == pytest.approx(SNR_DB, abs=0.05)


def test_loud_speech_with_noise_is_made_lower_not_clipped():
    loud = tone(440, level=0.98)
    mixed = conditions.make("noise10").change(loud, "a")
    assert np.abs(mixed).max() <= 1.0
    scale = np.dot(mixed, loud) / np.dot(loud, loud)
    assert db(scale * loud) - db(mixed - scale * loud) == pytest.approx(SNR_DB, abs=0.2)


def test_noise_depends_on_the_recording_and_nothing_else():
    change, again = conditions.make("noise10").change, conditions.make("noise10").change
    speech = tone(440)
    np.testing.assert_array_equal(change(speech, "a"), again(speech, "a"))
    assert not np.array_equal(change(speech, "a"), change(speech, "b"))


def test_pink_noise_falls_by_3_db_an_octave():
    pcm = conditions.pink(20 * SECOND, np.random.default_rng(0))
    power = np.abs(np.fft.rfft(pcm)) ** 2
    hz = np.fft.rfftfreq(len(pcm), 1 / SAMPLE_RATE_HZ)
    octaves = [power[(hz >= f) & (hz < 2 * f)].sum() for f in (100, 200, 400, 800, 1600, 3200)]
    np.testing.assert_allclose(octaves, octaves[0], rtol=0.1)
    assert power[hz < 19].max() < 1e-6 * power.max()


def noise_set(tmp_path, *clips: np.ndarray) -> RecordingSet:
    recordings = []
    for i, pcm in enumerate(clips):
        write_wav(tmp_path / f"{i}.wav", pcm)
        recordings.append(Recording(f"n{i}", tmp_path / f"{i}.wav", "", ""))
    return RecordingSet("noise/x", tuple(recordings), "abc", len(clips))


def test_noise_is_drawn_from_a_folder_around_its_end(tmp_path):
    """A second of a tone under two seconds of speech: the noise is that tone all along."""
    noise = noise_set(tmp_path, np.zeros(SECOND, np.float32), tone(1000))
    speech = tone(440, 2 * SECOND)
    for name in "abcd":  # silence is drawn too, and another taken for it
        added = conditions.make("noise10", noise).change(speech, name) - speech
        spectrum = np.abs(np.fft.rfft(added))
        assert np.argmax(spectrum) == 2000
        assert db(speech) - db(added) == pytest.approx(SNR_DB, abs=0.05)


def test_silent_noise_is_refused(tmp_path):
    noise = noise_set(tmp_path, np.zeros(100, np.float32))
    with pytest.raises(ConfigError, match="noise/x is silent"):
        conditions.make("noise10", noise).change(tone(440), "a")


def test_names():
    assert conditions.parse([]) == ["clean"]
    assert conditions.parse(["quiet"]) == ["quiet"]
    assert conditions.parse(["noise10,telephone", "quiet"]) == [
        *("clean", "noise10", "telephone", "quiet")
    ]
    assert conditions.parse(["quiet", "clean", "quiet"]) == ["clean", "quiet"]
    with pytest.raises(ConfigError, match="'windy'"):
        conditions.parse(["windy"])


def test_a_set_under_a_condition(tmp_path):
    one = noise_set(tmp_path, tone(440))
    assert conditions.under(one, conditions.make("clean")) is one
    low = conditions.under(one, conditions.make("quiet"))
    assert (low.name, low.condition, low.label) == ("noise/x", "quiet", "noise/x, quiet")
    assert (low.recordings[0].id, low.recordings[0].path) == ("n0", one.recordings[0].path)
    np.testing.assert_array_equal(
        low.recordings[0].pcm(), conditions.quiet(one.recordings[0].pcm())
    )


# --- in bench.accuracy -------------------------------------------------------------------------


@pytest.fixture
def speech(make_folder):
    said = [("good day to all", "good day to all", "ann"), ("good day", "good night", "bob")]
    return make_folder(
        "sets/speech", [{"said": s, "text": text, "speaker": who} for s, text, who in said]
    )


def test_conditions_beside_the_clean_one(oracle, idle, speech):
    """The oracle reads letters from levels: at -30 dB it understands nothing that is right."""
    clean = manifests.read(speech)
    low = conditions.under(clean, conditions.make("quiet"))
    result = accuracy.measure(oracle, QUICK, [clean, low], with_ctc=False)
    first, second = result["sets"]
    assert (first["condition"], second["condition"]) == ("clean", "quiet")
    assert result["conditions"] == {"quiet": {"gain_db": -30.0, "bits": 16}}
    wer, clean_wer = second["speech"]["wer_percent"], first["speech"]["wer_percent"]
    assert clean_wer == pytest.approx(100 / 6, abs=0.01)
    assert wer > clean_wer
    to_clean = second["speech"]["to_clean"]
    assert to_clean["wer_percent"] == clean_wer
    assert to_clean["ratio"] == pytest.approx(wer / clean_wer, abs=0.01)
    assert "to_clean" not in first["speech"]
    page = report.render([("x.json", json.loads(json.dumps(result)))])
    assert f"**{to_clean['ratio']:.2f}**" in page


def test_the_command_changes_what_the_engine_hears(idle, speech, make_folder, capsys):
    noise = make_folder("sets/noise", [{"said": "hm", "text": ""}])
    arguments = [str(speech), "--model", "random:tiny", "--vad", "off", "--without-ctc"]
    more = ["--condition", "noise10,quiet", "--noise-from", str(noise), "--noise", str(noise)]
    assert accuracy.main([*arguments, *more]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [s["condition"] for s in result["sets"]] == ["clean", "noise10", "quiet", "clean"]
    assert result["conditions"]["noise10"]["noise"] == "sets/noise"
    assert result["conditions"]["noise10"]["snr_db"] == 10.0


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["--condition", "windy"], "unknown condition 'windy'"),
        (["--condition", "noise10", "--noise-from", "nowhere"], "manifest.jsonl"),
    ],
)
def test_errors_say_what_to_do(idle, speech, capsys, arguments, what):
    assert accuracy.main([str(speech), *arguments]) == 2
    said = capsys.readouterr()
    assert what in said.err
    assert "hint: " in said.err


def test_speech_is_not_taken_as_noise(idle, speech, capsys):
    assert accuracy.main([str(speech), "--condition", "noise10", "--noise-from", str(speech)]) == 2
    assert "is no noise" in capsys.readouterr().err
