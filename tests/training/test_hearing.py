"""hearing.py and distill.py: what an ear hears alone and in a batch; a student without text."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from sparqle_stream.config import CtcConfig, EncoderConfig
from sparqle_stream.ctc import CtcHead
from sparqle_stream.encoder import Encoder
from sparqle_stream.errors import ConfigError, ModelError
from training import distill
from training.corpus import PackWriter
from training.data import AugmentConfig
from training.distill import DistillConfig, soft_ctc_loss
from training.hearing import hear, load_ear, posteriors, whole
from training.settings import read_config
from training.sources import Source

TINY = EncoderConfig(width=64, n_heads=1, n_layers=1)
CONFIGS = Path(distill.__file__).parent / "configs"


@pytest.fixture
def ear(tmp_path):
    torch.manual_seed(0)
    encoder, head = Encoder(TINY), CtcHead(CtcConfig(64, 16, 5))
    weights = {f"encoder.{k}": v for k, v in encoder.state_dict().items()}
    weights |= {f"ctc.{k}": v for k, v in head.state_dict().items()}
    save_file(weights, tmp_path / "ear.safetensors")
    return tmp_path / "ear.safetensors"


@pytest.fixture
def pack(tmp_path):
    rng = np.random.default_rng(0)
    with PackWriter(tmp_path / "pack") as writer:
        for i in range(4):
            pcm = rng.integers(-3000, 3000, 9_600, dtype=np.int16)
            writer.add(pcm, id=str(i), text="", speaker="s", corpus="c", licence="l")
    return tmp_path / "pack"


def test_recordings_are_heard_as_if_alone(ear):
    """More than one batch, in the order of their lengths; padding reaches nobody's frames."""
    rng = np.random.default_rng(0)
    lengths = [3_200 + 640 * i for i in rng.permutation(14)]
    recordings = [rng.normal(0, 0.1, n).astype(np.float32) for n in lengths]
    encoder, head = load_ear(ear, 5)
    together = dict(posteriors(encoder, head, recordings, 16))
    assert sorted(together) == list(range(14))
    for i in (0, 5, 13):
        ((_, alone),) = posteriors(encoder, head, [recordings[i]], 16)
        assert alone.shape == (lengths[i] // 640, 5)
        torch.testing.assert_close(together[i], alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("ahead", [0, 2, 12])
def test_look_ahead_moves_no_frame(ear, ahead):
    """What is heard of a click two seconds on is heard there, however late the frames come."""
    pcm = np.random.default_rng(1).normal(0, 1e-4, 64_000).astype(np.float32)
    pcm[32_000:32_640] += 0.5
    encoder, head = load_ear(ear, 5)
    encoder.positions.zero_()  # a random ear knows little else
    ((_, heard),) = posteriors(encoder, head, [pcm], 200, ahead)
    assert len(heard) == 100
    strange = (heard - heard[20]).abs().sum(dim=1)[10:]  # after the start
    assert abs(strange.argmax().item() + 10 - 50) <= 2


@pytest.mark.parametrize("ahead", [0, 4])
def test_a_student_that_hears_everything_is_its_teacher(ear, ahead):
    """The same silence before it, the same positions: nothing is left to learn but the masks."""
    encoder, _ = load_ear(ear, 5)
    mel = torch.randn(2, 24, 80)
    student = encoder.forward_train(mel, 0, 0, torch.zeros(2, dtype=torch.long), ahead)
    teacher = whole(encoder, mel, ahead)
    torch.testing.assert_close(student[:, ahead:], teacher[:, : 12 - ahead], rtol=1e-5, atol=1e-5)


def test_positions_begin_anywhere_in_a_share_of_the_streams():
    pcm, rng = torch.zeros(200, 640), random.Random(0)
    for share, low, high in ((0.0, 0, 0), (0.5, 60, 140), (1.0, 190, 200)):
        _, offset = hear(pcm, rng, AugmentConfig(offset=share), torch.device("cpu"))
        assert low <= (offset > 0).sum() <= high


def test_a_head_is_known_by_its_weights(ear, tmp_path):
    """Its width, its blocks and how far they look back."""
    head = CtcHead(CtcConfig(width=64, hidden=24, n_pieces=9, n_blocks=3, kernel=5))
    encoder = {k: v for k, v in load_file(ear).items() if k.startswith("encoder.")}
    other = tmp_path / "other.safetensors"
    save_file(encoder | {f"ctc.{k}": v for k, v in head.state_dict().items()}, other)
    assert load_ear(other, 9)[1].cfg == head.cfg
    assert load_ear(ear, 5)[1].cfg == CtcConfig(64, 16, 5)


def test_a_file_without_an_ear_is_told(tmp_path):
    save_file({"ctc.out.bias": torch.zeros(5)}, tmp_path / "x.safetensors")
    with pytest.raises(ModelError, match="holds no encoder"):
        load_ear(tmp_path / "x.safetensors", 5)


def test_soft_targets_by_hand():
    """KL of (1/2, 1/2) from (1/4, 3/4), a frame; nothing for equal ones."""
    teacher = torch.tensor([0.25, 0.75]).log().expand(1, 3, 2)
    student = torch.tensor([0.5, 0.5]).log().expand(1, 3, 2)
    expected = 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)
    assert soft_ctc_loss(student, teacher).item() == pytest.approx(expected, rel=1e-5)
    assert soft_ctc_loss(teacher, teacher).item() == pytest.approx(0.0, abs=1e-6)


def test_a_student_comes_nearer_to_its_teacher(ear, pack, tmp_path):
    """Without a transcript; what comes out is `init` of training.adapt; the head stays as it is."""
    cfg = DistillConfig(
        sources=(Source(str(pack), transcribed=False),),
        ear=str(ear),
        n_pieces=5,
        steps=30,
        streams=2,
        stream_s=1.28,
        lr=3e-3,
        warmup=1,
        bf16=False,
        ema=0.5,
        chunks=(4,),
        lefts=(16,),
        augment=AugmentConfig(speed=0, room=0, telephone=0, noise=0, gain_low_db=0, gain_high_db=0),
    )
    run = distill.start(cfg)
    head = {k: v.clone() for k, v in run.head.state_dict().items()}
    run.seed()
    rows = [run.train_step() for _ in range(cfg.steps)]
    first, last = (np.mean([r["frames"] for r in part]) for part in (rows[:5], rows[-5:]))
    assert last < 0.8 * first
    assert all(r["posterior"] > 0 for r in rows)
    assert all(torch.equal(head[k], v) for k, v in run.head.state_dict().items())
    run.save(tmp_path)
    again = distill.start(replace(cfg, ear="", init=str(tmp_path / "encoder.safetensors")))
    assert again.head is None
    assert torch.equal(again.weights()["ln_post.weight"], run.average["ln_post.weight"])
    assert torch.equal(again.teacher.ln_post.weight, again.student.ln_post.weight)
    both = distill.start(replace(cfg, init=str(tmp_path / "encoder.safetensors")))
    assert torch.equal(both.weights()["ln_post.weight"], run.average["ln_post.weight"])
    assert torch.equal(both.teacher.ln_post.weight, load_ear(ear, 5)[0].ln_post.weight)
    assert both.head is not None
    with pytest.raises(ConfigError, match="nobody to distil") as err:
        distill.start(replace(cfg, ear=""))
    assert "init" in err.value.hint


def test_shipped_configs_can_be_read():
    cfg = read_config(DistillConfig, CONFIGS / "distill.toml")
    assert not any(source.transcribed for source in cfg.sources)
