"""prefix.py: a prefix reads as the tokens it came from, learns alone, and gets into the bridge."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from sparqle_stream import testing
from sparqle_stream.artifacts import DEFAULT_LLM, sha256
from sparqle_stream.errors import ConfigError, ModelError
from sparqle_stream.weights import merge_lora
from tests.training.text_runs import log_of, small_config, whole_and_in_parts
from training import export, loop, prefix
from training.export import add_text, compact
from training.prefix import NOT_SPOKEN, Text, Trainer, places_of, read, start

CONFIGS = Path(prefix.__file__).parent / "configs"
LINES = ["So it is told.", "Told so -- it's so!", "Is it told so?", "In 1984 it was."]


@pytest.fixture(autouse=True)
def tiny_llm(monkeypatch):
    """What training.prefix loads, whatever the config names."""

    def load_llm(name, dtype=torch.float32):
        model = testing.tiny_model()
        return model.llm.to(dtype), model.tokenizer

    monkeypatch.setattr(prefix, "load_llm", load_llm)


@pytest.fixture
def cfg(tmp_path):
    (tmp_path / "books.txt").write_text("\n".join(LINES) + "\n")
    (tmp_path / "dev.txt").write_text("is it so\nso told it is\n")
    texts, dev = tmp_path / "books.txt", tmp_path / "dev.txt"
    return small_config(texts, dev, dev_every=3, n_places=5, warmup=2, seed=3)


# --- the model -----------------------------------------------------------------------------------


def test_a_prefix_reads_as_the_tokens_that_it_came_from():
    llm = testing.tiny_model().llm
    ids = torch.randint(2, 258, (3, 40), generator=torch.Generator().manual_seed(0))
    ids[:, :17] = ids[0, :17]
    k, v = places_of(llm, ids[0, :17])
    hidden, own = read(llm, ids[:, 17:], k, v)
    torch.testing.assert_close(hidden, llm.forward_train(llm.embed(ids))[:, 17:])
    whole, _ = read(llm, ids, k[:, :, :0], v[:, :, :0])
    torch.testing.assert_close(whole, llm.forward_train(llm.embed(ids)))
    longer = places_of(llm, ids[1])
    for (k_own, v_own), k_whole, v_whole in zip(own, *longer, strict=True):
        torch.testing.assert_close(k_own[1], k_whole[:, 17:])
        torch.testing.assert_close(v_own[1], v_whole[:, 17:])


def test_the_loss_is_that_of_the_next_token_among_the_spoken(cfg):
    trainer = Trainer(cfg)
    ids = trainer.ids.tolist()
    assert ids == sorted({1, *(2 + ord(c) for c in "abcdefghijklmnopqrstuvwxyz' ")})
    trainer.prefix.bias.data.normal_(generator=torch.Generator().manual_seed(0))
    rows = torch.tensor([trainer.ids[[0, 3, 5, 1]].tolist()])
    state = dict(trainer.prefix.named_parameters())
    nats = trainer.nats(state, rows[:, :-1], trainer.number[rows[:, 1:]])
    hidden, _ = read(trainer.llm, rows[:, :-1], trainer.prefix.k, trainer.prefix.v)
    logits = trainer.llm.logits(hidden)[0, :, ids] + trainer.prefix.bias
    expected = -logits.log_softmax(-1)[range(3), [3, 5, 1]].sum()
    torch.testing.assert_close(nats, expected)
    none = torch.full((1, 3), NOT_SPOKEN)
    assert trainer.nats(state, rows[:, :-1], none).item() == 0.0


def test_perplexity_counts_words(cfg):
    """Padding and the order of sentences change nothing."""
    trainer = Trainer(cfg)
    said, total = ["is it so", "so told it is"], 0.0
    for sentence in said:
        ids = torch.tensor([prefix.encode(trainer.tokenizer, sentence)])
        hidden, _ = read(trainer.llm, ids[:, :-1], trainer.prefix.k, trainer.prefix.v)
        logits = F.linear(hidden, trainer.head)
        total += F.cross_entropy(logits[0], trainer.number[ids[0, 1:]], reduction="sum").item()
    assert trainer.perplexity(said) == pytest.approx(math.exp(total / 7), rel=1e-4)
    assert trainer.perplexity(said[::-1]) == pytest.approx(math.exp(total / 7), rel=1e-4)


def test_the_bridge_s_adapters_are_merged(cfg, tmp_path):
    gen = torch.Generator().manual_seed(0)
    lora = {"a": torch.randn(2, 64, generator=gen), "b": torch.randn(32, 2, generator=gen)}
    name = "layers.1.attn.k_proj"
    bridge = {f"lora.{name}.{side}": value for side, value in lora.items()}
    save_file(bridge, tmp_path / "bridge.safetensors")
    plain, _ = prefix.load_merged(cfg)
    changed = replace(cfg, bridge=str(tmp_path / "bridge.safetensors"), lora_scale=0.5)
    merged, _ = prefix.load_merged(changed)
    expected = dict(plain.state_dict())
    merge_lora(expected, {f"{name}.{side}": value for side, value in lora.items()}, 0.5)
    assert not torch.equal(expected[f"{name}.weight"], plain.state_dict()[f"{name}.weight"])
    for key, value in merged.state_dict().items():
        assert torch.equal(value, expected[key]), key
    assert not any(p.requires_grad for p in merged.parameters())


# --- the run -------------------------------------------------------------------------------------


def test_the_loss_falls_and_nothing_else_moves(cfg, tmp_path):
    trainer = Trainer(replace(cfg, steps=40))
    before = {k: v.clone() for k, v in trainer.llm.state_dict().items()}
    first = {k: v.clone() for k, v in trainer.weights().items()}
    trainer.run(tmp_path / "run", resume=False)
    losses = [row["loss"] for row in log_of(tmp_path / "run")]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    for name, value in trainer.llm.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert trainer.weights().keys() == {"text.k", "text.v", "text.bias"}
    for name, value in trainer.weights().items():
        assert not torch.equal(value, first[name]), name


def test_what_is_stored_is_what_the_engine_reads(cfg, tmp_path):
    trainer = Trainer(cfg)
    trainer.run(tmp_path / "run", resume=False)
    stored, n = load_file(tmp_path / "run" / "prefix.safetensors"), len(trainer.ids)
    assert {k: (v.dtype, tuple(v.shape)) for k, v in stored.items()} == {
        "text.k": (torch.bfloat16, (2, 1, 5, 32)),
        "text.v": (torch.bfloat16, (2, 1, 5, 32)),
        "text.ids": (torch.int32, (n,)),
        "text.bias": (torch.float32, (n,)),
    }
    assert torch.equal(stored["text.ids"].long(), trainer.ids)
    assert torch.equal(stored["text.k"], trainer.average["text.k"].bfloat16())
    rows = log_of(tmp_path / "run")
    assert [row["step"] for row in rows if "perplexity_dev" in row] == [3, 6]
    said = prefix.read_sentences(cfg.dev[0])
    assert rows[-1]["perplexity_dev"] == pytest.approx(trainer.perplexity(said))


def test_a_run_that_was_interrupted_ends_with_the_same_weights(cfg, tmp_path):
    whole, again = whole_and_in_parts(replace(cfg, accumulate=2), tmp_path, step=3)
    for ours, theirs in ((whole.weights(), again.weights()), (whole.average, again.average)):
        for name in ours:
            assert torch.equal(ours[name], theirs[name]), name
    losses = [[row["loss"] for row in log_of(tmp_path / x)] for x in ("whole", "parts")]
    assert losses[0] == losses[1]


def test_another_config_s_checkpoint_is_told(cfg, tmp_path):
    Trainer(cfg).run(tmp_path / "run", resume=False)
    with pytest.raises(ModelError, match="do not fit Prefix; wrong shape: k"):
        Trainer(replace(cfg, n_places=6)).run(tmp_path / "run", resume=True)


def test_texts_are_drawn_by_weight_and_share(cfg, tmp_path):
    (tmp_path / "rare.txt").write_text("x\n")
    rare = Text(str(tmp_path / "rare.txt"), weight=0.25)
    trainer = Trainer(replace(cfg, texts=(replace(cfg.texts[0], weight=0.75), rare)))
    assert trainer.texts == [["so it is told", "told so it's so", "is it told so"], ["x"]]
    trainer.seed()
    ids = trainer.draw(20_000, trainer.rng)
    beginnings, n_rare = ids.count(1), ids.count(2 + ord("x"))
    assert n_rare / beginnings == pytest.approx(0.25, abs=0.04)
    half = prefix.read_sentences(replace(cfg.texts[0], share=0.67))
    assert half == ["so it is told", "told so it's so"]


def test_a_pack_is_a_text(files):
    assert "it is so" in prefix.read_sentences(Text(files.pack))


# --- what may be wrong ---------------------------------------------------------------------------


def run_command(monkeypatch, tmp_path, config):
    (tmp_path / "prefix.toml").write_text(config)
    argv = ["prefix", str(tmp_path / "prefix.toml"), "--work", str(tmp_path / "run")]
    monkeypatch.setattr(sys, "argv", argv)
    loop.main("prefix", None, lambda path, device: start(prefix.load_config(path), device))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"", "error: {} has no sentence to learn from\nhint: one a line, numbers spelled out\n"),
        (b"1984\n42\n", "error: {} has no sentence to learn from\nhint: one a line"),
        (b"\x80\xff\x00\n", "error: {} has no sentence to learn from\nhint: one a line"),
        (None, "error: {}: No such file or directory\n"),
    ],
    ids=["empty", "digits", "binary", "missing"],
)
@pytest.mark.parametrize("role", ["texts", "dev"])
def test_bad_texts_are_one_line(monkeypatch, tmp_path, capsys, role, text, said):
    (tmp_path / "good.txt").write_text("so it is\n")
    bad = tmp_path / "bad.txt"
    if text is not None:
        bad.write_bytes(text)
    good = "" if role == "texts" else f"[[texts]]\npath = '{tmp_path / 'good.txt'}'\n"
    with pytest.raises(SystemExit) as left:
        run_command(monkeypatch, tmp_path, f"{good}[[{role}]]\npath = '{bad}'\n")
    assert left.value.code == 2
    assert capsys.readouterr().err.startswith(said.format(bad))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"texts": ()}, "there are no texts"),
        ({"n_places": 0}, "n_places = 0"),
        ({"texts": (Text("a", weight=0.0),)}, r"weight = 0\.0, share = 1\.0 of a"),
        ({"dev": (Text("a", share=2.0),)}, r"share = 2\.0 of a"),
        ({"dev": (Text("x/a.txt"), Text("y/a.txt"))}, "the same name"),
    ],
)
def test_impossible_configs_are_told(cfg, changes, message):
    with pytest.raises(ConfigError, match=message):
        replace(cfg, **changes)


def test_the_shipped_config_can_be_read():
    cfg = prefix.load_config(CONFIGS / "prefix.toml")
    assert (cfg.llm, cfg.n_places, cfg.row_length) == (DEFAULT_LLM, 64, 128)
    assert sum(text.weight for text in cfg.texts) == pytest.approx(1.0)


# --- into the bridge -----------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """A model folder's bridge and config, with a prefix of before."""
    gen = torch.Generator().manual_seed(0)
    bridge = {
        "stop.weight": torch.randn(1, 4, generator=gen),
        "qformer.queries": torch.randn(80, 64, generator=gen).bfloat16(),
        "text.k": torch.ones(1, 1, 2, 4),
        "text.old": torch.ones(2),
    }
    out = tmp_path / "model"
    out.mkdir()
    save_file(bridge, out / "bridge.safetensors")
    (out / "config.json").write_text('{"name": "x", "sha256": {"ear.safetensors": "e"}}')
    return out


def bits(value):
    return value.contiguous().view(torch.uint8).numpy().tobytes()


def test_a_prefix_gets_into_a_bridge_that_stays_the_same(cfg, tmp_path, folder):
    before = load_file(folder / "bridge.safetensors")
    Trainer(cfg).run(tmp_path / "run", resume=False)
    add_text(folder, tmp_path / "run" / "prefix.safetensors")
    text = load_file(tmp_path / "run" / "prefix.safetensors")
    after = load_file(folder / "bridge.safetensors")
    kept = {name: value for name, value in before.items() if not name.startswith("text.")}
    assert after.keys() == kept.keys() | text.keys()
    for name, value in (kept | text).items():
        assert (after[name].dtype, after[name].shape) == (value.dtype, value.shape), name
        assert bits(after[name]) == bits(value), name
    config = json.loads((folder / "config.json").read_text())
    hashes = {"ear.safetensors": "e", "bridge.safetensors": sha256(folder / "bridge.safetensors")}
    assert config == {"name": "x", "sha256": hashes}
    assert sorted(p.name for p in folder.iterdir()) == ["bridge.safetensors", "config.json"]
    ids = compact(after)["text.ids"]  # as when the folder's bridge is exported again
    assert ids.dtype == torch.int32
    assert torch.equal(ids, text["text.ids"])


def test_export_takes_a_prefix_on_its_command_line(cfg, tmp_path, folder, monkeypatch):
    Trainer(cfg).run(tmp_path / "run", resume=False)
    parts = [x for name in ("ear", "bridge", "pieces") for x in (f"--{name}", str(tmp_path))]
    text = str(tmp_path / "run" / "prefix.safetensors")
    monkeypatch.setattr(sys, "argv", ["export", str(folder), *parts, "--text", text])
    monkeypatch.setattr(export, "export", lambda *parts: None)  # the folder is there
    export.main()
    assert set(export.PREFIX) <= load_file(folder / "bridge.safetensors").keys()


def test_only_a_prefix_is_taken(tmp_path, folder):
    save_file({"lora.a": torch.ones(2)}, tmp_path / "other.safetensors")
    before = (folder / "bridge.safetensors").read_bytes()
    with pytest.raises(ModelError, match=r"is no prefix: it has lora\.a"):
        add_text(folder, tmp_path / "other.safetensors")
    with pytest.raises(ModelError, match="cannot read"):
        add_text(folder, tmp_path / "none.safetensors")
    assert (folder / "bridge.safetensors").read_bytes() == before
