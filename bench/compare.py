"""Compare: `python -m bench.compare [FOLDER...]`: the same files, the same cores, us and others.

In: folders with a manifest (bench.manifests); without any, the bundled clip. Each peer of
bench.peers whose package is installed (`pip install -e .[peers]`), and whose weights are given
where it has no random ones (`--weights vosk=FOLDER`), runs against us in turns A B A B, every turn
in a process of its own with the same number of threads, so that neither memory nor warm caches are
shared and a slow minute of the machine hits both.
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

from bench import bounds, machine, manifests, peers, plots, scoring, settings
from bench.peers import OURS, PEERS, tokens_for
from bench.settings import Settings
from sparqle_stream.config import SAMPLE_RATE_HZ, n_cores
from sparqle_stream.errors import ConfigError, ModelError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from bench.manifests import RecordingSet
    from bench.peers import Pcm

    Turn = dict[str, Any]
    RunTurn = Callable[[str], Turn]

WARM_UP_S = 3.0
TURN = "--turn-of"  # a process of our own is meant: NAME JOB
WRITE = "--write-weights-of"  # likewise: NAME FOLDER


# --- one turn, in a process of its own ---------------------------------------------------------


def take_turn(name: str, job: dict[str, Any]) -> Turn:
    """One recogniser over all recordings of a job -> what it took."""
    pcm = np.load(job["pcm"], mmap_mode="r")
    clips = [np.asarray(pcm[a:b]) for a, b in job["spans"]]
    start = time.perf_counter()
    folder = [Path(job["weights"][name])] if name in job["weights"] else []
    hear = PEERS[name].make(Settings(**job["settings"]), *folder)
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
        env = os.environ | {"OMP_NUM_THREADS": str(threads)}
        turn: Turn = json.loads(_ours([TURN, name, str(job)], env).splitlines()[-1])
        return turn

    return run


def _ours(arguments: Sequence[str], env: Mapping[str, str]) -> str:
    """What this command, in another process, prints; it fetches nothing."""
    command = [sys.executable, "-m", "bench.compare", *arguments]
    env = dict(env) | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise ModelError(f"the turn of {arguments[1]} failed", hint="its output is above")
    return done.stdout


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
    free = machine.require_free(is_forced=args.force)
    model = wanted.load_model()
    weights_hash, bound = model.weights_hash, bounds.of_chunk(model, wanted.chunk_ms)
    del model  # what is timed has its own
    recordings = [r for of_set in sets for r in of_set.recordings]
    with tempfile.TemporaryDirectory() as folder:
        weights = args.weights | _written(names, Path(folder))
        clips = [(r.pcm(), r.text) for r in recordings]
        job = _write_job(Path(folder), wanted, clips, weights)
        under = machine.Conditions(free)
        pairs = play(names, args.rounds, _in_a_process(job, wanted.threads))
        timing = under.summary()
        audio_s = json.loads(job.read_text())["spans"][-1][1] / SAMPLE_RATE_HZ
    found = result_of(pairs, [r.text for r in recordings])
    load = {
        "rounds": args.rounds,
        "order": "A B A B",
        "threads": wanted.threads,
        "seed": peers.SEED,
    }
    return (
        {"bench": "compare", "ratios": found.pop("ratios")}
        | {
            "settings": wanted.summary(),
            "load": load | {"seed": peers.SEED},
            "machine": machine.card(weights_hash, wanted.threads),
            "sets": manifests.summary(sets),
            "timing": timing,
            "bound": bound,
            "audio_seconds": round(audio_s, 2),
        }
        | found
        | {"left_out": _left_out(args.weights)}
    )


def _left_out(weights: Mapping[str, Path]) -> dict[str, str]:
    """Why others did not run, those that could have been left out by name not among them."""
    why = {
        name: f"{what} not installed" for name, peer in PEERS.items() if (what := peer.missing())
    }
    lacking = [name for name, peer in PEERS.items() if peer.wants_weights and name not in weights]
    return dict.fromkeys(lacking, "no weights given") | why


def _written(names: Sequence[str], folder: Path) -> dict[str, Path]:
    """Folders of what peers load that has to be made first, by processes of their own."""
    folders = {name: folder / name for name in names if PEERS[name].write}
    for name, out in folders.items():
        print(f"{name}: writing random weights", file=sys.stderr, flush=True)
        out.mkdir()
        _ours([WRITE, name, str(out)], os.environ)
    return folders


def _write_job(
    folder: Path,
    wanted: Settings,
    clips: Sequence[tuple[Pcm, str]],
    weights: Mapping[str, Path],
) -> Path:
    """What every turn reads: one file of PCM, where each recording is in it, its tokens, and
    folders of weights by peer."""
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
                "weights": {name: str(path.resolve()) for name, path in weights.items()},
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
    of = "real weights that you have, of: " + ", ".join(_with_weights())
    add("--weights", nargs="+", default=[], metavar="NAME=FOLDER", help=of)
    add("--rounds", type=int, default=2, metavar="N", help="of A B (%(default)s)")
    add("--limit", type=int, metavar="N", help="of each folder the first n recordings")
    add("--force", action="store_true", help="time on a busy machine, and say so in the result")
    plots.add_option(parser)
    settings.add_options(parser)
    return parser


def _others() -> list[str]:
    return [name for name in PEERS if name != OURS]


def _with_weights() -> list[str]:
    return [name for name, peer in PEERS.items() if peer.wants_weights]


def _weights(given: Sequence[str]) -> dict[str, Path]:
    """NAME=FOLDER .. -> folders by name. Raises ConfigError."""
    found = {}
    for one in given:
        name, _, folder = one.partition("=")
        if name not in _with_weights() or not folder or not Path(folder).is_dir():
            raise ConfigError(
                f"--weights {one} cannot be used",
                hint=f"NAME=FOLDER, a folder that is there, of {', '.join(_with_weights())}",
            )
        found[name] = Path(folder)
    return found


def _chosen(wanted: Sequence[str] | None, weights: Mapping[str, Path]) -> list[str]:
    """Peers that can run. Raises ConfigError for unknown names, and when there are none."""
    for name in wanted or ():
        if name not in _others():
            raise ConfigError(f"unknown peer {name!r}", hint=", ".join(_others()))
        peers.require(name, weights)
    lacking = _left_out(weights)
    names = [name for name in wanted or _others() if name not in lacking]
    if not names:
        raise ConfigError("no other recogniser is installed", hint="pip install -e .[peers]")
    return names


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv[:1] == [TURN]:
        print(json.dumps(take_turn(argv[1], json.loads(Path(argv[2]).read_text()))))
        return 0
    if argv[:1] == [WRITE] and (write := PEERS[argv[1]].write):
        write(Path(argv[2]))
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
        args.weights = _weights(args.weights)
        names = _chosen(args.peers, args.weights)
        sets = [manifests.read(folder, limit=args.limit) for folder in args.folders]
        sets = sets or [manifests.bundled()]
        manifests.require_files(sets)
        return measure(args, wanted, sets, names)

    draw = [lambda result: plots.draw(result, args.plot)]
    return settings.run_and_print(run, args.output, then=draw)


if __name__ == "__main__":
    sys.exit(main())
