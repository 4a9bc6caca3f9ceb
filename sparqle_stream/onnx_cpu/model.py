"""Model: a folder of graphs -> what the engine runs. Imports neither torch nor transformers."""

from __future__ import annotations

import functools
import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime as ort

from sparqle_stream.config import ModelConfig
from sparqle_stream.config_json import config_from_json, read_json
from sparqle_stream.errors import ModelError
from sparqle_stream.lexicon import Lexicon
from sparqle_stream.onnx_cpu.settings import FORMAT, INDEX
from sparqle_stream.onnx_cpu.stages import OnnxStages
from sparqle_stream.pieces import CtcPieces
from sparqle_stream.tokenizer import TextTokenizer

if TYPE_CHECKING:
    from pathlib import Path

    import numpy.typing as npt

    from sparqle_stream.onnx_cpu.memory import Kind
    from sparqle_stream.stages import Floats, Tokenizer

GRAPHS = ("features", "ear", "qformer", "llm")
# What ONNX Runtime would put together again, and takes four times as long for (graphs._add_norm).
SLOWER = ["SkipLayerNormFusion"]
PLAIN_ROWS = 16  # 25 000 logits each; the memory of the largest call is never given back
KINDS: dict[str, Kind] = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int8)": np.int8,
}
FILES = (
    *(f"{name}.{kind}" for name in (*GRAPHS, "vocabulary") for kind in ("onnx", "data")),
    *("tokens.npy", "stop.npy", "pieces.json"),
)
PLAIN_FILES = ("plain.onnx", "plain.data")  # beside text.npz
FIELDS = ("name", "weights_hash", "bos_id", "config")  # of the index


@dataclass(frozen=True, slots=True)
class TextPrefix:
    """What stands before plain text, so that the LLM is a language model of speech."""

    kv: dict[str, npt.NDArray[Any]]  # (KV, P, d) by name of the slot, as slots hold them
    bias: npt.NDArray[np.float32]  # (V,) of every token

    @property
    def n_places(self) -> int:
        return int(self.kv["k_0"].shape[1])


@dataclass(slots=True)
class OnnxModel:
    """Sessions of all graphs and what is needed to read and write text."""

    cfg: ModelConfig
    pieces: CtcPieces
    lexicon: Lexicon | None  # None: the LLM alone decides what is written
    tokenizer: Tokenizer
    name: str
    weights_hash: str
    folder: Path
    sessions: dict[str, Any]  # onnxruntime.InferenceSession by graph
    tokens: npt.NDArray[np.float16]  # (V, E) embeddings, mapped: what is not used is not read
    head: npt.NDArray[np.float16]  # (V, E) output embeddings, the same unless untied
    stop: npt.NDArray[np.float32]  # (E + 1,) stop head
    text: TextPrefix | None = None  # None: nobody judges readings
    is_shared: bool = True  # sessions may be run by several threads
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def make_stages(self, n_rows: int) -> OnnxStages:
        return OnnxStages(self, n_rows)

    def weight_bytes(self) -> dict[str, int]:
        """Bytes of each graph that one row reads; of `vocabulary` for all logits."""
        names = (*GRAPHS, "vocabulary")
        return {name: (self.folder / f"{name}.data").stat().st_size for name in names}

    def session(self, name: str) -> Any:  # noqa: ANN401 - onnxruntime has no types
        """The session of a graph; `vocabulary` is loaded when somebody asks for it."""
        if name not in self.sessions:
            with self._lock:  # two workers may ask at once
                if name not in self.sessions:
                    self.sessions[name] = open_session(self.folder / f"{name}.onnx")
        return self.sessions[name]

    def plain_log_probs(self, hidden: Floats, before: list[int], ids: list[int]) -> Floats:
        """hidden (C, E) of plain texts; before: after which of them each of R tokens is said ->
        their log-probabilities (R,)."""
        assert self.text is not None
        said = self.head[ids].astype(np.float32)
        logits = np.einsum("re,re->r", hidden[before], said)
        run = self.session("plain").run
        parts = [hidden[at : at + PLAIN_ROWS] for at in range(0, len(hidden), PLAIN_ROWS)]
        everything = np.concatenate([run(None, {"hidden": part})[0] for part in parts])
        out: Floats = logits + self.text.bias[ids] - everything[before]
        return out

    def kind(self, graph: str, name: str) -> Kind:
        """Of which numbers an input of a graph is."""
        kinds = {value.name: value.type for value in self.session(graph).get_inputs()}
        return KINDS[kinds[name]]


def lacking(folder: Path) -> str:
    """The first file that a folder of graphs should have and has not; ''."""
    files = (INDEX, *FILES, *(PLAIN_FILES if (folder / "text.npz").is_file() else ()))
    return next((name for name in files if not (folder / name).is_file()), "")


def load(folder: Path, tokenizer: Tokenizer | None = None) -> OnnxModel:
    """A folder that `export` wrote.

    Raises ModelError for a folder of another version, or with something missing.
    """
    raw, text = read_json(folder / INDEX), folder / "text.npz"
    if name := lacking(folder):
        raise ModelError(f"{folder} has no {name}", hint="export the model anew")
    if raw.get("format") != FORMAT:
        raise ModelError(
            f"{folder} has format {raw.get('format')}, not {FORMAT}",
            hint="export the model anew with this version",
        )
    if unsaid := [name for name in FIELDS if name not in raw]:
        raise ModelError(f"{folder / INDEX} does not say {unsaid[0]}", hint="export the model anew")
    cfg: ModelConfig = config_from_json(ModelConfig, raw["config"], folder / INDEX)
    pieces, words = CtcPieces.load(folder / "pieces.json"), folder / "words.safetensors"
    tokens = _mapped(folder / "tokens.npy")
    head = folder / "head.npy"
    return OnnxModel(
        cfg=cfg,
        pieces=pieces,
        lexicon=Lexicon.load(words, pieces) if words.is_file() else None,
        tokenizer=tokenizer or TextTokenizer.load(folder / "tokenizer.json", raw["bos_id"]),
        name=raw["name"],
        weights_hash=raw["weights_hash"],
        folder=folder,
        sessions={name: open_session(folder / f"{name}.onnx") for name in GRAPHS},
        tokens=tokens,
        head=_mapped(head) if head.is_file() else tokens,
        stop=np.array(_mapped(folder / "stop.npy")),
        text=_prefix(text) if text.is_file() else None,
    )


def open_session(path: Path) -> Any:  # noqa: ANN401 - onnxruntime has no types
    """It computes in the thread that asks: an engine has several of these."""
    _share_arena()
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.use_env_allocators", "1")
    # A plan of where results lie is kept for every shape that came up, for ever, and wins nothing.
    options.enable_mem_pattern = False
    try:
        return ort.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"], disabled_optimizers=SLOWER
        )
    except Exception as err:
        raise ModelError(f"cannot load {path}: {err}", hint="export the model anew") from err


@functools.cache
def _share_arena() -> None:
    """All sessions take room for their results from one arena of the process. By default each has
    its own and keeps what its largest call took, though they run one after the other.
    """
    kind = ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR
    where = ort.OrtMemoryInfo("Cpu", kind, 0, ort.OrtMemType.DEFAULT)
    ort.create_and_register_allocator(where, ort.OrtArenaCfg({}))


def _prefix(path: Path) -> TextPrefix:
    try:
        with np.load(path) as stored:
            kv = {name: stored[name] for name in stored.files if name != "bias"}
            return TextPrefix(kv, stored["bias"])
    except (OSError, ValueError, KeyError, EOFError) as err:
        raise ModelError(f"cannot read {path}: {err}", hint="export the model anew") from err


def _mapped(path: Path) -> Any:  # noqa: ANN401 - numpy.memmap
    try:
        return np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError) as err:
        raise ModelError(f"cannot read {path}: {err}", hint="export the model anew") from err
