"""Corpora on disk: manifests of audio files -> one memory-mapped int16 file and an index.

A *pack* is a folder with `audio.i16` (all clips one after another, 16 kHz mono) and
`index.jsonl` (one object a clip: id, start and length in samples, text, speaker, corpus, licence).
Decoding compressed audio once makes an epoch cheap and keeps training free of codecs.
"""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sparqle_stream.errors import AudioFormatError, ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from typing import BinaryIO

    from av import AudioFrame
    from numpy.typing import NDArray

    from training.manifests import Recording

SAMPLE_RATE_HZ = 16_000
AUDIO, INDEX = "audio.i16", "index.jsonl"

logger = logging.getLogger(__name__)


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
    """A folder of decoded speech, read through a memory map.

    Raises ConfigError for one without audio.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if not (folder / AUDIO).stat().st_size:
            raise ConfigError(
                f"the pack in {folder} is empty", hint="pack it anew, or leave it out"
            )
        self.samples: NDArray[np.int16] = np.memmap(folder / AUDIO, np.int16, mode="r")
        lines = (folder / INDEX).read_text().splitlines()
        self.clips = [Clip(**json.loads(line)) for line in lines]

    def pcm(self, clip: Clip) -> NDArray[np.float32]:
        """PCM (S,) float32 in -1..1."""
        raw = self.samples[clip.start : clip.start + clip.length]
        return raw.astype(np.float32) / 32768.0


class PackWriter:
    """Writes a pack, as a context manager: it has its name once it is whole, until then `.part`.

    What a run that was killed has written is gone on with by `resume`: `last_id` is its last clip.
    Raises ConfigError where there is a pack already: runs may have it mapped.
    """

    def __init__(self, folder: Path, *, resume: bool = False) -> None:
        self.folder = folder
        if (folder / INDEX).exists():
            raise ConfigError(f"there is a pack in {folder}", hint="name another folder, or rm it")
        folder.mkdir(parents=True, exist_ok=True)
        audio, index = folder / f"{AUDIO}.part", folder / f"{INDEX}.part"
        clips = _whole_clips(audio, index) if resume else []
        self.last_id = clips[-1].id if clips else ""
        self.n_clips = len(clips)
        self._n_samples = sum(clip.length for clip in clips)
        self._index = index.open("w")
        self._index.writelines(json.dumps(asdict(clip)) + "\n" for clip in clips)
        self._audio = audio.open("ab")
        self._audio.truncate(2 * self._n_samples)

    def __enter__(self) -> PackWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._audio.close()
        self._index.close()
        if kind is None:
            for name in (AUDIO, INDEX):  # the index last: with it a pack is whole
                (self.folder / f"{name}.part").replace(self.folder / name)

    def add(
        self, pcm: NDArray[np.int16], targets: dict[str, str] | None = None, **facts: str
    ) -> None:
        """PCM (S,) at 16 kHz with a Clip's other fields."""
        self._audio.write(pcm.tobytes())
        clip = Clip(start=self._n_samples, length=len(pcm), targets=targets or {}, **facts)
        self._index.write(json.dumps(asdict(clip)) + "\n")
        self.n_clips += 1
        self._n_samples += len(pcm)

    @property
    def seconds(self) -> float:
        """Of sound, that of earlier runs included."""
        return self._n_samples / SAMPLE_RATE_HZ


def _whole_clips(audio: Path, index: Path) -> list[Clip]:
    """The first clips of an unfinished pack that are there to their last sample."""
    if not (audio.exists() and index.exists()):
        return []
    n_samples, clips = audio.stat().st_size // 2, []
    for line in index.read_text().splitlines():
        try:
            clip = Clip(**json.loads(line))
        except ValueError:  # it was killed in the middle of the line
            break
        if clip.start + clip.length > n_samples:
            break
        clips.append(clip)
    return clips


def after(recordings: Sequence[Recording], last_id: str) -> Sequence[Recording]:
    """Those behind the one with that id ('': all): what a run that was killed had still to do.

    Raises ConfigError for an id that is not there: clips would be written twice.
    """
    if not last_id:
        return recordings
    ids = [one.id for one in recordings]
    if last_id not in ids:
        raise ConfigError(
            f"the pack that was begun ends with {last_id!r}, which no manifest here has",
            hint="name the same manifests, or leave --resume out to begin anew",
        )
    return recordings[len(ids) - ids[::-1].index(last_id) :]


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


def decode_all(
    recordings: Iterable[Recording], *, is_any: bool = False
) -> Iterator[tuple[Recording, NDArray[np.int16]]]:
    """Each recording with its PCM (S,); a file of which several parts follow is decoded once.

    A file that cannot be decoded is left out with a warning; when it is the first one, they are
    probably all like that, and AudioFormatError is raised, unless `is_any`: an earlier run decoded
    some.
    """
    whole: NDArray[np.int16] | None = None
    path: Path | None = None
    for one in recordings:
        if one.path != path:
            path = one.path
            try:
                whole, is_any = decode_file(one.path), True
            except AudioFormatError as err:
                if not is_any:
                    raise
                logger.warning("left out: %s", err.message)
                whole = None
        if whole is None:
            continue
        start = round(one.start_s * SAMPLE_RATE_HZ)
        n = len(whole) if one.seconds is None else round(one.seconds * SAMPLE_RATE_HZ)
        yield one, whole[start : start + n]
