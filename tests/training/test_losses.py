"""losses.py and stage1.py: by hand where that is possible; a first stage that learns."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sparqle_stream.errors import ConfigError
from training import losses, stage1
from training.data import AugmentConfig
from training.settings import read_config
from training.sources import Source
from training.stage1 import Stage1Config, TextTower, Trainer

CONFIGS = Path(stage1.__file__).parent / "configs"


def test_similarity_is_that_of_the_best_query():
    speech = torch.tensor([[[3.0, 0.0], [0.0, 2.0]], [[-1.0, 0.0], [-1.0, 0.0]]])
    text = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    half = math.sqrt(0.5)
    expected = torch.tensor([[1.0, half], [-1.0, -half]])
    torch.testing.assert_close(losses.similarity(speech, text), expected)


def test_contrastive_by_hand():
    """Two pairs, cosines 1 and 0, temperature 1/2, no smoothing: -log of e^2 / (e^2 + 1)."""
    scores, own = torch.eye(2), torch.eye(2, dtype=torch.bool)
    loss = losses.contrastive(scores, torch.tensor(0.5), own, smoothing=0.0)
    assert loss.item() == pytest.approx(-math.log(math.e**2 / (math.e**2 + 1)), rel=1e-5)
    smooth = losses.contrastive(scores, torch.tensor(0.5), own, smoothing=0.2)
    wrong = -math.log(1 / (math.e**2 + 1))
    assert smooth.item() == pytest.approx(0.9 * loss.item() + 0.1 * wrong, rel=1e-5)


def test_consistency_by_hand():
    """Halves, a quarter and three: both divergences, and each learns from the other alone."""
    half, sure = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
    there = 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)
    back = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    loss = losses.consistency(half.requires_grad_(), sure)
    assert loss.item() == pytest.approx(0.5 * (there + back), rel=1e-5)
    assert losses.consistency(sure, half) == loss
    (grad,) = torch.autograd.grad(loss, half)
    torch.testing.assert_close(grad, -0.5 * sure.exp())  # of 0.5 * KL(sure || half), no more
    assert losses.consistency(sure, sure).item() == 0.0


def test_rows_of_one_name_are_no_negatives():
    """All three alike: whatever is similar to what, nothing is wrong but the smoothing's rest."""
    own = losses.same(["a", "a", "b"])
    scores = torch.tensor([[9.0, 9.0, -9.0], [9.0, 9.0, -9.0], [-9.0, -9.0, 9.0]])
    loss = losses.contrastive(scores, torch.tensor(1.0), own, smoothing=0.0)
    expected = (2 * math.log(2) + 0.0) / 3  # two right answers of equal weight cannot do better
    assert loss.item() == pytest.approx(expected, abs=1e-4)


def test_hard_negatives_are_others_and_the_likely_ones():
    gen = torch.Generator().manual_seed(0)
    scores = torch.tensor([[9.0, 0.0, 4.0], [5.0, 9.0, 0.0], [0.0, 0.0, 9.0]])
    own = torch.eye(3, dtype=torch.bool)
    drawn = torch.stack([losses.hard_negatives(scores, own, gen) for _ in range(400)])
    assert not (drawn == torch.arange(3)).any()
    share = (drawn[:, 0] == 2).float().mean().item()
    assert share == pytest.approx(math.e**4 / (math.e**4 + 1), abs=0.04)
    alone = losses.hard_negatives(scores[:1], own[:1] | True, gen)
    assert alone.shape == (1,)


def test_matching_by_hand():
    """Positions are averaged before the softmax."""
    logits = torch.tensor([[[0.0, 2.0], [0.0, 0.0]], [[1.0, 0.0], [1.0, 0.0]]])
    loss = losses.matching(logits, torch.tensor([True, False]))
    expected = 0.5 * (math.log(1 + math.exp(-1)) + math.log(1 + math.exp(-1)))
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_generation_by_hand():
    logits = torch.tensor([[[0.0, math.log(3.0), -99.0], [5.0, 5.0, 5.0]]])
    loss = losses.generation(logits, torch.tensor([[1, 2]]), pad=2)
    assert loss.item() == pytest.approx(-math.log(0.75), rel=1e-5)


def test_the_tower_reads_both_ways_or_forwards_only():
    torch.manual_seed(0)
    tower = TextTower(5, 16, 2).eval()
    ids = tower.pack([[1, 2, 3, 4], [1, 2]], tower.dec)
    assert ids.tolist() == [[6, 1, 2, 3, 4], [6, 1, 2, 7, 7]]
    changed = ids.clone()
    changed[0, 3] = 0
    queries = torch.randn(2, 3, 16)
    for is_causal in (True, False):
        a, b = (tower(x, queries, is_causal=is_causal) for x in (ids, changed))
        same = torch.allclose(a[0, :3], b[0, :3], atol=1e-6)
        assert same == is_causal
        torch.testing.assert_close(a[1], b[1])
    other = tower(ids, queries + 1.0, is_causal=True)
    assert not torch.allclose(other, tower(ids, queries, is_causal=True))
    with_nothing = tower(ids[:, :1], None, is_causal=False)
    torch.testing.assert_close(with_nothing[0], with_nothing[1])


def config(files, **changes):
    quiet = AugmentConfig(speed=0, noise=0, telephone=0, room=0, gain_low_db=0, gain_high_db=0)
    settings = {"n_layers": 1, "text_layers": 1, "joint_width": 16, "steps": 4, "streams": 3}
    settings |= {"stream_s": 1.28, "lr": 2e-3, "warmup": 1, "chunks": (8,), "augment": quiet}
    return Stage1Config(files.ear, files.pieces, (Source(files.pack),), **settings | changes)


def test_a_first_stage_learns_and_gives_its_questions_to_the_bridge(files, tmp_path):
    run = Trainer(config(files))
    before = {k: v.clone() for k, v in run.model.state_dict().items()}
    run.run(tmp_path / "work", resume=False)
    after = run.model.state_dict()
    still = [k for k in before if torch.equal(before[k], after[k])]
    assert all(k.startswith(("encoder.", "qformer.")) for k in still)
    assert not [k for k in still if k.startswith(("qformer.layers.0.fc", "qformer.queries"))]
    made = load_file(tmp_path / "work" / "stage1.safetensors")
    assert "qformer.queries" in made
    assert "qformer.out.weight" not in made
    again = Trainer(config(files, steps=5))
    again.run(tmp_path / "work", resume=True)
    assert again.step == 5


def test_each_loss_can_be_left_out(files):
    for name in ("contrastive", "matching", "generation"):
        others = dict.fromkeys({"contrastive", "matching", "generation"} - {name}, 0.0)
        run = Trainer(config(files, **others))
        run.seed()
        loss, row = run.batch_loss()
        assert list(row) == [name]
        assert loss.item() == pytest.approx(row[name], rel=1e-5)
    with pytest.raises(ConfigError, match="all losses have weight 0"):
        config(files, contrastive=0.0, matching=0.0, generation=0.0)


def test_the_answers_are_those_of_streaming(files):
    """What comes after a chunk changes nothing in it."""
    model = Trainer(config(files)).model
    frames = torch.randn(1, 32, 64)
    later = frames.clone()
    later[:, 16:] += 1.0
    a, b = (model.ask(x, 8) for x in (frames, later))
    torch.testing.assert_close(a[:, :4], b[:, :4])
    assert not torch.allclose(a[:, 4:], b[:, 4:])


def test_shipped_configs_can_be_read():
    assert read_config(Stage1Config, CONFIGS / "stage1.toml").sources


def test_streams_in_which_nothing_is_said_teach_nothing(files, monkeypatch):
    """Not even what a mean over no text is, NaN; the values of the log are the same ones."""
    run = Trainer(config(files, generation=0.0))
    run.seed()
    batch = next(run.batches)
    batch.said = [[] for _ in batch.said]
    monkeypatch.setattr(run, "batches", iter([batch]))
    loss, row = run.batch_loss()
    assert not loss.requires_grad
    assert row == {"contrastive": 0.0, "matching": 0.0}
