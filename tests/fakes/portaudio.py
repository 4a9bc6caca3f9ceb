"""A `sounddevice` module without a sound card: devices as told, sound as told.

Put an instance into sys.modules["sounddevice"]. `hear` calls the open stream's callback as
PortAudio's thread would; `play` does it from a thread of its own, at the speed of speech.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np

INVALID_RATE = -9997
INVALID_CHANNELS = -9998
UNAVAILABLE = -9985
BLOCK_S = 0.02


class PortAudioError(Exception):
    """As the real one: args are a text and PortAudio's number."""


@dataclass
class Device:
    """An input device; `rates` and `max_open_channels` say what it can be opened with."""

    name: str
    channels: int = 1
    default_rate: int = 48_000
    rates: tuple[int, ...] = (16_000, 44_100, 48_000)
    open_channels: tuple[int, ...] = (1, 2)
    is_busy: bool = False
    host: int = 0


@dataclass
class FakeSoundDevice:
    """The part of sounddevice that the microphone uses."""

    devices: list[Device] = field(default_factory=list)
    default_input: int = 0
    clip: np.ndarray | None = None  # (S,) at 16 kHz: every stream that is started plays it
    opened: list[FakeStream] = field(default_factory=list)
    n_initialized: int = 1

    PortAudioError = PortAudioError

    def __post_init__(self) -> None:
        index = self.default_input if self.devices else -1
        self.default = SimpleNamespace(device=(index, -1))

    def query_hostapis(self) -> list[dict]:
        return [{"name": "ALSA", "default_input_device": -1}, {"name": "JACK"}]

    def query_devices(self) -> list[dict]:
        return [
            {
                "index": i,
                "name": device.name,
                "hostapi": device.host,
                "max_input_channels": device.channels,
                "default_samplerate": float(device.default_rate),
            }
            for i, device in enumerate(self.devices)
        ]

    def InputStream(self, **settings) -> FakeStream:  # the real name
        device = self.devices[settings["device"]]
        if device.is_busy:
            raise PortAudioError("Error opening InputStream: Device unavailable", UNAVAILABLE)
        if settings["samplerate"] not in device.rates:
            raise PortAudioError("Error opening InputStream: Invalid sample rate", INVALID_RATE)
        if settings["channels"] not in device.open_channels:
            raise PortAudioError("Invalid number of channels", INVALID_CHANNELS)
        stream = FakeStream(self, **settings)
        self.opened.append(stream)
        return stream

    def _terminate(self) -> None:
        self.n_initialized -= 1

    def _initialize(self) -> None:
        self.n_initialized += 1


class FakeStream:
    """An open stream of a device."""

    def __init__(self, owner: FakeSoundDevice, *, samplerate, channels, callback, **_settings):
        self.rate_hz = samplerate
        self.channels = channels
        self.is_open = True
        self._owner = owner
        self._callback = callback

    def start(self) -> None:
        if self._owner.clip is not None:
            threading.Thread(target=self._play, args=(self._owner.clip,), daemon=True).start()

    def hear(self, mono: np.ndarray, *, overflow: bool = False) -> None:
        """mono (S,) at the stream's rate, on all channels; the buffer is used again, as in C."""
        block = np.repeat(mono.astype(np.float32)[:, None], self.channels, axis=1)
        self._callback(block, len(block), None, SimpleNamespace(input_overflow=overflow))
        block[:] = np.nan

    def abort(self, ignore_errors: bool = True) -> None:
        self.is_open = False

    def close(self, ignore_errors: bool = True) -> None:
        self.is_open = False

    def _play(self, clip: np.ndarray) -> None:
        """The clip, then silence for ever, 20 ms a block."""
        assert self.rate_hz == 16_000
        size, due = int(self.rate_hz * BLOCK_S), time.perf_counter()
        at = 0
        while self.is_open:
            block = np.zeros(size, np.float32)
            part = clip[at : at + size]
            block[: len(part)] = part
            self.hear(block)
            at, due = at + size, due + BLOCK_S
            time.sleep(max(0.0, due - time.perf_counter()))
