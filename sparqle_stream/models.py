"""Models: names and folders -> a model ready to run, on the backend that fits the device.

A model folder holds config.json, ear.safetensors (encoder, CTC head), bridge.safetensors (Q-Former,
stop head, LoRA), pieces.json and, if words are to be searched for in what CTC hears,
words.safetensors; its LLM is an argument. A CPU runs it as ONNX graphs, which are made once, from
the torch modules, and kept in the cache folder: from then on torch is not imported. What
`training.export --onnx` wrote is such a folder of graphs, and a model too.
"""

from __future__ import annotations

import logging
import shutil
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from sparqle_stream import artifacts
from sparqle_stream.artifacts import list_models, path, pull, verify
from sparqle_stream.config import BACKENDS, DTYPES
from sparqle_stream.config_json import read_json
from sparqle_stream.errors import ConfigError, ModelError
from sparqle_stream.onnx_cpu.settings import DEFAULT_DTYPE, FORMAT, INDEX
from sparqle_stream.onnx_cpu.settings import DTYPES as ONNX_DTYPES

if TYPE_CHECKING:
    from sparqle_stream.config import ModelConfig
    from sparqle_stream.lexicon import Lexicon
    from sparqle_stream.onnx_cpu.model import OnnxModel
    from sparqle_stream.pieces import CtcPieces
    from sparqle_stream.stages import Stages, Tokenizer
    from sparqle_stream.torch_model import SparqleModel

__all__ = ["Model", "list_models", "load", "path", "pull", "verify"]

RANDOM_TINY = "random:tiny"
log = logging.getLogger(__name__)
TORCH_DTYPES = ("float32", "bfloat16")
UNUSED_DAYS = 30  # graphs (240 MB) that nothing ran from for so long make room for new ones


class Model(Protocol):
    """What a stream's host side and the engine need of a model, whatever computes it."""

    cfg: ModelConfig
    pieces: CtcPieces
    lexicon: Lexicon | None  # None: the LLM alone decides what is written
    tokenizer: Tokenizer
    name: str
    weights_hash: str  # of the files of model and LLM
    is_shared: bool  # whether several threads may run its stages at once, each with rows of its own

    @property
    def text(self) -> object | None:
        """What makes the LLM a judge of readings; None: it is none."""
        ...

    def make_stages(self, n_rows: int) -> Stages: ...

    def weight_bytes(self) -> dict[str, int]:
        """Bytes of each stage that one row reads; of `vocabulary` for all logits."""
        ...


def load(
    name_or_path: str | Path = artifacts.DEFAULT_MODEL,
    *,
    llm: str | Path | None = None,
    dtype: str = "auto",
    device: str = "cpu",
    backend: str = "auto",
    cuda_graphs: bool = True,
) -> Model:
    """A model by name or folder with its LLM (by name, file or folder), ready on `device`.

    dtype: 'int8' (of all large matrices) or 'float32' on the ONNX backend, 'float32' or 'bfloat16'
    on torch. cuda_graphs: whether steps on CUDA are captured and replayed, or launched kernel by
    kernel. Raises ConfigError for what does not go together, ModelError for files that are
    missing or wrong.
    """
    is_random, asked = str(name_or_path) == RANDOM_TINY, dtype
    backend, dtype = choose(backend, dtype, device, is_random=is_random)
    if backend == "torch":
        loaded = _load_torch(name_or_path, llm, dtype, device)
        loaded.is_captured = cuda_graphs and loaded.device.type == "cuda"
        return loaded
    from sparqle_stream.onnx_cpu import model

    folder = Path(name_or_path)
    if not (folder / INDEX).is_file():
        return _load_graphs(name_or_path, llm, dtype)
    own = read_json(folder / INDEX).get("dtype")
    if llm is not None or asked not in ("auto", own):
        raise ConfigError(
            f"the graphs in {folder} have an LLM and a dtype ({own}) of their own",
            hint="leave --llm and --dtype out, or give the folder that they were made from",
        )
    return model.load(folder)


def choose(backend: str, dtype: str, device: str, *, is_random: bool = False) -> tuple[str, str]:
    """What 'auto' means on a device: (backend, dtype). Raises ConfigError."""
    if backend not in BACKENDS:
        raise ConfigError(f"unknown backend {backend!r}", hint=f"use {', '.join(BACKENDS)}")
    if dtype not in DTYPES:
        raise ConfigError(f"unknown dtype {dtype!r}", hint=f"use {', '.join(DTYPES)}")
    is_cpu = device.startswith("cpu")
    if backend == "auto":
        backend = "onnx" if is_cpu and not is_random and dtype != "bfloat16" else "torch"
    if backend == "onnx" and not is_cpu:
        raise ConfigError(f"the ONNX backend does not run on {device}", hint="use --backend torch")
    if backend == "onnx" and is_random:
        raise ConfigError("random models have no graphs", hint="use --backend torch")
    known = ONNX_DTYPES if backend == "onnx" else TORCH_DTYPES
    if dtype == "auto":
        dtype = DEFAULT_DTYPE if backend == "onnx" else "float32" if is_cpu else "bfloat16"
    if dtype not in known:
        raise ConfigError(
            f"--dtype {dtype} is not of the {backend} backend", hint=f"use {', '.join(known)}"
        )
    return backend, dtype


def _load_torch(
    name_or_path: str | Path, llm: str | Path | None, dtype: str, device: str
) -> SparqleModel:
    from sparqle_stream import torch_model

    if str(name_or_path) == RANDOM_TINY:
        from sparqle_stream.testing import tiny_model

        return torch_model.to_device(tiny_model(), dtype, device)
    folder = artifacts.model_folder(name_or_path)
    source = artifacts.llm_source(llm or artifacts.DEFAULT_LLM)
    return torch_model.to_device(torch_model.read(folder, source), dtype, device)


def write_graphs(
    name_or_path: str | Path, llm: str | Path | None, out: Path, dtype: str = DEFAULT_DTYPE
) -> None:
    """The graphs of a model with its LLM, in one of its dtypes, into the folder `out`."""
    from sparqle_stream import torch_model
    from sparqle_stream.onnx_cpu.export import export

    folder = artifacts.model_folder(name_or_path)
    model = torch_model.read(folder, artifacts.llm_source(llm or artifacts.DEFAULT_LLM))
    for part in (model.encoder, model.ctc, model.qformer, model.llm):
        part.float().eval()
    words = folder / artifacts.WORDS_FILE
    export(model, out, dtype, words if words.is_file() else None)


def graphs_folder(name_or_path: str | Path, llm: str | Path | None, dtype: str) -> Path:
    """Where a model's graphs are in the cache, or will be. Raises ModelError without the model."""
    folder = artifacts.model_folder(name_or_path)
    source = artifacts.llm_source(llm or artifacts.DEFAULT_LLM)
    key = f"{artifacts.hash_of(folder, source)}-{dtype}-{FORMAT}"
    return artifacts.cache_dir() / "graphs" / key


def _load_graphs(name_or_path: str | Path, llm: str | Path | None, dtype: str) -> OnnxModel:
    """From the cache; they are made where they are missing or damaged."""
    from sparqle_stream.onnx_cpu import model

    out = graphs_folder(name_or_path, llm, dtype)
    if (loaded := _cached(out)) is not None:
        with suppress(OSError):  # of somebody else, or on a disk that cannot be written
            (out / INDEX).touch()
        return loaded
    from filelock import FileLock

    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(out.parent / ".lock"):  # two processes may want them at once
            if (loaded := _cached(out)) is None:
                _make_room(out.parent)
                write_graphs(name_or_path, llm, out, dtype)
                loaded = model.load(out)
    except OSError as err:
        raise ModelError(
            f"cannot write the model's graphs to {out.parent}: {err}",
            hint="make room there, point SPARQLE_HOME elsewhere, or use --backend torch",
        ) from err
    return loaded


def _cached(out: Path) -> OnnxModel | None:
    """The graphs of a folder; None where there are none, or what is there is damaged."""
    from sparqle_stream.onnx_cpu import model

    if not (out / INDEX).is_file():
        return None
    try:
        return model.load(out)
    except ModelError as err:
        log.warning("%s; made anew", err.message)
        return None


def _make_room(graphs: Path) -> None:
    """Removes graphs of models that are not used any more, and what killed processes left."""
    for left in graphs.glob(".tmp-*"):
        shutil.rmtree(left, ignore_errors=True)
    oldest = time.time() - UNUSED_DAYS * 86400
    for index in graphs.glob(f"*/{INDEX}"):
        if index.stat().st_mtime < oldest:
            shutil.rmtree(index.parent, ignore_errors=True)
