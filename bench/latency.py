"""Latency: `python -m bench.latency [FILE|FOLDER...]` plays recordings and times every word.

In: recordings, or folders with a manifest.jsonl; without any, the bundled clip. They are played in
20 ms packets at the speed of speech through one engine in this process, one stream at a time, or
with --virtual as fast as the machine goes (bench.players says what is the same then).
Out: one JSON document. Emission delay of words, first word after the start of speech, end of speech
to final: algorithmic (stream time that had to be heard) and with compute (wall clock). Compute per
chunk and per stage, RTF. The first seconds of the first recording are played before, to warm up.

Contract: refuses to time on a machine that others use, unless --force; the result says so then.
"""

from __future__ import annotations

import argparse
import sys
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench import machine, manifests, settings
from bench.delays import Delays, algorithmic, measure, percentiles_ms
from sparqle_stream.config import SAMPLE_RATE_HZ

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy as np
    import numpy.typing as npt

    from bench.manifests import Recording, RecordingSet
    from bench.players import Progress, Take
    from bench.settings import Settings
    from sparqle_stream.config import StreamOptions
    from sparqle_stream.models import SparqleModel

    Pcm = npt.NDArray[np.float32]
    Player = Callable[[Pcm, StreamOptions, Progress], Take]

WARM_UP_S = 3.0


def run(
    model: SparqleModel,
    wanted: Settings,
    sets: Sequence[RecordingSet],
    *,
    is_virtual: bool,
    is_forced: bool = False,
) -> dict[str, Any]:
    """The whole benchmark."""
    from bench import players
    from sparqle_stream.engine import Engine

    busy_before = machine.require_free(is_forced=is_forced)
    recordings = [recording for of_set in sets for recording in of_set.recordings]
    under = machine.Conditions(busy_before)
    if is_virtual:
        takes = _play_all(
            players.VirtualEngine(model, wanted.engine_config()).play, wanted, recordings
        )
    else:
        with closing(Engine(model, wanted.engine_config())) as engine:

            def play(pcm: Pcm, options: StreamOptions, progress: Progress) -> Take:
                return players.play(engine, pcm, options, progress)

            takes = _play_all(play, wanted, recordings)
    conditions = {
        "pace": "virtual" if is_virtual else "speed of speech",
        "packet_ms": 1000 * players.PACKET_SAMPLES // SAMPLE_RATE_HZ,
    } | under.summary()
    return {
        "bench": "latency",
        "settings": wanted.summary(),
        "machine": machine.card(model.weights_hash, wanted.threads),
        "sets": manifests.summary(sets),
        "timing": conditions,
    } | figures(takes)


def figures(takes: Sequence[Take]) -> dict[str, Any]:
    """What is reported of recordings that were played."""
    heard, clocked = Delays(), Delays()
    for take in takes:
        heard.extend(algorithmic(take.events))
        clocked.extend(measure(take.arrivals))
    chunks = [seconds for take in takes for seconds in take.chunk_seconds]
    audio_s = sum(take.duration for take in takes)
    compute_s = sum(take.compute_seconds for take in takes)
    stages: dict[str, float] = {}
    for take in takes:
        for stage, seconds in take.stage_seconds.items():
            stages[stage] = stages.get(stage, 0.0) + seconds
    return {
        "algorithmic": heard.summary(),
        "with_compute": clocked.summary(),
        "word_times_from": "the engine's CTC path",
        "words_with_unsure_end": heard.n_unsure,
        "chunk_compute_ms": percentiles_ms(chunks),
        "stage_ms_per_audio_second": {
            stage: round(1000 * seconds / audio_s, 2) for stage, seconds in stages.items()
        },
        "audio_seconds": round(audio_s, 2),
        "compute_seconds": round(compute_s, 2),
        "rtf": round(compute_s / audio_s, 4),
        "latest_packet_ms": round(1000 * max(take.late_s for take in takes), 1),
    }


def _play_all(player: Player, wanted: Settings, recordings: Sequence[Recording]) -> list[Take]:
    """Every recording in turn, after a warm-up on the first."""
    from tqdm import tqdm

    from sparqle_stream import audio

    options = wanted.stream_options()
    first = audio.read_file(recordings[0].path)
    player(first[: int(WARM_UP_S * SAMPLE_RATE_HZ)], options, lambda seconds: None)
    total_s = sum(audio.file_seconds(r.path) or 0.0 for r in recordings)
    every_s = 0.2 if sys.stderr.isatty() else 60.0
    with tqdm(
        total=total_s,
        desc="plays",
        bar_format="{desc}: {percentage:3.0f}%|{bar}| {n:.0f}/{total:.0f} s, {remaining} left",
        file=sys.stderr,
        mininterval=every_s,
    ) as bar:

        def progress(seconds: float) -> None:
            bar.update(min(seconds, total_s - bar.n))  # what a container says is not exact

        return [player(audio.read_file(r.path), options, progress) for r in recordings]


# --- command -----------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.latency", description=__doc__)
    add = parser.add_argument
    add("paths", nargs="*", type=Path, metavar="FILE|FOLDER", help="recordings or manifests")
    add("--virtual", action="store_true", help="do not wait for the clock")
    add("--force", action="store_true", help="time on a busy machine, and say so in the result")
    some = parser.add_mutually_exclusive_group()
    some.add_argument("--every", type=int, default=1, metavar="N", help="of folders, each n-th")
    some.add_argument("--limit", type=int, metavar="N", help="of folders, the first n")
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

    def measured() -> dict[str, Any]:
        wanted = settings.from_args(args)
        wanted.stream_options()  # wrong options are said before a model is loaded
        sets = _sets(args)
        manifests.require_files(sets)
        if not args.force:
            machine.require_free(is_forced=False)  # before the minutes that loading may take
        model = wanted.load_model()
        return run(model, wanted, sets, is_virtual=args.virtual, is_forced=args.force)

    return settings.run_and_print(measured, args.output)


if __name__ == "__main__":
    sys.exit(main())
