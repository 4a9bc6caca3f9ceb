"""`python -m training.export ... --onnx`: what it writes captions a file without torch."""

from __future__ import annotations

import json
import subprocess
import sys
import wave
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from sparqle_stream import models, testing, weights
from sparqle_stream.config import (
    SILENT_MEL,
    CtcConfig,
    EncoderConfig,
    EngineConfig,
    QFormerConfig,
)
from sparqle_stream.ctc import CtcHead
from sparqle_stream.encoder import Encoder
from sparqle_stream.engine import Engine
from sparqle_stream.errors import ConfigError, ModelError
from sparqle_stream.onnx_cpu import model as onnx_model
from sparqle_stream.onnx_cpu.settings import INDEX
from sparqle_stream.qformer import QFormer
from sparqle_stream.stages import prefix_ids
from sparqle_stream.tokenizer import TextTokenizer
from sparqle_stream.weights import LlmFiles
from sparqle_stream.writer import Greedy
from training import export

WIDTH = 64
SAID = 3.0  # seconds of the clip
# The command line, which then says what it imported.
ALONE = """
import sys
from sparqle_stream import cli
status = cli.main(sys.argv[1:])
heavy = [name for name in ("torch", "transformers", "onnx") if name in sys.modules]
sys.exit(f"imported {heavy}" if heavy else status)
"""


def file_tokenizer() -> TextTokenizer:
    """`testing.ByteTokenizer` as a file can hold it: the tiny LLM was made to write its tokens."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE

    printed = [*range(33, 127), *range(161, 173), *range(174, 256)]  # GPT-2's letters for bytes
    others = [byte for byte in range(256) if byte not in printed]
    letters = {b: chr(b) for b in printed} | {b: chr(256 + i) for i, b in enumerate(others)}
    vocab = {"<pad>": 0, "<bos>": testing.ByteTokenizer.bos_id}
    vocab |= {letter: testing.FIRST_BYTE + byte for byte, letter in letters.items()}
    for i, syllable in enumerate(testing.SYLLABLES):
        vocab[syllable.replace(" ", letters[ord(" ")])] = testing.FIRST_BYTE + 256 + i
    tokenizer = Tokenizer(BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return TextTokenizer(tokenizer, bos_id=testing.ByteTokenizer.bos_id)


def states(**modules: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {
        f"{part}.{name}": value.contiguous()
        for part, module in modules.items()
        for name, value in module.state_dict().items()
    }


@pytest.fixture(autouse=True)
def one_thread():
    """Small matrices gain nothing by a second, and on a busy machine it is waited for."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Files of training: `ear`, `bridge`, `pieces`, `llm`, all tiny, random and talkative."""
    root = tmp_path_factory.mktemp("parts")
    pieces, llm = testing.tiny_pieces(), testing.tiny_model().llm
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        encoder = Encoder(EncoderConfig(width=WIDTH, n_heads=1, n_layers=1))
        ctc = CtcHead(CtcConfig(WIDTH, 16, pieces.size))
        shape = QFormerConfig(n_layers=1, width=WIDTH, encoder_width=WIDTH, llm_width=WIDTH)
        qformer = QFormer(replace(shape, n_pieces=pieces.size))
        with torch.no_grad():
            testing._liven(ctc, qformer, testing.tiny_model().llm)
    save_file(states(encoder=encoder, ctc=ctc), root / "ear.safetensors")
    save_file(states(qformer=qformer, stop=llm.stop), root / "bridge.safetensors")
    pieces.tokenizer.save(str(root / "pieces.json"))
    state = {k: v for k, v in llm.state_dict().items() if not k.startswith("stop.")}
    (root / "llm").mkdir()
    weights.save_llm(LlmFiles(llm.cfg, state, file_tokenizer()), root / "llm")
    names = {name: root / f"{name}.safetensors" for name in ("ear", "bridge")}
    return SimpleNamespace(**names, pieces=root / "pieces.json", llm=root / "llm")


@pytest.fixture
def run_export(parts, tmp_path, monkeypatch):
    """Runs the command into tmp_path/model and tmp_path/graphs."""

    def run(*options):
        argv = ["training.export", str(tmp_path / "model"), "--ear", str(parts.ear)]
        argv += ["--bridge", str(parts.bridge), "--pieces", str(parts.pieces)]
        argv += ["--onnx", str(tmp_path / "graphs"), "--llm", str(parts.llm), *options]
        monkeypatch.setattr(sys, "argv", argv)
        export.main()
        return tmp_path / "model", tmp_path / "graphs"

    return run


@pytest.fixture
def wav(clip, tmp_path):
    """The clip's beginning as a file."""
    path = tmp_path / "said.wav"
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16_000)
        file.writeframes(np.rint(clip[: int(SAID * 16_000)] * 32767).astype("<i2").tobytes())
    return path


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_the_folder_captions_a_file_without_torch(run_export, parts, wav, dtype, capsys):
    """With the detector, which has a model of its own; in float32 it writes what torch writes."""
    folder, graphs = run_export("--dtype", dtype)
    assert f"{folder}: " in capsys.readouterr().out
    argv = [str(wav), "--model", str(graphs), "--backend", "onnx", "--format", "json"]
    done = subprocess.run(
        [sys.executable, "-c", ALONE, *argv], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    got = json.loads(done.stdout)
    assert got["duration"] == pytest.approx(SAID, abs=0.01)
    assert got["words"]
    if dtype == "float32":
        from sparqle_stream import audio

        model = models.load(folder, llm=parts.llm, backend="torch", dtype="float32")
        with Engine(model, EngineConfig(n_slots=1)) as engine:
            expected = testing.text_of(engine.transcribe(audio.read_file(wav)))
        assert got["text"] == expected.strip()


def test_int8_is_the_default(run_export):
    _, graphs = run_export()
    assert json.loads((graphs / INDEX).read_text())["dtype"] == "int8"


def test_an_llm_that_is_not_there_is_said_and_leaves_no_graphs(run_export, tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        run_export("--llm", str(tmp_path / "nothing"))
    assert caught.value.code == 2
    assert "nothing" in capsys.readouterr().err
    assert not (tmp_path / "graphs").exists()


# --- models.write_graphs -------------------------------------------------------------------------


@pytest.fixture
def folder(parts, tmp_path):
    from sparqle_stream.config import WriterConfig

    files = (parts.ear, parts.bridge, parts.pieces)
    export.export(tmp_path / "model", *files, None, WriterConfig())
    return tmp_path / "model"


def heard(model, pcm):
    """CTC log-probs (C, V) of chunks of pcm (S,), and the queries of the end (Q, E)."""
    stages, path = model.make_stages(1), []

    def hear(_row, log_probs):
        path.append(np.array(log_probs))
        return Greedy(0)

    with stages.working(1):
        stages.wipe(0)
        stages.begin({0: prefix_ids(model.tokenizer, "")})
        for at in range(0, len(pcm) - 5119, 5120):
            stages.step({0: pcm[at : at + 5120]}, {0: 240}, 6, hear)
    recent = stages.state.recent.numpy() if hasattr(stages, "state") else stages.recent
    return np.concatenate(path), recent[0].copy()


def test_graphs_are_those_of_the_folder(folder, parts, clip, tmp_path):
    """Name, hash and config; what they hear is what torch hears."""
    models.write_graphs(folder, parts.llm, tmp_path / "graphs", "float32")
    graphs = onnx_model.load(tmp_path / "graphs")
    torch_model = models.load(folder, llm=parts.llm, backend="torch", dtype="float32")
    assert (graphs.name, graphs.weights_hash) == (torch_model.name, torch_model.weights_hash)
    assert graphs.cfg == torch_model.cfg
    assert graphs.tokenizer.decode(graphs.tokenizer.encode("naïve, 12")) == "naïve, 12"
    got, expected = heard(graphs, clip[:48_000]), heard(torch_model, clip[:48_000])
    np.testing.assert_allclose(got[0], expected[0], atol=1e-3)
    np.testing.assert_allclose(got[1], expected[1], atol=1e-3)
    assert np.abs(expected[1]).max() > 0.1


def test_int8_is_smaller_and_heard_alike(folder, parts, clip, tmp_path):
    for dtype in ("int8", "float32"):
        models.write_graphs(folder, parts.llm, tmp_path / dtype, dtype)
    small, large = (onnx_model.load(tmp_path / dtype) for dtype in ("int8", "float32"))
    assert small.weight_bytes()["llm"] < 0.5 * large.weight_bytes()["llm"]
    got, exact = heard(small, clip[:48_000])[0], heard(large, clip[:48_000])[0]
    assert 0 < (np.exp(exact) * (exact - got)).sum(axis=-1).mean() < 0.02


def test_graphs_take_the_place_of_older_ones(folder, parts, tmp_path):
    """In whole: nothing of the old ones is left among them."""
    out = tmp_path / "graphs"
    models.write_graphs(folder, parts.llm, out, "float32")
    (out / "old.data").write_bytes(b"x")
    models.write_graphs(folder, parts.llm, out, "int8")
    assert json.loads((out / INDEX).read_text())["dtype"] == "int8"
    assert not (out / "old.data").exists()
    assert not list(tmp_path.glob(".tmp-*"))


@pytest.mark.parametrize("what", ["model", "runs", "file"])
def test_nothing_but_graphs_is_ever_replaced(folder, parts, tmp_path, what):
    """`--onnx runs` deleted all that had been trained."""
    place = {"model": folder, "runs": tmp_path / "runs", "file": tmp_path / "x"}[what]
    (tmp_path / "runs" / "joint").mkdir(parents=True)
    (tmp_path / "runs" / "joint" / "last.pt").write_bytes(b"hours")
    (tmp_path / "x").write_bytes(b"")
    before = sorted(place.rglob("*"))
    with pytest.raises(ConfigError, match="is a file" if what == "file" else "would be replaced"):
        models.write_graphs(folder, parts.llm, place, "float32")
    assert sorted(place.rglob("*")) == before
    assert (tmp_path / "runs" / "joint" / "last.pt").read_bytes() == b"hours"


def test_the_page_says_what_silence_is():
    page = (Path(models.__file__).parent.parent / "docs" / "onnx.md").read_text()
    assert f"({SILENT_MEL} at the start" in page


def test_the_words_of_a_model_go_with_its_graphs(folder, parts, tmp_path, monkeypatch):
    """As they are: what is in them is the lexicon's business."""
    from sparqle_stream import torch_model

    monkeypatch.setattr(torch_model.Lexicon, "load", lambda *_: None)
    (folder / "words.safetensors").write_bytes(b"words")
    models.write_graphs(folder, parts.llm, tmp_path / "graphs", "float32")
    assert (tmp_path / "graphs" / "words.safetensors").read_bytes() == b"words"


def test_a_folder_that_is_no_model_writes_nothing(parts, tmp_path):
    with pytest.raises(ModelError):
        models.write_graphs(tmp_path / "none", parts.llm, tmp_path / "graphs", "float32")
    assert not (tmp_path / "graphs").exists()
