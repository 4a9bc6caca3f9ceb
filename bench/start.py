"""Start: `python -m bench.start [FILE]` times the product from its start to its first caption.

Every run is a process of its own, `sparqle-stream FILE --format vtt` into a pipe: the file is read
as fast as the machine goes, so nothing waits for a clock. In WebVTT the header is written when the
model is loaded, and the first cue when the word after it is final: until then every chunk up to
the cue's end was captioned, which is more than a first word needs and is said in the result
(`first_cue`). The first run warms the page cache and does not count.
Out: one JSON document. Seconds from before the process is made to the header, to the first cue and
to the end, and the most memory that it held (VmHWM, sampled until it is gone): median, min, max.

Bound: what loading has to read of weights and texts, once, at the bandwidth of one thread. It
leaves out Python, imports, ONNX Runtime's preparations and the first chunks.
Contract: a run that fails or captions nothing is an error, not a figure.
"""

from __future__ import annotations

import argparse
import os
import re
import select
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import IO, TYPE_CHECKING, Any

from bench import bounds, machine, manifests, plots, settings
from sparqle_stream.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from bench.settings import Settings
    from sparqle_stream.models import Model

RUNS = 5
GOALS = {"first_caption_s": 4.0, "peak_rss_mb": 800.0}
SAMPLE_S = 0.01  # between looks at a process's memory
LIMIT_S = 300.0  # for one run
HEADER = b"WEBVTT\n"
CUE = re.compile(rb"^(\S+ --> \S+)\n.*\S", re.MULTILINE)  # its times, then a line of its text
# Beside GRAPHS: what `onnx_cpu.model.load` reads whole. Embeddings are mapped, other graphs wait.
READ_WHOLE = (
    *("stages.json", "stop.npy", "text.npz"),
    *("tokenizer.json", "pieces.json", "words.safetensors"),
)


@dataclass(frozen=True, slots=True)
class Run:
    """One process; seconds since just before it was made."""

    loaded_s: float  # header of WebVTT
    first_caption_s: float
    whole_s: float
    peak_rss_mb: float  # 10^6 bytes
    first_cue: str  # 'FROM --> TO' in the recording


def command(wanted: Settings, recording: Path) -> list[str]:
    """The product's command line, with every option that a result names."""
    options = {
        "--model": wanted.model,
        "--llm": wanted.llm,
        "--chunk-ms": wanted.chunk_ms,
        "--delay-ms": wanted.delay_ms,
        "--vad": wanted.vad,
        "--vad-stop": wanted.vad_stop_ms,
        "--dtype": wanted.dtype,
        "--compute": wanted.compute,
        "--backend": wanted.backend,
        "--threads": wanted.threads,
    }
    given = [str(x) for item in options.items() if item[1] is not None for x in item]
    program = [sys.executable, "-m", "sparqle_stream.cli"]
    return [*program, str(recording.resolve()), "--format", "vtt", *given]


def watch(program: Sequence[str], limit_s: float = LIMIT_S) -> Run:
    """Runs a program that writes WebVTT, to its end. Raises ConfigError if it does not do it."""
    with tempfile.TemporaryFile() as told:
        start = time.perf_counter()
        process = subprocess.Popen(
            program, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=told, env=_environ()
        )
        assert process.stdout is not None
        try:
            marks, cue, peak = _follow(process.pid, process.stdout, start, limit_s)
            status = process.wait(timeout=limit_s)
        except subprocess.TimeoutExpired as err:
            raise ConfigError(
                f"{_name(program)} was not done after {limit_s:g} s", hint="a shorter recording?"
            ) from err
        finally:
            process.kill()
            process.wait()
            process.stdout.close()
        whole_s = time.perf_counter() - start
        told.seek(0)
        last = told.read().decode(errors="replace").strip().rpartition("\n")[2]
    if status != 0:
        raise ConfigError(f"{_name(program)} ended with status {status}", hint=last)
    if len(marks) < 2:
        raise ConfigError(f"{_name(program)} captioned nothing", hint=last or "is it speech?")
    return Run(marks["loaded"], marks["caption"], whole_s, peak, cue)


def _environ() -> dict[str, str]:
    """Without defaults that somebody has set for himself: the result's settings say all."""
    own = ("SPARQLE_HOME",)
    return {k: v for k, v in os.environ.items() if k in own or not k.startswith("SPARQLE_")}


def _name(program: Sequence[str]) -> str:
    return " ".join(Path(part).name for part in program[:4])


def _follow(
    pid: int, out: IO[bytes], start: float, limit_s: float
) -> tuple[dict[str, float], str, float]:
    """Until the output ends: seconds of 'loaded' and 'caption', the first cue, peak memory."""
    marks: dict[str, float] = {}
    cue, text, peak = "", b"", 0.0
    while True:
        ready, _, _ = select.select([out], [], [], SAMPLE_S)
        now = time.perf_counter() - start
        peak = max(peak, peak_mb(pid))
        if now > limit_s:
            raise subprocess.TimeoutExpired("", limit_s)
        if not ready:
            continue
        block = os.read(out.fileno(), 1 << 16)
        if not block:
            return marks, cue, peak
        text += block
        if text.startswith(HEADER):
            marks.setdefault("loaded", now)
        if not cue and (found := CUE.search(text)):
            marks["caption"], cue = now, found[1].decode()


def peak_mb(pid: int) -> float:
    """Most memory that a process has held so far, in 10^6 bytes; 0 when it is gone.

    Where there is no /proc, what it holds now: peaks between two looks are lost then.
    """
    if (told := machine.high_water_mb(pid)) is not None:
        return told
    with suppress(ConfigError):
        if machine.high_water_mb() is None:
            return machine.Process(pid).read().rss_mb
    return 0.0


def bound(model: Model) -> dict[str, float]:
    """The least time that reading a model's files takes, all of them in the page cache."""
    n_bytes, bandwidth = bytes_to_read(model), bounds.read_gigabytes_per_s(1)
    return {
        "read_mb": round(n_bytes / 1e6, 1),
        "read_gb_per_s": round(bandwidth, 1),
        "seconds_at_least": float(f"{n_bytes / 1e9 / bandwidth:.3g}"),
    }


def bytes_to_read(model: Model) -> int:
    """Bytes without which nothing can be captioned."""
    from sparqle_stream.onnx_cpu.model import GRAPHS, OnnxModel

    if not isinstance(model, OnnxModel):
        return sum(model.weight_bytes().values())
    graphs = [f"{name}.{kind}" for name in GRAPHS for kind in ("onnx", "data")]
    files = [model.folder / name for name in (*graphs, *READ_WHOLE)]
    return sum(file.stat().st_size for file in files if file.is_file())


def figures(runs: Sequence[Run]) -> dict[str, Any]:
    """Median, min and max of runs that count."""
    names = ("loaded_s", "first_caption_s", "whole_s", "peak_rss_mb")
    return {name: _spread(getattr(one, name) for one in runs) for name in names}


def _spread(values: Iterable[float]) -> dict[str, float]:
    taken = sorted(values)
    spread = {"median": median(taken), "min": taken[0], "max": taken[-1]}
    return {name: round(value, 3) for name, value in spread.items()}


def run(args: argparse.Namespace, wanted: Settings) -> dict[str, Any]:
    free = machine.require_free(is_forced=args.force)
    recordings = manifests.of_files([args.file]) if args.file else manifests.bundled()
    manifests.require_files([recordings])
    (recording,) = recordings.recordings
    model = wanted.load_model()  # makes the graphs where they are missing: no start of that counts
    facts = bound(model), machine.card(model.weights_hash, wanted.threads)
    program, under = command(wanted, recording.path), machine.Conditions(free)
    warm_up, *runs = [watch(program) for _ in range(1 + args.runs)]
    return {
        "bench": "start",
        "settings": wanted.summary() | {"runs": args.runs},
        "machine": facts[1],
        "timing": under.summary() | {"pace": "as fast as the machine goes, WebVTT into a pipe"},
        "recording": {"name": recording.id, "seconds": round(recording.length_s(), 2)},
        "warm_up_first_caption_s": round(warm_up.first_caption_s, 3),
        "first_cue": runs[0].first_cue,
        "bound": facts[0],
        "goals": GOALS,
    } | figures(runs)


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.start", description=__doc__)
    add = parser.add_argument
    add("file", nargs="?", type=Path, metavar="FILE", help="speech (default: the bundled clip)")
    add("--runs", type=int, default=RUNS, metavar="N", help="that count (%(default)s)")
    add("--force", action="store_true", help="time on a busy machine, and say so in the result")
    plots.add_option(parser)
    settings.add_options(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)

    def measured() -> dict[str, Any]:
        wanted = settings.from_args(args)
        wanted.stream_options()  # wrong options are said before a model is loaded
        plots.require(args.plot)
        if args.runs < 1:
            raise ConfigError(f"--runs {args.runs} cannot be used", hint="1 or more")
        return run(args, wanted)

    draw = [lambda result: plots.draw(result, args.plot)]
    return settings.run_and_print(measured, args.output, then=draw)


if __name__ == "__main__":
    sys.exit(main())
