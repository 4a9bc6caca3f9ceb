"""Accuracy of strict streaming: `python -m bench.accuracy FOLDER... [--noise FOLDER...]`.

In: folders with a manifest (bench.manifests says of what kinds); without any, the bundled clip.
Every recording goes through the engine as a stream of its own; what is scored is what a client that
appends every final has at the end, never anything provisional or revised. --condition changes what
the engine hears (bench.conditions), --long-form joins recordings first and runs them beside the
same ones cut at utterances (bench.long_form). --offline is streaming, too: with the longest chunk
and delay that the engine has, for whoever can wait that long. --reference runs another recogniser
on the same recordings (bench.references). Ctrl-C ends it with what is done: "interrupted" is in
the result then, sets are cut short, and what comes last (CTC, references) may be missing.
Out: one JSON document. Per folder: WER with intervals, per speaker, last words, revisions, delays
in stream time, and the WER of the greedy CTC path of the same encoder in the same segments; of a
condition and of joined recordings also the ratio to the clean ones (`to_clean`) and to the same cut
at utterances (`to_cut`). On folders of noise: false words a minute. Recordings without text in any
folder count as noise.

Contract: texts and delays do not depend on the machine's load, and in float32 not on --batch
either; int8 and bf16 round differently with more rows, so that near ties may flip. RTF depends on
all of it: a machine that others use is refused, unless --force, and the result says how busy it was
and how many streams ran at once.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench import (
    conditions,
    long_form,
    machine,
    manifests,
    plots,
    ratios,
    references,
    scoring,
    settings,
    writing,
)
from bench.captioned import Captioned, caption, hear, warm_up
from bench.captioned import timing as timing_of
from bench.delays import Delays, algorithmic
from sparqle_stream import messages

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from bench.manifests import RecordingSet
    from bench.settings import Settings
    from sparqle_stream.engine import Engine
    from sparqle_stream.models import Model

    Json = dict[str, Any]

FALSE_WORDS_SHOWN = 10


def measure(
    model: Model,
    wanted: Settings,
    sets: Sequence[RecordingSet],
    *,
    with_ctc: bool = True,
    transcripts: list[Json] | None = None,
    reference: Sequence[str] = (),
) -> Json:
    """The whole benchmark; `transcripts` gets an entry per recording, for looking at dev sets."""
    from sparqle_stream.engine import Engine

    scorer = scoring.Scorer()
    busy_before = machine.busy_share()
    under = machine.Conditions(busy_before)
    sets = _with_cuts(sets)
    with closing(Engine(model, wanted.engine_config())) as engine:
        warm_up(engine, wanted, sets)
        start = time.perf_counter()
        captioned, is_whole = _caption_all(engine, wanted, sets)
        wall_s = time.perf_counter() - start
    sets = sets[: len(captioned)]
    every_one = [c for of_set in captioned for c in of_set]
    timing = timing_of(every_one) | under.summary()
    # Seconds of audio that the whole machine captioned in a second.
    timing["rtfx"] = round(timing["audio_seconds"] / wall_s, 2)
    if with_ctc:
        is_whole = is_whole and _is_done(lambda: hear(model, wanted, every_one))
        with_ctc = is_whole
    if transcripts is not None:
        transcripts += _texts(sets, captioned)
    result = {
        "bench": "accuracy",
        "mode": wanted.mode,
        "settings": wanted.summary(),
        "seeds": {"intervals": scoring.SEED},
        "machine": machine.card(model.weights_hash, wanted.threads),
        "timing": timing,
        "conditions": conditions.facts_of(sets),
        "sets": _reports(scorer, sets, captioned, with_ctc),
    }
    if reference and is_whole:
        rows: list[Json] = []
        is_whole = _is_done(
            lambda: rows.extend(references.measure(reference, wanted, sets, scorer))
        )
        result["references"] = [*rows, *references.published()]
    return result if is_whole else result | {"interrupted": True}


def _caption_all(
    engine: Engine, wanted: Settings, sets: Sequence[RecordingSet]
) -> tuple[list[list[Captioned]], bool]:
    """Of each set the recordings that were done, in their order; False where Ctrl-C ended it.

    What streams at that moment is lost, and with nothing done it stays a KeyboardInterrupt.
    """
    done: list[list[Captioned]] = []
    try:
        for of_set in sets:
            done.append([])
            for captioned in caption(engine, wanted, of_set):
                done[-1].append(captioned)  # one by one: what is there stays
    except KeyboardInterrupt:
        done = [of_set for of_set in done if of_set]
        if not done:
            raise
        return done, False
    return done, True


def _is_done(work: Callable[[], object]) -> bool:
    """False where Ctrl-C ended it."""
    try:
        work()
    except KeyboardInterrupt:
        return False
    return True


def _with_cuts(sets: Sequence[RecordingSet]) -> list[RecordingSet]:
    """Before recordings that were joined the same ones cut at utterances, once."""
    found: list[RecordingSet] = []
    for one in sets:
        if one.cut is not None and one.cut not in found:
            found.append(one.cut)
        found.append(one)
    return found


# --- figures -----------------------------------------------------------------------------------


def _reports(
    scorer: scoring.Scorer,
    sets: Sequence[RecordingSet],
    captioned: Sequence[Sequence[Captioned]],
    with_ctc: bool,
) -> list[Json]:
    """Every set as JSON; then what one is to another, of sets that are whole."""
    reports = [_report(scorer, *item, with_ctc) for item in zip(sets, captioned, strict=True)]
    scored = []
    for of_set, captions in zip(sets, captioned, strict=True):
        speech = [c for c in captions if c.recording.text]
        tallies = [scorer.score(c.recording.text, c.text) for c in speech]
        scored.append(ratios.Scored(of_set, [c.recording for c in speech], tallies))
    for report, one in zip(reports, scored, strict=True):
        if one.speech and "interrupted" not in report:
            report["speech"] |= ratios.all_of(one, scored)
    return reports


def _report(
    scorer: scoring.Scorer, recordings: RecordingSet, captioned: Sequence[Captioned], with_ctc: bool
) -> Json:
    """One folder as JSON: what all its recordings share, then speech, then noise."""
    is_whole = len(captioned) == len(recordings.recordings)
    if not is_whole:
        recordings = replace(recordings, recordings=tuple(c.recording for c in captioned))
    speech = [c for c in captioned if c.recording.text]
    noise = [c for c in captioned if not c.recording.text]
    report: Json = {
        "name": recordings.name,
        "condition": recordings.condition,
        "corpora": recordings.corpora,
        "manifest_sha256": recordings.fingerprint,
        "recordings": len(captioned),
        "recordings_in_manifest": recordings.n_all,
        "failed": sum(c.has_failed for c in captioned),
        "revisions": sum(scoring.n_revisions(c.events) for c in captioned),
        "warnings": sum(isinstance(e, messages.Warning) for c in captioned for e in c.events),
    } | timing_of(captioned)
    if not is_whole:
        report["interrupted"] = True
    if recordings.joined_to_s is not None:
        report["long_form"] = long_form.facts(recordings)
    if speech:
        report["speech"] = _speech(scorer, speech, with_ctc)
    if noise:
        report["noise"] = _noise(noise)
    return report


def _speech(scorer: scoring.Scorer, captioned: Sequence[Captioned], with_ctc: bool) -> Json:
    tallies = [scorer.score(c.recording.text, c.text) for c in captioned]
    speakers = scoring.by_speaker(
        (c.recording.speaker, t) for c, t in zip(captioned, tallies, strict=True)
    )
    delays = Delays()
    for one in captioned:
        delays.extend(algorithmic(one.events))
    report = scoring.summary(scoring.total(tallies)) | {
        "wer_interval_95": scoring.interval(tallies),
        "wer_interval_95_speakers": scoring.interval(list(speakers.values())),
        "speakers": {name: scoring.summary(tally) for name, tally in speakers.items()},
        "delays_stream_time": delays.summary(),
        "segments_without_words": delays.n_without_words,
        "word_times_from": "the engine's CTC path",
        "words_with_unsure_end": delays.n_unsure,
        "writing": writing.summary((c.recording.text, c.text) for c in captioned),
    }
    if with_ctc:
        heard = [scorer.score(c.recording.text, c.heard) for c in captioned]
        report["greedy_ctc"] = scoring.summary(scoring.total(heard))
    return report


def _noise(captioned: Sequence[Captioned]) -> Json:
    """Every word that was shown is false, fillers and bracketed ones too: nothing is normalised."""
    words = [(c.recording.id, c.text.split()) for c in captioned]  # ids may be there twice
    n_words = sum(len(said) for _, said in words)
    minutes = sum(c.done.duration for c in captioned) / 60
    return {
        "minutes": round(minutes, 2),
        "false_words": n_words,
        "false_words_per_minute": round(n_words / minutes, 2) if minutes else None,
        "recordings_with_words": sum(bool(said) for _, said in words),
        "worst": {
            name: {"words": len(said), "first": " ".join(said[:FALSE_WORDS_SHOWN])}
            for name, said in sorted(words, key=lambda item: -len(item[1]))[:3]
            if said
        },
    }


def _texts(
    sets: Sequence[RecordingSet], captioned: Sequence[Sequence[Captioned]]
) -> Iterator[Json]:
    """What was to be said and what was written, of each recording."""
    for of_set, captions in zip(sets, captioned, strict=True):
        for one in captions:
            finals = [e for e in one.events if isinstance(e, messages.Final)]
            yield {
                "set": of_set.name,
                "condition": of_set.condition,
                "id": one.recording.id,
                "reference": one.recording.text,
                "text": one.text,
                "greedy_ctc": one.heard,
                "words": [asdict(word) for event in finals for word in event.words],
            }


def _write_transcripts(path: Path, entries: Sequence[Json]) -> None:
    with settings.writing(path, "--transcripts"), path.open("w", encoding="utf-8") as file:
        for entry in entries:
            file.write(json.dumps(entry, ensure_ascii=False) + "\n")


# --- command -----------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.accuracy", description=__doc__)
    add = parser.add_argument
    add(
        "folders", nargs="*", type=Path, metavar="FOLDER", help="with manifest.jsonl and recordings"
    )
    add("--noise", nargs="+", type=Path, default=[], metavar="FOLDER", help="nobody speaks in it")
    some = parser.add_mutually_exclusive_group()
    some.add_argument("--every", type=int, default=1, metavar="N", help="each n-th recording")
    some.add_argument("--limit", type=int, metavar="N", help="the first n recordings")
    add("--batch", type=int, default=1, metavar="N", help="streams at once, for speed (1)")
    add("--offline", action="store_true", help="stream with the longest chunk and delay")
    add(
        "--condition",
        action="append",
        default=[],
        metavar="NAME",
        help=f"{', '.join(conditions.NAMES)}; several, or a comma list, run after the clean one",
    )
    add("--noise-from", type=Path, metavar="FOLDER", help="noise of noise10 (pink, made here)")
    add(
        "--long-form",
        type=float,
        nargs="+",
        metavar="S",
        help="join recordings to so many seconds, of one speaker as far as they go, then across "
        "speakers, which is harder; beside them, the same cut at utterances",
    )
    add("--pause-s", type=float, default=0.5, metavar="S", help="where they are joined (0.5)")
    add("--without-ctc", action="store_true", help="leave out the greedy CTC text")
    add(
        "--reference",
        action="append",
        default=[],
        metavar="NAME",
        help=f"the same recordings through {', '.join(references.names())}; adds published figures",
    )
    add("--transcripts", type=Path, metavar="FILE.jsonl", help="texts side by side; for dev sets")
    add("--force", action="store_true", help="on a busy machine: only RTF suffers, and it says so")
    plots.add_option(parser)
    settings.add_options(parser)
    return parser


def _sets(args: argparse.Namespace) -> list[RecordingSet]:
    """Speech under each condition, joined if that is wanted, then noise. Errors before any work."""
    names = conditions.parse(args.condition)
    speech = [manifests.read(folder, args.every, args.limit) for folder in args.folders]
    noise = [manifests.read(folder, args.every, args.limit) for folder in args.noise]
    source = manifests.read(args.noise_from) if args.noise_from else None
    silent = [*noise, *([source] if source else [])]  # nobody speaks in any of these
    for recordings in silent:
        manifests.require_noise(recordings)
    manifests.require_files([*speech, *silent])
    if not speech and not noise:
        speech = [manifests.bundled()]
    found: list[RecordingSet] = []
    for condition in (conditions.make(name, source) for name in names):
        for one in (conditions.under(recordings, condition) for recordings in speech):
            lengths = args.long_form or ()
            found += [long_form.joined(one, s, args.pause_s) for s in lengths] if lengths else [one]
    return found + noise


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    transcripts: list[Json] = []

    def run() -> Json:
        wanted = settings.from_args(args, n_streams=args.batch)
        if args.offline:
            wanted = wanted.offline()
        wanted.stream_options()  # wrong options are said before a model is loaded
        references.require(args.reference)
        plots.require(args.plot)
        sets = _sets(args)
        if not args.force:
            machine.require_free(is_forced=False)
        return measure(
            wanted.load_model(),
            wanted,
            sets,
            with_ctc=not args.without_ctc,
            transcripts=transcripts if args.transcripts else None,
            reference=args.reference,
        )

    then: list[Callable[[Json], None]] = [lambda result: plots.draw(result, args.plot)]
    if args.transcripts:
        then.append(lambda _: _write_transcripts(args.transcripts, transcripts))
    places = [("--transcripts", args.transcripts)]
    return settings.run_and_print(run, args.output, places, then)


if __name__ == "__main__":
    sys.exit(main())
