"""adapt.py: losses by hand, the head before the body, resuming where it stopped."""

from __future__ import annotations

import itertools
import json
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from sparqle_stream.config import CtcConfig, EncoderConfig
from sparqle_stream.ctc import CtcHead
from sparqle_stream.encoder import Encoder
from sparqle_stream.errors import ConfigError
from sparqle_stream.weights import in_eight_bits
from training import adapt
from training.adapt import AdaptConfig, Trainer, ctc_loss
from training.corpus import PackWriter
from training.data import AugmentConfig
from training.hearing import distil_loss
from training.sources import Source, make_sampler
from training.text import train_pieces

CONFIGS = Path(adapt.__file__).parent / "configs"
TEXTS = ["the cat sat", "on the mat", "and there it was", "so it is told"]
TINY = EncoderConfig(width=16, n_heads=2, n_layers=1, left_frames=32)


@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
    return train_pieces(TEXTS, 40, tmp_path_factory.mktemp("pieces") / "pieces.json")


@pytest.fixture(scope="module")
def pack(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("pack"), np.random.default_rng(0)
    with PackWriter(folder) as writer:
        for i, text in enumerate([*TEXTS, "in 1984"]):
            pcm = rng.integers(-3000, 3000, 9_600, dtype=np.int16)
            writer.add(pcm, id=str(i), text=text, speaker="s", corpus="c", licence="l")
    return folder


def config(pack, **changes):
    cfg = AdaptConfig(
        pieces="",
        sources=(Source(str(pack)),),
        steps=8,
        head_steps=2,
        streams=2,
        stream_s=1.28,
        warmup=1,
        lr_encoder=1e-3,
        augment=AugmentConfig(speed=0.0, room=0.0, telephone=0.0),
    )
    return replace(cfg, **changes)


def make_trainer(cfg, pieces):
    torch.manual_seed(0)
    encoder, teacher, head = Encoder(TINY), Encoder(TINY), CtcHead(CtcConfig(16, 8, pieces.size))
    teacher.load_state_dict(encoder.state_dict())
    trainer = Trainer(cfg, encoder, teacher, head, pieces)
    trainer.seed()
    return trainer


def moved(before, after, part):
    names = [name for name in before if name.startswith(part)]
    assert names
    return any(not torch.equal(before[name], after[name]) for name in names)


def copy_of(weights):
    return {name: value.clone() for name, value in weights.items()}


def test_workers_draw_the_same_again(pack, pieces):
    """Two processes take turns: a run with them can be repeated, and hears what one would not."""
    drawn = [
        make_trainer(config(pack, workers=n, noise="", seed=4), pieces).batches for n in (2, 2, 0)
    ]
    first, again, alone = ([next(batches).noisy for _ in range(3)] for batches in drawn)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert torch.equal(first[0], alone[0])
    assert not torch.equal(first[1], alone[1])


def test_dropout_is_for_training_only(pieces):
    """What a sub-layer adds is dropped in part, scaled so that its mean stays."""
    encoder, mel = Encoder(TINY), torch.randn(1, 64, 80, generator=torch.Generator().manual_seed(0))
    offset = torch.zeros(1, dtype=torch.long)
    whole = encoder.eval().forward_train(mel, 8, 32, offset)
    head = CtcHead(CtcConfig(width=16, hidden=8, n_pieces=5, n_blocks=1))
    adapt.add_dropout(encoder, head, 0.5)
    assert torch.equal(encoder.forward_train(mel, 8, 32, offset), whole)
    encoder.train()
    torch.manual_seed(0)
    assert not torch.equal(encoder.forward_train(mel, 8, 32, offset), whole)
    x = encoder.blocks[0].fc2(torch.ones(1000, 64))
    kept = x != 0
    assert 0.4 < kept.float().mean() < 0.6
    torch.testing.assert_close(
        x[kept], 2 * encoder.blocks[0].eval().fc2(torch.ones(1000, 64))[kept]
    )
    frames = torch.randn(1, 64, 16)
    assert not torch.equal(head(frames), head(frames))
    assert torch.equal(head.eval()(frames), head(frames))


def test_ctc_loss_sums_over_all_paths(pieces):
    """Against every path written out; per piece of the batch; an empty row is all blank."""
    n_frames, text = 4, "z"  # a letter that no text has: the mark of a word, then the letter
    a, b = pieces.encode(text)
    log_probs = torch.randn(3, n_frames, pieces.size, generator=torch.Generator().manual_seed(0))
    log_probs = log_probs.log_softmax(dim=-1)
    total = 0.0
    for path in itertools.product([0, a, b], repeat=n_frames):
        if [p for p, _ in itertools.groupby(path) if p] == [a, b]:
            total += log_probs[0, range(n_frames), path].sum().exp().item()
    blank = log_probs[1:, :, 0].sum().item()
    loss = ctc_loss(log_probs, [text, "", ""], pieces)
    assert loss.item() == pytest.approx((-np.log(total) - blank) / 2, rel=1e-5)


def test_ctc_loss_of_no_row_is_nothing(pieces):
    log_probs = torch.zeros(0, 5, pieces.size, requires_grad=True)
    loss = ctc_loss(log_probs, [], pieces)
    loss.backward()
    assert loss.item() == 0.0


def test_distil_loss_is_relative():
    """Nothing when equal; the same for frames of any scale; rises with the error."""
    gen = torch.Generator().manual_seed(0)
    teacher, error = torch.randn(2, 2, 50, 16, generator=gen)
    assert distil_loss(teacher, teacher).item() == pytest.approx(0.0, abs=1e-6)
    small, large = (
        distil_loss(teacher + 0.1 * error, teacher),
        distil_loss(teacher + error, teacher),
    )
    assert 0.005 < small < 0.1 < 0.8 < large
    scaled = distil_loss(7 * (teacher + error), 7 * teacher)
    assert scaled.item() == pytest.approx(large.item(), rel=1e-4)


def test_the_head_learns_before_the_body(pack, pieces):
    cfg = config(pack)
    trainer = make_trainer(cfg, pieces)
    for step in range(4):
        before = copy_of(trainer.weights())
        row = trainer.train_step()
        after = trainer.weights()
        assert np.isfinite(list(row.values())).all()
        assert moved(before, after, "ctc.")
        assert moved(before, after, "encoder.") == (step >= 3)  # its warm-up begins at zero
        assert (row["distil"] > 0) == (step >= cfg.head_steps)
    torch.manual_seed(0)
    teacher = Encoder(TINY)
    for ours, first in zip(trainer.teacher.parameters(), teacher.parameters(), strict=True):
        assert torch.equal(ours, first)


def test_two_views_of_a_batch_are_masked_apart(pack, pieces):
    """Without masks both hear the same and are not apart; with masks they are, and learn of it."""
    cfg = config(pack, consistency=1.0, head_steps=0)
    seen = []
    for spec in (0.0, 1.0):
        augment = replace(cfg.augment, spec=spec, offset=0.0)
        trainer = make_trainer(replace(cfg, augment=augment), pieces)
        hear = trainer.head.forward
        trainer.head.forward = lambda frames, hear=hear: (
            seen.append(frames.shape[0]) or hear(frames)
        )
        row = trainer.train_step()
        assert (row["apart"] > 1e-6) == (spec > 0)
        assert row["audio_s"] == cfg.streams * cfg.stream_s
    assert seen == [4, 4]
    nobody = config(pack, sources=(Source(str(pack), transcribed=False),), consistency=1.0)
    trainer = make_trainer(replace(nobody, head_steps=0, warmup=1, distil=0.0), pieces)
    before = copy_of(trainer.weights())
    for _ in range(2):
        row = trainer.train_step()
    assert row["ctc"] == 0.0
    assert moved(before, trainer.weights(), "encoder.")  # taught by itself where nobody wrote


def test_what_nobody_transcribed_is_not_taught_as_silence(pack, pieces):
    cfg = config(pack, sources=(Source(str(pack), transcribed=False),), head_steps=0)
    trainer = make_trainer(cfg, pieces)
    row = trainer.train_step()
    assert row["ctc"] == 0.0
    assert row["distil"] > 0.0
    assert len(trainer.sampler.sources[0][1]) == 5


def test_rates_are_the_config_s_also_after_a_resume(pack, pieces, tmp_path):
    """A checkpoint's own rates once kept a whole run from seeing a changed config."""
    first = make_trainer(config(pack), pieces)
    first.run(tmp_path, resume=False)
    again = make_trainer(config(pack, steps=16, lr_head=7e-3, lr_encoder=7e-4), pieces)
    again.run(tmp_path, resume=True)
    assert again.step == 16
    assert [g["peak"] for g in again.optimizer.param_groups] == [7e-3, 7e-4]
    assert again.optimizer.param_groups[0]["lr"] == pytest.approx(7e-3 / 16)
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    steps = [json.loads(line)["step"] for line in lines]
    assert steps == list(range(1, 17))


def test_a_signal_ends_a_run_after_its_step_and_saves_it(pack, pieces, tmp_path):
    trainer = make_trainer(config(pack), pieces)
    train_step = trainer.train_step

    def interrupted():
        if trainer.step == 2:
            signal.raise_signal(signal.SIGTERM)
        return train_step()

    trainer.train_step = interrupted
    before = signal.getsignal(signal.SIGTERM)
    trainer.run(tmp_path, resume=False)
    assert trainer.step == 3
    assert torch.load(tmp_path / "last.pt", weights_only=True)["step"] == 3
    assert signal.getsignal(signal.SIGTERM) is before


def test_only_spelled_out_clips_are_drawn(pack):
    sampler = make_sampler((Source(str(pack)),), "", AugmentConfig(), 1.28, 0)
    assert [clip.text for clip in sampler.sources[0][1]] == TEXTS


def test_a_run_goes_on_where_it_was_saved(pack, pieces, tmp_path):
    """Weights, moving average, optimizer and step: the next step is the one that was due."""
    cfg = config(pack)

    def steps(trainer, n):
        for _ in range(n):
            trainer.seed()
            trainer.train_step()

    first = make_trainer(cfg, pieces)
    steps(first, 4)
    first.save(tmp_path)
    steps(first, 1)
    again = make_trainer(cfg, pieces)
    again.resume(tmp_path)
    assert again.step == 4
    steps(again, 1)
    for ours, theirs in ((first.weights(), again.weights()), (first.average, again.average)):
        for name in ours:
            torch.testing.assert_close(ours[name], theirs[name], atol=1e-7, rtol=0)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ear.safetensors", "last.pt"]


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("adapt*.toml")), ids=lambda p: p.name)
def test_shipped_configs_can_be_read(path):
    cfg = adapt.load_config(path)
    assert cfg.sources
    assert all(n >= 16 or n in (0, 4, 8) for n in cfg.chunks)


def test_a_misspelt_option_is_an_error(tmp_path):
    text = (CONFIGS / "adapt.toml").read_text().replace("lr_head", "lr_haed")
    (tmp_path / "a.toml").write_text(text)
    with pytest.raises(ConfigError, match="unknown option lr_haed") as err:
        adapt.load_config(tmp_path / "a.toml")
    assert err.value.hint == "did you mean lr_head?"


def test_frozen_blocks_do_not_move(pack, pieces):
    trainer = make_trainer(config(pack, head_steps=0, frozen_blocks=1), pieces)
    before = copy_of(trainer.weights())
    for _ in range(2):
        trainer.train_step()
    after = trainer.weights()
    still = [k for k in before if k.startswith(("encoder.conv", "encoder.blocks.0"))]
    assert still
    assert all(torch.equal(before[k], after[k]) for k in still)
    assert moved(before, after, "encoder.ln_post")
    assert moved(before, after, "ctc")


def test_a_run_can_begin_with_the_ear_of_a_model_folder(pack, pieces, tmp_path):
    """Stored in 8 bits, and without anybody's Whisper."""
    encoder = Encoder(EncoderConfig(width=64, n_heads=1, n_layers=1))
    head = CtcHead(CtcConfig(64, 8, pieces.size))
    stored = in_eight_bits({f"encoder.{k}": v for k, v in encoder.state_dict().items()})
    stored |= {f"ctc.{k}": v.bfloat16() for k, v in head.state_dict().items()}
    save_file(stored, tmp_path / "ear.safetensors")
    pieces.tokenizer.save(str(tmp_path / "pieces.json"))
    own = {"pieces": str(tmp_path / "pieces.json"), "ear": str(tmp_path / "ear.safetensors")}
    trainer = Trainer.start(config(pack, head_steps=0, bf16=False, **own))
    weights = copy_of(trainer.weights())
    for name, value in encoder.state_dict().items():
        assert torch.allclose(weights[f"encoder.{name}"], value, atol=0.01), name
        assert torch.equal(weights[f"encoder.{name}"], trainer.teacher.state_dict()[name]), name
    assert all(value.dtype == torch.float32 for value in weights.values())
    trainer.seed()
    for _ in range(2):  # the rate of the first is nothing yet
        trainer.train_step()
    assert moved(weights, trainer.weights(), "encoder")
    assert moved(weights, trainer.weights(), "ctc")


def test_a_head_with_blocks_learns_on_an_encoder_that_stays(pack, pieces, tmp_path):
    """All of its steps are the head's: the encoder is heard without dropout, and left alone."""
    encoder = Encoder(EncoderConfig(width=64, n_heads=1, n_layers=1))
    save_file(encoder.state_dict(), tmp_path / "encoder.safetensors")
    pieces.tokenizer.save(str(tmp_path / "pieces.json"))
    own = {"pieces": str(tmp_path / "pieces.json"), "init": str(tmp_path / "encoder.safetensors")}
    shape = {"head_hidden": 24, "head_blocks": 2, "head_kernel": 5}
    trainer = Trainer.start(
        config(pack, steps=3, head_steps=3, dropout=0.5, bf16=False, **shape, **own)
    )
    assert trainer.head.cfg == CtcConfig(64, 24, pieces.size, 2, 5)
    weights = copy_of(trainer.weights())
    trainer.seed()
    for _ in range(3):
        trainer.train_step()
    assert not trainer.encoder.training
    assert trainer.head.training
    assert not moved(weights, trainer.weights(), "encoder")
    for part in ("ctc.hidden", "ctc.blocks.0.conv", "ctc.blocks.1.fc2", "ctc.out_norm"):
        assert moved(weights, trainer.weights(), part)


def test_a_run_must_begin_with_something(pack, pieces, tmp_path):
    pieces.tokenizer.save(str(tmp_path / "pieces.json"))
    with pytest.raises(ConfigError, match="nothing to begin with") as err:
        Trainer.start(config(pack, pieces=str(tmp_path / "pieces.json")))
    assert "ear" in err.value.hint


def test_a_warm_up_of_no_steps(pack, pieces):
    trainer = make_trainer(config(pack, warmup=0), pieces)
    trainer.train_step()
    assert trainer.optimizer.param_groups[0]["lr"] == trainer.cfg.lr_head
