"""Compare: `python -m bench.compare [FOLDER...]`: the same files, the same cores, us and others.

In: folders with a manifest (bench.manifests); without any, the bundled clip. Each peer of
bench.peers whose package is installed (`pip install -e .[peers]`) runs against us in turns A B A B,
every turn in a process of its own with the same number of threads, so that neither memory nor warm
caches are shared and a slow minute of the machine hits both.
Out: one JSON document, ratios first: theirs over ours of time and of peak memory, of every round.
Then every turn; WER where a peer has real weights and the recordings have texts; who was left out.

Contract: loading and one warm-up do not count as time. Refuses to time on a machine that others
use, unless --force; the result says so then.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bench import machine, manifests, peers, plots, scoring, settings
from bench.peers import OURS, PEERS, tokens_for
from bench.settings import Settings
from sparqle_stream.config import SAMPLE_RATE_HZ, n_cores
from sparqle_stream.errors import ConfigError, ModelError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from bench.manifests import RecordingSet
    from bench.peers import Pcm

    Turn = dict[str, Any]
    RunTurn = Callable[[str], Turn]

WARM_UP_S = 3.0
TURN = "--turn-of"  # a process of our own is meant: NAME JOB


# --- one turn, in a process of its own ---------------------------------------------------------


def take_turn(name: str, job: dict[str, Any]) -> Turn:
    """One recogniser over all recordings of a job -> what it took."""
    pcm = np.load(job["pcm"], mmap_mode="r")
    clips = [np.asarray(pcm[a:b]) for a, b in job["spans"]]
    start = time.perf_counter()
    hear = PEERS[name].make(Settings(**job["settings"]))
    hear(clips[0][: int(WARM_UP_S * SAMPLE_RATE_HZ)], 4)
    loaded = time.perf_counter()
    texts = [hear(clip, n) for clip, n in zip(clips, job["tokens"], strict=True)]
    seconds = time.perf_counter() - loaded
    audio_s = sum(map(len, clips)) / SAMPLE_RATE_HZ
    return {
        "seconds": round(seconds, 3),
        "rtf": round(seconds / audio_s, 5),
        "load_seconds": round(loaded - start, 2),
        "peak_rss_mb": machine.peak_rss_mb(),
        "texts": texts if PEERS[name].has_real_weights else [],
    }


def _in_a_process(job: Path, threads: int) -> RunTurn:
    """Turns in processes with so many threads, whatever their libraries would take."""

    def run(name: str) -> Turn:
        env = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-m", "bench.compare", TURN, name, str(job)]
        done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            raise ModelError(f"the turn of {name} failed", hint="its output is above")
        turn: Turn = json.loads(done.stdout.splitlines()[-1])
        return turn

    return run


# --- all turns ---------------------------------------------------------------------------------


def play(names: Sequence[str], rounds: int, run: RunTurn) -> dict[str, list[tuple[Turn, Turn]]]:
    """For each peer: ours, theirs, ours, theirs .. -> the pairs of each round."""
    pairs: dict[str, list[tuple[Turn, Turn]]] = {}
    for name in names:
        pairs[name] = []
        for i in range(rounds):
            print(f"{name}: round {i + 1} of {rounds}", file=sys.stderr, flush=True)
            ours = run(OURS)
            pairs[name].append((ours, run(name)))
    return pairs


def ratios(pairs: Sequence[tuple[Turn, Turn]]) -> dict[str, Any]:
    """Theirs over ours, round by round, and the geometric mean of the rounds."""
    found: dict[str, Any] = {}
    for what, key in (("time", "seconds"), ("memory", "peak_rss_mb")):
        of_rounds = [theirs[key] / ours[key] for ours, theirs in pairs]
        found[what] = round(statistics.geometric_mean(of_rounds), 3)
        found[f"{what}_rounds"] = [round(one, 3) for one in of_rounds]
    return found


def engine(name: str, turns: Sequence[Turn], references: Sequence[str]) -> dict[str, Any]:
    """One recogniser: the median of its turns, its highest memory, its WER."""
    return {
        "what": PEERS[name].what,
        "version": PEERS[name].version(),
        "rtf": round(statistics.median(turn["rtf"] for turn in turns), 5),
        "peak_rss_mb": max(turn["peak_rss_mb"] for turn in turns),
        "wer_percent": _wer(references, turns[0]["texts"]),
        "turns": [{key: turn[key] for key in turn if key != "texts"} for turn in turns],
    }


def _wer(references: Sequence[str], texts: Sequence[str]) -> float | None:
    """None for random weights, and without texts to compare with."""
    if not texts or not all(references):
        return None
    scorer = scoring.Scorer()
    pairs = zip(references, texts, strict=True)
    return round(scoring.total(scorer.score(*pair) for pair in pairs).wer, 2)


def result_of(
    pairs: dict[str, list[tuple[Turn, Turn]]], references: Sequence[str]
) -> dict[str, Any]:
    """What is reported of all turns, ratios first."""
    ours = [mine for of_peer in pairs.values() for mine, _ in of_peer]
    theirs = {name: [turn for _, turn in of_peer] for name, of_peer in pairs.items()}
    return {
        "ratios": {name: ratios(of_peer) for name, of_peer in pairs.items()},
        "engines": {
            name: engine(name, turns, references) for name, turns in ({OURS: ours} | theirs).items()
        },
    }


def measure(
    args: argparse.Namespace, wanted: Settings, sets: Sequence[RecordingSet], names: Sequence[str]
) -> dict[str, Any]:
    """The whole benchmark."""
    under = machine.Conditions(machine.require_free(is_forced=args.force))
    recordings = [r for of_set in sets for r in of_set.recordings]
    with tempfile.TemporaryDirectory() as folder:
        job = _write_job(Path(folder), wanted, [(r.pcm(), r.text) for r in recordings])
        pairs = play(names, args.rounds, _in_a_process(job, wanted.threads))
        audio_s = json.loads(job.read_text())["spans"][-1][1] / SAMPLE_RATE_HZ
    found = result_of(pairs, [r.text for r in recordings])
    missing = {name: peer.missing() for name, peer in PEERS.items()}
    return (
        {"bench": "compare", "ratios": found.pop("ratios")}
        | {
            "settings": wanted.summary(),
            "load": {"rounds": args.rounds, "order": "A B A B", "threads": wanted.threads},
            "machine": machine.card("", wanted.threads),
            "sets": manifests.summary(sets),
            "timing": under.summary(),
            "audio_seconds": round(audio_s, 2),
        }
        | found
        | {"left_out": {n: f"{what} not installed" for n, what in missing.items() if what}}
    )


def _write_job(folder: Path, wanted: Settings, clips: Sequence[tuple[Pcm, str]]) -> Path:
    """What every turn reads: one file of PCM, where each recording is in it, and its tokens."""
    ends = np.cumsum([len(pcm) for pcm, _ in clips]).tolist()
    np.save(folder / "pcm.npy", np.concatenate([pcm for pcm, _ in clips]))
    job = folder / "job.json"
    job.write_text(
        json.dumps(
            {
                "pcm": str(folder / "pcm.npy"),
                "spans": list(zip([0, *ends[:-1]], ends, strict=True)),
                "tokens": [tokens_for(text, len(pcm)) for pcm, text in clips],
                "settings": asdict(wanted),
            }
        )
    )
    return job


# --- command -----------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.compare", description=__doc__)
    add = parser.add_argument
    add("folders", nargs="*", type=Path, metavar="FOLDER", help="with a manifest")
    add("--peers", nargs="+", metavar="NAME", help="of these only: " + ", ".join(_others()))
    add("--rounds", type=int, default=2, metavar="N", help="of A B (%(default)s)")
    add("--limit", type=int, metavar="N", help="of each folder the first n recordings")
    add("--force", action="store_true", help="time on a busy machine, and say so in the result")
    plots.add_option(parser)
    settings.add_options(parser)
    return parser


def _others() -> list[str]:
    return [name for name in PEERS if name != OURS]


def _chosen(wanted: Sequence[str] | None) -> list[str]:
    """Peers that can run. Raises ConfigError for unknown names, and when there are none."""
    for name in wanted or ():
        if name not in _others():
            raise ConfigError(f"unknown peer {name!r}", hint=", ".join(_others()))
        peers.require(name)
    names = [name for name in wanted or _others() if not PEERS[name].missing()]
    if not names:
        raise ConfigError("no other recogniser is installed", hint="pip install -e .[peers]")
    return names


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv[:1] == [TURN]:
        print(json.dumps(take_turn(argv[1], json.loads(Path(argv[2]).read_text()))))
        return 0
    args = parser().parse_args(argv)

    def run() -> dict[str, Any]:
        wanted = settings.from_args(args)
        if not wanted.threads:  # the same number for everybody, whatever their defaults are
            args.threads = n_cores()
            wanted = settings.from_args(args)
        wanted.stream_options()  # wrong options are said before a model is loaded
        if args.rounds < 1:
            raise ConfigError(f"--rounds {args.rounds} cannot be used", hint="1 or more")
        plots.require(args.plot)
        names = _chosen(args.peers)
        sets = [manifests.read(folder, limit=args.limit) for folder in args.folders]
        sets = sets or [manifests.bundled()]
        manifests.require_files(sets)
        result = measure(args, wanted, sets, names)
        plots.draw(result, args.plot)
        return result

    return settings.run_and_print(run, args.output)


if __name__ == "__main__":
    sys.exit(main())
