"""Throughput: `python -m bench.throughput [FOLDER...]` finds how many live streams a machine holds.

In: folders with a manifest (bench.manifests); without any, the bundled clip. Their recordings, with
pauses between them, are played at the speed of speech by more and more streams, until p95 of the
lag exceeds a chunk (--limit-ms), somebody is refused or dropped, or nothing is heard of a stream.
With --arrivals it is an open loop instead: streams come and go at random, whether or not the engine
keeps up.
Against: an engine in this process; --server, the same behind our own websocket server here; --url,
any running server (--dialect stream for our own /v1/stream, others for anybody's: bench.dialects).
Out: one JSON document: a line for each number of streams (lag, RTF, CPU, memory, refused, dropped),
streams and streams per core that are held, memory per stream, and the bound of the memory bus.

Contract: in process and with --server the CPU time of the players is counted in. Refuses to time on
a machine that others use, unless --force; the result says so then.
"""

from __future__ import annotations

import argparse
import sys
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench import load, machine, manifests, plots, reel, settings
from bench.targets import End, EngineTarget, StreamTarget, until_free
from sparqle_stream.config import SAMPLE_RATE_HZ, n_cores
from sparqle_stream.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from bench.manifests import RecordingSet
    from bench.reel import Reel
    from bench.settings import Settings
    from bench.targets import Target
    from sparqle_stream.models import Model

WARM_UP_S = 3.0
OWN = "stream"
OTHERS = ("openai", "vllm", "deepgram", "whisperlive", "whisperlivekit")  # bench.dialects
FOREIGN_LIMIT_MS = 1000.0  # of lag, where the protocol counts from the end of speech
REST_S = 1.0  # for the slots of servers that cannot be asked, as `until_free` asks ours


class Rig:
    """What all runs of one benchmark share: whom they play to, the reel, whose CPU is read."""

    def __init__(
        self, args: argparse.Namespace, target: Target, rest: Callable[[], None], tape: Reel
    ) -> None:
        self.target, self.tape = target, tape
        self._rest = rest  # after a run, until all of its slots are free
        self.process = machine.Process(args.server_pid)
        self.is_readable = bool(args.server_pid) or not args.url
        self._packet_ms, self._seed = args.packet_ms, args.seed

    def play(self, bookings: list[load.Booking]) -> load.Played:
        played = load.play(
            self.target, self.tape, bookings, self._packet_ms, self._seed, self.process
        )
        self._rest()
        return played

    def warm_up(self) -> str:
        """A short stream that does not count -> the model's name. Raises ConfigError."""
        (outcome,) = self.play(load.level(1, WARM_UP_S, 0.0)).outcomes
        if outcome.end is not End.DONE:
            raise ConfigError(
                f"the first stream was {outcome.end.value}: {outcome.why}",
                hint="is the server there, and is its dialect the one of --dialect?",
            )
        return outcome.model

    def known(self, figures: dict[str, Any]) -> dict[str, Any]:
        """Figures without the CPU and memory of a process that is not the server's."""
        unknown = (
            () if self.is_readable else ("cpu_cores", "cpu_seconds_per_audio_second", "rss_mb")
        )
        return figures | dict.fromkeys(unknown)


def rising(rig: Rig, args: argparse.Namespace, limit_ms: float) -> dict[str, Any]:
    """More and more streams, until they do not keep up."""
    levels: list[dict[str, Any]] = []

    def keeps_up(n: int) -> bool:
        played = rig.play(load.level(n, args.seconds, args.stagger_s))
        figures = load.figures(
            played, only_together=True, is_told_at_ends=rig.target.is_told_at_ends
        )
        figures["kept_up"] = load.has_kept_up(figures, limit_ms)
        levels.append(figures)
        _say(figures)
        return bool(figures["kept_up"])

    held = load.search(keeps_up, args.most)
    load.require_lags(levels)
    cores = n_cores() if not args.url else None
    return {
        "streams_held": held,
        "is_limited_by_most": held == args.most,
        "streams_per_core": round(held / cores, 2) if cores else None,
        "memory_per_stream_mb": load.memory_per_stream_mb(levels) if rig.is_readable else None,
        "levels": [rig.known(one) for one in sorted(levels, key=lambda one: int(one["streams"]))],
    }


def coming_and_going(rig: Rig, args: argparse.Namespace, limit_ms: float) -> dict[str, Any]:
    """An open loop of arrivals."""
    bookings = load.arrivals(args.arrivals, args.mean_seconds, args.seconds, args.seed)
    played = rig.play(bookings)
    figures = load.figures(played, only_together=False)
    figures["kept_up"] = load.has_kept_up(figures, limit_ms)
    _say(figures)
    load.require_lags([figures])
    return {"arrivals": rig.known(figures) | load.crowd(played)}


def measure(
    args: argparse.Namespace,
    wanted: Settings,
    sets: Sequence[RecordingSet],
    model: Model | None,
) -> dict[str, Any]:
    """The whole benchmark; `model` is None with --url."""
    from bench import bounds

    server = machine.Process(args.server_pid) if args.server_pid else None
    under = machine.Conditions(machine.require_free(is_forced=args.force), server)
    tape = reel.load(sets, args.pause_s, args.seed)
    limit_ms = args.limit_ms or _default_limit_ms(args)
    with ExitStack() as stack:
        target, rest = _target(args, wanted, model, stack)
        rig = Rig(args, target, rest, tape)
        name = rig.warm_up()
        is_open = args.arrivals is not None
        found = coming_and_going(rig, args, limit_ms) if is_open else rising(rig, args, limit_ms)
    return {
        "bench": "throughput",
        "settings": wanted.summary() | ({"model": name, "dtype": "its own"} if args.url else {}),
        "load": {
            "through": _through(args),
            "lag_from": target.lag_from,
            "limit_ms": limit_ms,
            "seconds": args.seconds,
            "packet_ms": args.packet_ms,
            "pause_s": args.pause_s,
            "stagger_s": None if is_open else args.stagger_s,
            "arrivals_per_minute": args.arrivals,
            "mean_seconds": args.mean_seconds if is_open else None,
            "slots": None if args.url else args.most,
            "seed": args.seed,
        },
        "machine": machine.card(model.weights_hash if model else "", wanted.threads),
        "sets": manifests.summary(sets),
        "timing": under.summary(),
        "bound": bounds.of_chunk(model, wanted.chunk_ms, compute=wanted.compute) if model else None,
    } | found


def _target(
    args: argparse.Namespace, wanted: Settings, model: Model | None, stack: ExitStack
) -> tuple[Target, Callable[[], None]]:
    """Whom the streams play to, and what waits until it has room again; what has to be closed
    afterwards goes on the stack.
    """
    from bench.dialects import DIALECTS
    from bench.socket_target import SocketTarget
    from sparqle_stream import engine as engines
    from sparqle_stream import server

    options = wanted.stream_options()
    url, rest = args.url, partial(time.sleep, REST_S)
    if model is not None:
        engine = stack.enter_context(engines.Engine(model, wanted.engine_config()))
        if not args.server:
            return EngineTarget(engine, options), lambda: None  # freed before a run is over
        cfg = server.ServerConfig(port=0, drain_s=0.0, defaults=options)
        url = stack.enter_context(server.background(engine, cfg))
        rest = partial(until_free, url)
    if args.dialect != OWN:
        asked = args.server_model or (model.name if model else "")
        return SocketTarget(url, DIALECTS[args.dialect], asked, args.api_key), rest
    query: dict[str, str | int] = {"chunk_ms": wanted.chunk_ms, "delay_ms": wanted.delay_ms}
    query |= {"vad": wanted.vad, "vad_stop_ms": wanted.vad_stop_ms}
    return StreamTarget(url, query, args.api_key), rest


def _default_limit_ms(args: argparse.Namespace) -> float:
    return float(args.chunk_ms) if args.dialect == OWN else FOREIGN_LIMIT_MS


def _through(args: argparse.Namespace) -> str:
    """Whom the streams played to; the address of a server is nobody's business."""
    if args.url:
        return f"a server, dialect {args.dialect}"
    return f"our server, dialect {args.dialect}" if args.server else "the engine, in process"


def _say(figures: dict[str, Any]) -> None:
    lag = figures["lag_ms"]
    print(
        f"{figures['streams']} streams: lag p50 {lag['p50']} p95 {lag['p95']} ms, "
        f"{figures['refused']} refused, {figures['dropped']} dropped, "
        f"{figures['without_lag'] or 0} without a lag",
        file=sys.stderr,
        flush=True,
    )


# --- command -----------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.throughput", description=__doc__)
    add = parser.add_argument
    add("folders", nargs="*", type=Path, metavar="FOLDER", help="with a manifest")
    add("--most", type=int, default=32, metavar="N", help="streams to try, slots (%(default)s)")
    add("--seconds", type=float, default=30.0, help="of each stream, or of arrivals (%(default)s)")
    add("--stagger-s", type=float, default=2.0, metavar="S", help="over which streams start (2)")
    add("--limit-ms", type=float, metavar="MS", help="p95 of lag (a chunk; 1000 for others)")
    add("--packet-ms", type=int, default=20, metavar="MS", help="(%(default)s)")
    add("--pause-s", type=float, default=1.0, metavar="S", help="mean, after recordings (1)")
    add("--arrivals", type=float, metavar="N", help="streams a minute come and go: open loop")
    add("--mean-seconds", type=float, default=20.0, metavar="S", help="they stay (%(default)s)")
    add("--seed", type=int, default=0, help="(%(default)s)")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--server", action="store_true", help="through our own server, started here")
    where.add_argument("--url", help="through a server that runs: ws://HOST:PORT")
    add("--dialect", choices=(OWN, *OTHERS), default=OWN, help="(%(default)s)")
    add("--api-key", default="", metavar="KEY", help="of the server")
    add("--server-model", default="", metavar="NAME", help="what other dialects ask for")
    add("--server-pid", type=int, metavar="PID", help="of a server here: its CPU and memory")
    add("--force", action="store_true", help="time on a busy machine, and say so in the result")
    plots.add_option(parser)
    settings.add_options(parser)
    return parser


def _check(args: argparse.Namespace) -> None:
    """Raises ConfigError for what could only fail later."""
    positive = {
        "--most": args.most,
        "--seconds": args.seconds,
        "--packet-ms": args.packet_ms,
        "--mean-seconds": args.mean_seconds,
        "--arrivals": args.arrivals if args.arrivals is not None else 1,
    }
    for flag, value in positive.items():
        if value <= 0:
            raise ConfigError(f"{flag} {value:g} cannot be used", hint="more than 0")
    if args.seconds * SAMPLE_RATE_HZ < 1 or args.stagger_s < 0 or args.pause_s < 0:
        raise ConfigError("times cannot be below 0", hint="seconds, such as 2.5")
    if args.arrivals is None and args.stagger_s >= args.seconds:
        raise ConfigError(
            "with that --stagger-s the streams never run together", hint="a longer --seconds"
        )
    if args.dialect != OWN and not (args.url or args.server):
        raise ConfigError(
            f"--dialect {args.dialect} needs a server", hint="--url ws://HOST:PORT, or --server"
        )
    if args.server_pid and not args.url:
        raise ConfigError("--server-pid belongs to --url", hint="leave it out")


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)

    def run() -> dict[str, Any]:
        _check(args)
        wanted = settings.from_args(args, n_streams=args.most)
        wanted.stream_options()  # wrong options are said before a model is loaded
        plots.require(args.plot)
        sets = [manifests.read(folder) for folder in args.folders] or [manifests.bundled()]
        manifests.require_files(sets)
        if not args.force:
            machine.require_free(is_forced=False)  # before the minutes that loading may take
        return measure(args, wanted, sets, None if args.url else wanted.load_model())

    draw = [lambda result: plots.draw(result, args.plot)]
    return settings.run_and_print(run, args.output, then=draw)


if __name__ == "__main__":
    sys.exit(main())
