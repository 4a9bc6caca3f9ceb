"""Settings that every benchmark of the engine shares: model, chunk, delay, detector, precision."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparqle_stream.config import (
    CHUNK_MS_RANGE,
    DELAY_MS_RANGE,
    EngineConfig,
    StreamOptions,
    VadConfig,
)
from sparqle_stream.errors import ConfigError, SparqleError

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterator, Sequence

    from sparqle_stream.models import Model

    Json = dict[str, Any]

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130


@dataclass(frozen=True, slots=True)
class Settings:
    """One configuration of the engine. `n_streams` run at once, in one batch."""

    model: str = "sparqle-base-en"
    llm: str | None = None
    chunk_ms: int = 320
    delay_ms: int = 240
    vad: str = "silero"
    vad_stop_ms: int = VadConfig().stop_ms
    dtype: str = "auto"
    compute: str = "cpu"
    backend: str = "auto"
    threads: int = 0
    n_streams: int = 1

    def __post_init__(self) -> None:
        if self.n_streams < 1:
            raise ConfigError(f"--batch {self.n_streams} cannot be used", hint="1 or more")

    def stream_options(self) -> StreamOptions:
        """Raises ConfigError, also for what only the command line could have got wrong."""
        vad = VadConfig(kind=self.vad, stop_ms=self.vad_stop_ms)
        return StreamOptions(chunk_ms=self.chunk_ms, delay_ms=self.delay_ms, vad=vad)

    def engine_config(self) -> EngineConfig:
        return EngineConfig(
            n_slots=self.n_streams,
            chunk_ms=self.chunk_ms,
            threads=self.threads,
            dtype=self.dtype,
            compute=self.compute,
            backend=self.backend,
        )

    def offline(self) -> Settings:
        """The same with the longest chunk and delay that a stream may have.

        It streams all the same: nothing hears the whole recording before it writes. The name is
        that of --offline, and of `mode` in results.
        """
        return replace(self, chunk_ms=CHUNK_MS_RANGE[1], delay_ms=DELAY_MS_RANGE[1])

    @property
    def mode(self) -> str:
        return "offline" if self == self.offline() else "streaming"

    def load_model(self) -> Model:
        from sparqle_stream import models

        return models.load(
            self.model,
            llm=self.llm,
            dtype=self.dtype,
            device=self.compute,
            backend=self.backend,
        )

    def summary(self) -> dict[str, Any]:
        """As JSON: 'auto' as what it came to; of paths the last part, the rest is of one disk."""
        from sparqle_stream import models

        is_random = self.model == models.RANDOM_TINY
        backend, dtype = models.choose(self.backend, self.dtype, self.compute, is_random=is_random)
        return asdict(self) | {
            "model": Path(self.model).name,
            "llm": self.llm and Path(self.llm).name,
            "backend": backend,
            "dtype": dtype,
        }


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of `Settings` except `n_streams`, and --output."""
    default = Settings()
    add = parser.add_argument
    add("--model", default=default.model, metavar="NAME|PATH", help="(default %(default)s)")
    add("--llm", metavar="NAME|PATH", help="another LLM behind the same bridge")
    add("--chunk-ms", type=int, default=default.chunk_ms, metavar="MS", help="(%(default)s)")
    add("--delay-ms", type=int, default=default.delay_ms, metavar="MS", help="(%(default)s)")
    add("--vad", choices=("silero", "webrtc", "off"), default=default.vad, help="(%(default)s)")
    add("--vad-stop", type=int, default=default.vad_stop_ms, metavar="MS", help="(%(default)s)")
    add("--dtype", default=default.dtype, help="auto, int8, float32, bfloat16 (%(default)s)")
    add("--backend", default=default.backend, help="auto, onnx, torch (%(default)s)")
    add("--compute", choices=("cpu", "cuda"), default=default.compute, help="(%(default)s)")
    add("--threads", type=int, default=default.threads, help="0: all cores (%(default)s)")
    add("--output", type=Path, metavar="FILE.json", help="for example in bench/results/")


def from_args(args: argparse.Namespace, n_streams: int = 1) -> Settings:
    return Settings(
        model=args.model,
        llm=args.llm,
        chunk_ms=args.chunk_ms,
        delay_ms=args.delay_ms,
        vad=args.vad,
        vad_stop_ms=args.vad_stop,
        dtype=args.dtype,
        compute=args.compute,
        backend=args.backend,
        threads=args.threads,
        n_streams=n_streams,
    )


def run_and_print(
    run: Callable[[], Json],
    output: Path | None,
    places: Sequence[tuple[str, Path | None]] = (),
    then: Sequence[Callable[[Json], object]] = (),
) -> int:
    """The exit status. The result goes, in one line, to stdout, and to `output`.

    `places`: options and paths of whatever else is to be written, looked at before anything is
    measured. `then`: who writes it, of the result, once that is safe; none stops another. A result
    that is "interrupted" is a part: it takes the place of no file, and the status is 130.
    """
    try:
        for option, path in (("--output", output), *places):
            require_place(path, option)
        result = run()
        # First: what hours have measured must not be lost with a disk that is full.
        print(_line(result), flush=True)
    except SparqleError as err:
        return _told(err)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    is_part = bool(result.get("interrupted"))
    if is_part:
        print("interrupted: the result is of what was done", file=sys.stderr)
        if output is not None and output.is_file():
            print(f"{output} stays as it was", file=sys.stderr)
            output = None
    status = EXIT_INTERRUPTED if is_part else 0
    for keep in (lambda whole: write(whole, output), *then):
        try:
            keep(result)
        except SparqleError as err:
            status = max(status, _told(err))
        except KeyboardInterrupt:
            print("interrupted: not everything was written", file=sys.stderr)
            return EXIT_INTERRUPTED
    return status


def _told(err: SparqleError) -> int:
    """The exit status of an error, which is said."""
    print(f"error: {err.message}", file=sys.stderr)
    if err.hint:
        print(f"hint: {err.hint}", file=sys.stderr)
    return EXIT_USER_ERROR


def write(result: Json, output: Path | None) -> None:
    """The result as a file, if one is wanted; one that is there stays whole until then."""
    if output is None:
        return
    is_file = output.is_file() or not output.exists()
    # A device or a pipe is written to; a file that took its place would be a bad surprise.
    part = output.with_name(output.name + ".part") if is_file else output
    text = as_json(result, indent=1) + "\n"
    with writing(output, "--output"):
        output.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(text, encoding="utf-8")
        if part != output:
            part.replace(output)


@contextlib.contextmanager
def writing(path: Path, option: str) -> Iterator[None]:
    """What cannot be written inside is a ConfigError that names the option."""
    try:
        yield
    except OSError as err:
        why = err.strerror or str(err)
        raise ConfigError(f"cannot write {path}: {why}", hint=f"check {option}") from err


def as_json(result: Json, indent: int | None = None) -> str:
    """Strict JSON: NaN and infinity, which only Python reads, are an error that says where."""
    try:
        return json.dumps(result, ensure_ascii=False, indent=indent, allow_nan=False)
    except ValueError as err:
        where = ", ".join(_not_finite(result, "")) or str(err)
        raise SparqleError(
            f"figures of the result are no numbers: {where}", hint="the benchmark has a defect"
        ) from err


def _line(result: Json) -> str:
    """The result in one line; one that is no JSON goes to stderr, so that no figure is lost."""
    try:
        return as_json(result)
    except SparqleError:
        print(json.dumps(result, ensure_ascii=False), file=sys.stderr, flush=True)
        raise


def _not_finite(value: object, name: str) -> list[str]:
    """Where there is NaN or infinity: 'timing.rtf is nan'."""
    if isinstance(value, float) and not math.isfinite(value):
        return [f"{name} is {value}"]
    inside: list[tuple[object, object]] = []
    if isinstance(value, dict):
        inside = list(value.items())
    elif isinstance(value, list | tuple):
        inside = list(enumerate(value))
    prefix = f"{name}." if name else ""
    return [where for key, one in inside for where in _not_finite(one, f"{prefix}{key}")]


def require_place(path: Path | None, option: str) -> None:
    """Raises ConfigError where no file can be made, before anything is measured."""
    if path is None or path.exists() and not path.is_file() and not path.is_dir():
        return  # a device or a pipe
    with writing(path, option):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
        if path.is_file() and not os.access(path, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    if path.is_dir():
        raise ConfigError(f"{option} {path} is a folder", hint="name a file in it")
