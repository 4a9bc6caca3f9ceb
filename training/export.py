"""Trained parts -> a model folder that `sparqle-stream --model` loads.

`python -m training.export OUT --ear runs/ear/ear.safetensors --bridge runs/joint/bridge.safetensors
--pieces runs/pieces.json --words runs/words.safetensors`

The encoder's matrices are stored in int8 with a scale for every row, Q-Former and adapters in bf16;
norms, biases and the small heads in float32. `--text runs/prefix/prefix.safetensors` puts the
prefix with which the LLM judges readings into bridge.safetensors. `--onnx FOLDER` writes the graphs
as well that ONNX Runtime runs (docs/onnx.md); a folder that `--model` loads too, without torch.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors.torch import save_file

from sparqle_stream import models
from sparqle_stream.artifacts import sha256
from sparqle_stream.config import ModelConfig, QFormerConfig, WriterConfig
from sparqle_stream.config_json import read_json
from sparqle_stream.errors import ConfigError, ModelError
from sparqle_stream.onnx_cpu.export import require_place
from sparqle_stream.onnx_cpu.settings import DEFAULT_DTYPE, DTYPES
from sparqle_stream.tasks import TRANSCRIBE, name_of
from sparqle_stream.weights import (
    expanded,
    in_eight_bits,
    part,
    read_safetensors,
    whisper_config,
)
from training.errors import reported
from training.hearing import head_config
from training.lora import LORA_SCALE

if TYPE_CHECKING:
    from torch import Tensor


STORED = ("ear.safetensors", "bridge.safetensors", "pieces.json")
PREFIX = ("text.k", "text.v", "text.ids", "text.bias")  # of training.prefix


def compact(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Matrices as bf16, other numbers as float32; integers (the ids of a prefix) stay."""

    def smaller(value: Tensor) -> Tensor:
        if not value.is_floating_point():
            return value
        return value.bfloat16() if value.ndim >= 2 and value.numel() > 4096 else value.float()

    return {name: smaller(value).contiguous() for name, value in weights.items()}


def export(
    out: Path,
    ear: Path,
    bridge: Path,
    pieces: Path,
    words: Path | None,
    writer: WriterConfig,
    tasks: tuple[str, ...] = (TRANSCRIBE,),
) -> None:
    """Writes the folder `out`. Raises ConfigError for tasks that could not be done with it."""
    for task in tasks:
        name_of(*task.split(" to "))
    if words is not None and tasks != (TRANSCRIBE,):
        raise ConfigError(
            "with a lexicon only what was said can be written", hint="leave --words out"
        )
    heard, trained = expanded(read_safetensors(ear)), read_safetensors(bridge)
    cfg = replace(shapes(heard, trained), name=out.name, tasks=tasks, writer=writer)
    encoder = {name: value for name, value in heard.items() if name.startswith("encoder.")}
    head = {name: value for name, value in heard.items() if name.startswith("ctc.")}
    out.mkdir(parents=True, exist_ok=True)
    # Beside their places, then renamed: `out` may be the folder that the parts lie in.
    with tempfile.TemporaryDirectory(dir=out, prefix=".tmp-") as temporary:
        new = Path(temporary)
        save_file(in_eight_bits(encoder) | compact(head), new / "ear.safetensors")
        save_file(compact(trained), new / "bridge.safetensors")
        shutil.copyfile(pieces, new / "pieces.json")
        stored = [*STORED]
        if words is not None:
            shutil.copyfile(words, new / "words.safetensors")
            stored.append("words.safetensors")
        hashes = {name: sha256(new / name) for name in stored}  # what `models verify` compares
        extra = {"lora_scale": LORA_SCALE, "sha256": hashes}
        config = new / "config.json"
        config.write_text(json.dumps(asdict(cfg) | extra, indent=1) + "\n")
        for name in stored:
            _share(new / name, config)
        for path in (*(new / name for name in stored), config):
            path.replace(out / path.name)


def _share(weights: Path, like: Path) -> None:
    """Who may read one may read the other: safetensors lets nobody else read what it writes."""
    weights.chmod(like.stat().st_mode & 0o777)


def add_text(folder: Path, text: Path) -> None:
    """Puts `text`, what training.prefix made, into a model folder's bridge.safetensors, in place of
    an older prefix and, if it has them, of the LLM's adapters. Other tensors stay as they are;
    config.json gets the new hash.

    Raises ModelError for files that cannot be read, or a `text` that holds something else.
    """
    prefix, bridge = read_safetensors(text), folder / "bridge.safetensors"
    if {name for name in prefix if not name.startswith("lora.")} != set(PREFIX):
        raise ModelError(
            f"{text} is no prefix: it has {', '.join(sorted(prefix)[:3]) or 'nothing'}",
            hint="give prefix.safetensors of training.prefix",
        )
    rest = {k: v for k, v in read_safetensors(bridge).items() if not k.startswith("text.")}
    if unknown := {name for name in prefix if name.startswith("lora.")} - rest.keys():
        raise ModelError(
            f"{bridge} has no {min(unknown)}", hint="give the bridge that the adapters are of"
        )
    # Beside it, then renamed: the tensors that are written may be a memory map of the old file.
    whole = folder / "bridge.tmp"
    save_file(rest | prefix, whole)
    _share(whole, folder / "config.json")
    whole.replace(bridge)
    config = read_json(folder / "config.json")
    config["sha256"] = config.get("sha256", {}) | {bridge.name: sha256(bridge)}
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")


def shapes(heard: dict[str, Tensor], trained: dict[str, Tensor]) -> ModelConfig:
    """The config of weights that training made, by their shapes."""
    encoder, n_pieces = part(heard, "encoder"), len(heard["ctc.out.bias"])
    width = encoder["conv1.weight"].shape[0]
    layers = {name.split(".")[2] for name in trained if name.startswith("qformer.layers.")}
    llm_width, own_width = trained["qformer.out.weight"].shape
    return replace(
        ModelConfig(),
        encoder=whisper_config(encoder),
        ctc=head_config(part(heard, "ctc"), width, n_pieces),
        qformer=replace(
            QFormerConfig(),
            kind="window" if "qformer.queries" in trained else "stack",
            width=own_width,
            n_layers=len(layers) or QFormerConfig().n_layers,
            encoder_width=width,
            llm_width=llm_width,
            n_pieces=n_pieces,
        ),
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m training.export", description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--ear", type=Path, required=True)
    parser.add_argument("--bridge", type=Path, required=True)
    parser.add_argument("--pieces", type=Path, required=True)
    parser.add_argument("--words", type=Path, help="lexicon; without it the LLM decides alone")
    parser.add_argument("--text", type=Path, help="prefix.safetensors of training.prefix")
    tuned = ("llm_weight", "stop_threshold", "mark_odds", "mark_margin", "case_margin")
    for name in tuned:
        default = getattr(WriterConfig(), name)
        parser.add_argument(f"--{name.replace('_', '-')}", type=float, default=default)
    parser.add_argument("--onnx", type=Path, metavar="FOLDER", help="write the graphs there too")
    parser.add_argument("--llm", help="language model of the graphs (default: the model's own)")
    parser.add_argument(
        "--dtype", choices=DTYPES, default=DEFAULT_DTYPE, help="its precision there"
    )
    parser.add_argument(
        "--tasks", nargs="+", default=[TRANSCRIBE], help='such as transcribe "translate to de"'
    )
    args = parser.parse_args()
    with reported():
        if args.onnx:
            require_place(args.onnx)  # said before minutes of work
        writer = WriterConfig(**{name: getattr(args, name) for name in tuned})
        export(args.out, args.ear, args.bridge, args.pieces, args.words, writer, tuple(args.tasks))
        if args.text:
            add_text(args.out, args.text)
        if args.onnx:
            models.write_graphs(args.out, args.llm, args.onnx, args.dtype)
    size = sum(p.stat().st_size for p in args.out.iterdir()) / 1e6
    print(f"{args.out}: {size:.1f} MB")


if __name__ == "__main__":
    main()
