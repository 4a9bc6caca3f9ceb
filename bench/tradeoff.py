"""Trade-off: `python -m bench.tradeoff FOLDER...`: what waiting buys, over delays and chunks.

In: folders with a manifest (bench.manifests); without any, the bundled clip. Each cell of the grid
is one engine with one chunk and one delay; the model is loaded once.
Out: one JSON document with a cell for each pair: WER with its interval, delays in stream time, RTF,
and what the machine did meanwhile. With --output or --resume it is written after each cell, so that
a run that was stopped is gone on with by the same command (--resume FILE).

Contract: WER and delays do not depend on the machine's load, RTF does: a busy machine is refused,
unless --force. Only cells of the same recordings, settings and weights stand in one document.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench import captioned, machine, manifests, plots, scoring, settings
from bench.delays import Delays, algorithmic
from sparqle_stream.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bench.captioned import Captioned
    from bench.manifests import RecordingSet
    from bench.settings import Settings
    from sparqle_stream.models import Model

    Json = dict[str, Any]

CHUNKS_MS = (80, 160, 320, 640, 1280)
DELAYS_MS = (0, 80, 240, 480, 960)
MUST_AGREE = ("settings", "recordings", "weights")  # of documents that cells are added to


def grid(wanted: Settings, chunks: Sequence[int], delays: Sequence[int]) -> list[Settings]:
    """Cells in their order: delay by delay within a chunk. Raises ConfigError for wrong ones."""
    cells = [
        replace(wanted, chunk_ms=chunk, delay_ms=delay) for chunk in chunks for delay in delays
    ]
    for cell in cells:
        cell.stream_options()
    return list(dict.fromkeys(cells))


def cell(
    model: Model, wanted: Settings, sets: Sequence[RecordingSet], scorer: scoring.Scorer
) -> Json:
    """One chunk and one delay over all recordings."""
    from sparqle_stream.engine import Engine

    under = machine.Conditions(machine.busy_share())
    with closing(Engine(model, wanted.engine_config())) as engine:
        captioned.warm_up(engine, wanted, sets)
        captions = [list(captioned.caption(engine, wanted, s)) for s in sets]
    card = machine.card(model.weights_hash, wanted.threads)
    return {
        "chunk_ms": wanted.chunk_ms,
        "delay_ms": wanted.delay_ms,
        "timing": captioned.timing([one for of_set in captions for one in of_set])
        | under.summary(),
        "commit": card["commit"],
        "date": card["date"],
        "sets": [
            {"name": s.name} | _figures(scorer, of_set)
            for s, of_set in zip(sets, captions, strict=True)
        ],
    }


def _figures(scorer: scoring.Scorer, captions: Sequence[Captioned]) -> Json:
    speech = [one for one in captions if one.recording.text]
    tallies = [scorer.score(one.recording.text, one.text) for one in speech]
    delays = Delays()
    for one in speech:
        delays.extend(algorithmic(one.events))
    return scoring.summary(scoring.total(tallies)) | {
        "wer_interval_95": scoring.interval(tallies),
        "delays_stream_time": delays.summary(),
        "words_with_unsure_end": delays.n_unsure,
        "failed": sum(one.has_failed for one in captions),
    }


# --- the document ------------------------------------------------------------------------------


def document(
    model: Model, wanted: Settings, sets: Sequence[RecordingSet], cells: Sequence[Settings]
) -> Json:
    """A result without cells."""
    return {
        "bench": "tradeoff",
        "settings": wanted.summary(),
        "seeds": {"intervals": scoring.SEED},
        "machine": machine.card(model.weights_hash, wanted.threads),
        "grid": _pairs(cells),
        "sets": manifests.summary(sets),
        "ids_sha256": _fingerprint(sets),
        "timing": {},
        "cells": [],
    }


def _fingerprint(sets: Sequence[RecordingSet]) -> str:
    """Which recordings of the manifests were chosen."""
    ids = json.dumps([[one.id for one in of_set.recordings] for of_set in sets])
    return hashlib.sha256(ids.encode()).hexdigest()[:16]


def gone_on_with(path: Path | None, new: Json) -> Json:
    """The document in `path`, its grid widened to that of the new one, which serves where there is
    none yet. Raises ConfigError when cells of the two could not be compared.
    """
    if path is None or not path.exists():
        return new
    try:
        old: Json = json.loads(path.read_text())
        differing = [name for name in MUST_AGREE if _facts(old)[name] != _facts(new)[name]]
    except (ValueError, KeyError, TypeError) as err:
        raise ConfigError(
            f"{path.name} is no result of bench.tradeoff: {err!r}", hint="--output another file"
        ) from err
    if differing:
        raise ConfigError(
            f"{path.name} was measured with other {', '.join(differing)}",
            hint="use the same options and recordings, or begin another file",
        )
    pairs = [*old["grid"], *(pair for pair in new["grid"] if pair not in old["grid"])]
    return old | {"grid": sorted(pairs)}


def _facts(result: Json) -> Json:
    """What all cells of a document have in common."""
    settings = {k: v for k, v in result["settings"].items() if k not in ("chunk_ms", "delay_ms")}
    recordings = [result["sets"], result["ids_sha256"]]
    weights = result["machine"]["weights_hash"]
    return {"settings": settings, "recordings": recordings, "weights": weights}


def with_cell(result: Json, one: Json) -> Json:
    """The document with one cell more, in the order of the grid; the worst of all timings."""
    cells = sorted([*result["cells"], one], key=lambda c: (c["chunk_ms"], c["delay_ms"]))
    timings = [c["timing"] for c in cells]
    return result | {
        "cells": cells,
        "timing": {
            "machine_was_busy": any(t["machine_was_busy"] for t in timings),
            "others_share_before": max(t["others_share_before"] for t in timings),
            "wall_seconds": round(sum(t["wall_seconds"] for t in timings), 1),
        },
    }


def missing(result: Json, cells: Sequence[Settings]) -> list[Settings]:
    """Cells that the document has not got."""
    done = _pairs_of(result["cells"])
    return [one for one in cells if [one.chunk_ms, one.delay_ms] not in done]


def _pairs(cells: Sequence[Settings]) -> list[list[int]]:
    return sorted([one.chunk_ms, one.delay_ms] for one in cells)


def _pairs_of(cells: Sequence[Json]) -> list[list[int]]:
    return [[one["chunk_ms"], one["delay_ms"]] for one in cells]


# --- command -----------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.tradeoff", description=__doc__)
    add = parser.add_argument
    add("folders", nargs="*", type=Path, metavar="FOLDER", help="with a manifest")
    add("--chunks", type=int, nargs="+", default=CHUNKS_MS, metavar="MS", help="%(default)s")
    add("--delays", type=int, nargs="+", default=DELAYS_MS, metavar="MS", help="%(default)s")
    some = parser.add_mutually_exclusive_group()
    some.add_argument("--every", type=int, default=1, metavar="N", help="each n-th recording")
    some.add_argument("--limit", type=int, metavar="N", help="the first n recordings")
    add("--batch", type=int, default=1, metavar="N", help="streams at once, for speed (1)")
    add("--resume", type=Path, metavar="FILE.json", help="go on with this result, if it is there")
    add("--force", action="store_true", help="on a busy machine: only RTF suffers, and it says so")
    plots.add_option(parser)
    settings.add_options(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    output = args.output or args.resume

    def run() -> Json:
        wanted = settings.from_args(args, n_streams=args.batch)
        cells = grid(wanted, args.chunks, args.delays)
        plots.require(args.plot)
        sets = [manifests.read(folder, args.every, args.limit) for folder in args.folders]
        sets = sets or [manifests.bundled()]
        manifests.require_speech(sets)
        manifests.require_files(sets)
        if not args.force:
            machine.require_free(is_forced=False)
        model = wanted.load_model()
        result = gone_on_with(args.resume, document(model, wanted, sets, cells))
        scorer = scoring.Scorer()
        for one in missing(result, cells):
            print(f"chunk {one.chunk_ms} ms, delay {one.delay_ms} ms", file=sys.stderr, flush=True)
            result = with_cell(result, cell(model, one, sets, scorer))
            settings.write(result, output)
        return result | ({"plot": args.plot.name} if args.plot else {})

    draw = [lambda result: plots.draw(result, args.plot)]
    return settings.run_and_print(run, output, then=draw)


if __name__ == "__main__":
    sys.exit(main())
