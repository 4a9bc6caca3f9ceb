"""Soak: `python -m bench.soak [FOLDER...]` captions hours of audio and watches what must not grow.

In: folders with a manifest (bench.manifests); without any, the bundled clip. Streams of random
lengths come and go, faster than real time, until --hours of audio were captioned: most end in
order, some are flushed before, some are given up in the middle. In an engine of this process, or
with --server through our own websocket server here, where giving up is hanging up.
Out: one JSON document: after every round of streams the resident memory, the bytes of the model's
state and of all that the slots keep, open files, threads and streams that are still open, and the
mean time of a chunk of one stream that is always the same and has the engine to itself: beside
others it would tell how many they were. In process also what one stream holds that stays open for
the whole run. And how much each grew from the first fifth of the run on, which is warm-up.

All pages of the engine's states are written to first, since a row takes them one by one, when it
hears its first long segment, and those of mapped weights are read, which words take one by one;
before each sample the C library gives back what is free.

Contract: exits with 1 when something grew or a stream failed. A run that is too short to tell gives
no verdict, and says so. Ctrl-C ends it at once, with what was measured so far and status 130.
Refuses a machine that others use, unless --force: the time of a chunk is one of the figures; the
result says so then.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass
from enum import Enum
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bench import flat, held, machine, manifests, plots, reel, settings
from sparqle_stream import messages
from sparqle_stream.config import SAMPLE_RATE_HZ
from sparqle_stream.errors import ConfigError, SparqleError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from concurrent.futures import Future

    from bench.manifests import RecordingSet
    from bench.reel import Pcm, Reel
    from bench.settings import Settings
    from sparqle_stream.engine import Engine
    from sparqle_stream.models import Model
    from sparqle_stream.replay import Block
    from sparqle_stream.worker import Slots

    Play = Callable[["Plan", "Tally"], None]

EXIT_GREW = 1
SHORTEST_S = 1.0
WAIT_S = 300.0  # for anything; far more than it takes
POLL_S = 0.2  # after Ctrl-C


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


# What chunks are timed on, and what a stream that stays open hears in every round.
PROBE = Plan(start=0, n_samples=10 * SAMPLE_RATE_HZ, leave=Leave.IN_ORDER)
WITNESS = Plan(start=0, n_samples=30 * SAMPLE_RATE_HZ, leave=Leave.FLUSHED)


@dataclass(slots=True)
class Tally:
    """What came of streams."""

    words: int = 0
    failed: int = 0
    reasons: set[str] = dataclasses.field(default_factory=set)
    n_samples: int = 0  # that were sent
    flushed: int = 0  # flushes that were answered

    def __add__(self, other: Tally) -> Tally:
        return Tally(
            self.words + other.words,
            self.failed + other.failed,
            self.reasons | other.reasons,
            self.n_samples + other.n_samples,
            self.flushed + other.flushed,
        )

    def sent(self, packets: Iterable[Pcm]) -> Iterator[Pcm]:
        """The packets, counted as they are taken: who gives up has not sent all of them."""
        for packet in packets:
            self.n_samples += len(packet)
            yield packet

    def note(self, event: messages.Event) -> None:
        if isinstance(event, messages.Final):
            self.words += len(event.words)
        elif isinstance(event, messages.Flushed):
            self.flushed += 1
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


def alone(play: Play) -> Play:
    """`play` whose failure is its stream's own: the round and what was measured go on."""

    def play_alone(one: Plan, tally: Tally) -> None:
        try:
            play(one, tally)
        except Exception as err:  # noqa: BLE001 - whatever it is, it is said
            if not tally.failed:  # its Error event may have come before
                told = err.message if isinstance(err, SparqleError) else str(err)
                tally.fail(told or type(err).__name__)

    return play_alone


def in_process(engine: Engine, wanted: Settings, tape: Reel) -> Play:
    """Streams of an engine here, as fast as it takes audio."""
    options = wanted.stream_options()

    def play(one: Plan, tally: Tally) -> None:
        is_over = threading.Event()

        def on_event(event: messages.Event) -> None:
            tally.note(event)
            if isinstance(event, messages.Done | messages.Error):
                is_over.set()

        stream = engine.open(options, on_event)
        try:
            for packet in tally.sent(tape.packets(one.start, one.n_samples, SAMPLE_RATE_HZ)):
                stream.wait_for_room(1.0, WAIT_S)
                if is_over.is_set():  # it failed, or the engine was closed
                    return
                stream.feed(packet)
            if one.leave is Leave.GIVEN_UP:
                return
            if one.leave is Leave.FLUSHED:
                stream.flush()
            stream.finish()
            if not is_over.wait(WAIT_S + one.n_samples / SAMPLE_RATE_HZ):
                tally.fail("no end in time")
        finally:
            stream.cancel()

    return play


def over_a_socket(url: str, wanted: Settings, tape: Reel) -> Play:
    """Connections to our server; who gives up hangs up after the first word. One that is lost is a
    failure, not made again."""
    from sparqle_stream import client

    options: dict[str, str | int] = {"pace": "file", "vad": wanted.vad}
    options |= {"chunk_ms": wanted.chunk_ms, "delay_ms": wanted.delay_ms}

    def play(one: Plan, tally: Tally) -> None:
        packets = tally.sent(tape.packets(one.start, one.n_samples, SAMPLE_RATE_HZ))
        last = [client.FLUSH] if one.leave is Leave.FLUSHED else []
        blocks: Iterable[Block] = chain(packets, last)
        events = client.stream_sync(url, blocks, options=options, resume_s=0.0)
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
        self,
        engine: Engine,
        slots: Sequence[Slots],
        play: Play,
        witness: tuple[held.Witness, Reel] | None = None,
    ) -> None:
        """`witness`: a stream that stays open, and what it hears; only in this process."""
        self._engine, self._slots, self._play, self._witness = engine, slots, play, witness
        self._process = machine.Process()
        self.probes = Tally()  # of the streams that chunks are timed on and that stay open

    def sample(self, cycles: int, audio_s: float) -> dict[str, Any]:
        """Once no stream is open; who is left after a while counts as one that leaked."""
        self._wait_for_silence()
        holds = {"held_bytes": self._hold(*self._witness)} if self._witness else {}
        chunk_ms = self._probe()
        held.give_back()
        reading = self._process.read()
        return {
            "cycles": cycles,
            "audio_seconds": round(audio_s, 1),
            "rss_mb": round(reading.rss_mb, 1),
            "state_bytes": sum(s.state_bytes() for s in self._slots),
            "slots_bytes": held.reach(self._slots, held.of_model(self._engine.model)),
            **holds,
            "chunk_ms": chunk_ms,
            "open_files": reading.open_files,
            "threads": reading.threads,
            "streams_open": self._n_open(),
        }

    def _hold(self, witness: held.Witness, tape: Reel) -> int | None:
        """Bytes that the stream holds that is open all along."""
        tally = Tally()
        packets = tape.packets(WITNESS.start, WITNESS.n_samples, SAMPLE_RATE_HZ)
        held_bytes = witness.hear(tally.sent(packets), tally.note)
        if held_bytes is None and not tally.failed:
            tally.fail("the stream that stays open has ended")
        self.probes += tally
        return held_bytes

    def _probe(self) -> float | None:
        """Mean time of a chunk of `PROBE`; None where it had none."""
        before, tally = self._engine.metrics(), Tally()
        self._play(PROBE, tally)
        self.probes += tally
        self._wait_for_silence()
        now = self._engine.metrics()
        n_chunks = now.chunks - before.chunks
        spent_s = now.step_seconds.total_s - before.step_seconds.total_s
        return round(1000 * spent_s / n_chunks, 3) if n_chunks else None

    def _n_open(self) -> int:
        """Streams that are open, without the one that has to be."""
        stays = self._witness is not None and self._witness[0].is_open
        return self._engine.metrics().n_streams - stays

    def _wait_for_silence(self) -> None:
        deadline = time.perf_counter() + 10.0
        while self._n_open() and time.perf_counter() < deadline:
            time.sleep(0.01)


# --- the run -----------------------------------------------------------------------------------


@dataclass(slots=True)
class Rounds:
    """What came of all rounds, up to now."""

    samples: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    tally: Tally = dataclasses.field(default_factory=Tally)
    seconds: float = 0.0  # by the clock
    is_interrupted: bool = False


def measure(
    args: argparse.Namespace, model: Model, wanted: Settings, sets: Sequence[RecordingSet]
) -> dict[str, Any]:
    """The whole benchmark."""
    under = machine.Conditions(machine.require_free(is_forced=args.force))
    tape = reel.load(sets, args.pause_s, args.seed)
    with ExitStack() as stack:
        play, watcher = _begin(args, model, wanted, tape, stack)
        rounds = _rounds(args, play, watcher, len(tape.tape))
    found, everything = flat.flatness(rounds.samples), rounds.tally + watcher.probes
    is_flat, why = flat.verdict(found, everything.failed)
    last = rounds.samples[-1] if rounds.samples else {"audio_seconds": 0.0, "cycles": 0}
    return {
        "bench": "soak",
        "settings": wanted.summary(),
        "load": _load(args),
        "machine": machine.card(model.weights_hash, wanted.threads),
        "sets": manifests.summary(sets),
        "timing": under.summary(),
        "audio_seconds": last["audio_seconds"],
        "cycles": last["cycles"],
        "words": rounds.tally.words,
        "flushed": rounds.tally.flushed,
        "failed": everything.failed,
        "reasons": sorted(everything.reasons),
        "interrupted": rounds.is_interrupted,
        "times_real_time": round(everything.n_samples / SAMPLE_RATE_HZ / rounds.seconds, 2),
        "is_flat": is_flat,
        "why": why,
        "flat": found,
        "samples": rounds.samples,
    }


def _begin(
    args: argparse.Namespace, model: Model, wanted: Settings, tape: Reel, stack: ExitStack
) -> tuple[Play, Watcher]:
    """An engine and how streams are played to it; what has to be closed goes on the stack."""
    from sparqle_stream import engine as engines
    from sparqle_stream import server
    from sparqle_stream.batch import Batch

    slots: list[Slots] = []

    def make_slots(model: Model, n: int) -> Slots:
        slots.append(Batch(model, n))
        return slots[-1]

    cfg = wanted.engine_config()
    # One more: for the stream that stays open, or that a server has not forgotten yet.
    cfg = dataclasses.replace(cfg, n_slots=cfg.n_slots + 1)
    engine = stack.enter_context(engines.Engine(model, cfg, make_slots))
    held.touch(slots)  # what grows from here on is no page of their states, nor of the weights
    if args.server:
        served = server.ServerConfig(port=0, drain_s=0.0, defaults=wanted.stream_options())
        url = stack.enter_context(server.background(engine, served))
        play = alone(over_a_socket(url, wanted, tape))
        return play, Watcher(engine, slots, play)
    play = alone(in_process(engine, wanted, tape))
    witness = held.Witness(engine, wanted.stream_options())
    stack.callback(witness.close)
    return play, Watcher(engine, slots, play, (witness, tape))


def _load(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "through": "our server, dialect stream" if args.server else "the engine, in process",
        "longest_s": args.longest_s,
        "leaves": {leave.value: share for leave, share in LEAVES.items()},
        "seed": args.seed,
        "chunks_timed_on_s": PROBE.n_samples / SAMPLE_RATE_HZ,
        "stays_open_s_a_round": None if args.server else WITNESS.n_samples / SAMPLE_RATE_HZ,
    }


def _rounds(args: argparse.Namespace, play: Play, watcher: Watcher, tape: int) -> Rounds:
    """Rounds of --batch streams at once, a sample after each, until there was enough audio, or
    until Ctrl-C: whoever closes the engine ends the streams that are still running."""
    from tqdm import tqdm

    rng, rounds, start = np.random.default_rng(args.seed), Rounds(), time.perf_counter()
    wanted_s, audio_s, cycles = args.hours * 3600, 0.0, 0
    of_round: list[Tally] = []  # each of one thread
    every_s = 0.2 if sys.stderr.isatty() else 60.0
    pool = ThreadPoolExecutor(args.batch)
    try:
        with tqdm(total=wanted_s, unit="s", file=sys.stderr, mininterval=every_s) as bar:
            while audio_s < wanted_s:
                plans = [plan(rng, args.longest_s, tape) for _ in range(args.batch)]
                of_round = [Tally() for _ in plans]
                _wait([pool.submit(play, *pair) for pair in zip(plans, of_round, strict=True)])
                played, of_round = sum(of_round, Tally()), []
                rounds.tally += played
                played_s = played.n_samples / SAMPLE_RATE_HZ
                audio_s, cycles = audio_s + played_s, cycles + len(plans)
                rounds.samples.append(watcher.sample(cycles, audio_s))
                bar.update(min(played_s, wanted_s - bar.n))
                if not played_s:  # nobody is taken any more: it would never end
                    break
    except KeyboardInterrupt:
        rounds.is_interrupted = True
        rounds.tally += sum(of_round, Tally())  # before their streams are ended
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    rounds.seconds = time.perf_counter() - start
    return rounds


def _wait(streams: Sequence[Future[None]]) -> None:
    """Until all have ended. In short waits: a signal may not wake a thread from a long one."""
    while wait(streams, POLL_S).not_done:
        pass
    for one in streams:
        one.result()


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
        return results[0]

    def draw(result: dict[str, Any]) -> None:
        if result["samples"]:
            plots.draw(result, args.plot)

    status = settings.run_and_print(run, args.output, then=[draw])
    return _status(results[0]) if results and not status else status


def _status(result: dict[str, Any]) -> int:
    """The exit status of a run, whose verdict is said where it is not that all is flat."""
    if not result["is_flat"]:
        says = "no verdict" if result["is_flat"] is None else "not flat"
        print(f"{says}: {result['why']}", file=sys.stderr)
    if result["interrupted"]:
        print("interrupted", file=sys.stderr)
        return settings.EXIT_INTERRUPTED
    return EXIT_GREW if result["is_flat"] is False else 0


if __name__ == "__main__":
    sys.exit(main())
