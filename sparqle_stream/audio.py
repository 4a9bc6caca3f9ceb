"""Audio: packets of bytes, or a file -> PCM (S,) float32 at 16 kHz, mono, every sample in -1..1.

Contract: cutting the bytes anywhere gives the same samples as one call, bit for bit. A packet may
end in the middle of a sample or of a row of channels; the odd bytes wait for the next one.
Samples that are not numbers (NaN, infinity) become 0, louder ones are clipped; channels are mixed
as their mean.
Latency: none at 16 kHz. Else the resampler's window, constant over the stream: 30 ms at 8 kHz,
22 at 11.025, 11 at 22.05, 10 at 24, 8 at 32, 14 at 44.1, 12.5 at 48 kHz (measured).
"""

from __future__ import annotations

import functools
import logging
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import soxr

from sparqle_stream.config import SAMPLE_RATE_HZ
from sparqle_stream.errors import AudioFormatError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from av.audio.frame import AudioFrame
    from av.audio.stream import AudioStream
    from av.container import InputContainer

logger = logging.getLogger(__name__)

Pcm = npt.NDArray[np.float32]

SAMPLE_BYTES = {"s16le": 2, "f32le": 4, "mulaw": 1, "alaw": 1}
RATE_HZ_RANGE = (8_000, 48_000)
MAX_CHANNELS = 64


@dataclass(frozen=True, slots=True)
class AudioFormat:
    """What the bytes of a stream are. `channels` are interleaved."""

    encoding: str = "s16le"
    rate_hz: int = SAMPLE_RATE_HZ
    channels: int = 1

    def __post_init__(self) -> None:
        if self.encoding not in SAMPLE_BYTES:
            raise AudioFormatError(
                f"unknown audio encoding {self.encoding!r}", hint=f"use {', '.join(SAMPLE_BYTES)}"
            )
        low, high = RATE_HZ_RANGE
        if not low <= self.rate_hz <= high:
            raise AudioFormatError(
                f"a sample rate of {self.rate_hz} Hz cannot be used", hint=f"use {low} to {high} Hz"
            )
        if not 1 <= self.channels <= MAX_CHANNELS:
            raise AudioFormatError(
                f"{self.channels} channels cannot be used", hint=f"use 1 to {MAX_CHANNELS}"
            )

    @property
    def row_bytes(self) -> int:
        """Bytes of one sample in all channels."""
        return SAMPLE_BYTES[self.encoding] * self.channels


@dataclass(slots=True)
class AudioState:
    """What a stream keeps. The resampler's window is inside soxr, so a state cannot be copied."""

    resampler: soxr.ResampleStream | None  # None: the stream is at 16 kHz already
    odd: bytes = b""  # less than one row: the beginning of a sample that is still to come
    n_in: int = 0  # rows decoded, at the stream's own rate
    n_out: int = 0  # samples handed out, at 16 kHz


def init_state(fmt: AudioFormat) -> AudioState:
    return AudioState(_resampler(fmt.rate_hz))


def step(fmt: AudioFormat, state: AudioState, packet: bytes) -> tuple[AudioState, Pcm]:
    """packet (any number of bytes) -> PCM (S,). S is 0 while the resampler's window fills."""
    raw = state.odd + packet
    n_odd = len(raw) % fmt.row_bytes
    whole, state.odd = raw[: len(raw) - n_odd], raw[len(raw) - n_odd :]
    mono = _mix(_decode(fmt.encoding, whole).reshape(-1, fmt.channels).T)
    state.n_in += len(mono)
    pcm = _resample(state.resampler, mono)
    state.n_out += len(pcm)
    return state, pcm


def flush(fmt: AudioFormat, state: AudioState) -> tuple[AudioState, Pcm]:
    """What the resampler's window still holds, as PCM (S,). The stream goes on; odd bytes stay.

    The window starts anew, as if silence had come before: call it where the speaker has stopped.
    """
    pcm = _tail(state.resampler)
    state.resampler = _resampler(fmt.rate_hz)
    state.n_out += len(pcm)
    return state, pcm


def finish(fmt: AudioFormat, state: AudioState) -> Pcm:
    """The last samples, PCM (S,). Bytes of an incomplete sample are dropped."""
    return flush(fmt, state)[1]


def clean(samples: npt.NDArray[np.floating]) -> Pcm:
    """Samples of any shape -> float32 in -1..1: not a number becomes 0, what is louder is clipped.

    Without it one NaN would stay in the recurrent states of all later stages for ever.
    """
    finite = np.where(np.isfinite(samples), samples, 0)
    return np.clip(finite, -1, 1).astype(np.float32, copy=False)


def read_file(path: str | Path) -> Pcm:
    """The sound of a file of any container -> PCM (S,). Errors as in `stream_file`."""
    return np.concatenate(list(stream_file(path)))


def stream_file(path: str | Path, block: int = SAMPLE_RATE_HZ) -> Iterator[Pcm]:
    """The sound of a file, in pieces of PCM (block,), the last one shorter; memory stays bounded.

    A file that is cut off or damaged gives what can be decoded, and a warning in the log.
    The first piece raises AudioFormatError when there is no sound to be had at all.
    """
    if block < 1:
        raise ValueError(f"block must be positive, got {block}")
    pending: list[Pcm] = []
    n_pending = n_total = 0
    with _open(path) as container:
        for pcm in _file_pcm(container, path):
            pending.append(pcm)
            n_pending += len(pcm)
            n_total += len(pcm)
            if n_pending >= block:
                joined = np.concatenate(pending)
                n_whole = n_pending - n_pending % block
                for at in range(0, n_whole, block):
                    yield joined[at : at + block].copy()
                pending, n_pending = [joined[n_whole:].copy()], n_pending - n_whole
    if n_pending:
        yield np.concatenate(pending)
    if n_total == 0:
        raise AudioFormatError(
            f"no sound could be decoded from {path}", hint="is the file complete? does it play?"
        )


def is_pipe(path: str | Path) -> bool:
    """Whether there is something of that name that can be read once only."""
    path = Path(path)
    try:
        return path.exists() and not path.is_file() and not path.is_dir()
    except OSError:  # a name that is too long, a folder that may not be looked into
        return False


def file_seconds(path: str | Path) -> float | None:
    """How long a file says it is, for a progress bar; None where the container does not say.

    None too of a pipe, whose first bytes could not be read again.
    """
    if is_pipe(path):
        return None
    with _open(path) as container:
        return container.duration / 1e6 if container.duration else None


# Packets


def _decode(encoding: str, raw: bytes) -> Pcm:
    """Whole samples in their encoding -> (S,) float32 in -1..1."""
    if encoding == "s16le":
        return np.frombuffer(raw, "<i2").astype(np.float32) / np.float32(32_768)
    if encoding == "f32le":
        return clean(np.frombuffer(raw, "<f4"))
    table = mulaw_table() if encoding == "mulaw" else alaw_table()
    return table[np.frombuffer(raw, np.uint8)]


@functools.cache
def mulaw_table() -> Pcm:
    """Value of each mu-law byte, (256,) float32.

    ITU-T G.711 (11/88) table 2: sign, 3 bits of segment, 4 of step, all inverted on the wire. With
    the encoder's bias of 33 a value is (33 + 2 step) 2^segment - 33, of 8192 at full scale.
    """
    code = ~np.arange(256, dtype=np.uint8)
    segment, step_in = (code >> 4).astype(np.int32) & 7, code.astype(np.int32) & 15
    magnitude = ((33 + 2 * step_in) << segment) - 33
    return np.where(code & 0x80, -magnitude, magnitude).astype(np.float32) / np.float32(8192)


@functools.cache
def alaw_table() -> Pcm:
    """Value of each A-law byte, (256,) float32.

    ITU-T G.711 (11/88) table 1: sign (1 is positive), 3 bits of segment, 4 of step, even bits
    inverted on the wire. The two lowest segments are linear; of 4096 at full scale.
    """
    code = np.arange(256, dtype=np.uint8) ^ 0x55
    segment, step_in = (code >> 4).astype(np.int32) & 7, code.astype(np.int32) & 15
    linear = 2 * step_in + 1
    magnitude = np.where(segment == 0, linear, (linear + 32) << np.maximum(segment - 1, 0))
    return np.where(code & 0x80, magnitude, -magnitude).astype(np.float32) / np.float32(4096)


def _mix(channels: npt.NDArray[np.float32]) -> Pcm:
    """(C, S) -> (S,), the mean. Added one by one: a reduction's order may hang on the shape."""
    if len(channels) == 1:
        return np.ascontiguousarray(channels[0])
    mono: Pcm = channels[0].copy()
    for channel in channels[1:]:
        mono += channel
    mono /= len(channels)
    return mono


def _resampler(rate_hz: int) -> soxr.ResampleStream | None:
    """Streaming resampler to 16 kHz.

    vr: its filters run in the time domain, so that the lag is constant and short. The usual engine
    filters by FFT in blocks: 12 to 115 ms at 8 kHz against 30, 6 to 37 at 48 kHz against 12.5.
    Both give the same samples for any cut; images and aliases of both are under -110 dB.
    """
    if rate_hz == SAMPLE_RATE_HZ:
        return None
    return soxr.ResampleStream(rate_hz, SAMPLE_RATE_HZ, 1, dtype="float32", quality="HQ", vr=True)


def _resample(resampler: soxr.ResampleStream | None, mono: Pcm, *, last: bool = False) -> Pcm:
    """(S,) -> (S', ) at 16 kHz, clipped once more because a steep filter overshoots."""
    if resampler is None:
        return mono
    pcm: Pcm = resampler.resample_chunk(mono, last=last)
    return np.clip(pcm, -1, 1, out=pcm)


# Files


@contextmanager
def _open(path: str | Path) -> Iterator[InputContainer]:
    """A file's container. Everything that can be wrong with the file is an AudioFormatError.

    FFmpeg reads through our own file object and may open nothing else: a name such as `http:x`
    stays a name, and a playlist cannot lead to other files or to the network.
    """
    import av

    nothing_else = {"protocol_whitelist": "none"}
    with ExitStack() as opened:
        try:
            file = opened.enter_context(Path(path).open("rb"))
            if file.seekable() and not file.peek(1):
                raise AudioFormatError(f"{path} is empty", hint="was the recording saved?")
            container = opened.enter_context(
                av.open(file, "r", metadata_errors="replace", options=nothing_else)
            )
        except FileNotFoundError as err:
            raise AudioFormatError(f"there is no file {path}", hint="check the name") from err
        except IsADirectoryError as err:
            raise AudioFormatError(f"{path} is a directory", hint="name the files in it") from err
        except av.FFmpegError as err:
            raise AudioFormatError(
                f"{path} is not an audio or video file, or is damaged ({err.strerror})",
                hint="wav, flac, ogg, opus, mp3, m4a, webm, mp4 and more can be read",
            ) from err
        except (OSError, ValueError) as err:
            raise AudioFormatError(f"{path} cannot be read: {err}", hint="check the name") from err
        yield container


def _file_pcm(container: InputContainer, path: str | Path) -> Iterator[Pcm]:
    """Decoded frames -> PCM (S,) at 16 kHz. The rate may change inside a file (chained ogg)."""
    if not container.streams.audio:
        raise AudioFormatError(f"{path} has no sound in it", hint="pick a file with an audio track")
    stream = container.streams.audio[0]
    rate_hz = SAMPLE_RATE_HZ
    resampler = _resampler(rate_hz)
    for frame in _frames(container, stream, path):
        if frame.sample_rate != rate_hz:
            yield _tail(resampler)
            rate_hz = frame.sample_rate
            resampler = _resampler(rate_hz)
        yield _resample(resampler, _frame_mono(frame))
    yield _tail(resampler)


def _frames(
    container: InputContainer, stream: AudioStream, path: str | Path
) -> Iterator[AudioFrame]:
    """Decoded frames up to where the container breaks off; packets beyond repair are left out."""
    import av

    packets = container.demux(stream)
    problem, decoded_s = "", 0.0
    while True:
        try:
            packet = next(packets, None)
        except (av.FFmpegError, OSError) as err:  # OSError: from the disk, through our file object
            problem, packet = f"the file breaks off ({err.strerror})", None
        try:
            for frame in stream.decode(packet):
                decoded_s += frame.samples / frame.sample_rate
                yield frame
        except av.EOFError:  # the decoder was emptied by the last packet
            pass
        except av.FFmpegError as err:
            problem = f"some of it could not be decoded ({err.strerror})"
        if packet is None:
            break
    if problem := problem or _lacking(container, stream, decoded_s):
        logger.warning("%s: %s", path, problem)


def _lacking(container: InputContainer, stream: AudioStream, decoded_s: float) -> str:
    """What to say of a file that has less sound than its header promises; "" where all is well."""
    if container.format.name == "aac":  # has no header: what it says is a guess from its size
        return ""
    said_s = 0.0
    if stream.duration and stream.time_base:
        said_s = float(stream.duration * stream.time_base)
    elif container.duration and not container.streams.video:  # a film may outlast its sound
        said_s = container.duration / 1e6
    if decoded_s >= 0.95 * said_s - 0.5:
        return ""
    return f"the file says it has {said_s:.0f} s of sound and has {decoded_s:.0f}: is it whole?"


def _frame_mono(frame: AudioFrame) -> Pcm:
    """One decoded frame of any sample format and channels -> (S,) float32 in -1..1."""
    try:
        samples: npt.NDArray[Any] = frame.to_ndarray()  # (C, S), or (1, S * C): interleaved
    except ValueError as err:
        raise AudioFormatError(
            f"samples of the format {frame.format.name} cannot be read",
            hint="convert it, for example to 16 bits: ffmpeg -i IN -c:a pcm_s16le OUT.wav",
        ) from err
    if not frame.format.is_planar:
        samples = samples.reshape(-1, frame.layout.nb_channels).T
    if samples.dtype == np.uint8:  # the only unsigned format, silence is 128
        return _mix((samples.astype(np.float32) - 128) / np.float32(128))
    if samples.dtype.kind == "i":
        return _mix((samples / (np.iinfo(samples.dtype).max + 1)).astype(np.float32))
    return _mix(clean(samples))


def _tail(resampler: soxr.ResampleStream | None) -> Pcm:
    return _resample(resampler, np.zeros(0, np.float32), last=True)
