"""Soak: `python -m bench.soak [FOLDER...]` captions hours of audio and watches what must not grow.

In: folders with a manifest (bench.manifests); without any, the bundled clip. Streams of random
lengths come and go, faster than real time, until --hours of audio were captioned: most end in
order, some are flushed before, some are given up in the middle. In an engine of this process, or
with --server through our own websocket server here, where giving up is hanging up.
Out: one JSON document: after every round of streams the resident memory, the bytes of all state,
open files, threads and streams that are still open, and the mean time of a chunk of one stream that
is always the same and has the engine to itself: beside others it would tell how many they were. And
how much each grew from the first fifth of the run on, which is warm-up.

Contract: exits with 1 when something grew. Refuses a machine that others use, unless --force: the
time of a chunk is one of the figures; the result says so then.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bench import machine, manifests, plots, reel, settings
from sparqle_stream import messages
from sparqle_stream.config import SAMPLE_RATE_HZ
from sparqle_stream.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from bench.manifests import RecordingSet
    from bench.reel import Pcm, Reel
    from bench.settings import Settings
    from sparqle_stream.engine import Engine
    from sparqle_stream.models import Model
    from sparqle_stream.worker import Slots

EXIT_GREW = 1
SHORTEST_S = 1.0
WAIT_S = 300.0  # for anything; far more than it takes
WARM_UP_SHARE = 0.2
FEWEST_SAMPLES = 5  # after the warm-up; fewer say nothing
# What may be gained over a whole run: a share of the median, and an amount.
ALLOWED = {
    "rss_mb": (0.02, 5.0),
    "state_bytes": (0.0, 0.0),
    "chunk_ms": (0.2, 0.0),
    "open_files": (0.0, 0.5),
    "threads": (0.0, 0.5),
    "streams_open": (0.0, 0.0),
}


class Leave(Enum):
    """How a stream ends."""

    IN_ORDER = "in order"
    FLUSHED = "flushed before"
    GIVEN_UP = "given up"


LEAVES = {Leave.IN_ORDER: 0.7, Leave.FLUSHED: 0.1, Leave.GIVEN_UP: 0.2}


@dataclass(frozen=True, slots=True)
class Plan:
    """One stream: where on the reel it begins, how long it is, how it ends."""

    start: int
    n_samples: int
    leave: Leave


# What chunks are timed on.
PROBE = Plan(start=0, n_samples=10 * SAMPLE_RATE_HZ, leave=Leave.IN_ORDER)


@dataclass(slots=True)
class Tally:
    """What came of streams."""

    words: int = 0
    failed: int = 0
    reasons: set[str] = dataclasses.field(default_factory=set)
    n_samples: int = 0  # that were sent

    def __add__(self, other: Tally) -> Tally:
        return Tally(
            self.words + other.words,
            self.failed + other.failed,
            self.reasons | other.reasons,
            self.n_samples + other.n_samples,
        )

    def sent(self, packets: Iterable[Pcm]) -> Iterator[Pcm]:
        """The packets, counted as they are taken: who gives up has not sent all of them."""
        for packet in packets:
            self.n_samples += len(packet)
            yield packet

    def note(self, event: messages.Event) -> None:
        if isinstance(event, messages.Final):
            self.words += len(event.words)
        elif isinstance(event, messages.Error):
            self.fail(event.message)

    def fail(self, why: str) -> None:
        self.failed += 1
        self.reasons.add(why)


def plan(rng: np.random.Generator, longest_s: float, tape: int) -> Plan:
    """Lengths are spread evenly over their logarithm: many short streams, a few long ones."""
    seconds = float(np.exp(rng.uniform(np.log(SHORTEST_S), np.log(longest_s))))
    leave = list(LEAVES)[int(rng.choice(len(LEAVES), p=list(LEAVES.values())))]
    return Plan(int(rng.integers(tape)), int(seconds * SAMPLE_RATE_HZ), leave)


# --- one stream --------------------------------------------------------------------------------


def in_process(engine: Engine, wanted: Settings, tape: Reel) -> Callable[[Plan, Tally], None]:
    """Streams of an engine here, as fast as it takes audio."""
    options = wanted.stream_options()

    def play(one: Plan, tally: Tally) -> None:
        is_over = threading.Event()

        def on_event(event: messages.Event) -> None:
            tally.note(event)
            if isinstance(event, messages.Done | messages.Error):
                is_over.set()

        stream = engine.open(options, on_event)
        for packet in tally.sent(tape.packets(one.start, one.n_samples, SAMPLE_RATE_HZ)):
            stream.wait_for_room(1.0, WAIT_S)
            stream.feed(packet)
        if one.leave is Leave.GIVEN_UP:
            stream.cancel()
            return
        if one.leave is Leave.FLUSHED:
            stream.flush()
        stream.finish()
        if not is_over.wait(WAIT_S + one.n_samples / SAMPLE_RATE_HZ):
            tally.fail("no end in time")
            stream.cancel()

    return play


def over_a_socket(url: str, wanted: Settings, tape: Reel) -> Callable[[Plan, Tally], None]:
    """Connections to our server; who gives up hangs up after the first word."""
    from sparqle_stream import client

    options: dict[str, str | int] = {"pace": "file", "vad": wanted.vad}
    options |= {"chunk_ms": wanted.chunk_ms, "delay_ms": wanted.delay_ms}

    def play(one: Plan, tally: Tally) -> None:
        packets = tally.sent(tape.packets(one.start, one.n_samples, SAMPLE_RATE_HZ))
        events = client.stream_sync(url, packets, options=options)
        try:
            for event in events:
                tally.note(event)
                if one.leave is Leave.GIVEN_UP and isinstance(event, messages.Final):
                    break
        except client.ServerError as err:
            tally.fail(err.message)
        finally:
            events.close()  # type: ignore[attr-defined]  # it is a generator

    return play


# --- what is watched ---------------------------------------------------------------------------


class Watcher:
    """Samples of one engine and this process, between rounds of streams."""

    def __init__(
        self, engine: Engine, slots: Sequence[Slots], play: Callable[[Plan, Tally], None]
    ) -> None:
        self._engine, self._slots, self._play = engine, slots, play
        self._process = machine.Process()
        self.probes = Tally()  # of the streams that chunks are timed on

    def sample(self, cycles: int, audio_s: float) -> dict[str, Any]:
        """Once no stream is open; who is left after a while counts as one that leaked."""
        self._wait_for_silence()
        chunk_ms, reading = self._probe(), self._process.read()
        return {
            "cycles": cycles,
            "audio_seconds": round(audio_s, 1),
            "rss_mb": round(reading.rss_mb, 1),
            "state_bytes": sum(s.state_bytes() for s in self._slots),
            "chunk_ms": chunk_ms,
            "open_files": reading.open_files,
            "threads": reading.threads,
            "streams_open": self._engine.metrics().n_streams,
        }

    def _probe(self) -> float | None:
        """Mean time of a chunk of `PROBE`; None where it had none."""
        before = self._engine.metrics()
        self._play(PROBE, self.probes)
        self._wait_for_silence()
        now = self._engine.metrics()
        n_chunks = now.chunks - before.chunks
        spent_s = now.step_seconds.total_s - before.step_seconds.total_s
        return round(1000 * spent_s / n_chunks, 3) if n_chunks else None

    def _wait_for_silence(self) -> None:
        deadline = time.perf_counter() + 10.0
        while self._engine.metrics().n_streams and time.perf_counter() < deadline:
            time.sleep(0.01)


def growth(hours: Sequence[float], values: Sequence[float]) -> float:
    """Median slope of all pairs (Theil and Sen) times the span: a few outliers do not move it."""
    x, y = np.asarray(hours, float), np.asarray(values, float)
    i, j = np.triu_indices(len(x), 1)
    runs = x[j] - x[i]
    slopes = (y[j] - y[i])[runs > 0] / runs[runs > 0]
    return float(np.median(slopes) * (x[-1] - x[0])) if len(slopes) else 0.0


def flatness(samples: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """For everything watched: first and last, growth after the warm-up, and what is allowed."""
    kept = samples[int(WARM_UP_SHARE * len(samples)) :]
    found: dict[str, dict[str, Any]] = {}
    for name, (share, amount) in ALLOWED.items():
        points = [(s["audio_seconds"], s[name]) for s in kept if s[name] is not None]
        if len(points) < FEWEST_SAMPLES:
            found[name] = {"growth": None, "is_flat": None}
            continue
        seconds, values = zip(*points, strict=True)
        gained = growth(seconds, values)
        allowed = share * float(np.median(values)) + amount
        found[name] = {
            "first": values[0],
            "last": values[-1],
            "most": max(values),
            "growth": round(gained, 3),
            "allowed": round(allowed, 3),
            "is_flat": gained <= allowed and (allowed > 0 or max(values) == values[0]),
        }
    return found


# --- the run -----------------------------------------------------------------------------------


def measure(
    args: argparse.Namespace, model: Model, wanted: Settings, sets: Sequence[RecordingSet]
) -> dict[str, Any]:
    """The whole benchmark."""
    from sparqle_stream import engine as engines
    from sparqle_stream import server
    from sparqle_stream.batch import Batch

    under = machine.Conditions(machine.require_free(is_forced=args.force))
    tape = reel.load(sets, args.pause_s, args.seed)
    slots: list[Slots] = []

    def make_slots(model: Model, n: int) -> Slots:
        slots.append(Batch(model, n))
        return slots[-1]

    with ExitStack() as stack:
        engine = stack.enter_context(engines.Engine(model, wanted.engine_config(), make_slots))
        if args.server:
            cfg = server.ServerConfig(port=0, drain_s=0.0, defaults=wanted.stream_options())
            play = over_a_socket(stack.enter_context(server.background(engine, cfg)), wanted, tape)
        else:
            play = in_process(engine, wanted, tape)
        watcher, start = Watcher(engine, slots, play), time.perf_counter()
        samples, tally = _rounds(args, play, watcher, len(tape.tape))
        seconds = time.perf_counter() - start
    flat, everything = flatness(samples), tally + watcher.probes
    failed = everything.failed
    verdicts = [one["is_flat"] for one in flat.values()]
    return {
        "bench": "soak",
        "settings": wanted.summary(),
        "load": _load(args),
        "machine": machine.card(model.weights_hash, wanted.threads),
        "sets": manifests.summary(sets),
        "timing": under.summary(),
        "audio_seconds": samples[-1]["audio_seconds"],
        "cycles": samples[-1]["cycles"],
        "words": tally.words,
        "failed": failed,
        "reasons": sorted(everything.reasons),
        "times_real_time": round(everything.n_samples / SAMPLE_RATE_HZ / seconds, 2),
        "is_flat": None if None in verdicts else all(verdicts) and not failed,
        "flat": flat,
        "samples": samples,
    }


def _load(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "through": "our server, dialect stream" if args.server else "the engine, in process",
        "longest_s": args.longest_s,
        "leaves": {leave.value: share for leave, share in LEAVES.items()},
        "seed": args.seed,
        "chunks_timed_on_s": PROBE.n_samples / SAMPLE_RATE_HZ,
    }


def _rounds(
    args: argparse.Namespace, play: Callable[[Plan, Tally], None], watcher: Watcher, tape: int
) -> tuple[list[dict[str, Any]], Tally]:
    """Rounds of --batch streams at once, a sample after each, until there was enough audio."""
    from tqdm import tqdm

    rng, tally = np.random.default_rng(args.seed), Tally()
    samples: list[dict[str, Any]] = []
    wanted_s, audio_s, cycles = args.hours * 3600, 0.0, 0
    every_s = 0.2 if sys.stderr.isatty() else 60.0
    with (
        ThreadPoolExecutor(args.batch) as pool,
        tqdm(total=wanted_s, unit="s", file=sys.stderr, mininterval=every_s) as bar,
    ):
        while audio_s < wanted_s:
            plans = [plan(rng, args.longest_s, tape) for _ in range(args.batch)]
            of_round = [Tally() for _ in plans]  # each of one thread
            list(pool.map(play, plans, of_round))
            played = sum(of_round, Tally())
            played_s = played.n_samples / SAMPLE_RATE_HZ
            tally += played
            audio_s, cycles = audio_s + played_s, cycles + len(plans)
            samples.append(watcher.sample(cycles, audio_s))
            bar.update(min(played_s, wanted_s - bar.n))
            if not played_s:  # nobody is taken any more: it would never end
                break
    return samples, tally


# --- command -----------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.soak", description=__doc__)
    add = parser.add_argument
    add("folders", nargs="*", type=Path, metavar="FOLDER", help="with a manifest")
    add("--hours", type=float, default=1.0, help="of audio, all streams together (%(default)s)")
    add("--longest-s", type=float, default=600.0, metavar="S", help="stream (%(default)s)")
    add("--batch", type=int, default=4, metavar="N", help="streams at once (%(default)s)")
    add("--pause-s", type=float, default=1.0, metavar="S", help="mean, after recordings (1)")
    add("--seed", type=int, default=0, help="(%(default)s)")
    add("--server", action="store_true", help="through our own server, started here")
    add("--force", action="store_true", help="on a busy machine, and say so in the result")
    plots.add_option(parser)
    settings.add_options(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    results: list[dict[str, Any]] = []

    def run() -> dict[str, Any]:
        if args.hours <= 0 or args.longest_s < SHORTEST_S:
            raise ConfigError(
                "that would be no audio", hint=f"--hours above 0, --longest-s from {SHORTEST_S:g}"
            )
        wanted = settings.from_args(args, n_streams=args.batch)
        wanted.stream_options()  # wrong options are said before a model is loaded
        plots.require(args.plot)
        sets = [manifests.read(folder) for folder in args.folders] or [manifests.bundled()]
        manifests.require_files(sets)
        if not args.force:
            machine.require_free(is_forced=False)  # before the minutes that loading may take
        results.append(measure(args, wanted.load_model(), wanted, sets))
        plots.draw(results[0], args.plot)
        return results[0]

    status = settings.run_and_print(run, args.output)
    return EXIT_GREW if results and results[0]["is_flat"] is False else status


if __name__ == "__main__":
    sys.exit(main())
