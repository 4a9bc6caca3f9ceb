"""Trained parts -> a model folder that `sparqle-stream --model` loads.

`python -m training.export OUT --ear runs/ear/ear.safetensors --bridge runs/joint/bridge.safetensors
--pieces runs/pieces.json --words runs/words.safetensors`

Encoder, Q-Former and adapters are stored as bf16; norms, biases and the small heads as float32.
"""

from __future__ import annotations

import argparse
import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors.torch import load_file, save_file

from sparqle_stream.artifacts import sha256
from sparqle_stream.config import CtcConfig, ModelConfig, QFormerConfig, WriterConfig
from sparqle_stream.ctc import CtcPieces

if TYPE_CHECKING:
    from torch import Tensor


STORED = ("encoder.safetensors", "bridge.safetensors", "pieces.json")


def compact(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Matrices as bf16, everything else as float32."""
    return {
        k: (v.bfloat16() if v.ndim >= 2 and v.numel() > 4096 else v.float()).contiguous()
        for k, v in weights.items()
    }


def export(
    out: Path, ear: Path, bridge: Path, pieces: Path, words: Path | None, writer: WriterConfig
) -> None:
    out.mkdir(parents=True, exist_ok=True)
    heard, trained = load_file(ear), load_file(bridge)
    encoder = {k.removeprefix("encoder."): v for k, v in heard.items() if k.startswith("encoder.")}
    head = {k: v for k, v in heard.items() if k.startswith("ctc.")}
    save_file(compact(encoder), out / "encoder.safetensors")
    save_file(compact(head | trained), out / "bridge.safetensors")
    shutil.copyfile(pieces, out / "pieces.json")
    stored = [*STORED]
    if words is not None:
        shutil.copyfile(words, out / "words.safetensors")
        stored.append("words.safetensors")
    kind = "window" if "qformer.queries" in trained else "stack"
    n_pieces = CtcPieces.load(pieces).size
    cfg = replace(
        ModelConfig(),
        name=out.name,
        ctc=CtcConfig(n_pieces=n_pieces),
        qformer=QFormerConfig(kind=kind, n_pieces=n_pieces),
        writer=writer,
    )
    hashes = {name: sha256(out / name) for name in stored}  # what `models verify` compares
    extra = {"lora_scale": 2.0, "sha256": hashes}
    (out / "config.json").write_text(json.dumps(asdict(cfg) | extra, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m training.export", description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--ear", type=Path, required=True)
    parser.add_argument("--bridge", type=Path, required=True)
    parser.add_argument("--pieces", type=Path, required=True)
    parser.add_argument("--words", type=Path, help="lexicon; without it the LLM decides alone")
    for name in ("llm_weight", "stop_threshold", "mark_odds"):
        default = getattr(WriterConfig(), name)
        parser.add_argument(f"--{name.replace('_', '-')}", type=float, default=default)
    args = parser.parse_args()
    writer = WriterConfig(args.llm_weight, args.stop_threshold, args.mark_odds)
    export(args.out, args.ear, args.bridge, args.pieces, args.words, writer)
    size = sum(p.stat().st_size for p in args.out.iterdir()) / 1e6
    print(f"{args.out}: {size:.1f} MB")


if __name__ == "__main__":
    main()
