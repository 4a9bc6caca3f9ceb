"""Microphone: every way in which it can be missing, odd or lost, without a sound card.

A fake `sounddevice` says what a device can do; one test opens ALSA's null device through the real
PortAudio where that is installed.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from sparqle_stream import live, messages, microphone
from sparqle_stream.errors import DeviceError
from sparqle_stream.terminal import QuietView
from tests.fakes.portaudio import Device, FakeSoundDevice, PortAudioError

if TYPE_CHECKING:
    from collections.abc import Iterator

REPO = Path(__file__).resolve().parent.parent


@pytest.fixture
def fake(monkeypatch):
    """Installs a fake sounddevice with the given devices."""

    def install(*devices: Device, **kwargs) -> FakeSoundDevice:
        module = FakeSoundDevice(list(devices), **kwargs)
        monkeypatch.setitem(sys.modules, "sounddevice", module)
        return module

    return install


class Clock:
    """Time that passes when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def sine(hz: float, rate_hz: int, seconds: float = 1.0) -> np.ndarray:
    return 0.5 * np.sin(2 * np.pi * hz * np.arange(round(rate_hz * seconds)) / rate_hz)


def packets(mic: microphone.Microphone) -> list[np.ndarray]:
    parts = []
    while (pcm := mic.read(0.0)) is not None:
        parts.append(pcm)
    return parts


def everything(mic: microphone.Microphone) -> np.ndarray:
    return np.concatenate(packets(mic))


def test_without_portaudio_one_line_says_what_to_install(tmp_path, monkeypatch):
    """sounddevice raises OSError when it is imported, not ImportError."""
    (tmp_path / "sounddevice.py").write_text("raise OSError('PortAudio library not found')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "sounddevice", raising=False)
    with pytest.raises(DeviceError, match="PortAudio library is not installed") as caught:
        microphone.input_devices()
    assert "apt install libportaudio2" in caught.value.hint


def test_without_a_device_it_says_so(fake):
    fake()
    with pytest.raises(DeviceError, match="no input device") as caught:
        microphone.Microphone()
    assert "container" in caught.value.hint


def test_outputs_are_not_listed_and_the_default_is_marked(fake):
    fake(Device("Speakers", channels=0), Device("Webcam"), Device("Headset"), default_input=2)
    devices = microphone.input_devices()
    assert [(d.index, d.name, d.is_default) for d in devices] == [
        (1, "Webcam", False),
        (2, "Headset", True),
    ]
    assert microphone.choose(None, devices).name == "Headset"


@pytest.mark.parametrize(
    ("wanted", "index"), [("0", 0), ("2", 2), ("usb", 1), ("USB MIC", 1), ("Array", 2)]
)
def test_a_device_is_chosen_by_number_or_part_of_its_name(fake, wanted, index):
    fake(Device("Webcam"), Device("USB Mic"), Device("Array"), Device("Array", host=1))
    assert microphone.choose(wanted, microphone.input_devices()).index == index


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ("7", "no input device '7'"),
        ("--7", "no input device '--7'"),
        ("\N{SUPERSCRIPT TWO}", "no input device"),  # a digit, and no number
        ("piano", "no input device"),
        ("mic", "could be several"),
    ],
)
def test_a_choice_that_fits_none_or_several_names_the_candidates(fake, wanted, message):
    fake(Device("Mic left"), Device("Mic right"))
    with pytest.raises(DeviceError, match=message) as caught:
        microphone.Microphone(wanted)
    assert "0 (Mic left), 1 (Mic right)" in caught.value.hint


def test_a_busy_device_says_so(fake):
    fake(Device("Webcam", is_busy=True))
    with pytest.raises(DeviceError, match="'Webcam' is busy") as caught:
        microphone.Microphone()
    assert "--list-devices" in caught.value.hint


def test_sound_comes_out_as_it_went_in(fake):
    """PortAudio reuses its buffer: what is not copied in the callback is lost (here: NaN)."""
    sd = fake(Device("Webcam"))
    with microphone.Microphone() as mic:
        sound = sine(440, 16_000).astype(np.float32)
        for block in np.split(sound, 50):
            sd.opened[0].hear(block)
        np.testing.assert_array_equal(everything(mic), sound)
        assert mic.read(0.0) is None
    assert not sd.opened[0].is_open


@pytest.mark.parametrize(
    "device",
    [
        Device("hw", default_rate=44_100, rates=(44_100,)),
        Device("hw", default_rate=48_000, rates=(48_000,), channels=2, open_channels=(2,)),
        Device("studio", default_rate=96_000, rates=(48_000, 96_000)),
    ],
    ids=["44k", "48k-stereo-only", "96k"],
)
def test_a_device_with_a_rate_and_channels_of_its_own_is_resampled(fake, device):
    sd = fake(device)
    with microphone.Microphone() as mic:
        stream = sd.opened[-1]
        assert (stream.rate_hz, mic.rate_hz) == (min(device.default_rate, 48_000),) * 2
        for block in np.array_split(sine(440, stream.rate_hz), 77):
            stream.hear(block)
        pcm = everything(mic)
    assert len(pcm) == pytest.approx(16_000, abs=400)  # the resampler holds back its window
    spectrum = np.abs(np.fft.rfft(pcm * np.hanning(len(pcm))))
    assert np.argmax(spectrum) * 16_000 / len(pcm) == pytest.approx(440, abs=2)
    assert np.abs(pcm[2_000:-500]).max() == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize(
    "device",
    [
        Device("Webcam"),
        Device("hw", default_rate=48_000, rates=(48_000,), channels=2, open_channels=(2,)),
    ],
    ids=["16k", "48k-stereo-only"],
)
def test_what_finds_the_queue_full_becomes_silence_of_that_length(fake, monkeypatch, device):
    """As if nothing had been said there: times of what follows hold, to the sample."""
    sd = fake(device)
    with microphone.Microphone() as mic:
        blocks = np.split(sine(440, mic.rate_hz, 0.9), 9)
        for i, block in enumerate(blocks):
            sd.opened[-1].hear(block * (i not in (2, 5, 6)))
        wanted = everything(mic)
    monkeypatch.setattr(microphone, "QUEUE_BLOCKS", 2)
    with microphone.Microphone() as mic:
        parts = []
        # Two of each find room. What was lost is read where it was, when something follows.
        for heard, n_reads in ((blocks[:3], 1), (blocks[3:7], 2), (blocks[7:], 0)):
            for block in heard:
                sd.opened[-1].hear(block)
            parts += [mic.read(0.0) for _ in range(n_reads)]
        pcm = np.concatenate([*parts, everything(mic)])
        assert mic.n_overflows == 3
    np.testing.assert_array_equal(pcm, wanted)


def test_what_is_lost_just_before_the_end_counts(fake, monkeypatch):
    """Nothing is heard after it, and the recording is no shorter for that."""
    monkeypatch.setattr(microphone, "QUEUE_BLOCKS", 2)
    sd = fake(Device("Webcam"))
    with microphone.Microphone() as mic:
        for _ in range(5):
            sd.opened[0].hear(np.ones(320))
        np.testing.assert_array_equal(everything(mic), np.repeat([1, 0], [640, 960]))
        assert mic.read(0.0) is None  # once


def test_silence_for_a_long_loss_comes_in_short_packets(fake, monkeypatch):
    """Of a reader that was held up for an hour, say by a pager; memory stays bounded."""
    monkeypatch.setattr(microphone, "QUEUE_BLOCKS", 1)
    sd = fake(Device("Webcam"))
    with microphone.Microphone() as mic:
        for _ in range(101):
            sd.opened[0].hear(np.ones(12_000))
        lengths = [len(pcm) for pcm in packets(mic)]
    assert max(lengths) == 16_000
    assert sum(lengths) == 101 * 12_000


class Stream:
    """One of the engine, with room or without; the next block is heard when room is asked for."""

    def __init__(self, on_event, has_room: bool, hear: Iterator) -> None:
        self._on_event, self._has_room, self._hear = on_event, has_room, hear
        self.n_fed = 0

    def wait_for_room(self, _seconds, timeout=None) -> bool:
        is_over = next(self._hear, "over") == "over"
        return is_over or self._has_room

    def feed(self, pcm) -> None:
        self.n_fed += len(pcm)

    def finish(self) -> None:
        self._on_event(messages.Done(self.n_fed / 16_000, 0.0, 0.0))


@pytest.mark.parametrize("cause", ["PortAudio", "queue", "engine", "none"])
def test_lost_sound_is_told_once(fake, monkeypatch, capsys, cause):
    """Whoever lost it, and to who reads no live view, too."""
    monkeypatch.setattr(microphone, "QUEUE_BLOCKS", 2)
    sd = fake(Device("Webcam"))

    def hear() -> Iterator[None]:
        for _ in range(4):
            for _ in range(3 if cause == "queue" else 1):
                sd.opened[0].hear(np.ones(320), overflow=cause == "PortAudio")
            yield
        os.kill(os.getpid(), signal.SIGTERM)
        yield

    with microphone.Microphone() as mic:
        blocks = hear()
        next(blocks)
        session = live.LiveSession(mic, QuietView(), None)
        session.run(lambda on_event: Stream(on_event, cause != "engine", blocks))
    told = "" if cause == "none" else f"note: {microphone.TOO_SLOW}\n"
    assert capsys.readouterr() == ("", told)


def test_a_device_that_goes_and_comes_back_leaves_silence_of_that_length(fake):
    clock = Clock()
    sd = fake(Device("Webcam"), Device("Headset"), default_input=1)
    with microphone.Microphone(clock=clock) as mic:
        sd.opened[0].hear(sine(440, 16_000, 0.02))
        assert len(mic.read(0.0)) == 320
        clock.now += microphone.STALL_S - 0.1
        assert mic.read(0.0) is None  # not yet
        clock.now += 0.2
        sd.devices = [Device("Headset")]  # unplugged and in again: another number, the same name
        pcm = mic.read(0.0)
        assert len(pcm) == round(2.1 * 16_000)
        assert not pcm.any()
        assert "went silent" in mic.notices[0]
        assert "2.1 s were not heard" in mic.notices[1]
        assert mic.device.index == 0
        assert sd.n_initialized == 1  # PortAudio was shut down once and started once
        sd.opened[1].hear(sine(440, 16_000, 0.02))
        assert mic.read(0.0).any()


def test_a_device_that_stays_away_is_an_error(fake, monkeypatch):
    """After a while; until then `read` returns at once, so that a key can end it all."""
    clock = Clock()
    sd = fake(Device("Webcam"))
    mic = microphone.Microphone(clock=clock)
    sd.devices = []
    monkeypatch.delattr(microphone.time, "sleep")  # a reader that slept could not be ended

    def wait_for_it() -> None:
        while clock.now < 200.0:
            assert mic.read(0.0) is None
            clock.now += 0.25

    with pytest.raises(DeviceError, match="'Webcam' is gone"):
        wait_for_it()
    assert clock.now - 100.0 == pytest.approx(microphone.GIVE_UP_S, abs=2.0)
    assert len(mic.notices) == 1  # however often it was tried


def test_portaudio_may_fail_to_start_again_for_a_while(fake, monkeypatch):
    """A sound server that restarts: PortAudio's own error is no traceback, nor is that of shutting
    down what did not start."""
    clock = Clock()
    sd = fake(Device("Webcam"))
    with microphone.Microphone(clock=clock) as mic:
        initialize, terminate = sd._initialize, sd._terminate

        def fails(*_):
            raise PortAudioError("Error initializing PortAudio", -9999)

        monkeypatch.setattr(sd, "_initialize", fails)
        clock.now += microphone.STALL_S + 0.1
        assert mic.read(0.0) is None
        monkeypatch.setattr(sd, "_terminate", fails)
        clock.now += microphone.REOPEN_EVERY_S
        assert mic.read(0.0) is None
        monkeypatch.setattr(sd, "_initialize", initialize)
        clock.now += microphone.REOPEN_EVERY_S
        assert len(mic.read(0.0)) == round(4.1 * 16_000)
        monkeypatch.setattr(sd, "_terminate", terminate)


def test_pure_silence_is_told_once_after_five_seconds():
    meter = microphone.LevelMeter()
    told = []
    for _ in range(70):
        meter.add(np.zeros(1_600, np.float32))
        told.append(meter.notice("Webcam"))
    assert [i for i, text in enumerate(told) if text] == [49]
    assert "'Webcam' delivers pure silence" in told[49]
    assert meter.dbfs < -100


def test_a_muted_analogue_input_is_told_with_its_level():
    """Its converter still hums: -70 dBFS is no room with a person in it."""
    rng = np.random.default_rng(0)
    meter = microphone.LevelMeter()
    for _ in range(60):
        meter.add((10 ** (-70 / 20) * rng.standard_normal(1_600)).astype(np.float32))
    assert "almost silent (-70 dBFS)" in meter.notice("Webcam")


def test_a_quiet_room_is_not_told_and_sound_arms_the_warning_again():
    rng = np.random.default_rng(0)
    room = (10 ** (-60 / 20) * rng.standard_normal(16_000 * 6)).astype(np.float32)
    meter = microphone.LevelMeter()
    for block in np.split(room, 60):
        meter.add(block)
    assert meter.notice("Webcam") == ""
    for _ in range(2):
        meter.add(np.zeros(16_000 * 6, np.float32))
        assert meter.is_silent
        assert meter.notice("Webcam") == ""  # a pause: microphones that gate noise do this
        meter.add(np.zeros(16_000 * 10, np.float32))
        assert "pure silence" in meter.notice("Webcam")
        meter.add(room[:1_600])
        assert not meter.is_silent


def test_the_meter_rises_at_once_and_falls_slowly():
    meter = microphone.LevelMeter()
    meter.add(sine(440, 16_000, 0.1).astype(np.float32))
    assert meter.dbfs == pytest.approx(-9.03, abs=0.1)  # a sine of 0.5
    meter.add(np.zeros(4_000, np.float32))
    assert meter.dbfs == pytest.approx(-19.03, abs=0.1)  # 40 dB a second


REAL = """
import sys
from sparqle_stream import microphone
devices = microphone.input_devices()
print([d.name for d in devices], file=sys.stderr)
with microphone.Microphone("default") as mic:
    n = 0
    for _ in range(200):
        pcm = mic.read(0.05)
        if pcm is not None:
            assert pcm.dtype == "float32" and abs(pcm).max(initial=0) <= 1
            n += len(pcm)
        if n > 1600:
            break
print(n > 1600, mic.rate_hz)
"""


def test_real_portaudio_opens_the_null_device_of_alsa(tmp_path):
    """The fake cannot know what PortAudio accepts: one open, read and close for real."""
    probe = subprocess.run(
        [sys.executable, "-c", "import sounddevice"], capture_output=True, text=True, check=False
    )
    if probe.returncode:
        pytest.skip(f"no PortAudio here: {probe.stderr.strip().splitlines()[-1]}")
    (tmp_path / "asound.conf").write_text(
        "pcm.!default { type null }\nctl.!default { type null }\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", REAL],
        cwd=REPO,
        env=os.environ | {"ALSA_CONFIG_PATH": str(tmp_path / "asound.conf")},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    if "no input device" in run.stderr:
        pytest.skip("this PortAudio is built without ALSA")
    assert (run.returncode, run.stdout) == (0, "True 16000\n"), run.stderr
