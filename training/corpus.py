"""Corpora on disk: manifests of audio files -> one memory-mapped int16 file and an index.

A *pack* is a folder with `audio.i16` (all clips one after another, 16 kHz mono) and
`index.jsonl` (one object a clip: id, start and length in samples, text, speaker, corpus, licence).
Decoding compressed audio once makes an epoch cheap and keeps training free of codecs.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sparqle_stream.errors import AudioFormatError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from typing import BinaryIO

    from av import AudioFrame
    from numpy.typing import NDArray

    from training.manifests import Recording

SAMPLE_RATE_HZ = 16_000


@dataclass(frozen=True, slots=True)
class Clip:
    """One utterance of a pack: `start` and `length` in samples at 16 kHz."""

    id: str
    start: int
    length: int
    text: str
    speaker: str
    corpus: str
    licence: str
    targets: dict[str, str] = field(default_factory=dict)  # by task, where it is not transcription

    @property
    def seconds(self) -> float:
        return self.length / SAMPLE_RATE_HZ


class Pack:
    """A folder of decoded speech, read through a memory map."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.samples: NDArray[np.int16] = np.memmap(folder / "audio.i16", np.int16, mode="r")
        lines = (folder / "index.jsonl").read_text().splitlines()
        self.clips = [Clip(**json.loads(line)) for line in lines]

    def pcm(self, clip: Clip) -> NDArray[np.float32]:
        """PCM (S,) float32 in -1..1."""
        raw = self.samples[clip.start : clip.start + clip.length]
        return raw.astype(np.float32) / 32768.0


class PackWriter:
    """Appends clips to a pack; the index is written clip by clip, so a killed run can be seen."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._audio = (folder / "audio.i16").open("wb")
        self._index = (folder / "index.jsonl").open("w")
        self._n_samples = 0

    def add(
        self, pcm: NDArray[np.int16], targets: dict[str, str] | None = None, **facts: str
    ) -> None:
        """PCM (S,) at 16 kHz with a Clip's other fields."""
        self._audio.write(pcm.tobytes())
        clip = Clip(start=self._n_samples, length=len(pcm), targets=targets or {}, **facts)
        self._index.write(json.dumps(asdict(clip)) + "\n")
        self._n_samples += len(pcm)

    def close(self) -> None:
        self._audio.close()
        self._index.close()


def decode_file(file: Path | BinaryIO) -> NDArray[np.int16]:
    """Any audio file that PyAV opens -> PCM (S,) int16 at 16 kHz, mono.

    Raises AudioFormatError for a file that is not there, damaged, or without sound.
    """
    import av

    resampler = av.AudioResampler(format="s16", layout="mono", rate=SAMPLE_RATE_HZ)
    parts: list[NDArray[np.int16]] = []
    try:
        with av.open(str(file) if isinstance(file, Path) else file, "r") as container:
            for frame in container.decode(audio=0):
                parts += [_samples(out) for out in resampler.resample(frame)]
            parts += [_samples(out) for out in resampler.resample(None)]
    except (av.FFmpegError, IndexError) as err:  # IndexError: no stream of audio
        raise AudioFormatError(
            f"{file} cannot be decoded: {err}", hint="mend it, or leave it out of the manifest"
        ) from err
    return np.concatenate(parts) if parts else np.zeros(0, np.int16)


def _samples(frame: AudioFrame) -> NDArray[np.int16]:
    return frame.to_ndarray().reshape(-1).astype(np.int16, copy=False)


def decode_all(recordings: Iterable[Recording]) -> Iterator[tuple[Recording, NDArray[np.int16]]]:
    """Each recording with its PCM (S,); a file of which several parts follow is decoded once."""
    path, whole = None, np.zeros(0, np.int16)
    for one in recordings:
        if one.path != path:
            path, whole = one.path, decode_file(one.path)
        start = round(one.start_s * SAMPLE_RATE_HZ)
        n = len(whole) if one.seconds is None else round(one.seconds * SAMPLE_RATE_HZ)
        yield one, whole[start : start + n]
