"""Microphone: a device of PortAudio in, PCM (S,) float32 at 16 kHz, mono, out.

Contract: the audio callback only copies its block into a bounded queue. What cannot be had is said
in one line (DeviceError with a hint): no PortAudio, no device, a busy one. A device that goes away
is opened again by name; the time in between is filled with silence, so that times stay true. So is
what finds the queue full. What PortAudio loses itself is told, but nobody says how long it was.
Latency: PortAudio's own (some 35 ms), and the resampler's where the device is not at 16 kHz.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from sparqle_stream import audio
from sparqle_stream.config import SAMPLE_RATE_HZ
from sparqle_stream.errors import DeviceError

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType

Pcm = npt.NDArray[np.float32]

QUEUE_BLOCKS = 2000  # some 20 s of the blocks that hosts choose
SILENCE_PACKET_S = 1.0  # at a time for what was lost: a reader may have been held up for hours
STALL_S = 2.0  # a device that delivers nothing for so long has gone away
REOPEN_EVERY_S = 1.0
GIVE_UP_S = 15.0
SILENCE_DBFS = -65.0
SILENCE_S = 5.0
# Later on a pause is likelier than a fault: many microphones gate a quiet room to nothing.
PAUSE_S = 15.0
PURE_SILENCE_DBFS = -100.0  # below the last bit of 16
TOO_SLOW = "this machine is too slow: some of what is said is lost"

# PortAudio's error numbers (portaudio.h)
_INVALID_CHANNELS = -9998
_INVALID_RATE = -9997
_UNAVAILABLE = -9985

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class InputDevice:
    """One device that can record."""

    index: int
    name: str
    host_api: str
    channels: int
    rate_hz: int
    is_default: bool


def portaudio() -> ModuleType:
    """The sounddevice module, which loads PortAudio. Raises DeviceError that says what to do."""
    try:
        import sounddevice
    except ImportError as err:
        raise DeviceError(
            f"the sounddevice package cannot be imported: {err}",
            hint="pip install sounddevice; files and the server work without it",
        ) from err
    except OSError as err:  # "PortAudio library not found"
        raise DeviceError(
            "the PortAudio library is not installed, so there is no microphone",
            hint="Debian, Ubuntu: sudo apt install libportaudio2; Fedora: sudo dnf install"
            " portaudio; files and the server work without it",
        ) from err
    module: ModuleType = sounddevice
    return module


def input_devices() -> list[InputDevice]:
    """All devices that can record; empty where there is none."""
    sd = portaudio()
    try:
        default = sd.default.device[0]
        hosts = sd.query_hostapis()
        if default < 0 and hosts:
            default = next((h["default_input_device"] for h in hosts), -1)
        return [
            InputDevice(
                index=int(entry["index"]),
                name=str(entry["name"]),
                host_api=str(hosts[entry["hostapi"]]["name"]),
                channels=int(entry["max_input_channels"]),
                rate_hz=int(entry["default_samplerate"]),
                is_default=int(entry["index"]) == default,
            )
            for entry in sd.query_devices()
            if entry["max_input_channels"] > 0
        ]
    except sd.PortAudioError as err:
        raise DeviceError(f"PortAudio cannot list devices: {err}", hint="see doctor") from err


def choose(wanted: str | None, devices: list[InputDevice]) -> InputDevice:
    """The device of a number or of part of a name; the system's default for None."""
    if not devices:
        raise DeviceError(
            "no microphone: this machine has no input device",
            hint="plug one in; over ssh, in a container or under WSL there is none: caption files,"
            " or pipe sound into: sparqle-stream -",
        )
    if wanted is None:
        return next((d for d in devices if d.is_default), devices[0])
    if wanted.isascii() and wanted.isdigit():
        found = [d for d in devices if d.index == int(wanted)]
    else:
        found = [d for d in devices if d.name.casefold() == wanted.casefold()] or [
            d for d in devices if wanted.casefold() in d.name.casefold()
        ]
    if not found:
        raise DeviceError(
            f"no input device {wanted!r}", hint=f"choose with --device one of: {_names(devices)}"
        )
    if len({d.name for d in found}) > 1:
        raise DeviceError(
            f"{wanted!r} could be several devices", hint=f"choose by number: {_names(found)}"
        )
    # One device under several host interfaces (Windows): the default one, else the first.
    return next((d for d in found if d.is_default), found[0])


def _names(devices: list[InputDevice]) -> str:
    return ", ".join(f"{d.index} ({d.name})" for d in devices)


class Microphone:
    """An open input device; a context manager. Not thread safe but for PortAudio's callback."""

    def __init__(
        self, wanted: str | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.device = choose(wanted, input_devices())
        self.n_overflows = 0  # times that samples were lost, here or in PortAudio
        self.rate_hz = 0
        self.notices: list[str] = []  # what a user should know; whoever shows them takes them out
        self._clock = clock
        self._blocks: queue.Queue[tuple[int, Pcm]] = queue.Queue(QUEUE_BLOCKS)  # see _take
        self._next: tuple[int, Pcm] | None = None  # taken out of the queue, and not read yet
        self._n_lost = 0  # frames that found the queue full; counted by the callback alone
        self._n_filled = 0  # of these, for which silence was read
        self._is_loss_told = False
        self._stream: Any = None
        self._format = audio.AudioFormat("f32le")
        self._state = audio.init_state(self._format)
        self._heard_at = clock()
        self._tried_at: float | None = None  # to open it again; None: it is there
        self._open()

    def __enter__(self) -> Microphone:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def name(self) -> str:
        return self.device.name

    @property
    def is_finished(self) -> bool:
        """Never: a microphone ends when its user says so."""
        return False

    def read(self, timeout_s: float) -> Pcm | None:
        """The sound since the last call, PCM (S,) at 16 kHz; None when none came in `timeout_s`.

        Up to a place where sound was lost; the calls after it give silence, 1 s at most each.
        Raises DeviceError when the device went away and did not come back.
        """
        if self.n_overflows and not self._is_loss_told:
            self._is_loss_told = True
            self.notices.append(TOO_SLOW)
        n_lost = self._n_lost  # before the queue is asked: all that was heard before is in there
        if self._next is None:
            try:
                self._next = self._blocks.get(timeout=timeout_s)
            except queue.Empty:
                if n_lost == self._n_filled:
                    return self._reopen() if self._clock() - self._heard_at > STALL_S else None
                self._next = n_lost, np.zeros(0, np.float32)  # nothing was heard after it
        self._heard_at = self._clock()
        packet = self._heard() or self._silence()
        self._state, pcm = audio.step(self._format, self._state, packet)
        return pcm

    def _heard(self) -> bytes:
        """All blocks up to the end of the queue, or to the next place where some are missing."""
        blocks = []
        while self._next is not None and self._next[0] == self._n_filled:
            blocks.append(self._next[1])
            self._next = None if self._blocks.empty() else self._blocks.get_nowait()
        return np.concatenate(blocks).astype("<f4").tobytes() if blocks else b""

    def _silence(self) -> bytes:
        """As much as is missing before the next block, in the device's own format."""
        n_missing = self._next[0] - self._n_filled if self._next else 0
        n_frames = min(n_missing, round(SILENCE_PACKET_S * self.rate_hz))
        self._n_filled += n_frames
        return bytes(n_frames * self._format.row_bytes)

    def close(self) -> None:
        """Stops recording. May be called twice."""
        stream, self._stream = self._stream, None
        if stream is not None:
            # abort() rather than stop(): a device that is gone would never drain.
            stream.abort(ignore_errors=True)
            stream.close(ignore_errors=True)

    def _open(self) -> None:
        sd = portaudio()
        most, own_hz = self.device.channels, min(self.device.rate_hz, audio.RATE_HZ_RANGE[1])
        attempts = [(SAMPLE_RATE_HZ, 1), (own_hz, 1), (SAMPLE_RATE_HZ, most), (own_hz, most)]
        for attempt, (rate_hz, channels) in enumerate(attempts):
            try:
                self._stream = sd.InputStream(
                    device=self.device.index,
                    samplerate=rate_hz,
                    channels=channels,
                    dtype="float32",
                    latency="high",  # the model needs the CPU too; 'low' loses samples then
                    callback=self._take,
                )
                self._stream.start()
            except sd.PortAudioError as err:
                self.close()
                code = err.args[1] if len(err.args) > 1 else 0
                is_last = attempt == len(attempts) - 1
                if code in (_INVALID_RATE, _INVALID_CHANNELS) and not is_last:
                    continue
                raise self._why(err, code) from err
            break
        self.rate_hz = rate_hz
        self._format = audio.AudioFormat("f32le", rate_hz, channels)
        self._state = audio.init_state(self._format)
        self._heard_at = self._clock()
        log.debug("opened %s at %d Hz, %d channels", self.name, rate_hz, channels)

    def _why(self, err: Exception, code: int) -> DeviceError:
        if code == _UNAVAILABLE:
            return DeviceError(
                f"the microphone {self.name!r} is busy or not there any more",
                hint="close the program that uses it, or choose another: --list-devices",
            )
        return DeviceError(
            f"the microphone {self.name!r} cannot be opened: {err.args[0] if err.args else err}",
            hint="choose another with --device; --list-devices shows them",
        )

    def _take(self, block: Pcm, n_frames: int, _time: object, status: Any) -> None:  # noqa: ANN401
        """PortAudio's callback, on its own thread: copy and leave.

        With each block goes how many frames were lost before it, since the beginning.
        """
        if status and status.input_overflow:
            self.n_overflows += 1
        try:
            self._blocks.put_nowait((self._n_lost, block.reshape(-1).copy()))
        except queue.Full:
            self.n_overflows += 1
            self._n_lost += n_frames

    def _reopen(self) -> Pcm | None:
        """Tries once a second to open the device again, by name -> silence for as long as it was
        away, None while it is. Whoever reads can do something else between the attempts."""
        now, lost_at = self._clock(), self._heard_at
        if self._tried_at is None:
            self.notices.append(
                f"the microphone {self.name!r} went silent; trying to open it again"
            )
        elif now - self._tried_at < REOPEN_EVERY_S:
            return None
        self._tried_at = now
        sd = portaudio()
        self.close()
        try:
            # PortAudio lists devices only when it is initialised.
            with contextlib.suppress(sd.PortAudioError):  # the attempt before may have ended there
                sd._terminate()
            sd._initialize()
            self.device = choose(self.name, input_devices())
            self._open()
        except (DeviceError, sd.PortAudioError) as err:
            if now - lost_at <= GIVE_UP_S:
                return None
            raise DeviceError(
                f"the microphone {self.name!r} is gone",
                hint="plug it in again, or choose another: --list-devices",
            ) from err
        self._tried_at = None
        gap_s = self._clock() - lost_at
        self.notices.append(f"the microphone is back; {gap_s:.1f} s were not heard")
        return np.zeros(round(gap_s * SAMPLE_RATE_HZ), np.float32)


class LevelMeter:
    """Level of the sound, and whether a microphone that should hear something hears nothing."""

    def __init__(self) -> None:
        self.dbfs = -120.0  # what a meter shows: up at once, down 40 dB/s
        self._n_quiet = 0  # samples
        self._has_heard = False
        self._was_told = False

    @property
    def is_silent(self) -> bool:
        """Nothing that a microphone in a room would hear, for 5 s."""
        return self._n_quiet >= SILENCE_S * SAMPLE_RATE_HZ

    def add(self, pcm: Pcm) -> None:
        """pcm (S,) at 16 kHz, in -1..1."""
        if len(pcm) == 0:
            return
        seconds = len(pcm) / SAMPLE_RATE_HZ
        level = 10 * np.log10(float(np.mean(np.square(pcm, dtype=np.float64))) + 1e-12)
        self.dbfs = max(float(level), self.dbfs - 40 * seconds)
        if level >= SILENCE_DBFS:
            self._n_quiet, self._has_heard, self._was_told = 0, True, False
        else:
            self._n_quiet += len(pcm)

    def notice(self, device_name: str) -> str:
        """Once per silent spell, after 5 s (15 s once sound was heard): what is wrong; else ''."""
        patience_s = PAUSE_S if self._has_heard else SILENCE_S
        if self._was_told or self._n_quiet < patience_s * SAMPLE_RATE_HZ:
            return ""
        self._was_told = True
        if self.dbfs < PURE_SILENCE_DBFS:
            return (
                f"{device_name!r} delivers pure silence: muted, the wrong device (--list-devices),"
                " or no permission to record?"
            )
        return (
            f"{device_name!r} is almost silent ({self.dbfs:.0f} dBFS): muted, or the wrong device"
            " (--list-devices)?"
        )
