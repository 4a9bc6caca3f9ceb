"""Manifests: folders and files that name recordings and what is said in them -> recordings.

Ours is `manifest.jsonl`, one object a line: `audio` (a path beside it), `text` ('' where nobody
speaks or nobody wrote it down) and, if known, `id`, `speaker`, `corpus`, `licence`, `translations`
(an object: language -> text) and `answer`. Those of others are read as they are: LibriSpeech, any
folder above files such as `84/121123/84-121123.trans.txt`, with the recordings beside them; lhotse,
without being installed: `*cuts*.jsonl[.gz]`, or `*recordings*.jsonl[.gz]` and
`*supervisions*.jsonl[.gz]`. Of a cut all supervisions are its text. Recordings must be files with
one channel; paths that are not absolute are looked for from here, then from the manifest.

Contract: what is wrong with a manifest is said with the number of the line, before any audio is
read. A recording without an id is named after its path; `require_ids` sees to it that no two have
the same, since what is done and what is poor is told by ids.
"""

from __future__ import annotations

import gzip
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparqle_stream.config import SAMPLE_RATE_HZ
from sparqle_stream.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    import numpy as np
    import numpy.typing as npt

MANIFEST = "manifest.jsonl"
SUFFIXES = (".flac", ".wav", ".opus", ".ogg", ".mp3")


@dataclass(frozen=True, slots=True)
class Recording:
    """A whole file, or `seconds` of it from `start_s` on; with `parts`, recordings in a row."""

    id: str
    path: Path
    text: str
    speaker: str
    corpus: str = ""
    start_s: float = 0.0
    seconds: float | None = None
    parts: tuple[Recording, ...] = ()
    pause_s: float = 0.0  # of silence after each part but the last
    licence: str = ""
    targets: tuple[tuple[str, str], ...] = ()  # task (training.tasks) and what it should write

    def pcm(self) -> npt.NDArray[np.float32]:
        """(S,) at 16 kHz. Raises AudioFormatError for a file without audio."""
        import numpy as np

        from sparqle_stream import audio

        if self.parts:
            pause = np.zeros(round(self.pause_s * SAMPLE_RATE_HZ), np.float32)
            pieces = [piece for part in self.parts for piece in (part.pcm(), pause)]
            return np.concatenate(pieces[:-1])
        pcm = audio.read_file(self.path)
        if self.seconds is None:
            return pcm
        start = round(self.start_s * SAMPLE_RATE_HZ)
        return pcm[start : start + round(self.seconds * SAMPLE_RATE_HZ)]

    def length_s(self) -> float:
        """Seconds; of whole files, what their containers say (0 if they do not)."""
        from sparqle_stream import audio

        if self.parts:
            pauses_s = self.pause_s * (len(self.parts) - 1)
            return sum(part.length_s() for part in self.parts) + pauses_s
        return self.seconds or audio.file_seconds(self.path) or 0.0


Found = tuple[bytes, list[Recording]]


def read_all(sources: Sequence[Path]) -> list[Recording]:
    """The recordings of one or more manifests, each with an id of its own.

    Raises ConfigError where there is no recording, and for an id that is there twice.
    """
    found = [one for source in sources for one in read(source)[1]]
    require_ids(", ".join(map(str, sources)), found)
    return found


def require_ids(where: str, recordings: Sequence[Recording]) -> None:
    """Raises ConfigError for no recordings, and for an id that two of them have."""
    if not recordings:
        raise ConfigError(f"there are no recordings in {where}", hint="one a line")
    ((worst, n),) = Counter(one.id for one in recordings).most_common(1)
    if n > 1:
        raise ConfigError(
            f"{where}: {n} recordings have the id {worst!r}",
            hint='each needs its own "id"; manifests that share some are used one by one',
        )


def read(source: Path) -> Found:
    """The bytes and the recordings of a folder's manifest, or of a file: ours, or lhotse's cuts.

    Raises ConfigError for a place without a manifest.
    """
    if source.is_file():
        return _file(source)
    if (source / MANIFEST).is_file():
        return _file(source / MANIFEST)
    found = librispeech(source) or lhotse(source)
    if found is None:
        raise ConfigError(
            f"there is no {MANIFEST} in {source}, nothing of LibriSpeech and nothing of lhotse",
            hint='one object a line: {"audio": "a.wav", "text": "what is said", "speaker": "s1"}',
        )
    return found


def _file(path: Path) -> Found:
    if "cuts" in path.name:
        return _cuts(path.parent, [path])
    raw = _read(path)
    lines = [(n, line) for n, line in enumerate(raw.splitlines(), 1) if line.strip()]
    return raw, [_recording(path.parent, n, line) for n, line in lines]


def _recording(folder: Path, line_number: int, line: bytes) -> Recording:
    try:
        entry = json.loads(line)
        path, text = folder / entry["audio"], entry["text"]
        if not isinstance(text, str):
            raise TypeError("text is not a string")
    except (ValueError, KeyError, TypeError) as err:
        raise ConfigError(
            f"line {line_number} of the manifest in {folder} cannot be used ({err})",
            hint='each line needs "audio" and "text" ("" where nobody speaks)',
        ) from err
    speaker, corpus = str(entry.get("speaker", "")), str(entry.get("corpus", ""))
    return Recording(
        str(entry.get("id", _own_id(Path(entry["audio"])))),
        path,
        text,
        speaker,
        corpus,
        licence=str(entry.get("licence", "")),
        targets=_targets(entry),
    )


def _own_id(audio: Path) -> str:
    """'spk1/000' of spk1/000.wav; of a file elsewhere the last two parts: whose folder it is in is
    nobody's business."""
    whole = audio.with_suffix("")
    is_elsewhere = audio.is_absolute() or ".." in audio.parts
    return "/".join(whole.parts[-2:]) if is_elsewhere else whole.as_posix()


def _targets(entry: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    """('translate to de', text) for each of `translations`, ('answer', text) for `answer`.

    lhotse's recipes of translated speech have `translated_text` among their custom fields.
    """
    translations = entry.get("translations") or entry.get("translated_text") or {}
    targets = [(f"translate to {to}", str(text)) for to, text in sorted(translations.items())]
    return (*targets, *([("answer", str(entry["answer"]))] if entry.get("answer") else []))


def librispeech(folder: Path) -> Found | None:
    """All utterances in the order of their ids; None for a folder that has none."""
    tables = sorted(folder.rglob("*.trans.txt"))
    lines = [(table, line) for table in tables for line in table.read_text().splitlines()]
    recordings = [_utterance(table, line) for table, line in lines if line.strip()]
    raw = "\n".join(line for _, line in lines).encode()
    return (raw, recordings) if recordings else None


def _utterance(table: Path, line: str) -> Recording:
    """'84-121123-0000 GO DO YOU HEAR' in the table of its chapter."""
    name, _, text = line.strip().partition(" ")
    stems = [table.parent / (name + suffix) for suffix in SUFFIXES]
    path = next((stem for stem in stems if stem.is_file()), stems[0])
    return Recording(name, path, text.strip(), name.split("-")[0], "librispeech")


def lhotse(folder: Path) -> Found | None:
    """All cuts, or all supervisions of recordings; None for a folder that has neither."""
    cuts, tables = _named(folder, "cuts"), _named(folder, "supervisions")
    if cuts:
        return _cuts(folder, cuts)
    if not tables:
        return None
    sources = {
        entry["id"]: entry for path in _named(folder, "recordings") for _, entry in _entries(path)
    }

    def spoken(folder: Path, entry: Mapping[str, Any]) -> Recording:
        return _supervision(folder, entry, sources[entry["recording_id"]])

    entries = [(path, n, entry) for path in tables for n, entry in _entries(path)]
    raw = b"".join(map(_read, tables))
    return raw, [_checked(spoken, folder, *entry) for entry in entries]


def _cuts(folder: Path, paths: list[Path]) -> Found:
    entries = [(path, n, entry) for path in paths for n, entry in _entries(path)]
    return b"".join(map(_read, paths)), [_checked(_cut, folder, *entry) for entry in entries]


def _checked(make: Any, folder: Path, path: Path, n: int, entry: Mapping[str, Any]) -> Recording:  # noqa: ANN401 - a function of the two below
    try:
        recording: Recording = make(folder, entry)
    except (KeyError, IndexError, TypeError, ValueError) as err:
        raise ConfigError(
            f"line {n} of {path.name} cannot be used ({type(err).__name__}: {err})",
            hint="cuts or supervisions of recordings of one file each",
        ) from err
    return recording


def _cut(folder: Path, entry: Mapping[str, Any]) -> Recording:
    said = sorted(entry.get("supervisions", []), key=lambda one: float(one["start"]))
    return Recording(
        id=str(entry["id"]),
        path=_source(folder, entry["recording"]),
        text=" ".join(filter(None, (one.get("text") or "" for one in said))),
        speaker=str(said[0].get("speaker") or "") if said else "",
        start_s=float(entry["start"]),
        seconds=float(entry["duration"]),
        targets=_targets(said[0].get("custom") or {}) if len(said) == 1 else (),
    )


def _supervision(folder: Path, entry: Mapping[str, Any], recording: Mapping[str, Any]) -> Recording:
    return Recording(
        id=str(entry["id"]),
        path=_source(folder, recording),
        text=entry.get("text") or "",
        speaker=str(entry.get("speaker") or ""),
        start_s=float(entry["start"]),
        seconds=float(entry["duration"]),
        targets=_targets(entry.get("custom") or {}),
    )


def _source(folder: Path, recording: Mapping[str, Any]) -> Path:
    (source,) = recording["sources"]
    if source["type"] != "file" or len(source["channels"]) != 1:
        raise ValueError("not one file with one channel")
    path = Path(source["source"])
    return path if path.is_absolute() or path.is_file() else folder / path


def _named(folder: Path, what: str) -> list[Path]:
    return sorted({*folder.glob(f"*{what}*.jsonl"), *folder.glob(f"*{what}*.jsonl.gz")})


def _read(path: Path) -> bytes:
    return gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()


def _entries(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for n, line in enumerate(_read(path).splitlines(), 1):
        if line.strip():
            try:
                yield n, json.loads(line)
            except ValueError as err:
                raise ConfigError(
                    f"line {n} of {path.name} is not JSON: {err}", hint="one object a line"
                ) from err
