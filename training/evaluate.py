"""Word error rates of a run on packs: `python -m training.evaluate ear|stream`.

ear     greedy CTC under the streaming mask, batched: quick enough to choose checkpoints with
stream  the shipped engine, strictly streaming, from a model folder (bench.accuracy has more)

Both score with whisper-normalizer and jiwer. Packs that are marked as test are for the final
figure only.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from tqdm import tqdm

from sparqle_stream.config import EncoderConfig
from sparqle_stream.pieces import CtcPieces, greedy_path
from training.corpus import Clip, Pack
from training.errors import reported
from training.hearing import load_ear, posteriors
from training.place import is_bf16_fast


def error_rates(references: list[str], hypotheses: list[str]) -> dict[str, float]:
    """WER and CER in per cent over the whole set, Whisper's English normaliser on both sides."""
    import jiwer
    from whisper_normalizer.english import EnglishTextNormalizer

    normal = EnglishTextNormalizer()
    pairs = [(normal(r), normal(h)) for r, h in zip(references, hypotheses, strict=True)]
    pairs = [(r, h) for r, h in pairs if r]
    refs, hyps = [r for r, _ in pairs], [h for _, h in pairs]
    out = jiwer.process_words(refs, hyps)
    return {
        "wer": 100 * out.wer,
        "cer": 100 * jiwer.cer(refs, hyps),
        "substitutions": out.substitutions,
        "deletions": out.deletions,
        "insertions": out.insertions,
        "words": sum(len(r.split()) for r in refs),
    }


def greedy_texts(
    weights: Path,
    pieces: CtcPieces,
    pack: Pack,
    clips: list[Clip],
    chunk_frames: int,
    ahead: int = 0,
    device: str = "cpu",
) -> list[str]:
    """Greedy CTC text of every clip; chunk_frames 0 is full context, `ahead` in frames."""
    encoder, head = load_ear(weights, pieces.size, device)
    if is_bf16_fast(torch.device(device)):
        encoder.bfloat16()
    recordings = [pack.pcm(clip) for clip in clips]
    heard = posteriors(encoder, head, recordings, chunk_frames, ahead)
    texts = [""] * len(clips)
    for i, row in tqdm(heard, desc="ear", unit="clip", total=len(clips), disable=None):
        texts[i] = pieces.decode([piece for _, piece in greedy_path(row)])
    return texts


def ear(args: argparse.Namespace) -> dict[str, float]:
    pack, pieces = Pack(args.pack), CtcPieces.load(args.pieces)
    clips = pack.clips[:: args.every]
    texts = greedy_texts(
        args.weights,
        pieces,
        pack,
        clips,
        args.chunk_ms // 20,
        EncoderConfig().ahead_frames(args.delay_ms),
        args.device,
    )
    for clip, text in list(zip(clips, texts, strict=True))[: args.show]:
        print(f"  {clip.text}\n> {text}")
    return error_rates([c.text for c in clips], texts)


def stream(args: argparse.Namespace) -> dict[str, float]:
    from sparqle_stream import models
    from sparqle_stream.config import EngineConfig, StreamOptions, VadConfig
    from sparqle_stream.engine import Engine
    from sparqle_stream.messages import Final

    pack = Pack(args.pack)
    clips = pack.clips[:: args.every]
    options = StreamOptions(
        chunk_ms=args.chunk_ms, delay_ms=args.delay_ms, vad=VadConfig(kind=args.vad)
    )
    texts = []
    model, cfg = models.load(str(args.weights)), EngineConfig(chunk_ms=args.chunk_ms)
    with Engine(model, cfg) as engine:
        for i, clip in enumerate(tqdm(clips, desc="stream", unit="clip", disable=None)):
            events = engine.transcribe(pack.pcm(clip), options)
            texts.append("".join(e.text for e in events if isinstance(e, Final)).strip())
            if i < args.show:
                print(f"  {clip.text}\n> {texts[-1]}")
    return error_rates([c.text for c in clips], texts)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m training.evaluate", description=__doc__)
    parser.add_argument("what", choices=("ear", "stream"))
    parser.add_argument("pack", type=Path)
    parser.add_argument("--weights", type=Path, required=True, help="ear file or model folder")
    parser.add_argument("--pieces", type=Path, help="pieces.json (ear)")
    parser.add_argument("--chunk-ms", type=int, default=320, help="0: full context (ear)")
    parser.add_argument("--delay-ms", type=int, default=240)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="(ear)")
    parser.add_argument("--vad", default="silero")
    parser.add_argument("--every", type=int, default=1, help="take each n-th clip")
    parser.add_argument("--show", type=int, default=0, help="print this many pairs")
    args = parser.parse_args()
    with reported():
        print(json.dumps((ear if args.what == "ear" else stream)(args)))


if __name__ == "__main__":
    main()
