"""The run that all trainings share: steps, learning rates, moving average, checkpoints, log.

A run is seeded, writes one JSON object a step to log.jsonl, saves every few minutes and at the end,
and goes on from last.pt with `--resume`. Rates come from the config, not from the checkpoint.

A batch has `accumulate` shares, each drawn from a feed of its own, whose gradients are averaged. A
process alone takes them one after another, several processes (`accelerate launch`) share them out:
the same batches, and so the same losses, whatever the number of processes.
"""

from __future__ import annotations

import argparse
import json
import math
import signal
import time
from abc import ABC, abstractmethod
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from tqdm import tqdm

from sparqle_stream.errors import ConfigError
from training.errors import reported
from training.place import HERE, Place

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import FrameType

    from torch import Tensor

    from training.sources import Feed

LOWEST_RATE = 0.02  # of the peak, at the end
MOST_BAD_STEPS = 10  # in a row, whose gradients are not finite
SUMMED = ("audio_s", "rows")  # of a step's shares; other values are averaged


def warmed(n_steps: float, warmup: int) -> float:
    """Share of the peak rate after `n_steps`: it rises over `warmup` of them, with 0 at once."""
    return min(1.0, max(0.0, n_steps / warmup)) if warmup > 0 else float(n_steps > 0)


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
    """One training. A subclass makes its modules on `place` and calls `ready` with parameter
    groups, each of which has a `peak` learning rate.
    """

    name = "run"  # of the progress bar
    result = "weights.safetensors"  # the averaged weights, in the work folder
    shown: tuple[str, ...] = ()  # values of a step that the progress bar shows
    most_norm = 1.0  # at which gradients are clipped

    def __init__(self, steps: int, ema: float, accumulate: int = 1, place: Place = HERE) -> None:
        if accumulate < 1 or accumulate % place.n_processes:
            raise ConfigError(
                f"{place.n_processes} processes cannot share {accumulate} parts of a batch",
                hint="let accumulate be a multiple of the number of processes",
            )
        self.step, self.n_steps, self.ema = 0, steps, ema
        self.accumulate, self.place, self.is_stopped = accumulate, place, False
        self.n_bad, self.n_bad_in_a_row = 0, 0  # steps that taught nothing

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
    def make_feed(self, share: int) -> Feed:
        """The random choices of one share of the batches that follow `self.step`."""

    @abstractmethod
    def batch_loss(self) -> tuple[Tensor, dict[str, float]]:
        """The loss of one share, from `self.rng` and `self.batches`, and what goes into the log.

        A loss without a gradient teaches nothing.
        """

    @abstractmethod
    def warm_up(self, group: int) -> float:
        """Share of the peak rate that a parameter group has reached at `self.step`."""

    def seed(self) -> None:
        """Begins the random choices that follow `self.step`."""
        shares = range(self.place.index, self.accumulate, self.place.n_processes)
        self.feeds = [self.make_feed(share) for share in shares]
        self._use(self.feeds[0])

    def _use(self, feed: Feed) -> None:
        self.rng, self.sampler, self.batches = feed.rng, feed.sampler, feed.batches

    def train_step(self) -> dict[str, float]:
        """One update from all shares of a batch; what goes into the log.

        Raises ConfigError where gradients have not been finite for many steps.
        """
        self.optimizer.zero_grad(set_to_none=True)
        total: dict[str, float] = {}
        for feed in self.feeds:
            self._use(feed)
            loss, row = self.batch_loss()
            if loss.requires_grad:
                torch.autograd.backward(loss / self.accumulate)
            total = {key: total.get(key, 0.0) + value for key, value in row.items()}
        if self.place.n_processes > 1:
            total = self._exchange(total)
        row = {k: v if k in SUMMED else v / self.accumulate for k, v in total.items()}
        return row | {"norm": self._update(), "bad_steps": self.n_bad}

    def _exchange(self, row: dict[str, float]) -> dict[str, float]:
        """Sums gradients, the values of `row` and the wish to stop over all processes."""
        device = self.place.device
        grads = [p.grad for p in self.params]
        told = [*(g is not None for g in grads), self.is_stopped, *row.values()]
        flat = [
            (torch.zeros_like(p) if g is None else g).flatten().float()
            for p, g in zip(self.params, grads, strict=True)
        ]
        sums = self.place.sum(torch.cat([torch.tensor(told, device=device).float(), *flat]))
        heads, rest = sums[: len(told)].tolist(), sums[len(told) :]
        parts = torch.split(rest, [p.numel() for p in self.params])
        for p, has_grad, grad in zip(self.params, heads, parts, strict=False):
            p.grad = grad.view_as(p).to(p.dtype) if has_grad else None
        self.is_stopped = heads[len(grads)] > 0
        return dict(zip(row, heads[len(grads) + 1 :], strict=True))

    def _update(self) -> float:
        """Clipping, one optimizer step, the moving average; returns the norm before clipping.

        A norm that is not finite would destroy weights, average and then the checkpoint: such a
        step changes nothing.
        """
        learning = [p for p in self.params if p.grad is not None]
        norm = float(torch.nn.utils.clip_grad_norm_(learning, self.most_norm))
        if not math.isfinite(norm):
            self.step += 1
            self._count_bad()
            return norm
        self.n_bad_in_a_row = 0
        left = max(LOWEST_RATE, 1 - self.step / self.n_steps)
        for i, group in enumerate(self.optimizer.param_groups):
            group["lr"] = group["peak"] * self.warm_up(i) * left
        self.optimizer.step()
        self.step += 1
        self._follow()
        return norm

    def _count_bad(self) -> None:
        self.n_bad, self.n_bad_in_a_row = self.n_bad + 1, self.n_bad_in_a_row + 1
        if self.n_bad_in_a_row >= MOST_BAD_STEPS:
            raise ConfigError(
                f"the gradients of {MOST_BAD_STEPS} steps in a row are not finite, up to step"
                f" {self.step}",
                hint="go on from last.pt with --resume and lower rates, or bf16 = false",
            )

    @torch.no_grad()
    def _follow(self) -> None:
        """Exponential moving average; short at first so that it does not remember the start."""
        decay = min(self.ema, (1 + self.step) / (10 + self.step))
        now = self.weights()
        average = [self.average[key] for key in now]
        torch._foreach_lerp_(average, list(now.values()), 1 - decay)  # all in a launch or two

    def stored(self) -> dict[str, Tensor]:
        """What goes into `result`."""
        return {k: v.cpu().contiguous() for k, v in self.average.items()}

    def save(self, work: Path) -> None:
        """last.pt and the averaged weights, each replaced at once or not at all.

        Raises ConfigError where they cannot be written.
        """
        work.mkdir(parents=True, exist_ok=True)
        state = {
            "step": self.step,
            "weights": self.weights(),
            "average": self.average,
            "optimizer": self.optimizer.state_dict(),
        }
        whole, result = work / "last.tmp", work / f"{self.result}.tmp"
        try:
            torch.save(state, whole)
            save_file(self.stored(), result)
            whole.replace(work / "last.pt")
            result.replace(work / self.result)
        except (OSError, RuntimeError, SafetensorError) as err:  # what both say of a full disk
            whole.unlink(missing_ok=True)
            result.unlink(missing_ok=True)
            raise ConfigError(
                f"cannot save in {work}: {' '.join(str(err).split())[:200]}",
                hint="make room, then go on from what was saved before with --resume",
            ) from err

    def resume(self, work: Path) -> None:
        state = torch.load(work / "last.pt", weights_only=True, map_location=self.place.device)
        self.step, self.average = state["step"], state["average"]
        self.load(state["weights"])
        peaks = [group["peak"] for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(state["optimizer"])
        for group, peak in zip(self.optimizer.param_groups, peaks, strict=True):
            group["peak"] = peak

    def run(
        self, work: Path, *, resume: bool, save_every_s: float = 180.0, tensorboard: bool = False
    ) -> None:
        """All steps that are left; Ctrl-C and SIGTERM end it after a step, saved.

        Raises ConfigError where `work` holds a run that it is not told to go on with.
        """
        if (work / "last.pt").exists():
            if not resume:
                raise ConfigError(
                    f"{work} holds a run already", hint="--resume goes on with it, or name another"
                )
            self.resume(work)
        self.seed()
        is_main = self.place.index == 0
        with _stopped_by_signals(self), _log(work, is_main, tensorboard) as write:
            saved = time.monotonic()
            bar = tqdm(
                range(self.step, self.n_steps),
                desc=self.name,
                unit="step",
                mininterval=5,
                initial=self.step,
                total=self.n_steps,
                disable=not is_main,
            )
            for _ in bar:
                began = time.monotonic()
                row = self.train_step()
                row |= {"step": self.step, "seconds": time.monotonic() - began}
                write(row)
                bar.set_postfix({key: f"{row[key]:.2f}" for key in self.shown})
                if is_main and time.monotonic() - saved > save_every_s:
                    self.save(work)
                    saved = time.monotonic()
                if self.is_stopped:
                    break
            if is_main:
                self.save(work)
        self.place.wait()


@contextmanager
def _log(
    work: Path, is_main: bool, tensorboard: bool
) -> Iterator[Callable[[dict[str, float]], None]]:
    """Writes a step's values to log.jsonl and, if asked for, for TensorBoard; others write none."""
    if not is_main:
        yield lambda row: None
        return
    work.mkdir(parents=True, exist_ok=True)
    board = _board(work) if tensorboard else None
    with (work / "log.jsonl").open("a") as log:

        def write(row: dict[str, float]) -> None:
            log.write(json.dumps(row) + "\n")
            log.flush()
            if board:
                for key in sorted(row.keys() - {"step"}):
                    board.add_scalar(key, row[key], row["step"])

        try:
            yield write
        finally:
            if board:
                board.close()


def _board(work: Path) -> Any:  # noqa: ANN401 - tensorboard is optional
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as err:
        raise ConfigError(
            "--tensorboard needs tensorboard", hint="pip install tensorboard, or read log.jsonl"
        ) from err
    return SummaryWriter(str(work / "tensorboard"))


def main(name: str, about: str | None, make: Callable[[Path, str], Run]) -> None:
    """The command line of `python -m training.NAME`; `make` reads the config for a device."""
    parser = argparse.ArgumentParser(prog=f"python -m training.{name}", description=about)
    parser.add_argument("config", type=Path)
    parser.add_argument("--work", type=Path, required=True, help="checkpoints and log.jsonl")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--tensorboard", action="store_true", help="curves beside log.jsonl")
    args = parser.parse_args()
    with reported():
        run = make(args.config, args.device)
        run.run(args.work, resume=args.resume, tensorboard=args.tensorboard)
