"""The run that all trainings share: steps, learning rates, moving average, checkpoints, log.

A run is seeded, writes one JSON object a step to log.jsonl, saves every few minutes and at the end,
and goes on from last.pt with `--resume`. Rates come from the config, not from the checkpoint.
"""

from __future__ import annotations

import argparse
import json
import signal
import time
from abc import ABC, abstractmethod
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from tqdm import tqdm

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import FrameType

    from torch import Tensor

LOWEST_RATE = 0.02  # of the peak, at the end


def part(weights: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """Weights of one module, by their names in it."""
    return {k[len(name) + 1 :]: v for k, v in weights.items() if k.startswith(name + ".")}


@contextmanager
def _stopped_by_signals(run: Run) -> Iterator[None]:
    """A signal in the middle of a step would leave half of an update behind: it waits."""

    def stop(number: int, frame: FrameType | None) -> None:
        run.is_stopped = True

    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Run(ABC):
    """One training. A subclass makes its modules and calls `ready` with parameter groups.

    Every group has a `peak` learning rate.
    """

    name = "run"  # of the progress bar
    result = "weights.safetensors"  # the averaged weights, in the work folder
    shown: tuple[str, ...] = ()  # values of a step that the progress bar shows

    def __init__(self, steps: int, ema: float) -> None:
        self.step, self.n_steps, self.ema = 0, steps, ema

    def ready(self, groups: list[dict[str, Any]]) -> None:
        self.params = [p for group in groups for p in group["params"]]
        self.optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98), weight_decay=1e-3)
        self.average = {k: v.detach().clone() for k, v in self.weights().items()}

    @abstractmethod
    def weights(self) -> dict[str, Tensor]:
        """What is trained, by the names it is stored under."""

    @abstractmethod
    def load(self, weights: dict[str, Tensor]) -> None:
        """Takes weights of a checkpoint."""

    @abstractmethod
    def seed(self) -> None:
        """Begins the random choices that follow `self.step`."""

    @abstractmethod
    def train_step(self) -> dict[str, float]:
        """One batch, ending in `learn`; what goes into the log."""

    @abstractmethod
    def warm_up(self, group: int) -> float:
        """Share of the peak rate that a parameter group has reached at `self.step`."""

    def learn(self, loss: Tensor, most: float) -> float:
        """Backward, clipping at norm `most`, one optimizer step; returns the norm before it."""
        self.optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        norm = torch.nn.utils.clip_grad_norm_([p for p in self.params if p.grad is not None], most)
        left = max(LOWEST_RATE, 1 - self.step / self.n_steps)
        for i, group in enumerate(self.optimizer.param_groups):
            group["lr"] = group["peak"] * self.warm_up(i) * left
        self.optimizer.step()
        self.step += 1
        self._follow()
        return float(norm)

    @torch.no_grad()
    def _follow(self) -> None:
        """Exponential moving average; short at first so that it does not remember the start."""
        decay = min(self.ema, (1 + self.step) / (10 + self.step))
        for key, value in self.weights().items():
            self.average[key].lerp_(value, 1 - decay)

    def save(self, work: Path) -> None:
        """last.pt, replaced at once or not at all, and the averaged weights."""
        work.mkdir(parents=True, exist_ok=True)
        state = {
            "step": self.step,
            "weights": self.weights(),
            "average": self.average,
            "optimizer": self.optimizer.state_dict(),
        }
        torch.save(state, work / "last.tmp")
        (work / "last.tmp").rename(work / "last.pt")
        save_file({k: v.contiguous() for k, v in self.average.items()}, work / self.result)

    def resume(self, work: Path) -> None:
        state = torch.load(work / "last.pt", weights_only=True)
        self.step, self.average = state["step"], state["average"]
        self.load(state["weights"])
        peaks = [group["peak"] for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(state["optimizer"])
        for group, peak in zip(self.optimizer.param_groups, peaks, strict=True):
            group["peak"] = peak

    def run(self, work: Path, *, resume: bool, save_every_s: float = 180.0) -> None:
        """All steps that are left; Ctrl-C and SIGTERM end it after a step, saved."""
        if resume and (work / "last.pt").exists():
            self.resume(work)
        self.seed()
        work.mkdir(parents=True, exist_ok=True)
        saved = time.monotonic()
        self.is_stopped = False
        with _stopped_by_signals(self), (work / "log.jsonl").open("a") as log:
            bar = tqdm(range(self.step, self.n_steps), desc=self.name, unit="step", mininterval=5)
            for _ in bar:
                began = time.monotonic()
                row = self.train_step()
                row |= {"step": self.step, "seconds": time.monotonic() - began}
                log.write(json.dumps(row) + "\n")
                log.flush()
                bar.set_postfix({key: f"{row[key]:.2f}" for key in self.shown})
                if time.monotonic() - saved > save_every_s:
                    self.save(work)
                    saved = time.monotonic()
                if self.is_stopped:
                    break
        self.save(work)


def main(name: str, about: str | None, make: Callable[[Path], Run]) -> None:
    """The command line of `python -m training.NAME`; `make` reads the config."""
    parser = argparse.ArgumentParser(prog=f"python -m training.{name}", description=about)
    parser.add_argument("config", type=Path)
    parser.add_argument("--work", type=Path, required=True, help="checkpoints and log.jsonl")
    parser.add_argument("--resume", action="store_true")
    args = parser.parse_args()
    make(args.config).run(args.work, resume=args.resume)
