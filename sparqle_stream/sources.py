"""Sources: where PCM (S,) float32 at 16 kHz comes from when it is not a microphone.

Contract: `read(timeout_s)` waits no longer than it was told and gives a packet, or None when none
came; `is_finished` turns true after the last one. Errors are SparqleErrors of the first `read`.
"""

from __future__ import annotations

import queue
import threading
import time
from typing import TYPE_CHECKING, BinaryIO, Protocol

import numpy as np
import numpy.typing as npt

from sparqle_stream import audio
from sparqle_stream.config import SAMPLE_RATE_HZ
from sparqle_stream.errors import AudioFormatError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

Pcm = npt.NDArray[np.float32]

FILE_BLOCK_SAMPLES = SAMPLE_RATE_HZ // 2
PACED_BLOCK_SAMPLES = SAMPLE_RATE_HZ // 25  # 40 ms, as microphones do
PIPE_BYTES = 65_536
HEADERS = {b"RIFF": "wav", b"OggS": "ogg", b"fLaC": "flac", b"ID3": "mp3", b"\x1aE\xdf\xa3": "webm"}


class Source(Protocol):
    """A microphone, a file, a pipe."""

    @property
    def name(self) -> str: ...

    @property
    def is_finished(self) -> bool: ...

    def read(self, timeout_s: float) -> Pcm | None: ...


class FileSource:
    """A file of any container, as fast as it is asked for."""

    def __init__(self, name: str, blocks: Iterator[Pcm] | None = None) -> None:
        self.name = name
        self.is_finished = False
        self._blocks = blocks or audio.stream_file(name, FILE_BLOCK_SAMPLES)

    def read(self, timeout_s: float) -> Pcm | None:
        pcm = next(self._blocks, None)
        self.is_finished = pcm is None
        return pcm


class PacedSource:
    """A file at the speed of speech: sample s comes s / 16 000 s after the first `read`."""

    def __init__(
        self,
        name: str,
        blocks: Iterator[Pcm] | None = None,
        clock: Callable[[], float] = time.perf_counter,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.name = name
        self.is_finished = False
        self._blocks = blocks or audio.stream_file(name, PACED_BLOCK_SAMPLES)
        self._clock = clock
        self._sleep = sleep
        self._next: Pcm | None = None
        self._n_read = 0  # samples, `_next` included
        self.started_at: float | None = None  # clock time of sample 0

    def read(self, timeout_s: float) -> Pcm | None:
        if self._next is None:
            self._next = next(self._blocks, None)
            if self._next is None:
                self.is_finished = True
                return None
            self._n_read += len(self._next)
        if self.started_at is None:
            self.started_at = self._clock()
        wait_s = self.started_at + self._n_read / SAMPLE_RATE_HZ - self._clock()
        if wait_s > 0:
            self._sleep(min(wait_s, timeout_s))
        if wait_s > timeout_s:
            return None
        pcm, self._next = self._next, None
        return pcm


def _require_raw(packet: bytes) -> None:
    """A file with a header would be captioned as noise, at whatever rate it is not."""
    for magic, kind in HEADERS.items():
        if packet.startswith(magic):
            raise AudioFormatError(
                f"standard input is a {kind} file, and raw PCM is expected there",
                hint="name the file, or: ffmpeg -i FILE -ac 1 -ar 16000 -f s16le - | ...",
            )


class PipeSource:
    """Raw samples from a pipe, as they come; a thread reads so that captions do not wait for it."""

    def __init__(self, pipe: BinaryIO, fmt: audio.AudioFormat, name: str = "-") -> None:
        self.name = name
        self.is_finished = False
        self._pipe = pipe
        self._format = fmt
        self._state = audio.init_state(fmt)
        self._is_first = True
        self._packets: queue.Queue[bytes] = queue.Queue(16)
        self._thread = threading.Thread(target=self._pump, name="sparqle-pipe", daemon=True)
        self._thread.start()

    def read(self, timeout_s: float) -> Pcm | None:
        try:
            packet = self._packets.get(timeout=timeout_s)
        except queue.Empty:
            return None
        if not packet:
            self.is_finished = True
            return audio.finish(self._format, self._state)
        if self._is_first:
            self._is_first = False
            _require_raw(packet)
        self._state, pcm = audio.step(self._format, self._state, packet)
        return pcm

    def _pump(self) -> None:
        # read1 gives what is there, where read would wait for a full buffer.
        read = getattr(self._pipe, "read1", self._pipe.read)
        packet = b"more"
        while packet:
            try:
                packet = read(PIPE_BYTES)
            except (OSError, ValueError):  # closed under our hands: the end of the sound
                packet = b""
            self._packets.put(packet)
