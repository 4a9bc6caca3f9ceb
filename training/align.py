"""CTC forced alignment: when does each word of a transcript end, and does it fit the audio at all?

Viterbi over blank-interleaved pieces (Kürzinger et al., 2020, without the segmentation part).
training.joint runs it on the posteriors that the streaming encoder gave for this very audio, so a
word's end is the moment at which the engine could have known it. The command writes it down once,
heard with full context:

`python -m training.align PACK|FOLDER --ear EAR.safetensors --pieces PIECES.json [--resume]`

makes words.jsonl beside the pack's index or the manifest: one object a recording with `id`, `score`
(mean log-probability a frame), `is_poor` and `words`, [text, end in ms] each. Sources of a run with
`skip_poor = true` leave out what is poor, and what could not be aligned.
"""

from __future__ import annotations

import argparse
import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn import functional as F
from tqdm import tqdm

from sparqle_stream.config import FRAMES_PER_CTC
from sparqle_stream.errors import ConfigError
from sparqle_stream.pieces import BLANK, CtcPieces
from training.text import spoken

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from sparqle_stream.ctc import CtcHead
    from sparqle_stream.encoder import Encoder
    from training.data import Floats

    Transcript = tuple[str, str, object]  # id, text, handle
    Alignment = tuple[NDArray[np.int64], float]  # last frame of each piece, score

WORDS = "words.jsonl"
HEARD_AT_ONCE = 240  # recordings in memory
CTC_FRAME_MS = FRAMES_PER_CTC * 20

BAD_ALIGNMENT = -1.2  # mean log-probability a frame; below it the transcript is not this audio's
CTC_EARLY_FRAMES = 1  # CTC peaks come about 50 ms before the end of a word (models.md 3.3)


@dataclass(frozen=True, slots=True)
class AlignedWord:
    """A written word and the CTC frame (40 ms) after which it is over."""

    text: str
    end_frame: int

    @property
    def end_ms(self) -> int:
        return (self.end_frame + 1) * CTC_FRAME_MS


def viterbi(log_probs: NDArray[np.float32], pieces: list[int]) -> Alignment:
    """log_probs (T, V), pieces (L) -> last frame of each piece (L), mean log-probability a frame.

    Returns a score of -inf when T frames cannot hold the pieces.
    """
    return viterbi_rows(torch.from_numpy(log_probs)[None], [pieces])[0]


@torch.no_grad()
def viterbi_rows(log_probs: Tensor, pieces: Sequence[list[int]]) -> list[Alignment]:
    """The same for the rows of log_probs (B, T, V) at once, on their device."""
    n_rows, n_frames, _ = log_probs.shape
    if not n_rows or not n_frames:
        return [(np.zeros(len(row), np.int64), -np.inf) for row in pieces]
    n_states = torch.tensor([2 * len(row) + 1 for row in pieces])
    states = torch.full((n_rows, int(n_states.max())), BLANK)
    for i, row in enumerate(pieces):
        states[i, 1 : n_states[i] : 2] = torch.tensor(row, dtype=torch.long)
    can_skip = torch.zeros_like(states, dtype=torch.bool)
    can_skip[:, 3::2] = states[:, 3::2] != states[:, 1:-2:2]
    is_none = torch.arange(states.shape[1]) >= n_states[:, None]
    places = states[:, None].expand(-1, n_frames, -1).to(log_probs.device)
    emit = log_probs.float().gather(2, places)
    emit = emit.masked_fill(is_none[:, None].to(emit.device), -torch.inf)
    score, back = _forward(emit, can_skip.to(emit.device))
    return _backward(score.cpu().numpy(), back.cpu().numpy(), n_states.numpy())


def _forward(emit: Tensor, can_skip: Tensor) -> tuple[Tensor, Tensor]:
    """emit (B, T, S) -> scores of the last frame (B, S), steps into every state (T, B, S)."""
    score = torch.full_like(emit[:, 0], -torch.inf)
    score[:, :2] = emit[:, 0, :2]
    back = torch.zeros(emit.shape[1], *score.shape, dtype=torch.uint8, device=emit.device)
    for t in range(1, emit.shape[1]):
        one = F.pad(score[:, :-1], (1, 0), value=-torch.inf)
        two = F.pad(one[:, :-1], (1, 0), value=-torch.inf).masked_fill(~can_skip, -torch.inf)
        best, step = torch.stack([score, one, two]).max(dim=0)
        back[t] = step
        score = best + emit[:, t]
    return score, back


def _backward(
    score: NDArray[np.float32], back: NDArray[np.uint8], n_states: NDArray[np.int64]
) -> list[Alignment]:
    """From the better of the last two states of every row back to its first frame."""
    row, n_frames = np.arange(len(score)), len(back)
    state = n_states - 1
    before = np.maximum(n_states - 2, 0)
    state = np.where(score[row, state] >= score[row, before], state, before)
    total = score[row, state] / n_frames
    last = np.full((len(score), n_states.max() // 2 + 1), -1)
    for t in range(n_frames - 1, -1, -1):
        is_end = (state % 2 == 1) & (last[row, state // 2] < 0)
        last[row[is_end], state[is_end] // 2] = t
        state = state - back[t, row, state]
    n_pieces = n_states // 2
    is_whole = (n_pieces > 0) & (n_pieces <= n_frames)
    return [
        (last[i, :n], float(total[i])) if ok else (np.zeros(n, np.int64), -np.inf)
        for i, (n, ok) in enumerate(zip(n_pieces, is_whole, strict=True))
    ]


def align_words(
    log_probs: NDArray[np.float32], text: str, pieces: CtcPieces
) -> tuple[list[AlignedWord], float]:
    """Written words with their last CTC frame, and the alignment's score.

    A written word may be several spoken ones ("twenty-one") or none ("-"): the latter ends with
    the word before it.
    """
    return align_rows(torch.from_numpy(log_probs)[None], [text], pieces)[0]


def align_rows(
    log_probs: Tensor, texts: Sequence[str], pieces: CtcPieces
) -> list[tuple[list[AlignedWord], float]]:
    """`align_words` for the rows of log_probs (B, T, V)."""
    spelled = [[_spelling(word, pieces) for word in text.split()] for text in texts]
    flat = [[piece for spelling in row for piece in spelling] for row in spelled]
    paths = viterbi_rows(log_probs, flat)
    out = []
    for text, row, (ends, score) in zip(texts, spelled, paths, strict=True):
        words, used, end = [], 0, 0
        for word, spelling in zip(text.split(), row, strict=True):
            used += len(spelling)
            if spelling:
                end = int(ends[used - 1]) + CTC_EARLY_FRAMES
            words.append(AlignedWord(word, min(end, log_probs.shape[1] - 1)))
        out.append((words, score))
    return out


def _spelling(word: str, pieces: CtcPieces) -> list[int]:
    return pieces.encode(spoken(word)) if spoken(word) else []


def poor_ids(folder: Path) -> set[str] | None:
    """What words.jsonl in a pack's folder marks as poor; None where there is no such file."""
    if not (folder / WORDS).is_file():
        return None
    return {row["id"] for row in known_rows(folder / WORDS) if row["is_poor"]}


def known_rows(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a words.jsonl; a run that was killed has left half of its last one.

    Raises ConfigError for another line that is no JSON.
    """
    rows, lines = [], path.read_text().splitlines()
    for n, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except ValueError as err:
            if n == len(lines):
                break
            raise ConfigError(
                f"line {n} of {path} is not JSON: {err}", hint="run python -m training.align anew"
            ) from err
    return rows


def transcripts(source: Path) -> list[Transcript]:
    """Id, text and a handle of everything that a pack or a manifest transcribes."""
    from training import manifests
    from training.corpus import Pack

    if (source / "index.jsonl").is_file():
        return [(c.id, c.text, c) for c in Pack(source).clips if c.text]
    return [(r.id, r.text, r) for r in manifests.read_all([source]) if r.text]


def recordings(
    source: Path, todo: Sequence[Transcript], *, is_any: bool = False
) -> Iterator[tuple[Transcript, Floats]]:
    """Some of `transcripts`, each with its PCM (S,); files that cannot be decoded are left out.

    Raises AudioFormatError as decode_all does; `is_any` is for that.
    """
    from training.corpus import Clip, Pack, decode_all
    from training.manifests import Recording

    pack = Pack(source) if (source / "index.jsonl").is_file() else None
    named: dict[str, Transcript] = {}
    for one in todo:
        if pack and isinstance(one[2], Clip):
            yield one, pack.pcm(one[2])
        else:
            named[one[0]] = one
    files = (one[2] for one in named.values() if isinstance(one[2], Recording))
    for found, pcm in decode_all(files, is_any=is_any):
        yield named[found.id], pcm.astype(np.float32) / np.float32(32768)


def align(
    source: Path,
    todo: Sequence[Transcript],
    ear: tuple[Encoder, CtcHead],
    pieces: CtcPieces,
    chunk_frames: int,
    poor: float,
    *,
    is_any: bool = False,
) -> Iterator[dict[str, object]]:
    """Lines of words.jsonl for some of `transcripts`; chunk_frames 0 hears with full context."""
    from training.hearing import posteriors

    bar = tqdm(total=len(todo), desc="align", unit="clip", disable=None)
    decoded = recordings(source, todo, is_any=is_any)
    while pairs := list(itertools.islice(decoded, HEARD_AT_ONCE)):
        part = [one for one, _ in pairs]
        for i, log_probs in posteriors(*ear, [pcm for _, pcm in pairs], chunk_frames):
            words, score = align_words(log_probs.numpy(), part[i][1], pieces)
            is_poor = not score >= poor
            told = [] if score == -np.inf else [[w.text, w.end_ms] for w in words]
            bar.update()
            yield {
                "id": part[i][0],
                "score": None if score == -np.inf else round(score, 4),
                "is_poor": is_poor,
                "words": told,
            }


def _write_whole(out: Path, rows: list[dict[str, Any]]) -> None:
    """Only these rows, replaced at once: the next one must not be glued to half a line."""
    part = out.with_name(f"{out.name}.part")
    part.write_text("".join(json.dumps(row) + "\n" for row in rows))
    part.replace(out)


def main() -> None:
    from training.errors import reported
    from training.hearing import load_ear

    parser = argparse.ArgumentParser(prog="python -m training.align", description=__doc__)
    parser.add_argument("source", type=Path, help="a pack, or a folder or file with a manifest")
    parser.add_argument("--ear", type=Path, required=True, help="weights of training.adapt")
    parser.add_argument("--pieces", type=Path, required=True)
    parser.add_argument("--out", type=Path, help=f"(default: {WORDS} beside the manifest)")
    parser.add_argument("--chunk-ms", type=int, default=0, help="0: full context (default)")
    parser.add_argument("--poor", type=float, default=BAD_ALIGNMENT, help="(default: %(default)s)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--resume", action="store_true", help="go on with what is not aligned yet")
    args = parser.parse_args()
    folder = args.source if args.source.is_dir() else args.source.parent
    out = args.out or folder / WORDS
    with reported():
        known = known_rows(out) if args.resume and out.is_file() else []
        n, n_poor = len(known), sum(row["is_poor"] for row in known)
        pieces, done = CtcPieces.load(args.pieces), {row["id"] for row in known}
        ear = load_ear(args.ear, pieces.size, args.device)
        todo = [one for one in transcripts(args.source) if one[0] not in done]
        # Only now: a misspelt name must not cost what an earlier run has written.
        _write_whole(out, known)
        with out.open("a") as file:
            found = align(
                args.source,
                todo,
                ear,
                pieces,
                args.chunk_ms // 20,
                args.poor,
                is_any=bool(known),
            )
            for row in found:
                file.write(json.dumps(row) + "\n")
                file.flush()
                n, n_poor = n + 1, n_poor + bool(row["is_poor"])
    print(f"{n} recordings, {n_poor} of them poor -> {out}")


if __name__ == "__main__":
    main()
