"""Outputs: which text file, or standard output, takes the captions of which source.

Contract: everything that can be wrong with a destination is said before any audio is captioned.
What goes wrong later (a full disk) is an OutputError; a pipe without reader a BrokenPipeError.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from sparqle_stream import formats
from sparqle_stream.errors import AudioFormatError, ConfigError, SparqleError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from typing import TextIO

# Formats of which several can follow one another in one file.
STACKABLE = ("txt", "jsonl")


class OutputError(SparqleError):
    """The destination took no more: a full disk, a terminal that is gone."""

    code = "output"


@contextlib.contextmanager
def _telling(place: str | Path | None) -> Iterator[None]:
    """What the system says against writing `place` (None: standard output) is an OutputError."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as err:
        raise OutputError(
            f"cannot write {place or 'standard output'}: {err.strerror}",
            hint="is the disk full? what came before it was written",
        ) from err


class Outputs:
    """Where the captions of each of `names` go."""

    def __init__(self, names: Sequence[str], kind: str, output: str | None) -> None:
        self.kind = kind
        self._names = list(dict.fromkeys(names))
        self._path = Path(output) if output else None
        self._is_folder = self._path is not None and (
            output is not None and output.endswith(("/", "\\")) or self._path.is_dir()
        )
        # How many sources have each stem and each name (of one source, once).
        self._n_of = Counter(
            word for name in self._names for word in {Path(name).stem, Path(name).name}
        )
        self._shared: TextIO | None = None
        self._n_opened = 0
        if len(self._names) > 1 and not self._is_folder and kind not in STACKABLE:
            raise ConfigError(
                f"one {kind} file cannot hold the captions of {len(self._names)} files",
                hint="give a folder: --output captions/",
            )
        self._check_targets()
        self._prepare()

    @property
    def is_file(self) -> bool:
        """Captions go to a file, not to standard output."""
        return self._path is not None

    def __enter__(self) -> Outputs:
        return self

    def __exit__(self, *_: object) -> None:
        if self._shared is not None:
            with _telling(self._path):
                self._shared.close()

    @contextlib.contextmanager
    def open(self, name: str, *, is_live: bool = False) -> Iterator[formats.Writer]:
        """A writer for one source; it is finished when the block is left, also by an error.

        Only a source without any sound (AudioFormatError) has nothing to finish.
        """
        path = self._target(name)
        with _telling(path), contextlib.ExitStack() as opened:
            if path is None:
                out = sys.stdout
            elif self._is_folder:
                out = opened.enter_context(_create(path))
            else:
                self._shared = self._shared or _create(path)
                out = self._shared
            if self.kind == "txt" and len(self._names) > 1 and not self._is_folder:
                gap = "\n" if self._n_opened else ""
                out.write(f"{gap}==> {name} <==\n")
            self._n_opened += 1
            writer = formats.open_writer(self.kind, out, name, is_live=is_live)
            try:
                yield writer
            except AudioFormatError:
                raise
            except BaseException:
                writer.finish()
                raise
            writer.finish()

    def _target(self, name: str) -> Path | None:
        if self._path is None or not self._is_folder:
            return self._path
        source = Path("stdin" if name == "-" else name)
        # a.wav and a.mp3 must not write to one a.srt, nor x/a.wav and y/a.wav to one a.wav.srt
        if self._n_of[source.stem] == 1:
            stem = source.stem
        elif self._n_of[source.name] == 1:
            stem = source.name
        else:
            stem = "_".join(part for part in source.parts if part not in (source.anchor, ".."))
        return self._path / f"{stem}.{self.kind}"

    def _check_targets(self) -> None:
        """No destination is also a source, or the destination of two."""
        inputs = {Path(name).resolve() for name in self._names}
        source_of: dict[Path, str] = {}
        for name in self._names:
            path = self._target(name)
            if path is None:
                continue
            if path.resolve() in inputs:
                raise ConfigError(f"{path} is also to be read", hint="choose another --output")
            other = source_of.setdefault(path, name)
            if self._is_folder and other != name:
                raise ConfigError(
                    f"{other} and {name} would both be written to {path}",
                    hint="caption one after the other",
                )

    def _prepare(self) -> None:
        if self._path is None:
            if sys.stdout is None:
                raise OutputError("standard output is closed", hint="use --output PATH")
            return
        folder = self._path if self._is_folder else self._path.parent
        try:
            if self._is_folder:
                folder.mkdir(parents=True, exist_ok=True)
        except OSError as err:
            raise ConfigError(
                f"cannot make {folder}: {err.strerror}", hint="check --output"
            ) from err
        if not folder.is_dir():
            raise ConfigError(f"there is no folder {folder}", hint="make it, or change --output")
        place = self._path if self._path.exists() else folder
        if not os.access(place, os.W_OK):
            raise ConfigError(f"cannot write {self._path}: no permission", hint="change --output")


def _create(path: Path) -> TextIO:
    try:
        # replace: a name of a file that is no text must not cost the captions
        return path.open("w", encoding="utf-8", errors="replace", newline="\n")
    except OSError as err:
        raise ConfigError(f"cannot write {path}: {err.strerror}", hint="check --output") from err
