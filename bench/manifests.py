"""Manifests: a folder of recordings with their texts -> recordings to be captioned.

In: a folder with `manifest.jsonl`, one object a line with `audio` (a path in the folder), `text`
('' where nobody speaks) and, if known, `id`, `speaker` and `corpus`. Contract: what is wrong with
a manifest is said with the number of the line, before anything is loaded.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparqle_stream.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

MANIFEST = "manifest.jsonl"


@dataclass(frozen=True, slots=True)
class Recording:
    id: str
    path: Path
    text: str
    speaker: str
    corpus: str = ""


@dataclass(frozen=True, slots=True)
class RecordingSet:
    """Recordings that are scored together. `fingerprint` is that of the whole manifest."""

    name: str
    recordings: tuple[Recording, ...]
    fingerprint: str
    n_all: int  # in the manifest; more than there are here when some were left out

    @property
    def corpora(self) -> list[str]:
        """What the recordings are taken from, where the manifest says so."""
        return sorted({r.corpus for r in self.recordings if r.corpus})


def read(folder: Path, every: int = 1, limit: int | None = None) -> RecordingSet:
    """Each `every`-th recording of a folder, the first `limit` of them at most."""
    if every < 1 or (limit is not None and limit < 1):
        raise ConfigError("nothing would be left of the recordings", hint="use 1 or more")
    path = folder / MANIFEST
    try:
        raw = path.read_bytes()
    except OSError as err:
        raise ConfigError(
            f"there is no {MANIFEST} in {folder}",
            hint='one object a line: {"audio": "a.wav", "text": "what is said", "speaker": "s1"}',
        ) from err
    lines = [(n, line) for n, line in enumerate(raw.splitlines(), 1) if line.strip()]
    recordings = [_recording(folder, n, line) for n, line in lines]
    chosen = recordings[::every][:limit]
    if not chosen:
        raise ConfigError(f"{path} names no recordings", hint="one JSON object a line")
    fingerprint = hashlib.sha256(raw).hexdigest()[:16]
    return RecordingSet(_name(folder), tuple(chosen), fingerprint, len(recordings))


def require_noise(recordings: RecordingSet) -> None:
    """Raises ConfigError for a set in which somebody speaks: his words would not be false."""
    for recording in recordings.recordings:
        if recording.text:
            raise ConfigError(
                f"{recording.id} in {recordings.name} has text, so it is no noise",
                hint="name the folder without --noise",
            )


def require_files(sets: Sequence[RecordingSet]) -> None:
    """Raises ConfigError for a recording that is not there: sooner than after hours of others."""
    for of_set in sets:
        for recording in of_set.recordings:
            if not recording.path.is_file():
                raise ConfigError(
                    f"there is no file {recording.path}", hint=f"it is named in {of_set.name}"
                )


def summary(sets: Sequence[RecordingSet]) -> list[dict[str, Any]]:
    """The sets as JSON: which, how many, and the fingerprint of their manifests."""
    return [
        {"name": s.name, "recordings": len(s.recordings), "manifest_sha256": s.fingerprint}
        for s in sets
    ]


def bundled() -> RecordingSet:
    """The clip that comes with the product: a figure without any download."""
    assets = Path(str(resources.files("sparqle_stream"))) / "assets"
    source = assets / "demo_source.json"
    found = [p for p in sorted(assets.glob("demo.*")) if p.suffix != ".json"]
    if not found or not source.exists():
        raise ConfigError("the demo clip is missing", hint="name recordings or a manifest folder")
    raw = source.read_bytes()
    clip = Recording("demo", found[0], json.loads(raw)["text"], "demo")
    return RecordingSet("demo", (clip,), hashlib.sha256(raw).hexdigest()[:16], 1)


def of_files(paths: list[Path]) -> RecordingSet:
    """Files without texts."""
    clips = tuple(Recording(path.stem, path, "", "") for path in paths)
    return RecordingSet("files", clips, "", len(clips))


def _name(folder: Path) -> str:
    """The last two parts of the path: 'test/read'. The rest is somebody's disk."""
    return "/".join(folder.resolve().parts[-2:])


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
    return Recording(str(entry.get("id", path.stem)), path, text, speaker, corpus)
