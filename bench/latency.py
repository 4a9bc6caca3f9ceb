"""Latency: `python -m bench.latency [FILE|FOLDER...]` plays recordings and times every word.

In: recordings, or folders with a manifest (bench.manifests); without any, the bundled clip. They
are played in 20 ms packets at the speed of speech, one stream at a time: through an engine in this
process; with --server through our own websocket server here; with --url to one that runs; or with
--virtual as fast as the machine goes (bench.players says what is the same then).
Out: one JSON document. Emission delay of words, first word after the start of speech, end of speech
to final: algorithmic (stream time that had to be heard) and with compute (wall clock), word ends
being the engine's own and, with texts, those of a forced alignment (bench.aligned); AL, LAAL and
DAL (bench.lagging). Compute per chunk and per stage, RTF, the bound of the memory bus. The
first seconds of the first recording are played before, to warm up. --trace has every chunk; it
costs a little time, and the result says that it was there. Recordings that cannot be played are
counted as failed, and why goes to stderr. Ctrl-C ends it with what was played, not aligned, and
"interrupted" in the result.

Contract: refuses to time on a machine that others use, unless --force; the result says so then.
"""

from __future__ import annotations

import argparse
import sys
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench import lagging, machine, manifests, plots, settings
from bench.delays import Delays, algorithmic, measure, percentiles_ms
from bench.trace import Trace
from sparqle_stream import messages
from sparqle_stream.config import SAMPLE_RATE_HZ
from sparqle_stream.errors import ConfigError, SparqleError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy as np
    import numpy.typing as npt
    from tqdm import tqdm

    from bench.manifests import Recording, RecordingSet
    from bench.players import Progress, Take
    from bench.settings import Settings
    from sparqle_stream.config import StreamOptions
    from sparqle_stream.engine import Engine
    from sparqle_stream.models import Model

    Json = dict[str, Any]
    Pcm = npt.NDArray[np.float32]
    Player = Callable[[Pcm, StreamOptions, Progress], Take]

WARM_UP_S = 3.0


@dataclass(slots=True)
class Played:
    """Recordings that were played to their end, and their takes."""

    recordings: list[Recording] = field(default_factory=list)
    takes: list[Take] = field(default_factory=list)
    n_failed: int = 0
    is_whole: bool = True  # nobody interrupted


def run(
    args: argparse.Namespace, wanted: Settings, sets: Sequence[RecordingSet], trace: Trace | None
) -> Json:
    """The whole benchmark; `trace` gets the spans of an engine that runs here."""
    from bench import bounds, players

    model = None if args.url else wanted.load_model()
    recordings = [recording for of_set in sets for recording in of_set.recordings]
    under = machine.Conditions(machine.require_free(is_forced=args.force))
    with ExitStack() as stack:
        if trace is not None and not args.virtual:
            trace.restart()
        played = _play_all(_player(args, wanted, model, trace, stack), wanted, recordings)
    takes = played.takes
    conditions = {
        "pace": "virtual" if args.virtual else "speed of speech",
        "through": _through(args),
        "packet_ms": 1000 * players.PACKET_SAMPLES // SAMPLE_RATE_HZ,
    } | under.summary()
    result = {
        "bench": "latency",
        "settings": wanted.summary() | _told_by_server(args, takes),
        "machine": machine.card(model.weights_hash if model else "", wanted.threads),
        "sets": manifests.summary(sets),
        "played": len(takes),
        "failed": played.n_failed,
        "traced": trace is not None,
        "timing": conditions,
        "bound": bounds.of_chunk(model, wanted.chunk_ms, compute=wanted.compute) if model else None,
        "aligned": _aligned(model, wanted, played) if model else None,
    } | figures(takes, [len(r.text.split()) for r in played.recordings])
    return result if played.is_whole else result | {"interrupted": True}


def _aligned(model: Model, wanted: Settings, played: Played) -> Json | None:
    """Emission delay against aligned word ends, where there are texts and nobody is in a hurry."""
    from bench import aligned

    pairs = zip(played.recordings, played.takes, strict=True)
    texts = [(r, take) for r, take in pairs if r.text]
    if not texts or not played.is_whole:
        return None
    found = [(r.pcm(), r.text, take) for r, take in texts]
    try:
        return aligned.measure(model, wanted.stream_options(), found).summary()
    except KeyboardInterrupt:
        played.is_whole = False
        return None


def _player(
    args: argparse.Namespace,
    wanted: Settings,
    model: Model | None,
    trace: Trace | None,
    stack: ExitStack,
) -> Player:
    """Whoever plays one recording; what has to be closed afterwards goes on the stack."""
    from bench import players
    from sparqle_stream import engine as engines
    from sparqle_stream import server

    if model is None:
        return _remote(args, wanted, args.url, None)
    cfg = wanted.engine_config()
    if args.virtual:
        return players.VirtualEngine(model, cfg, trace).play
    if trace is None:
        engine = stack.enter_context(engines.Engine(model, cfg))
    else:
        from bench.traced import traced_engine

        engine = stack.enter_context(traced_engine(model, cfg, trace))
    if args.server:
        server_cfg = server.ServerConfig(port=0, drain_s=0.0)
        url = stack.enter_context(server.background(engine, server_cfg))
        return _remote(args, wanted, url, engine)

    def play(pcm: Pcm, options: StreamOptions, progress: Progress) -> Take:
        return players.play(engine, pcm, options, progress)

    return play


def _remote(args: argparse.Namespace, wanted: Settings, url: str, engine: Engine | None) -> Player:
    """A player over /v1/stream; what the steps cost is known of an engine here only."""
    from bench import players
    from bench.targets import until_free

    query: dict[str, str | int] = {"chunk_ms": wanted.chunk_ms, "delay_ms": wanted.delay_ms}
    query |= {"vad": wanted.vad, "vad_stop_ms": wanted.vad_stop_ms}
    metrics = None if engine is None else engine.metrics

    def play(pcm: Pcm, options: StreamOptions, progress: Progress) -> Take:
        del options  # they are in the query
        if engine is not None:
            until_free(url)  # its one slot is that of the recording before
        return players.play_remote(url, pcm, query, args.api_key, progress, metrics)

    return play


def _through(args: argparse.Namespace) -> str:
    """What was played to; the address of a server is nobody's business."""
    if args.url:
        return "a server, dialect stream"
    return "our server, dialect stream" if args.server else "the engine, in process"


def _told_by_server(args: argparse.Namespace, takes: Sequence[Take]) -> dict[str, str]:
    """The model that another process runs; its precision is not told."""
    names = {e.model for take in takes for e in take.events if isinstance(e, messages.Ready)}
    return {"model": ", ".join(sorted(names)), "dtype": "its own"} if args.url else {}


def figures(takes: Sequence[Take], n_reference: Sequence[int] = ()) -> Json:
    """What is reported of recordings that were played; n_reference: words of their texts, or 0."""
    heard, clocked = Delays(), Delays()
    for take in takes:
        heard.extend(algorithmic(take.events))
        clocked.extend(measure(take.arrivals))
    chunks = [seconds for take in takes for seconds in take.chunk_seconds]
    audio_s = sum(take.duration for take in takes)
    compute_s = sum(take.compute_seconds for take in takes)
    stages: dict[str, float] = {}
    of_stages: dict[str, list[float]] = {}
    for take in takes:
        for stage, seconds in take.stage_seconds.items():
            stages[stage] = stages.get(stage, 0.0) + seconds
        for stage, each in take.stage_chunks.items():
            of_stages.setdefault(stage, []).extend(each)
    return {
        "algorithmic": heard.summary(),
        "with_compute": clocked.summary(),
        "word_times_from": "the engine's CTC path",
        "words_with_unsure_end": heard.n_unsure,
        "segments_without_words": heard.n_without_words,
        "lagging": _lagging(takes, n_reference or [0] * len(takes)),
        "chunk_compute_ms": percentiles_ms(chunks),
        "stage_ms": {stage: percentiles_ms(seconds) for stage, seconds in of_stages.items()},
        "stage_ms_per_audio_second": {
            stage: round(1000 * seconds / audio_s, 2) for stage, seconds in stages.items()
        },
        "audio_seconds": round(audio_s, 2),
        "compute_seconds": round(compute_s, 2),
        "rtf": round(compute_s / audio_s, 4),
        "latest_packet_ms": round(1000 * max(take.late_s for take in takes), 1),
    }


def _lagging(takes: Sequence[Take], n_reference: Sequence[int]) -> dict[str, lagging.Lagging]:
    heard, clocked = [], []
    for take, n_words in zip(takes, n_reference, strict=True):
        times = lagging.of_words((event.time, event) for event in take.events)
        heard.append((times, take.duration, n_words))
        clocked.append((lagging.of_words(take.arrivals), take.duration, n_words))
    return {"algorithmic": lagging.summary(heard), "with_compute": lagging.summary(clocked)}


def _play_all(player: Player, wanted: Settings, recordings: Sequence[Recording]) -> Played:
    """Every recording in turn, after a warm-up on the first.

    Raises what the warm-up raises, and TakeError where not one recording could be played.
    """
    from bench.players import TakeError

    options = wanted.stream_options()
    first = recordings[0].pcm()
    with suppress(TakeError):  # said, and counted, when the recording's turn comes
        player(first[: int(WARM_UP_S * SAMPLE_RATE_HZ)], options, lambda seconds: None)
    played, total_s = Played(), sum(r.length_s() for r in recordings)
    with _bar(total_s) as bar:

        def progress(seconds: float) -> None:
            bar.update(min(seconds, total_s - bar.n))  # what a container says is not exact

        try:
            for recording in recordings:
                try:
                    take = player(recording.pcm(), options, progress)
                except SparqleError as err:
                    played.n_failed += 1
                    bar.write(f"{recording.id} failed: {err.message}", file=sys.stderr)
                else:
                    played.recordings.append(recording)
                    played.takes.append(take)
        except KeyboardInterrupt:
            if not played.takes:
                raise
            played.is_whole = False
    if not played.takes:
        raise TakeError("no recording could be played", hint="the reasons are above")
    return played


def _bar(total_s: float) -> tqdm[Any]:
    """Seconds that were played of all recordings, on stderr."""
    from tqdm import tqdm

    return tqdm(
        total=total_s,
        desc="plays",
        bar_format="{desc}: {percentage:3.0f}%|{bar}| {n:.0f}/{total:.0f} s, {remaining} left",
        file=sys.stderr,
        mininterval=0.2 if sys.stderr.isatty() else 60.0,
    )


# --- command -----------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.latency", description=__doc__)
    add = parser.add_argument
    add("paths", nargs="*", type=Path, metavar="FILE|FOLDER", help="recordings or manifests")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--virtual", action="store_true", help="do not wait for the clock")
    where.add_argument("--server", action="store_true", help="through our own server, started here")
    where.add_argument("--url", help="through a server that runs: ws://HOST:PORT")
    add("--api-key", default="", metavar="KEY", help="of the server")
    add("--trace", type=Path, metavar="FILE.json", help="every chunk, for chrome://tracing")
    add("--force", action="store_true", help="time on a busy machine, and say so in the result")
    some = parser.add_mutually_exclusive_group()
    some.add_argument("--every", type=int, default=1, metavar="N", help="of folders, each n-th")
    some.add_argument("--limit", type=int, metavar="N", help="of folders, the first n")
    plots.add_option(parser)
    settings.add_options(parser)
    return parser


def _sets(args: argparse.Namespace) -> list[RecordingSet]:
    folders = [path for path in args.paths if path.is_dir()]
    files = [path for path in args.paths if not path.is_dir()]
    sets = [manifests.read(folder, args.every, args.limit) for folder in folders]
    if files:
        sets.append(manifests.of_files(files))
    return sets or [manifests.bundled()]


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    trace = Trace(0.0 if args.virtual else None) if args.trace else None

    def measured() -> Json:
        wanted = settings.from_args(args)
        wanted.stream_options()  # wrong options are said before a model is loaded
        plots.require(args.plot)
        if args.trace and args.url:
            raise ConfigError("a server elsewhere cannot be traced", hint="--server, or no --url")
        sets = _sets(args)
        manifests.require_files(sets)
        if not args.force:
            machine.require_free(is_forced=False)  # before the minutes that loading may take
        return run(args, wanted, sets, trace)

    def keep_trace(_: Json) -> None:
        if trace is not None:
            with settings.writing(args.trace, "--trace"):
                trace.write(args.trace)

    then = [keep_trace, lambda result: plots.draw(result, args.plot)]
    return settings.run_and_print(measured, args.output, [("--trace", args.trace)], then)


if __name__ == "__main__":
    sys.exit(main())
