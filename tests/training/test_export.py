"""export.py: a model folder with everything under its name, small and readable by the product."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from sparqle_stream.artifacts import sha256
from sparqle_stream.config import ModelConfig, WriterConfig
from sparqle_stream.config_json import config_from_json
from sparqle_stream.errors import ConfigError
from sparqle_stream.pieces import CtcPieces
from sparqle_stream.weights import expanded, in_eight_bits
from training.export import compact, export
from training.text import train_pieces


def test_matrices_are_halved_and_small_tensors_are_kept():
    weights = {
        "matrix": torch.randn(128, 64),
        "convolution": torch.randn(64, 64, 3),
        "norm": torch.randn(8192),
        "head": torch.randn(1, 576),
    }
    stored = compact(weights)
    assert {name: str(value.dtype).removeprefix("torch.") for name, value in stored.items()} == {
        "matrix": "bfloat16",
        "convolution": "bfloat16",
        "norm": "float32",
        "head": "float32",
    }
    for name, value in weights.items():
        torch.testing.assert_close(stored[name].float(), value, atol=0, rtol=2**-8)


def test_an_encoder_survives_eight_bits():
    weights = {
        "matrix": torch.randn(128, 64) * torch.logspace(-3, 0, 128)[:, None],
        "convolution": torch.randn(64, 80, 3),
        "silent": torch.zeros(4, 4),
        "bias": torch.randn(512),
    }
    stored = in_eight_bits(weights)
    assert stored["matrix"].dtype == stored["convolution"].dtype == torch.int8
    again = expanded(stored)
    assert again.keys() == weights.keys()
    assert torch.equal(again["bias"], weights["bias"])
    for name, weight in weights.items():
        rows, found = weight.reshape(len(weight), -1), again[name].reshape(len(weight), -1)
        largest = rows.abs().amax(dim=1, keepdim=True)
        assert ((rows - found).abs() <= largest / 254 + 1e-7).all(), name


@pytest.mark.parametrize("kind", ["window", "stack"])
def test_a_folder_holds_every_part_once(tmp_path, kind):
    pieces = train_pieces(["the cat sat on the mat"], 36, tmp_path / "pieces.json")
    ear = {
        "encoder.conv1.weight": torch.ones(512, 80, 3),
        **{f"encoder.blocks.{i}.out.bias": torch.zeros(512) for i in range(6)},
        "ctc.hidden.bias": torch.zeros(512),
        "ctc.out.bias": torch.zeros(pieces.size),
    }
    bridge = {
        "qformer.out.weight": torch.zeros(576, 512),
        "stop.weight": torch.full((1, 4), 0.5),
        "lora.layers.0.attn.q_proj.a": torch.ones(2, 4),
        f"qformer.{'queries' if kind == 'window' else 'stack.weight'}": torch.ones(2, 4),
    }
    save_file(ear, tmp_path / "ear.safetensors")
    save_file(bridge, tmp_path / "bridge.safetensors")
    (tmp_path / "words.safetensors").write_bytes(b"words")
    out = tmp_path / "my-model"
    export(
        out,
        tmp_path / "ear.safetensors",
        tmp_path / "bridge.safetensors",
        tmp_path / "pieces.json",
        tmp_path / "words.safetensors",
        WriterConfig(llm_weight=2.0),
    )
    heard, rest = (load_file(out / f"{name}.safetensors") for name in ("ear", "bridge"))
    assert heard.keys() == ear.keys() | {"encoder.conv1.weight.scale"}
    assert expanded(heard)["encoder.conv1.weight"].eq(1.0).all()
    assert rest.keys() == bridge.keys()
    raw = json.loads((out / "config.json").read_text())
    assert raw.pop("lora_scale") == 2.0
    hashes = raw.pop("sha256")
    assert hashes == {p.name: sha256(p) for p in out.iterdir() if p.name != "config.json"}
    cfg = config_from_json(ModelConfig, raw, out / "config.json")
    assert (cfg.name, cfg.qformer.kind) == ("my-model", kind)
    assert cfg.writer == WriterConfig(llm_weight=2.0)
    assert cfg.ctc.n_pieces == cfg.qformer.n_pieces == pieces.size
    assert cfg.encoder == ModelConfig().encoder
    assert cfg.qformer == replace(ModelConfig().qformer, kind=kind, n_pieces=pieces.size)
    assert cfg.tasks == ("transcribe",)
    assert CtcPieces.load(out / "pieces.json").encode("the cat") == pieces.encode("the cat")


def test_parts_may_lie_in_the_folder_that_is_written(tmp_path):
    """Its files were rewritten then, and its config kept the hashes of the old ones."""
    pieces = train_pieces(["the cat sat on the mat"], 36, tmp_path / "pieces.json")
    ear = {
        "encoder.conv1.weight": torch.ones(512, 80, 3),
        "encoder.blocks.0.out.bias": torch.zeros(512),
        "ctc.hidden.bias": torch.zeros(512),
        "ctc.out.bias": torch.zeros(pieces.size),
    }
    bridge = {
        "qformer.out.weight": torch.zeros(576, 512),
        "stop.weight": torch.full((1, 4), 0.5),
        "qformer.queries": torch.ones(2, 4),
    }
    files = [tmp_path / f"{name}.safetensors" for name in ("ear", "bridge")]
    save_file(ear, files[0])
    save_file(bridge, files[1])
    export(tmp_path, *files, tmp_path / "pieces.json", None, WriterConfig())
    told = json.loads((tmp_path / "config.json").read_text())["sha256"]
    assert told == {path.name: sha256(path) for path in (*files, tmp_path / "pieces.json")}
    torch.testing.assert_close(load_file(files[1])["stop.weight"], bridge["stop.weight"])
    # Whoever may read the folder may read the weights: other users, and those of images.
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {
        (tmp_path / "config.json").stat().st_mode & 0o777
    }


def test_an_exported_ear_can_be_exported_again(tmp_path):
    """As when only the bridge is new: what is in 8 bits stays what it is."""
    pieces = train_pieces(["the cat sat on the mat"], 36, tmp_path / "pieces.json")
    gen = torch.Generator().manual_seed(0)
    ear = {
        "encoder.conv1.weight": torch.randn(512, 80, 3, generator=gen),
        **{f"encoder.blocks.{i}.out.bias": torch.zeros(512) for i in range(6)},
        "ctc.hidden.bias": torch.zeros(512),
        "ctc.out.bias": torch.zeros(pieces.size),
    }
    save_file(ear, tmp_path / "ear.safetensors")
    bridge = {"qformer.out.weight": torch.zeros(576, 512), "qformer.queries": torch.ones(2, 4)}
    save_file(bridge, tmp_path / "bridge.safetensors")
    parts = (tmp_path / "bridge.safetensors", tmp_path / "pieces.json", None, WriterConfig())
    export(tmp_path / "first", tmp_path / "ear.safetensors", *parts)
    export(tmp_path / "again", tmp_path / "first" / "ear.safetensors", *parts)
    first, again = (load_file(tmp_path / x / "ear.safetensors") for x in ("first", "again"))
    assert first.keys() == again.keys()
    assert torch.equal(first["encoder.conv1.weight"], again["encoder.conv1.weight"])
    assert all(torch.allclose(first[name].float(), again[name].float()) for name in first)


def test_a_lexicon_goes_with_transcription_only(tmp_path):
    """Beside it only heard words can be written: a translation would never come."""
    some = tmp_path / "x"
    with pytest.raises(ConfigError, match="with a lexicon"):
        export(some, some, some, some, some, WriterConfig(), ("transcribe", "translate to de"))
    with pytest.raises(ConfigError, match="unknown task 'sing'"):
        export(some, some, some, some, None, WriterConfig(), ("sing",))
