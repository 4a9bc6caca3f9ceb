"""Comparisons at equal budget: variants of a bridge, or shares of the data -> one table.

A TOML file has `steps`, a table `base` as training.joint reads it, `[[dev]]` sources to compare on,
and `[[variants]]`: a `name` and whatever differs from `base`. `data = 0.25` takes a quarter of the
clips of every source: with several shares the table is a scaling curve. Every variant has the same
seed, the same number of steps and streams, and is measured on the same undistorted streams of
`dev`.

`python -m training.ablate CONFIG.toml --work DIR [--resume]` writes DIR/ablation.md and .json.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sparqle_stream.errors import ConfigError
from sparqle_stream.tasks import TRANSCRIBE
from training.bridge import JointConfig
from training.data import AugmentConfig
from training.errors import reported
from training.joint import Trainer
from training.place import Place, find_place
from training.settings import from_table, read_table
from training.sources import Batches, Source

if TYPE_CHECKING:
    from collections.abc import Sequence

CLEAN = AugmentConfig(speed=0, noise=0, telephone=0, room=0, gain_low_db=0, gain_high_db=0)


@dataclass(frozen=True, slots=True)
class Plan:
    """What is compared: configs by name, and on what."""

    steps: int
    dev: tuple[Source, ...]
    variants: dict[str, JointConfig]
    dev_batches: int


@dataclass(frozen=True, slots=True)
class Outcome:
    """One row of the table. `text` is in nats a token, `right` a share of tokens."""

    name: str
    text: float
    stop: float
    right: float
    trained: int  # parameters
    seconds_a_step: float


def read_plan(path: Path) -> Plan:
    """Raises ConfigError for a plan that cannot be carried out."""
    raw = read_table(path)
    rows = raw.pop("variants", [])
    if unknown := sorted(raw.keys() - {"steps", "base", "dev", "dev_batches"}):
        raise ConfigError(f"{path.name}: unknown option {unknown[0]}", hint="see ablate.toml")
    if not rows or not raw.get("dev") or "steps" not in raw:
        raise ConfigError(f"{path.name} needs steps, dev and variants", hint="see ablate.toml")
    variants = {}
    for row in rows:
        table = raw.get("base", {}) | row
        name, share = table.pop("name"), table.pop("data", 1.0)
        cfg = from_table(JointConfig, table | {"steps": raw["steps"]}, f"{path.name}, {name}")
        variants[name] = replace(
            cfg, sources=tuple(replace(s, share=s.share * share) for s in cfg.sources)
        )
    dev = tuple(from_table(Source, one, path.name) for one in raw["dev"])
    return Plan(raw["steps"], dev, variants, raw.get("dev_batches", 8))


@torch.no_grad()
def measure(trainer: Trainer, plan: Plan) -> dict[str, float]:
    """Means of a trained bridge's losses over the first streams of `dev`, averaged weights."""
    trainer.load(trainer.average)
    zeros = ("text_steps", "p_text", "corrupt_tokens", "blur", "p_empty", "p_seam")
    fixed: dict[str, Any] = {"p_default_delay": 1.0, "chunks": (16,), "lengths_s": ()}
    fixed |= dict.fromkeys(zeros, 0) | {"tasks": (TRANSCRIBE,)}
    trainer.cfg = replace(trainer.cfg, **fixed)
    heard = replace(trainer.cfg, sources=plan.dev, noise="", augment=CLEAN, workers=0)
    feed = Batches(heard, seed=0, with_clean=False)
    trainer.rng, trainer.batches = random.Random(0), iter(feed)
    rows = [trainer.batch_loss()[1] for _ in range(plan.dev_batches)]
    rows = [row for row in rows if row["rows"]]
    if not rows:
        raise ConfigError("no stream of dev could be aligned", hint="more dev_batches, better ear")
    return {key: sum(row[key] for row in rows) / len(rows) for key in ("text", "stop", "right")}


def compare(plan: Plan, work: Path, place: Place, *, resume: bool) -> list[Outcome]:
    """Trains and measures one variant after the other; what was finished is not done again."""
    outcomes = []
    for i, (name, cfg) in enumerate(plan.variants.items()):
        done = work / f"{i}.json"
        if resume and done.is_file() and json.loads(done.read_text())["name"] == name:
            outcomes.append(Outcome(**json.loads(done.read_text())))
            continue
        trainer, began = Trainer(cfg, place), time.monotonic()
        trainer.run(work / str(i), resume=resume)
        seconds = (time.monotonic() - began) / max(1, cfg.steps)
        n_trained = sum(p.numel() for p in trainer.params)
        measured = measure(trainer, plan)
        outcome = Outcome(name, **measured, trained=n_trained, seconds_a_step=seconds)
        done.write_text(json.dumps(asdict(outcome)) + "\n")
        outcomes.append(outcome)
    return outcomes


def table(plan: Plan, outcomes: Sequence[Outcome]) -> str:
    """Markdown, the best of each column in bold; perplexity is exp(nats a token)."""
    best = min(o.text for o in outcomes), max(o.right for o in outcomes)
    rows = [
        f"{plan.steps} steps each, measured on {plan.dev_batches} batches of dev.",
        "",
        "| variant | nats a token | perplexity | tokens right | stop loss | trained | s a step |",
        "|---|---|---|---|---|---|---|",
    ]
    for o in outcomes:
        text = _bold(f"{o.text:.3f}", o.text == best[0])
        right = _bold(f"{100 * o.right:.1f} %", o.right == best[1])
        cells = [o.name, text, f"{math.exp(min(o.text, 20.0)):.1f}", right, f"{o.stop:.3f}"]
        cells += [f"{o.trained / 1e6:.2f} M", f"{o.seconds_a_step:.2f}"]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"


def _bold(text: str, is_bold: bool) -> str:
    return f"**{text}**" if is_bold else text


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m training.ablate", description=__doc__)
    parser.add_argument("config", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    args = parser.parse_args()
    with reported():
        plan = read_plan(args.config)
        args.work.mkdir(parents=True, exist_ok=True)
        outcomes = compare(plan, args.work, find_place(args.device), resume=args.resume)
        (args.work / "ablation.json").write_text(
            json.dumps([asdict(o) for o in outcomes], indent=1) + "\n"
        )
        (args.work / "ablation.md").write_text(table(plan, outcomes))
    print(table(plan, outcomes), end="")


if __name__ == "__main__":
    main()
