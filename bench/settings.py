"""Settings that every benchmark of the engine shares: model, chunk, delay, detector, precision."""

from __future__ import annotations

import json
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
    from collections.abc import Callable

    from sparqle_stream.models import Model

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
        """The same for whoever has the whole recording and time: longest chunk, longest delay."""
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


def run_and_print(run: Callable[[], dict[str, Any]], output: Path | None) -> int:
    """The exit status. The result goes, in one line, to stdout, and to `output`."""
    try:
        _require_place(output)
        result = run()
        # First: what hours have measured must not be lost with a disk that is full.
        print(json.dumps(result, ensure_ascii=False), flush=True)
        write(result, output)
    except SparqleError as err:
        print(f"error: {err.message}", file=sys.stderr)
        if err.hint:
            print(f"hint: {err.hint}", file=sys.stderr)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    return 0


def write(result: dict[str, Any], output: Path | None) -> None:
    """The result as a file, if one is wanted; one that is there stays whole until then."""
    if output is None:
        return
    is_file = output.is_file() or not output.exists()
    # A device or a pipe is written to; a file that took its place would be a bad surprise.
    part = output.with_name(output.name + ".part") if is_file else output
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        if part != output:
            part.replace(output)
    except OSError as err:
        raise ConfigError(f"cannot write {output}: {err.strerror}", hint="check --output") from err


def _require_place(output: Path | None) -> None:
    """Raises ConfigError where no file can be made, before anything is measured."""
    if output is None or output.exists() and not output.is_dir():
        return
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output.parent):
            pass
    except OSError as err:
        raise ConfigError(f"cannot write {output}: {err.strerror}", hint="check --output") from err
    if output.is_dir():
        raise ConfigError(f"--output {output} is a folder", hint="name a file in it")
