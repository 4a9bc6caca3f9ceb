"""Flips: `python -m bench.flips [FOLDER...]` counts what int8 changes against float32.

In: folders with a manifest (bench.manifests); without any, the bundled clip. Two models of the same
weights on one backend, in the precision asked for (--dtype; int8 on a CPU) and in float32, hear the
same recordings, one stream at a time.
Out: one JSON document, by folder. Of the ear alone, in the same segments: the share of CTC frames
whose best piece is another, and KL divergence from float32 in nats a frame. Of the captions: words
of the finals that differ, as edits over the words of float32 (`flip_rate_percent`), normalised as
for scoring, and as they are written, with capitals and marks; where there are texts the WER of both
and the difference in points, with paired 95 % bootstrap intervals over recordings and speakers.

Contract: none of it depends on the machine's load, and --dtype float32 gives zeros. A machine that
others use is refused all the same, unless --force, as by the other benchmarks.
"""

from __future__ import annotations

import argparse
import sys
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bench import captioned, heard, machine, manifests, plots, scoring, settings
from sparqle_stream import models
from sparqle_stream.errors import ConfigError
from sparqle_stream.onnx_cpu.settings import INDEX

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bench.captioned import Captioned
    from bench.manifests import RecordingSet
    from bench.scoring import Scorer
    from bench.settings import Settings
    from sparqle_stream.config import StreamOptions
    from sparqle_stream.models import Model
    from sparqle_stream.stages import Floats

REFERENCE = "float32"
GOALS = {"wer_points": 0.3}


# --- the ear -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Frames(scoring.Counts):
    """CTC frames of one or more recordings, padding included."""

    frames: int = 0
    changed: int = 0  # whose best piece is another
    nats: float = 0.0  # KL divergence, summed


def frames_of(rounded: Floats, exact: Floats) -> Frames:
    """Log-probs (C, V) of the same frames."""
    divergence = (np.exp(exact, dtype=np.float64) * (exact.astype(np.float64) - rounded)).sum()
    changed = int((rounded.argmax(axis=-1) != exact.argmax(axis=-1)).sum())
    return Frames(len(exact), changed, float(divergence))


def frames_heard(pair: tuple[Model, Model], options: StreamOptions, pcm: Floats) -> Frames:
    """pcm (S,): the detector's segments are the same for both, whatever they write."""
    sides = [heard.posteriors(model, options, pcm) for model in pair]
    return sum((frames_of(*two) for two in zip(*sides, strict=True)), Frames())


def _ear(counts: Frames) -> dict[str, Any]:
    return {
        "frames": counts.frames,
        "frames_changed": counts.changed,
        "frames_changed_percent": round(scoring.percent(counts.changed, counts.frames), 3),
        "nats_per_frame": float(f"{counts.nats / max(1, counts.frames):.3g}"),
    }


# --- the captions ------------------------------------------------------------------------------


def n_edits(words: Sequence[str], others: Sequence[str]) -> int:
    """Fewest insertions, deletions and substitutions from one list of words to another."""
    from jiwer import process_words

    if not words or not others:
        return len(words) + len(others)
    out = process_words(" ".join(words), " ".join(others))
    return out.substitutions + out.deletions + out.insertions


def _words(scorer: Scorer, rounded: Sequence[str], exact: Sequence[str]) -> dict[str, Any]:
    """How many words of `exact` (N texts) became others."""
    flips = scoring.total(scorer.score(b, a) for a, b in zip(rounded, exact, strict=True))
    # Nothing was normalised here: a capital or a comma is a difference too.
    edits = sum(n_edits(a.split(), b.split()) for a, b in zip(rounded, exact, strict=True))
    n_words = sum(len(text.split()) for text in exact)
    return {
        "words": flips.words,
        "words_changed": flips.errors,
        "flip_rate_percent": round(flips.wer, 2),
        "words_as_written": n_words,
        "words_changed_as_written": edits,
        "flip_rate_as_written_percent": round(scoring.percent(edits, n_words), 2),
        "texts_changed": sum(a != b for a, b in zip(rounded, exact, strict=True)),
    }


def _accuracy(
    scorer: Scorer, rounded: Sequence[Captioned], exact: Sequence[Captioned]
) -> dict[str, Any] | None:
    """WER of both and the difference; None where there are no texts."""
    both = [two for two in zip(rounded, exact, strict=True) if two[0].recording.text]
    if not both:
        return None
    sides = [[scorer.score(two[i].recording.text, two[i].text) for two in both] for i in range(2)]
    speakers = [one.recording.speaker for one, _ in both]
    by_speaker = [scoring.by_speaker(zip(speakers, side, strict=True)).values() for side in sides]
    of_speakers = scoring.difference(list(zip(*by_speaker, strict=True)))
    return {
        "reference_words": scoring.total(sides[0]).words,
        "wer_percent": round(scoring.total(sides[0]).wer, 2),
        "wer_float32_percent": round(scoring.total(sides[1]).wer, 2),
        "recordings": len(both),
        "difference": scoring.difference(list(zip(*sides, strict=True)))
        | {"interval_95_speakers": of_speakers["interval_95"]},
    }


# --- all ---------------------------------------------------------------------------------------


def measure(
    pair: tuple[Model, Model], wanted: Settings, sets: Sequence[RecordingSet]
) -> list[dict[str, Any]]:
    """Every set as JSON; pair: in the precision asked for, and in float32."""
    from sparqle_stream.engine import Engine

    scorer = scoring.Scorer()
    sides = []
    for model in pair:
        with closing(Engine(model, wanted.engine_config())) as engine:
            sides.append([list(captioned.caption(engine, wanted, s)) for s in sets])
    reports = []
    for of_set, rounded, exact in zip(sets, *sides, strict=True):
        ear = Frames()
        for one in captioned.with_bar(of_set.recordings, "CTC", len(of_set.recordings)):
            ear += frames_heard(pair, wanted.stream_options(), one.pcm())
        reports.append(
            {
                "name": of_set.name,
                "manifest_sha256": of_set.fingerprint,
                "recordings": len(of_set.recordings),
                "recordings_in_manifest": of_set.n_all,
                "failed": sum(one.has_failed for one in (*rounded, *exact)),
                "ear": _ear(ear),
                "captions": _words(scorer, [c.text for c in rounded], [c.text for c in exact]),
                "accuracy": _accuracy(scorer, rounded, exact),
            }
        )
    return reports


def both_of(wanted: Settings) -> tuple[Settings, Settings]:
    """The settings of the two models. Raises ConfigError where there can be no two."""
    if (Path(wanted.model) / INDEX).is_file():
        raise ConfigError(
            f"{Path(wanted.model).name} holds graphs of one precision",
            hint="name the model folder that they were made from",
        )
    is_random = wanted.model == models.RANDOM_TINY
    backend, dtype = models.choose(
        wanted.backend, wanted.dtype, wanted.compute, is_random=is_random
    )
    rounded = replace(wanted, backend=backend, dtype=dtype)
    return rounded, replace(rounded, dtype=REFERENCE)


def run(args: argparse.Namespace, wanted: Settings, sets: Sequence[RecordingSet]) -> dict[str, Any]:
    under = machine.Conditions(machine.require_free(is_forced=args.force))
    rounded, exact = both_of(wanted)
    pair = rounded.load_model(), exact.load_model()
    reports = measure(pair, rounded, sets)
    return {
        "bench": "flips",
        "settings": rounded.summary() | {"against": REFERENCE},
        "seeds": {"intervals": scoring.SEED},
        "machine": machine.card(pair[0].weights_hash, wanted.threads),
        "timing": under.summary(),
        "sets": reports,
        "goals": GOALS,
    }


# --- command -----------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.flips", description=__doc__)
    add = parser.add_argument
    add(
        "folders", nargs="*", type=Path, metavar="FOLDER", help="with manifest.jsonl and recordings"
    )
    some = parser.add_mutually_exclusive_group()
    some.add_argument("--every", type=int, default=1, metavar="N", help="each n-th recording")
    some.add_argument("--limit", type=int, metavar="N", help="the first n recordings")
    add("--force", action="store_true", help="on a busy machine: no figure changes, it says so")
    plots.add_option(parser)
    settings.add_options(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)

    def measured() -> dict[str, Any]:
        wanted = settings.from_args(args)
        wanted.stream_options()  # wrong options are said before a model is loaded
        plots.require(args.plot)
        both_of(wanted)
        sets = [manifests.read(folder, args.every, args.limit) for folder in args.folders]
        sets = sets or [manifests.bundled()]
        manifests.require_files(sets)
        return run(args, wanted, sets)

    draw = [lambda result: plots.draw(result, args.plot)]
    return settings.run_and_print(measured, args.output, then=draw)


if __name__ == "__main__":
    sys.exit(main())
