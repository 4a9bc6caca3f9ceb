"""captions.py: adapters are taught text, and pay for what they unlearn."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sparqle_stream.errors import ConfigError, ModelError
from tests.training.text_runs import log_of, small_config, whole_and_in_parts
from training import joint
from training.bridge import load_config as load_joint
from training.captions import CaptionsConfig, change, hear_captions
from training.export import add_text
from training.prefix import Trainer, load_config

JOINT = """
ear = "{ear}"
pieces = "{pieces}"
llm = "tiny"
streams = 2
stream_s = 2.56
rank = 2
p_text = 0.0
[[sources]]
pack = "{pack}"
weight = 1.0
"""


@pytest.fixture
def joint_config(files, tiny_llm, tmp_path, monkeypatch):
    monkeypatch.setattr(joint, "BAD_ALIGNMENT", -math.inf)  # of an ear that hears nothing
    path = tmp_path / "joint.toml"
    path.write_text(JOINT.format(**vars(files)))
    return path


@pytest.fixture
def cfg(joint_config, tmp_path):
    (tmp_path / "books.txt").write_text("so it is told\ntold so\n")
    captions = CaptionsConfig(joint=str(joint_config), rows=5, together=2, every=2, lr=1e-2)
    books = tmp_path / "books.txt"
    return small_config(books, books, dev_every=2, n_places=4, warmup=1, captions=captions)


def test_captions_are_the_rows_of_a_joint_run(joint_config):
    teacher = joint.Trainer(load_joint(joint_config))
    captions, again = hear_captions(teacher, 5), hear_captions(teacher, 5)
    assert len(captions) == 5
    for caption, other in zip(captions, again, strict=True):
        assert torch.equal(caption.embeds, other.embeds)
        assert 0 < len(caption.at) == len(caption.hidden) <= len(caption.embeds)
        whole = teacher.bridge.llm.forward_train(caption.embeds[None])[0]
        torch.testing.assert_close(caption.hidden, whole[caption.at])


def test_an_ear_that_hears_nothing_is_told(joint_config, monkeypatch):
    monkeypatch.setattr(joint, "BAD_ALIGNMENT", 0.0)
    monkeypatch.setattr("training.captions.MOST_EMPTY", 2)
    monkeypatch.setattr("training.captions.NOTHING_SAID", 0.0)
    teacher = joint.Trainer(load_joint(joint_config))
    with pytest.raises(ConfigError, match="no words were found"):
        hear_captions(teacher, 50)


def test_only_what_changes_is_paid_for(joint_config):
    teacher = joint.Trainer(load_joint(joint_config))
    llm, captions = teacher.bridge.llm, hear_captions(teacher, 4)
    assert change(llm, captions).item() < 1e-10
    for adapter in teacher.bridge.adapters.values():
        adapter.b.data.normal_(std=0.1)
    changed = change(llm, captions)
    alone = [change(llm, [caption]).item() * len(caption.at) for caption in captions]
    assert changed.item() == pytest.approx(
        sum(alone) / sum(len(caption.at) for caption in captions), rel=1e-4
    )
    torch.autograd.backward(changed)
    assert all(adapter.b.grad.any() for adapter in teacher.bridge.adapters.values())


def test_adapters_learn_and_captions_hold_them(cfg, tmp_path):
    changes = {}
    for weight in (0.0, 1000.0):
        held = replace(cfg, steps=30, captions=replace(cfg.captions, weight=weight))
        trainer = Trainer(held)
        first = {k: v.clone() for k, v in trainer.weights().items()}
        trainer.run(tmp_path / str(weight), resume=False)
        rows = log_of(tmp_path / str(weight))
        asked = [row["step"] for row in rows if "changed" in row]
        assert asked == list(range(1, 31, 2))
        assert rows[-1]["loss"] < rows[0]["loss"]
        assert sum(name.startswith("lora.") for name in first) == 2 * 14
        for name, weight_now in trainer.weights().items():
            assert not torch.equal(weight_now, first[name]), name
        changes[weight] = change(trainer.llm, trainer.captions).item()
    assert changes[1000.0] < 0.5 * changes[0.0]


def test_a_run_that_was_interrupted_ends_with_the_same_weights(cfg, tmp_path):
    whole, again = whole_and_in_parts(cfg, tmp_path, step=2)
    for name, value in whole.weights().items():
        assert torch.equal(value, again.weights()[name]), name
    perplexities = [
        [row["perplexity_books"] for row in log_of(tmp_path / x) if "perplexity_books" in row]
        for x in ("whole", "parts")
    ]
    assert perplexities[0] == perplexities[1]


def test_a_prefix_goes_on_where_another_ended(cfg, tmp_path):
    Trainer(cfg).run(tmp_path / "first", resume=False)
    path = tmp_path / "first" / "prefix.safetensors"
    stored = load_file(path)
    (tmp_path / "books.txt").write_text("so it is told\ntold zo\n")
    going = Trainer(replace(cfg, n_places=64, init=str(path)))
    assert torch.equal(going.prefix.k, stored["text.k"].float())
    assert len(going.ids) == len(stored["text.ids"])  # all letters are in both
    torch.testing.assert_close(going.prefix.bias.detach(), stored["text.bias"])
    save_file({"lora.a": torch.ones(2)}, path)
    with pytest.raises(ConfigError, match="is no prefix"):
        Trainer(replace(cfg, init=str(path)))


def test_adapters_get_into_the_bridge_with_their_prefix(cfg, tmp_path):
    trainer = Trainer(cfg)
    trainer.run(tmp_path / "run", resume=False)
    text = load_file(tmp_path / "run" / "prefix.safetensors")
    adapters = {name for name in text if name.startswith("lora.")}
    assert adapters == {name for name in trainer.weights() if name.startswith("lora.")}
    assert all(text[name].dtype == torch.bfloat16 for name in adapters)
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    old = {name: torch.zeros_like(value) for name, value in text.items() if name in adapters}
    save_file(old | {"stop.weight": torch.ones(1, 4)}, folder / "bridge.safetensors")
    add_text(folder, tmp_path / "run" / "prefix.safetensors")
    after = load_file(folder / "bridge.safetensors")
    assert after.keys() == text.keys() | {"stop.weight"}
    for name in text:
        assert torch.equal(after[name], text[name]), name
    old.pop(min(old))
    save_file(old, folder / "bridge.safetensors")
    with pytest.raises(ModelError, match=r"has no lora\.layers"):
        add_text(folder, tmp_path / "run" / "prefix.safetensors")


@pytest.mark.parametrize("changes", [{"together": 0}, {"rows": 2}, {"every": 0}])
def test_impossible_settings_are_told(changes):
    with pytest.raises(ConfigError, match="together"):
        CaptionsConfig(**changes)


def test_adapters_have_one_source(cfg):
    with pytest.raises(ConfigError, match="both bridge and captions"):
        replace(cfg, bridge="bridge.safetensors")


def test_a_joint_config_without_adapters_is_told(cfg, joint_config):
    joint_config.write_text('update = "frozen"\n' + joint_config.read_text())
    with pytest.raises(ConfigError, match="no adapters that could learn"):
        Trainer(cfg)


def test_the_shipped_config_can_be_read():
    cfg = load_config(Path(joint.__file__).parent / "configs" / "prefix-second.toml")
    assert cfg.captions.joint
    assert sum(text.weight for text in cfg.texts) == pytest.approx(1.0)
