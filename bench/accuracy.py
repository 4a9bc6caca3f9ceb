"""Accuracy of strict streaming: `python -m bench.accuracy FOLDER... [--noise FOLDER...]`.

In: folders with a manifest (bench.manifests says of what kinds); without any, the bundled clip.
Every recording goes through the engine as a stream of its own; what is scored is what a client that
appends every final has at the end, never anything provisional or revised. --long-form joins
neighbouring recordings of a speaker first. --offline asks what the same weights do for whoever has
the whole recording and time: the longest chunk and delay that the engine has.
Out: one JSON document. Per folder: WER with intervals, per speaker, last words, revisions, delays
in stream time, and the WER of the greedy CTC path of the same encoder in the same segments. On
folders of noise: false words a minute. Recordings without text in any folder count as noise.

Contract: texts and delays do not depend on the machine's load, and in float32 not on --batch
either; int8 and bf16 round differently with more rows, so that near ties may flip. RTF depends on
all of it: a machine that others use is refused, unless --force, and the result says how busy it was
and how many streams ran at once.
"""

from __future__ import annotations

import argparse
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from bench import machine, manifests, plots, scoring, settings
from bench.delays import Delays, algorithmic
from sparqle_stream import messages
from sparqle_stream.config import SAMPLE_RATE_HZ
from sparqle_stream.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from bench.manifests import Recording, RecordingSet
    from bench.settings import Settings
    from sparqle_stream.engine import Engine
    from sparqle_stream.models import Model

T = TypeVar("T")

FALSE_WORDS_SHOWN = 10


@dataclass(slots=True)
class Captioned:
    """One recording after its stream has ended."""

    recording: Recording
    events: list[messages.Event]
    heard: str = ""  # greedy CTC text

    @property
    def text(self) -> str:
        return scoring.text_of(self.events)

    @property
    def done(self) -> messages.Done:
        """A stream that failed has captioned nothing of its duration."""
        last = self.events[-1]
        return last if isinstance(last, messages.Done) else messages.Done(0.0, 0.0, 0.0)

    @property
    def has_failed(self) -> bool:
        return not isinstance(self.events[-1], messages.Done)


def measure(
    model: Model,
    wanted: Settings,
    sets: Sequence[RecordingSet],
    *,
    with_ctc: bool = True,
    transcripts: Path | None = None,
) -> dict[str, Any]:
    """The whole benchmark; `transcripts` gets a line per recording, for looking at dev sets."""
    from sparqle_stream.engine import Engine

    scorer = scoring.Scorer()
    busy_before = machine.busy_share()
    under = machine.Conditions(busy_before)
    with closing(Engine(model, wanted.engine_config())) as engine:
        _warm_up(engine, wanted, sets)
        captioned = {s.name: _caption(engine, wanted, s) for s in sets}
    timing = _timing([c for of_set in captioned.values() for c in of_set])
    timing |= under.summary()
    if with_ctc:
        _hear(model, wanted, [one for of_set in captioned.values() for one in of_set])
    if transcripts is not None:
        _write_transcripts(transcripts, captioned)
    return {
        "bench": "accuracy",
        "mode": wanted.mode,
        "settings": wanted.summary(),
        "machine": machine.card(model.weights_hash, wanted.threads),
        "timing": timing,
        "sets": [_report(scorer, s, captioned[s.name], with_ctc) for s in sets],
    }


# --- captioning --------------------------------------------------------------------------------


def _warm_up(engine: Engine, wanted: Settings, sets: Sequence[RecordingSet]) -> None:
    """Two seconds that do not count: the first steps allocate and read weights from disk."""
    pcm = sets[0].recordings[0].pcm()[: 2 * SAMPLE_RATE_HZ]
    engine.transcribe(pcm, wanted.stream_options())


def _caption(engine: Engine, wanted: Settings, recordings: RecordingSet) -> list[Captioned]:
    """Every recording through the engine, as many at once as it has slots, in the given order."""
    options = wanted.stream_options()

    def one(recording: Recording) -> Captioned:
        events = engine.transcribe(recording.pcm(), options)
        return Captioned(recording, [e for e in events if not isinstance(e, messages.Tail)])

    with ThreadPoolExecutor(wanted.n_streams) as pool:
        results = pool.map(one, recordings.recordings)
        return list(_with_bar(results, f"captions {recordings.name}", len(recordings.recordings)))


def _hear(model: Model, wanted: Settings, captioned: Sequence[Captioned]) -> None:
    """Fills in what the CTC head hears in the same segments."""
    from bench.heard import greedy_text

    options = wanted.stream_options()
    wanted_ones = [one for one in captioned if one.recording.text and not one.has_failed]
    for one in _with_bar(wanted_ones, "CTC", len(wanted_ones)):
        pcm = one.recording.pcm()
        one.heard = greedy_text(model, options, pcm, one.events)


def _with_bar(items: Iterable[T], name: str, n: int) -> Iterable[T]:
    """Progress on stderr: a bar for people, a line now and then for logs."""
    from tqdm import tqdm

    every_s = 0.2 if sys.stderr.isatty() else 60.0
    return tqdm(items, desc=name, total=n, unit="file", file=sys.stderr, mininterval=every_s)


# --- figures -----------------------------------------------------------------------------------


def _timing(captioned: Sequence[Captioned]) -> dict[str, Any]:
    audio_s = sum(c.done.duration for c in captioned)
    compute_s = sum(c.done.compute_seconds for c in captioned)
    return {
        "audio_seconds": round(audio_s, 2),
        "compute_seconds": round(compute_s, 2),
        "rtf": round(compute_s / audio_s, 4) if audio_s else None,
    }


def _report(
    scorer: scoring.Scorer, recordings: RecordingSet, captioned: Sequence[Captioned], with_ctc: bool
) -> dict[str, Any]:
    """One folder as JSON: what all its recordings share, then speech, then noise."""
    speech = [c for c in captioned if c.recording.text]
    noise = [c for c in captioned if not c.recording.text]
    report: dict[str, Any] = {
        "name": recordings.name,
        "corpora": recordings.corpora,
        "manifest_sha256": recordings.fingerprint,
        "recordings": len(captioned),
        "recordings_in_manifest": recordings.n_all,
        "failed": sum(c.has_failed for c in captioned),
        "revisions": sum(scoring.n_revisions(c.events) for c in captioned),
        "warnings": sum(isinstance(e, messages.Warning) for c in captioned for e in c.events),
    } | _timing(captioned)
    if speech:
        report["speech"] = _speech(scorer, speech, with_ctc)
    if noise:
        report["noise"] = _noise(noise)
    return report


def _speech(
    scorer: scoring.Scorer, captioned: Sequence[Captioned], with_ctc: bool
) -> dict[str, Any]:
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
        "word_times_from": "the engine's CTC path",
        "words_with_unsure_end": delays.n_unsure,
    }
    if with_ctc:
        heard = [scorer.score(c.recording.text, c.heard) for c in captioned]
        report["greedy_ctc"] = scoring.summary(scoring.total(heard))
    return report


def _noise(captioned: Sequence[Captioned]) -> dict[str, Any]:
    """Every word that was shown is false, fillers and bracketed ones too: nothing is normalised."""
    words = {c.recording.id: c.text.split() for c in captioned}
    n_words = sum(map(len, words.values()))
    minutes = sum(c.done.duration for c in captioned) / 60
    return {
        "minutes": round(minutes, 2),
        "false_words": n_words,
        "false_words_per_minute": round(n_words / minutes, 2) if minutes else None,
        "recordings_with_words": sum(bool(said) for said in words.values()),
        "worst": {
            name: {"words": len(said), "first": " ".join(said[:FALSE_WORDS_SHOWN])}
            for name, said in sorted(words.items(), key=lambda item: -len(item[1]))[:3]
            if said
        },
    }


def _write_transcripts(path: Path, captioned: dict[str, list[Captioned]]) -> None:
    with path.open("w") as file:
        for name, of_set in captioned.items():
            for one in of_set:
                words = [
                    asdict(w) for e in one.events if isinstance(e, messages.Final) for w in e.words
                ]
                entry = {
                    "set": name,
                    "id": one.recording.id,
                    "reference": one.recording.text,
                    "text": one.text,
                    "greedy_ctc": one.heard,
                    "words": words,
                }
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
    add("--offline", action="store_true", help="longest chunk and delay")
    add("--long-form", type=float, metavar="S", help="join recordings to so many seconds")
    add("--pause-s", type=float, default=0.5, metavar="S", help="where they are joined (0.5)")
    add("--without-ctc", action="store_true", help="leave out the greedy CTC text")
    add("--transcripts", type=Path, metavar="FILE.jsonl", help="texts side by side; for dev sets")
    add("--force", action="store_true", help="on a busy machine: only RTF suffers, and it says so")
    plots.add_option(parser)
    settings.add_options(parser)
    return parser


def _joined(args: argparse.Namespace, recordings: RecordingSet) -> RecordingSet:
    if args.long_form <= 0 or args.pause_s < 0:
        raise ConfigError("nothing can be joined to that", hint="--long-form 300 --pause-s 0.5")
    return manifests.joined(recordings, args.long_form, args.pause_s)


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)

    def run() -> dict[str, Any]:
        wanted = settings.from_args(args, n_streams=args.batch)
        if args.offline:
            wanted = wanted.offline()
        wanted.stream_options()  # wrong options are said before a model is loaded
        folders = [*args.folders, *args.noise]
        sets = [manifests.read(folder, args.every, args.limit) for folder in folders]
        for recordings in sets[len(args.folders) :]:
            manifests.require_noise(recordings)
        manifests.require_files(sets)
        plots.require(args.plot)
        if not args.force:
            machine.require_free(is_forced=False)
        if args.long_form is not None:
            n = len(args.folders)
            sets = [_joined(args, one) for one in sets[:n]] + sets[n:]
        result = measure(
            wanted.load_model(),
            wanted,
            sets or [manifests.bundled()],
            with_ctc=not args.without_ctc,
            transcripts=args.transcripts,
        )
        plots.draw(result, args.plot)
        return result

    return settings.run_and_print(run, args.output)


if __name__ == "__main__":
    sys.exit(main())
