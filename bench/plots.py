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


def _title(result: Json) -> str:
    busy = ", on a busy machine" if was_busy(result) else ""
    return f"{result['bench']}: {result['settings']['model']}{busy}"


_DRAW: dict[str, Callable[[Figure, Json], None]] = {
    "accuracy": _accuracy,
    "compare": _compare,
    "latency": _latency,
    "soak": _soak,
    "throughput": _throughput,
    "tradeoff": _tradeoff,
}
