"""models.py: a model folder and an LLM become a model; what does not fit says so."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sparqle_stream import artifacts, models, testing, torch_model, weights
from sparqle_stream.config import ModelConfig
from sparqle_stream.config_json import config_from_json
from sparqle_stream.errors import ConfigError, ModelError
from sparqle_stream.onnx_cpu.settings import INDEX
from sparqle_stream.pieces import CtcPieces
from sparqle_stream.tokenizer import TextTokenizer
from sparqle_stream.weights import LlmFiles

REPO = Path(__file__).resolve().parent.parent
LORA_SCALE = 0.5
ADAPTED = "layers.1.mlp.up_proj"


def byte_bpe():
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE

    vocab = {x: i for i, x in enumerate(["<bos>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return TextTokenizer(tokenizer, bos_id=0)


def parts_of(model):
    """What a model folder's two safetensors hold."""
    parts = (
        {"encoder": model.encoder, "ctc": model.ctc},
        {
            "qformer": model.qformer,
            "stop": model.llm.stop,
        },
    )
    return [
        {
            f"{part}.{name}": tensor.contiguous()
            for part, module in modules.items()
            for name, tensor in module.state_dict().items()
        }
        for modules in parts
    ]


@pytest.fixture(scope="session")
def written(tmp_path_factory, tiny):
    """The tiny model as a folder, with one LoRA pair, and its LLM as ours."""
    root = tmp_path_factory.mktemp("written")
    folder, llm = root / "model", root / "llm"
    folder.mkdir()
    llm.mkdir()
    ear, bridge = parts_of(tiny)
    gen = torch.Generator().manual_seed(0)
    bridge[f"lora.{ADAPTED}.a"] = torch.randn(4, tiny.cfg.llm.width, generator=gen)
    bridge[f"lora.{ADAPTED}.b"] = torch.randn(tiny.cfg.llm.ffn, 4, generator=gen) * 0.1
    save_file(ear, folder / "ear.safetensors")
    save_file(bridge, folder / "bridge.safetensors")
    tiny.pieces.tokenizer.save(str(folder / "pieces.json"))
    config = asdict(tiny.cfg) | {"lora_scale": LORA_SCALE}
    (folder / "config.json").write_text(json.dumps(config))
    state = {k: v for k, v in tiny.llm.state_dict().items() if not k.startswith("stop.")}
    weights.save_llm(LlmFiles(replace(tiny.cfg.llm, n_slot=99), state, byte_bpe()), llm)
    return folder, llm


@pytest.fixture
def folder(written, tmp_path):
    """A copy to spoil."""
    shutil.copytree(written[0], tmp_path / "model")
    return tmp_path / "model"


def test_load_gives_what_was_written(written, tiny):
    model = models.load(written[0], llm=written[1], backend="torch")
    assert model.name == "tiny"
    assert model.cfg == tiny.cfg
    assert model.llm.cfg.n_slot == tiny.cfg.llm.n_slot, "the slot is the model's, not the LLM's"
    assert model.device == torch.device("cpu")
    assert model.tokenizer.decode(model.tokenizer.encode("naïve, 12")) == "naïve, 12"
    assert model.pieces.size == tiny.pieces.size
    for ours, theirs in ((model.encoder, tiny.encoder), (model.ctc, tiny.ctc)):
        for name, tensor in theirs.state_dict().items():
            assert torch.equal(ours.state_dict()[name], tensor), name
    assert torch.equal(model.llm.stop.weight, tiny.llm.stop.weight)
    assert not any(p.requires_grad for p in model.llm.parameters())


def test_lora_is_merged_with_its_scale(written, tiny):
    """gate and up lie in one matrix after loading; only up was adapted."""
    bridge = load_file(written[0] / "bridge.safetensors")
    model = models.load(written[0], llm=written[1], backend="torch")
    gate, up = model.llm.layers[1].mlp.gate_up_proj.weight.chunk(2)
    change = bridge[f"lora.{ADAPTED}.b"] @ bridge[f"lora.{ADAPTED}.a"] * LORA_SCALE
    plain = tiny.llm.layers[1].mlp
    # the LLM is kept in float16
    torch.testing.assert_close(up, plain.up_proj.weight + change, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(gate, plain.gate_proj.weight, atol=1e-3, rtol=1e-3)
    assert float((up - plain.up_proj.weight).abs().mean()) > 0.01


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dtypes_of_torch(written, dtype):
    model = models.load(written[0], llm=written[1], dtype=dtype, backend="torch")
    for weight in (model.encoder.ln_post, model.qformer.out, model.llm.norm):
        assert weight.weight.dtype == getattr(torch, dtype)


@pytest.mark.parametrize(
    ("asked", "device", "comes_to"),
    [
        (("auto", "auto"), "cpu", ("onnx", "int8")),
        (("auto", "float32"), "cpu", ("onnx", "float32")),
        (("auto", "bfloat16"), "cpu", ("torch", "bfloat16")),
        (("torch", "auto"), "cpu", ("torch", "float32")),
        (("auto", "auto"), "cuda", ("torch", "bfloat16")),
    ],
)
def test_what_auto_means(asked, device, comes_to):
    assert models.choose(*asked, device) == comes_to


@pytest.mark.parametrize(
    ("asked", "device", "hint"),
    [
        (("onnx", "auto"), "cuda", "--backend torch"),
        (("torch", "int8"), "cpu", "float32, bfloat16"),
        (("onnx", "bfloat16"), "cpu", "int8, float32"),
        (("jax", "auto"), "cpu", "onnx"),
        (("auto", "float64"), "cpu", "int8"),
    ],
)
def test_what_does_not_go_together_is_refused(asked, device, hint):
    with pytest.raises(ConfigError) as caught:
        models.choose(*asked, device)
    assert hint in caught.value.hint


def test_starting_up_imports_no_heavy_library(written):
    """torch and transformers take seconds, gguf one; graphs that are there need none of them."""
    models.load(written[0], llm=written[1])
    code = (
        "import sys\n"
        "from sparqle_stream import models\n"
        f"models.load({str(written[0])!r}, llm={str(written[1])!r})\n"
        "heavy = ('torch', 'transformers', 'gguf', 'onnx', 'filelock')\n"
        "print([m for m in heavy if m in sys.modules])\n"
    )
    path = os.pathsep.join([str(REPO), str(REPO / "kernels")])
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip() == "[]", done.stderr


def test_a_random_model_by_name():
    model = models.load("random:tiny")
    assert model.weights_hash == "seed-0"
    assert model.llm.layers[0].attn.qkv_proj is not None


@pytest.mark.parametrize(
    ("device", "wanted", "is_captured"),
    [("cuda", {}, True), ("cuda", {"cuda_graphs": False}, False), ("cpu", {}, False)],
)
def test_steps_are_captured_on_cuda_unless_told_not_to(monkeypatch, device, wanted, is_captured):
    """Without a GPU: only who would capture is looked at."""
    model = testing.tiny_model()
    model.device = torch.device(device)
    monkeypatch.setattr(models, "_load_torch", lambda *_: model)
    made = []
    monkeypatch.setattr(torch_model, "TorchStages", lambda *args: made.append(args[2]))
    monkeypatch.setattr(torch_model, "CudaCapture", lambda: "a capture")
    models.load("random:tiny", device=device, **wanted).make_stages(1)
    assert made == ["a capture" if is_captured else None]


def test_weights_hash_follows_every_file(written, folder, tmp_path):
    first = models.load(written[0], llm=written[1]).weights_hash
    assert models.load(folder, llm=written[1]).weights_hash == first
    bridge = load_file(folder / "bridge.safetensors")
    bridge["stop.bias"] += 1.0
    save_file(bridge, folder / "bridge.safetensors")
    assert models.load(folder, llm=written[1]).weights_hash != first
    other = tmp_path / "llm"
    shutil.copytree(written[1], other)
    state = load_file(other / "model.safetensors")
    state["norm.weight"] += 1.0
    save_file(state, other / "model.safetensors")
    assert models.load(written[0], llm=other).weights_hash != first


# --- what does not fit ----------------------------------------------------------------------------


def spoil_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    for key, value in changes.items():
        part, _, name = key.partition("__")
        if name:
            config[part][name] = value
        else:
            config[part] = value
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"gain": 1}, "unknown ModelConfig field 'gain'"),
        ({"encoder__wdith": 64}, "unknown EncoderConfig field 'wdith'"),
        ({"qformer__kind": "magic"}, "unknown qformer kind 'magic'"),
        ({"encoder__width": 128}, r"conv1\.weight \(64, 80, 3\) instead of \(128, 80, 3\)"),
        ({"encoder__n_layers": 3}, r"missing: blocks\.2\."),
        ({"encoder__n_layers": 1}, r"unexpected: blocks\.1\."),
        ({"qformer__llm_width": 576}, "speaks to an LLM of width 576, .* has 64"),
    ],
    ids=lambda x: str(x)[:24],
)
def test_a_config_that_does_not_fit(written, folder, changes, said):
    spoil_config(folder, **changes)
    with pytest.raises(ModelError, match=said):
        models.load(folder, llm=written[1])


@pytest.mark.parametrize(
    ("file", "name", "said"),
    [
        ("ear", "encoder.conv1.bias", r"do not fit Encoder; missing: conv1\.bias"),
        ("ear", "ctc.out.weight", r"do not fit CtcHead; missing: out\.weight"),
        ("bridge", "qformer.out.bias", r"do not fit QFormer; missing: out\.bias"),
        ("bridge", "stop.bias", r"do not fit Linear; missing: bias"),
        ("bridge", f"lora.{ADAPTED}.b", f"adapter of {ADAPTED}"),
    ],
)
def test_a_tensor_that_is_missing_is_named(written, folder, file, name, said):
    path = folder / f"{file}.safetensors"
    stored = load_file(path)
    del stored[name]
    save_file(stored, path)
    with pytest.raises(ModelError, match=said):
        models.load(folder, llm=written[1])


@pytest.mark.parametrize("name", artifacts.MODEL_FILES)
def test_a_file_that_is_missing_is_named(written, folder, name):
    (folder / name).unlink()
    with pytest.raises(ModelError, match=f"has no {name}"):
        models.load(folder, llm=written[1])


@pytest.mark.parametrize("name", ["config.json", "ear.safetensors", "bridge.safetensors"])
def test_a_damaged_file_is_named(written, folder, name):
    (folder / name).write_bytes((folder / name).read_bytes()[:50])
    with pytest.raises(ModelError, match=f"cannot read .*{name}"):
        models.load(folder, llm=written[1])


@pytest.mark.parametrize(
    ("name", "llm", "said"),
    [
        ("sparqle-huge", None, "no model 'sparqle-huge'"),
        ("nowhere/at/all", None, "no model 'nowhere/at/all'"),
        (None, "llama99", "no LLM 'llama99'"),
        (None, "./nowhere.gguf", r"no LLM '\./nowhere\.gguf'"),
    ],
)
def test_an_unknown_name_says_what_there_is(written, name, llm, said):
    with pytest.raises(ModelError, match=said) as caught:
        models.load(name or written[0], llm=llm or written[1])
    assert "sparqle-base-en" in caught.value.hint or "smollm2" in caught.value.hint


def test_a_hub_name_that_cannot_be_had_is_one_line(written):
    """Tests run offline; so may users."""
    with pytest.raises(ModelError) as caught:
        models.load(written[0], llm="somebody/some-llm")
    assert "\n" not in str(caught.value)
    assert "somebody/some-llm" in caught.value.message


def test_an_unknown_dtype_is_a_config_error(written):
    with pytest.raises(ConfigError, match="float64"):
        models.load(written[0], llm=written[1], dtype="float64")


def test_config_survives_json():
    cfg = ModelConfig(name="x")
    raw = json.loads(json.dumps(asdict(cfg)))
    assert config_from_json(ModelConfig, raw, artifacts.ASSETS) == cfg


def test_a_cache_that_cannot_be_written_says_what_to_do(written, tmp_path, monkeypatch):
    monkeypatch.setenv("SPARQLE_HOME", str(tmp_path / "file" / "below"))
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(ModelError, match="cannot write the model's graphs") as caught:
        models.load(written[0], llm=written[1])
    assert "SPARQLE_HOME" in caught.value.hint


@pytest.mark.parametrize("name", ["vocabulary.data", "stop.npy", "tokenizer.json"])
def test_graphs_that_were_damaged_are_made_anew(written, tmp_path, monkeypatch, caplog, name):
    """Nothing but deleting them helped, and the hint was to export what nobody had exported."""
    monkeypatch.setenv("SPARQLE_HOME", str(tmp_path))
    made = models.load(written[0], llm=written[1]).folder
    (made / name).write_bytes(b"")
    again = models.load(written[0], llm=written[1])
    if name == "vocabulary.data":  # loaded when somebody asks for it: only whether it is there
        (made / name).unlink()
        again = models.load(written[0], llm=written[1])
    assert (again.folder / name).stat().st_size
    assert "made anew" in caplog.text


@pytest.mark.parametrize("options", [{"llm": "x"}, {"dtype": "float32"}])
def test_graphs_of_ones_own_have_what_they_were_made_with(written, tmp_path, monkeypatch, options):
    monkeypatch.setenv("SPARQLE_HOME", str(tmp_path))
    own = models.load(written[0], llm=written[1]).folder
    assert models.load(own, dtype="int8").folder == own
    with pytest.raises(ConfigError, match="of their own"):
        models.load(own, **options)


def test_graphs_that_nobody_uses_make_room_for_new_ones(written, tmp_path, monkeypatch):
    """Every new model is 240 MB of them; what a killed process left goes too."""
    monkeypatch.setenv("SPARQLE_HOME", str(tmp_path))
    graphs, month_ago = tmp_path / "graphs", time.time() - 31 * 86400
    for name in ("unused", "used"):
        (graphs / name).mkdir(parents=True)
        (graphs / name / INDEX).write_text("{}")
    os.utime(graphs / "unused" / INDEX, (month_ago, month_ago))
    (graphs / ".tmp-killed").mkdir()
    models.load(written[0], llm=written[1])
    names = {folder.name for folder in graphs.iterdir() if folder.is_dir()}
    (made,) = names - {"used"}
    assert "used" in names
    os.utime(graphs / made / INDEX, (month_ago, month_ago))
    models.load(written[0], llm=written[1])
    assert (graphs / made / INDEX).stat().st_mtime > month_ago + 86400


@pytest.mark.parametrize("text", ["", "{ half of it", '{"model": 7}'])
def test_a_damaged_vocabulary_is_told(tmp_path, text):
    """The library raises an Exception of no kind, which was a traceback."""
    for load in (CtcPieces.load, lambda path: TextTokenizer.load(path, 0)):
        path = tmp_path / "pieces.json"
        with pytest.raises(ModelError, match=r"cannot read .*pieces\.json"):
            load(path)  # there is none
        path.write_text(text)
        with pytest.raises(ModelError, match=r"cannot read .*pieces\.json"):
            load(path)
        path.unlink()


@pytest.mark.parametrize("config", [{"bos_id": 1}, {"llm": {}}, {"llm": {"widht": 3}, "bos_id": 1}])
def test_an_llm_folder_with_half_a_config_is_told(tmp_path, config):
    (tmp_path / weights.OWN_CONFIG).write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"sparqle_llm\.json"):
        weights.read_llm(tmp_path)
