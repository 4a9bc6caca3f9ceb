"""Prepare data: `python -m training.prepare pack|text|synth`.

pack   manifests with audio files -> a pack (see training.corpus)
text   books (.xhtml, .html, .txt) -> one sentence a line
synth  sentences -> a pack of synthetic speech
"""

from __future__ import annotations

import argparse
from pathlib import Path

from tqdm import tqdm

from training.corpus import PackWriter, decode_file, read_manifest
from training.synth import sentences_of, speak


def pack(args: argparse.Namespace) -> None:
    writer = PackWriter(args.out)
    rows = [row for folder in args.folders for row in read_manifest(folder)]
    for row in tqdm(rows, desc="decode", unit="clip"):
        facts = {key: row.get(key) or "" for key in ("id", "text", "speaker", "corpus", "licence")}
        writer.add(decode_file(Path(row["audio"])), **facts)
    writer.close()


def text(args: argparse.Namespace) -> None:
    found = {s for path in args.files for s in sentences_of(path.read_text(errors="ignore"))}
    args.out.write_text("\n".join(sorted(found)) + "\n")
    print(f"{len(found)} sentences -> {args.out}")


def synth(args: argparse.Namespace) -> None:
    hours = speak(args.text.read_text().splitlines(), args.out, args.hours, args.seed)
    print(f"{hours:.2f} h of synthetic speech -> {args.out}")


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m training.prepare", description=__doc__)
    commands = top.add_subparsers(required=True)
    one = commands.add_parser("pack", help="decode manifests into a pack")
    one.add_argument("out", type=Path)
    one.add_argument("folders", type=Path, nargs="+", help="folders with manifest.jsonl")
    one.set_defaults(run=pack)
    one = commands.add_parser("text", help="books to sentences")
    one.add_argument("out", type=Path)
    one.add_argument("files", type=Path, nargs="+")
    one.set_defaults(run=text)
    one = commands.add_parser("synth", help="speak sentences")
    one.add_argument("out", type=Path)
    one.add_argument("--text", type=Path, required=True)
    one.add_argument("--hours", type=float, default=1.0)
    one.add_argument("--seed", type=int, default=0)
    one.set_defaults(run=synth)
    return top


def main() -> None:
    args = parser().parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
