"""loop.py: shares of a batch are one batch, whoever computes them; what may go wrong is told."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import SafetensorError
from torch import nn

from sparqle_stream.errors import ConfigError
from training import loop
from training.loop import Run
from training.place import HERE, Place, find_place, is_bf16_fast
from training.sources import Feed

ROOT = Path(__file__).resolve().parents[2]
STEPS = 6


class Fit(Run):
    """A line through points that each share of a batch draws; a second bias is fitted by some."""

    name, result, shown = "fit", "fit.safetensors", ("loss",)

    def __init__(self, accumulate, place=HERE):
        super().__init__(STEPS, 0.9, accumulate, place)
        torch.manual_seed(0)
        self.line, self.rare = nn.Linear(3, 1), nn.Parameter(torch.zeros(1))
        groups = [{"params": list(self.line.parameters()), "peak": 0.1}]
        self.ready([*groups, {"params": [self.rare], "peak": 0.1}])

    def weights(self):
        return self.line.state_dict() | {"rare": self.rare.data}

    def load(self, weights):
        self.rare.data.copy_(weights["rare"])
        self.line.load_state_dict({k: v for k, v in weights.items() if k != "rare"})

    def make_feed(self, share):
        return Feed(random.Random(100 * self.step + share), None, iter(()))

    def warm_up(self, group):
        return 1.0

    def batch_loss(self):
        x = torch.tensor([[self.rng.gauss(0, 1) for _ in range(3)] for _ in range(4)])
        wrong = self.line(x)[:, 0] - x.sum(dim=1)
        if self.step == 2:  # nobody learns the second bias in this step, one share does in others
            loss = wrong.square().mean()
        else:
            is_odd = self.rng.random() < 0.5
            loss = (wrong + (self.rare if is_odd else 0.0)).square().mean()
        return loss, {"loss": loss.item(), "rows": 4}


def curve(work):
    lines = (work / "log.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_shares_make_one_batch(tmp_path):
    """Gradients of shares are averaged: the step is that of the mean of their losses."""
    run, by_hand = Fit(3), Fit(1)
    run.seed()
    losses = []
    for share in range(3):
        by_hand.rng = random.Random(share)
        losses.append(by_hand.batch_loss()[0])
    torch.stack(losses).mean().backward()
    row = run.train_step()
    assert row["loss"] == pytest.approx(sum(x.item() for x in losses) / 3)
    assert row["rows"] == 12
    clipped = [p.grad for p in by_hand.params]
    torch.nn.utils.clip_grad_norm_(by_hand.params, 1.0)
    for ours, theirs in zip(run.params, clipped, strict=True):
        torch.testing.assert_close(ours.grad, theirs)
    run.run(tmp_path, resume=False)
    assert [row["step"] for row in curve(tmp_path)] == list(range(2, STEPS + 1))


def test_a_run_is_not_written_over(tmp_path):
    Fit(1).run(tmp_path, resume=False)
    with pytest.raises(ConfigError, match="holds a run already"):
        Fit(1).run(tmp_path, resume=False)
    Fit(1).run(tmp_path, resume=True)


@pytest.mark.slow
def test_two_processes_learn_what_one_does(tmp_path):
    """`accelerate launch` with 2 processes: the loss curve and the weights of one process."""
    alone = Fit(2)
    alone.run(tmp_path / "one", resume=False)
    script = tmp_path / "fit.py"
    script.write_text(
        "import sys\nfrom pathlib import Path\n"
        "from tests.training.test_loop import Fit\nfrom training.place import find_place\n"
        "Fit(2, find_place('cpu', False)).run(Path(sys.argv[1]), resume=False)\n"
    )
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    command += ["--main_process_port", "0", str(script), str(tmp_path / "two")]
    env = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = curve(tmp_path / "one"), curve(tmp_path / "two")
    assert len(two) == STEPS  # one process writes the log
    for a, b in zip(one, two, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)
        assert b["norm"] == pytest.approx(a["norm"], rel=1e-5)
        assert (b["step"], b["rows"]) == (a["step"], a["rows"])
    weights = [torch.load(tmp_path / x / "last.pt", weights_only=True) for x in ("one", "two")]
    for name, value in weights[0]["weights"].items():
        torch.testing.assert_close(weights[1]["weights"][name], value, rtol=1e-5, atol=1e-6)


def test_processes_that_cannot_share_a_batch_are_told():
    with pytest.raises(ConfigError, match="2 processes cannot share 3 parts"):
        Fit(3, Place(torch.device("cpu"), n_processes=2))


def test_every_process_hears_that_one_was_stopped():
    """Gradients, values and the wish to stop of another process, which had no second bias."""
    other = Fit(2)
    other.rng = random.Random(1)

    class Two(Fit):
        def batch_loss(self):
            loss = self.line(torch.ones(1, 3)).sum()
            return loss, {"loss": loss.item()}

    run = Two(2, Place(torch.device("cpu"), index=0, n_processes=2))

    def add_other(flat):
        """What a process with gradients of 1, a loss of 5 and a signal would add."""
        n = sum(p.numel() for p in run.params)
        told = torch.tensor([1.0, 1.0, 0.0, 1.0, 5.0])
        return flat + torch.cat([told, torch.ones(n - 1), torch.zeros(1)])

    run.place = SimpleNamespace(index=0, n_processes=2, device=torch.device("cpu"), sum=add_other)
    run.seed()
    expected = run.batch_loss()[0].item()
    row = run.train_step()
    assert row["loss"] == pytest.approx((expected + 5.0) / 2)
    assert run.is_stopped
    assert run.rare.grad is None  # neither of both had one
    assert run.line.weight.grad is not None


def test_places():
    place = find_place("cpu", bf16=True)
    assert (place.device.type, place.bf16, place.n_processes) == ("cpu", True, 1)
    with place.autocast():
        assert torch.mm(torch.ones(2, 2), torch.ones(2, 2)).dtype == torch.bfloat16
    assert find_place("cpu").bf16 == is_bf16_fast(torch.device("cpu"))
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="no CUDA device"):
            find_place("cuda")


def test_tensorboard_is_asked_for_and_told_about(tmp_path, monkeypatch):
    run = Fit(1)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ConfigError, match="tensorboard"):
        run.run(tmp_path, resume=False, tensorboard=True)
    seen = []
    board = SimpleNamespace(
        add_scalar=lambda *x: seen.append(x), close=lambda: seen.append("closed")
    )
    fake = SimpleNamespace(SummaryWriter=lambda folder: seen.append(folder) or board)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", fake)
    run.run(tmp_path, resume=False, tensorboard=True)
    assert seen[0] == str(tmp_path / "tensorboard")
    assert ("loss", curve(tmp_path)[0]["loss"], 1) in seen
    assert seen[-1] == "closed"


def test_the_command_says_what_is_wrong_in_a_line(tmp_path, monkeypatch, capsys):
    argv = ["fit", str(tmp_path / "no.toml"), "--work", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", argv)
    from training.adapt import Trainer, load_config

    with pytest.raises(SystemExit) as exit_:
        loop.main("fit", None, lambda path, device: Trainer.start(load_config(path), device))
    assert exit_.value.code == 2
    assert capsys.readouterr().err.startswith("error: cannot read")


class Broken(Fit):
    """Its loss is infinite from one step to another."""

    first, last = 3, 3

    def batch_loss(self):
        loss, row = super().batch_loss()
        return loss * (float("inf") if self.first <= self.step < self.last else 1.0), row


def test_a_step_whose_gradients_are_not_finite_changes_nothing(tmp_path):
    run = Broken(1)
    run.last, kept = 4, []
    train_step = run.train_step

    def watched():
        kept.append([{k: v.clone() for k, v in x.items()} for x in (run.weights(), run.average)])
        return train_step()

    run.train_step = watched
    run.run(tmp_path, resume=False)
    for before, after in zip(kept[3], kept[4], strict=True):
        assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(p.isfinite().all() for p in [*run.params, *run.average.values()])
    assert [row["bad_steps"] for row in curve(tmp_path)] == [0, 0, 0, 1, 1, 1]
    assert run.step == STEPS


def test_many_such_steps_in_a_row_end_the_run(tmp_path):
    run = Broken(1)
    run.run(tmp_path, resume=False)
    saved = (tmp_path / "last.pt").read_bytes()
    again = Broken(1)
    again.n_steps, again.first, again.last = 99, STEPS, 99
    with pytest.raises(ConfigError, match="10 steps in a row are not finite, up to step 16"):
        again.run(tmp_path, resume=True)
    assert (tmp_path / "last.pt").read_bytes() == saved


@pytest.mark.parametrize("is_late", [False, True])
def test_a_full_disk_is_one_line_and_leaves_what_was_saved(tmp_path, monkeypatch, is_late):
    run = Fit(1)
    run.run(tmp_path, resume=False)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(*_):
        raise SafetensorError("No space left on device")

    if is_late:
        monkeypatch.setattr(loop, "save_file", full)
    elif Path("/dev/full").exists():
        (tmp_path / "last.tmp").symlink_to("/dev/full")
    else:
        pytest.skip("no /dev/full")
    with pytest.raises(ConfigError, match="cannot save in") as told:
        run.save(tmp_path)
    assert "\n" not in told.value.message
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_rates_rise_to_their_peak():
    assert [loop.warmed(n, 4) for n in (-1, 0, 1, 4, 9)] == [0.0, 0.0, 0.25, 1.0, 1.0]
    assert [loop.warmed(n, 0) for n in (-1, 0, 1)] == [0.0, 0.0, 1.0]  # it was divided by
