"""Manifests of others: LibriSpeech folders and lhotse's JSON lines -> recordings.

LibriSpeech: any folder above files such as `84/121123/84-121123.trans.txt`, with the recordings
beside them. lhotse, without being installed: `*cuts*.jsonl[.gz]`, or `*recordings*.jsonl[.gz]` and
`*supervisions*.jsonl[.gz]`. Of a cut all supervisions are its text. Recordings must be files with
one channel; paths that are not absolute are looked for from here, then from the manifest.
"""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.manifests import Recording
from sparqle_stream.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

SUFFIXES = (".flac", ".wav", ".opus", ".ogg", ".mp3")
Found = tuple[bytes, list[Recording]]


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
        raw = b"".join(map(_read, cuts))
        entries = [(path, n, entry) for path in cuts for n, entry in _entries(path)]
        return raw, [_checked(_cut, folder, *entry) for entry in entries]
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
    )


def _supervision(folder: Path, entry: Mapping[str, Any], recording: Mapping[str, Any]) -> Recording:
    return Recording(
        id=str(entry["id"]),
        path=_source(folder, recording),
        text=entry.get("text") or "",
        speaker=str(entry.get("speaker") or ""),
        start_s=float(entry["start"]),
        seconds=float(entry["duration"]),
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
