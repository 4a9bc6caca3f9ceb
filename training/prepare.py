"""Prepare data: `python -m training.prepare pack|text|passages|synth|pieces|whisper`.

pack   manifests with audio files, ours or lhotse's -> a pack (see training.corpus)
text   books (.xhtml, .html, .txt) -> one sentence a line
passages  books -> one passage a line, cut as readers cut it
synth  sentences -> a pack of synthetic speech
pieces sentences and transcripts -> the CTC head's vocabulary
whisper  OpenAI's Whisper encoder -> starting weights under our names
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

from safetensors.torch import save_file
from tqdm import tqdm

from sparqle_stream.weights import import_whisper
from training import manifests
from training.books import Shared, passages_of, sentences_of
from training.corpus import Pack, PackWriter, after, decode_all
from training.errors import reported
from training.synth import speak
from training.text import is_spelled_out, train_pieces

FACTS = ("id", "text", "speaker", "corpus", "licence")


def pack(args: argparse.Namespace) -> None:
    found = manifests.read_all(args.sources)
    with PackWriter(args.out, resume=args.resume) as writer:
        left = after(found, writer.last_id)
        bar = tqdm(left, "decode", len(found), initial=len(found) - len(left), unit="clip")
        for one, pcm in decode_all(bar, is_any=len(left) < len(found)):
            facts = {key: getattr(one, key) for key in FACTS}
            writer.add(pcm, targets=dict(one.targets), **facts)


def text(args: argparse.Namespace) -> None:
    shared, found = Shared.of(args.without), set[str]()
    for path in tqdm(args.files, "text", unit="book"):
        found |= {s for s in sentences_of(path.read_text(errors="ignore")) if s not in shared}
    args.out.write_text("\n".join(sorted(found)) + "\n")
    print(f"{len(found)} sentences -> {args.out}")


def passages(args: argparse.Namespace) -> None:
    shared, rng, found = Shared.of(args.without), random.Random(args.seed), list[str]()
    for path in tqdm(args.files, "passages", unit="book"):
        made = passages_of(path.read_text(errors="ignore"), rng)
        found += [passage for passage in made if passage not in shared]
    rng.shuffle(found)
    args.out.write_text("\n".join(found) + "\n")
    print(f"{len(found)} passages -> {args.out}")


def synth(args: argparse.Namespace) -> None:
    hours = speak(args.text.read_text().splitlines(), args.out, args.hours, args.seed)
    print(f"{hours:.2f} h of synthetic speech -> {args.out}")


def pieces(args: argparse.Namespace) -> None:
    lines = [line for path in args.text for line in path.read_text().splitlines()]
    for folder in args.packs:
        lines += sorted({c.text for c in Pack(folder).clips if is_spelled_out(c.text)})
    made = train_pieces(lines, args.size, args.out)
    print(f"{made.size} pieces -> {args.out}")


def whisper(args: argparse.Namespace) -> None:
    """OpenAI's names -> ours; positions are computed, not stored."""
    state = import_whisper(args.weights)
    save_file({name: value.contiguous() for name, value in state.items()}, args.out)
    print(f"{len(state)} tensors -> {args.out}")


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m training.prepare", description=__doc__)
    commands = top.add_subparsers(required=True)
    one = commands.add_parser("pack", help="decode manifests into a pack")
    one.add_argument("out", type=Path)
    one.add_argument(
        "sources",
        type=Path,
        nargs="+",
        help="folders with manifest.jsonl, LibriSpeech or lhotse's manifests; or cuts.jsonl[.gz]",
    )
    one.add_argument("--resume", action="store_true", help="go on where it was killed")
    one.set_defaults(run=pack)
    cut = {
        "text": (text, "books to sentences"),
        "passages": (passages, "books to passages, as readers cut them"),
    }
    for name, (run, about) in cut.items():
        one = commands.add_parser(name, help=about)
        one.add_argument("out", type=Path)
        one.add_argument("files", type=Path, nargs="+")
        one.add_argument(
            "--without",
            type=Path,
            nargs="*",
            default=[],
            help="manifests or texts; what shares six words in a row with them is left out",
        )
        if run is passages:
            one.add_argument("--seed", type=int, default=0, help="of where passages end")
        one.set_defaults(run=run)
    one = commands.add_parser("synth", help="speak sentences")
    one.add_argument("out", type=Path)
    one.add_argument("--text", type=Path, required=True)
    one.add_argument("--hours", type=float, default=1.0)
    one.add_argument("--seed", type=int, default=0)
    one.set_defaults(run=synth)
    one = commands.add_parser("pieces", help="train the CTC head's vocabulary")
    one.add_argument("out", type=Path)
    one.add_argument("--text", type=Path, nargs="*", default=[], help="one sentence a line")
    one.add_argument("--packs", type=Path, nargs="*", default=[], help="packs with transcripts")
    one.add_argument("--size", type=int, default=256)
    one.set_defaults(run=pieces)
    one = commands.add_parser("whisper", help="convert starting weights")
    one.add_argument("out", type=Path)
    one.add_argument("weights", type=Path, help="safetensors with openai/whisper's names")
    one.set_defaults(run=whisper)
    return top


def main() -> None:
    args = parser().parse_args()
    with reported():
        args.run(args)


if __name__ == "__main__":
    main()
