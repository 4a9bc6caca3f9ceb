"""Label recordings that nobody has transcribed: noisy-student training (Park et al., 2020).

An ear and a lexicon read each recording with all the sight that they can have: far look-ahead, and
a word beam that decides at the end. What they are sure of becomes a transcript for training.adapt,
which then hears the same audio in noise, rooms and short chunks. Sure means: a high mean
log-probability of the text's pieces under the ear, along the best alignment. A share of the labels
is wrong all the same: give such a pack less weight than what people wrote.

`python -m training.label OUT SOURCE... --ear EAR --pieces PIECES --words WORDS` makes a pack.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tqdm import tqdm

from sparqle_stream.config import BeamConfig
from sparqle_stream.lexicon import Lexicon
from sparqle_stream.pieces import CtcPieces
from sparqle_stream.word_beam import WordBeam
from training import manifests
from training.align import viterbi
from training.corpus import PackWriter, after, decode_all
from training.errors import reported
from training.hearing import load_ear, posteriors

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from training.manifests import Recording

    Floats = NDArray[np.float32]
    Label = tuple[Recording, NDArray[np.int16], str, float]

CHUNK_FRAMES, AHEAD_FRAMES = 64, 16  # 1.28 s at a time, 320 ms ahead: near full context, any length
HEARD_AT_ONCE = 96
LEAST_SCORE = -1.1  # of dev/varied's better half, where one word in five is wrong


def read(log_probs: Floats, lexicon: Lexicon) -> str:
    """log_probs (T, V) of a whole recording -> the word beam's best reading."""
    words: list[str] = []
    beam = WordBeam(lexicon, BeamConfig())
    beam.hear(log_probs)
    while True:
        found, _, nothing = beam.candidates()
        if not found or nothing > found[0].score:
            return " ".join(words)
        words.append(found[0].word.text)
        beam.commit(words[-1])


def sureness(log_probs: Floats, text: str, pieces: CtcPieces) -> float:
    """Log-probability of the text's best alignment with (T, V), a piece; -inf for no text."""
    spelling = [piece for word in text.split() for piece in pieces.encode(word)]
    if not spelling:
        return -np.inf
    return viterbi(log_probs, spelling)[1] * len(log_probs) / len(spelling)


def label(
    recordings: Sequence[Recording],
    ear: Path,
    pieces: CtcPieces,
    lexicon: Lexicon,
    *,
    is_any: bool = False,
) -> Iterator[Label]:
    """Every recording with its PCM (S,) int16, what was read, and how sure that is.

    In their order, since --resume goes on behind the last one; `is_any` as decode_all has it.
    """
    encoder, head = load_ear(ear, pieces.size)
    decoded = decode_all(recordings, is_any=is_any)
    while part := list(itertools.islice(decoded, HEARD_AT_ONCE)):
        pcm = [samples.astype(np.float32) / np.float32(32768) for _, samples in part]
        of_part = dict(posteriors(encoder, head, pcm, CHUNK_FRAMES, AHEAD_FRAMES))
        for i, one in enumerate(part):
            heard = of_part.pop(i).numpy()
            text = read(heard, lexicon)
            yield *one, text, sureness(heard, text, pieces)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m training.label", description=__doc__)
    parser.add_argument("out", type=Path, help="the pack")
    parser.add_argument("sources", type=Path, nargs="+", help="folders or files with a manifest")
    parser.add_argument("--ear", type=Path, required=True, help="weights of training.adapt")
    parser.add_argument("--pieces", type=Path, required=True)
    parser.add_argument("--words", type=Path, required=True, help="lexicon of training.words")
    parser.add_argument(
        "--least", type=float, default=LEAST_SCORE, help="sureness of a label (default %(default)s)"
    )
    parser.add_argument("--resume", action="store_true", help="go on where it was killed")
    args = parser.parse_args()
    with reported():
        pieces = CtcPieces.load(args.pieces)
        lexicon = Lexicon.load(args.words, pieces)
        todo = manifests.read_all(args.sources)
        with PackWriter(args.out, resume=args.resume) as writer:
            left = after(todo, writer.last_id)
            n_done = len(todo) - len(left)
            found = label(left, args.ear, pieces, lexicon, is_any=n_done > 0)
            bar = tqdm(found, "label", len(todo), initial=n_done, unit="clip", disable=None)
            for one, pcm, text, score in bar:
                if score >= args.least:
                    writer.add(
                        pcm,
                        id=one.id,
                        text=text,
                        speaker=one.speaker,
                        corpus=one.corpus,
                        licence=one.licence,
                    )
    hours = writer.seconds / 3600
    print(f"{writer.n_clips} of {len(todo)} recordings, {hours:.2f} h -> {args.out}")


if __name__ == "__main__":
    main()
