"""Plots: a result as a PNG, where matplotlib is installed.

Contract: whether it can be drawn is said before anything is measured, and figures never depend on
it. One function per kind of result.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.delays import FEWEST
from bench.settings import require_place, writing
from bench.tables import interval, was_busy
from sparqle_stream.errors import ConfigError, MissingExtraError

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    Json = dict[str, Any]

SIZE_INCHES = (8.0, 4.5)
DPI = 120


def add_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="needs matplotlib")


def require(path: Path | None) -> None:
    """Raises when a plot is wanted that could not be drawn in the end."""
    if path is None:
        return
    if path.suffix != ".png":
        raise ConfigError(f"--plot {path.name} is no PNG", hint="name it something.png")
    if not path.parent.is_dir():
        raise ConfigError(f"--plot: there is no folder {path.parent}", hint="make it before")
    if importlib.util.find_spec("matplotlib") is None:
        raise MissingExtraError("matplotlib is not installed", hint="pip install -e .[plot]")
    require_place(path, "--plot")


def draw(result: Json, path: Path | None) -> None:
    """The plot of a result, if one is wanted. Raises ConfigError where it cannot be written."""
    if path is None:
        return
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=SIZE_INCHES, layout="constrained")
    FigureCanvasAgg(figure)
    _DRAW[result["bench"]](figure, result)
    with writing(path, "--plot"):
        figure.savefig(path, dpi=DPI)


def _throughput(figure: Figure, result: Json) -> None:
    """Lag, and the cores that are busy, over the number of streams."""
    levels = result.get("levels") or [result["arrivals"]]
    n = [one["streams"] for one in levels]
    axes: Axes = figure.subplots()
    for share in ("p50", "p95", "max"):
        axes.plot(n, [one["lag_ms"][share] for one in levels], marker="o", label=f"lag {share}")
    axes.axhline(result["load"]["limit_ms"], linestyle="--", color="grey", label="limit")
    axes.set(xlabel="streams", ylabel="ms", yscale="log", title=_title(result))
    axes.legend(loc="upper left")  # "best" warns where it takes long


def _soak(figure: Figure, result: Json) -> None:
    """What must stay flat, over the audio that was captioned."""
    samples = result["samples"]
    hours = [one["audio_seconds"] / 3600 for one in samples]
    names = [name for name in result["flat"] if any(one[name] is not None for one in samples)]
    for axes, name in zip(figure.subplots(len(names), 1, sharex=True), names, strict=True):
        axes.plot(hours, [one[name] for one in samples], linewidth=1)
        axes.set_ylabel(name.replace("_", "\n"), rotation=0, ha="right", va="center")
        axes.set_ylim(bottom=0)
    figure.set_size_inches(SIZE_INCHES[0], 1.4 * len(names) + 1)
    figure.supxlabel("hours of audio")
    figure.suptitle(_title(result))


def _latency(figure: Figure, result: Json) -> None:
    """Percentiles of each delay, heard and by the clock."""
    axes: Axes = figure.subplots()
    shares = ("p50", "p90", "p95", "p99", "max")
    for side in ("algorithmic", "with_compute"):
        for name, values in result[side].items():
            if values["p50"] is not None:
                # No share that so few values cannot tell (bench.delays).
                told = [i for i, s in enumerate(shares) if values["n"] >= FEWEST.get(s, 1)]
                style = "-" if side == "with_compute" else "--"
                label = f"{name.removesuffix('_ms').replace('_', ' ')}, {side.replace('_', ' ')}"
                y = [values[shares[i]] for i in told]
                axes.plot(told, y, style, marker="o", label=label)
    axes.set_xticks(range(len(shares)), shares)
    axes.set(ylabel="ms", title=_title(result))
    axes.set_ylim(bottom=0)
    axes.legend(loc="upper left", fontsize="small")


def _accuracy(figure: Figure, result: Json) -> None:
    """WER of every set with its interval."""
    sets = [s for s in result["sets"] if "speech" in s]
    axes: Axes = figure.subplots()
    for i, one in enumerate(sets):
        speech = one["speech"]
        edges = interval(speech)
        axes.bar(i, speech["wer_percent"], color="tab:blue")
        if edges:
            axes.vlines(i, edges[0], edges[1], color="black")
    axes.set_xticks(range(len(sets)), [s["name"] for s in sets])
    axes.set(ylabel="WER, %", title=_title(result))


def _tradeoff(figure: Figure, result: Json) -> None:
    """WER over the median emission delay, one line a chunk size, one field a folder."""
    names = [one["name"] for one in result["sets"]]
    fields = figure.subplots(1, len(names), squeeze=False)[0]
    figure.set_size_inches(SIZE_INCHES[0] * max(1.0, 0.6 * len(names)), SIZE_INCHES[1])
    for i, (axes, name) in enumerate(zip(fields, names, strict=True)):
        for chunk_ms in sorted({cell["chunk_ms"] for cell in result["cells"]}):
            cells = [cell for cell in result["cells"] if cell["chunk_ms"] == chunk_ms]
            delays = [c["sets"][i]["delays_stream_time"]["emission_ms"]["p50"] for c in cells]
            points = [
                (delay, c["sets"][i]["wer_percent"], c["delay_ms"])
                for delay, c in zip(delays, cells, strict=True)
                if delay is not None
            ]
            if points:
                x, y, labels = zip(*points, strict=True)
                axes.plot(x, y, marker="o", markersize=3, label=f"{chunk_ms} ms")
                for point in zip(x, y, labels, strict=True):
                    axes.annotate(
                        f"{point[2]}",
                        point[:2],
                        xytext=(3, 3),
                        textcoords="offset points",
                        fontsize="xx-small",
                    )
        axes.set(xlabel="word end to emission, p50, ms of stream", ylabel="WER, %", title=name)
        axes.legend(loc="upper right", title="chunk", fontsize="small")
    figure.suptitle(f"{_title(result)}; beside each point: delay, ms")


def _compare(figure: Figure, result: Json) -> None:
    """Computing per second of audio, ours and theirs, every turn of it."""
    axes: Axes = figure.subplots()
    names = list(result["engines"])
    for i, name in enumerate(names):
        turns = [turn["rtf"] for turn in result["engines"][name]["turns"]]
        axes.scatter(turns, [i] * len(turns))
    axes.set_yticks(range(len(names)), names)
    axes.set(xlabel="RTF", xscale="log", title=_title(result))


def _passes(figure: Figure, result: Json) -> None:
    """Milliseconds of each pass of the LLM; across one row and one append, the bound."""
    axes: Axes = figure.subplots()
    shapes = list(next(iter(result["pass_ms"].values())))
    width = 0.8 / len(result["pass_ms"])
    for i, (name, passes) in enumerate(result["pass_ms"].items()):
        x = [at + i * width for at in range(len(shapes))]
        bars = axes.bar(x, [passes[shape] for shape in shapes], width, label=name)
        bound, half = result["bound_ms"][name], width / 2
        axes.hlines([bound] * len(x), [at - half for at in x], [at + half for at in x], "black")
        axes.bar_label(bars, [f"{passes[shape] / bound:.1f}" for shape in shapes], fontsize="small")
    axes.set_xticks([at + 0.4 - width / 2 for at in range(len(shapes))], shapes)
    axes.set(xlabel="streams x rows; lines: weights read once; numbers: times that", ylabel="ms")
    axes.set(yscale="log", title=_title(result))
    axes.legend(fontsize="small")


def _start(figure: Figure, result: Json) -> None:
    """Seconds from the command to each event, the fastest and slowest run, and the goal."""
    axes: Axes = figure.subplots()
    names = ("loaded_s", "first_caption_s", "whole_s")
    for i, name in enumerate(names):
        told = result[name]
        axes.bar(i, told["median"], color="tab:blue")
        axes.vlines(i, told["min"], told["max"], color="black")
        if name in result["goals"]:
            axes.hlines(result["goals"][name], i - 0.4, i + 0.4, linestyle="--", color="grey")
    axes.set_xticks(range(len(names)), [name[:-2].replace("_", " ") for name in names])
    axes.set(ylabel="s since the command", title=_title(result))


def _flips(figure: Figure, result: Json) -> None:
    """What int8 changes of each set, in percent."""
    axes: Axes = figure.subplots()
    sets = result["sets"]
    shares = {
        "words changed": [one["captions"]["flip_rate_percent"] for one in sets],
        "frames of CTC changed": [one["ear"]["frames_changed_percent"] for one in sets],
        "WER, points": [one["accuracy"]["difference"]["points"] for one in sets],
    }
    for i, (name, values) in enumerate(shares.items()):
        bars = axes.bar([at + 0.25 * i for at in range(len(sets))], values, 0.25, label=name)
        axes.bar_label(bars, fontsize="small")
    axes.set_xticks([at + 0.25 for at in range(len(sets))], [one["name"] for one in sets])
    axes.set(ylabel="%", title=_title(result))
    axes.legend(fontsize="small")


def _steps(figure: Figure, result: Json) -> None:
    """Milliseconds of a step over the number of streams, with CUDA graphs and without."""
    axes: Axes = figure.subplots()
    for graphs in (True, False):
        rows = [one for one in result["rows"] if one["graphs"] is graphs]
        for share in ("p50", "p95") if rows else ():
            label = f"{share}, {'with' if graphs else 'without'} graphs"
            y = [one[f"{share}_ms"] for one in rows]
            axes.plot([one["streams"] for one in rows], y, marker="o", label=label)
    axes.axhline(result["settings"]["chunk_ms"], linestyle="--", color="grey", label="a chunk")
    axes.set_xscale("log", base=2)
    axes.set(xlabel="streams", ylabel="ms", yscale="log", title=_title(result))
    axes.legend(fontsize="small")


def _kernels(figure: Figure, result: Json) -> None:
    """How much faster each kernel is than PyTorch's fastest, over the number of streams."""
    axes: Axes = figure.subplots()
    rows: dict[str, list[Json]] = {}
    for one in sorted(result["rows"], key=lambda one: int(one["streams"])):
        rows.setdefault(f"{one['op']}, {one['case']}, {one['dtype']}", []).append(one)
    for name, of in rows.items():
        axes.plot([one["streams"] for one in of], [one["speedup"] for one in of], "o-", label=name)
    axes.axhline(1.0, linestyle="--", color="grey")
    axes.set_xscale("log", base=2)
    axes.set(xlabel="streams", ylabel="times as fast as PyTorch", yscale="log")
    axes.set_title(_title(result))
    axes.legend(fontsize="xx-small", loc="upper left", bbox_to_anchor=(1, 1))


def _title(result: Json) -> str:
    busy = ", on a busy machine" if was_busy(result) else ""
    of = result["settings"]["model"] if "settings" in result else result.get("device", "")
    return f"{result['bench']}{of and ': '}{of}{busy}"


_DRAW: dict[str, Callable[[Figure, Json], None]] = {
    "accuracy": _accuracy,
    "compare": _compare,
    "flips": _flips,
    "kernels": _kernels,
    "latency": _latency,
    "passes": _passes,
    "soak": _soak,
    "start": _start,
    "steps": _steps,
    "throughput": _throughput,
    "tradeoff": _tradeoff,
}
