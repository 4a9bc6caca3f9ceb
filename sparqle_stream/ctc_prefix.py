"""CTC prefix: how well a text agrees with everything that CTC has heard, text by text.

In: CTC log-probabilities (C, V) of each chunk; the texts that could be written next. Out: their
prefix scores (Graves, 2008; Watanabe et al., 2017): the probability that what was said begins with
all that was written and then this text, whatever follows, summed over all ways to spell it in
pieces. Contract: the frames that written words have used up are dropped, so a state is bounded and
a score costs a second or two of frames. Latency: none.

Texts are what CTC spells: a to z and apostrophes, a space before every word.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from sparqle_stream.ctc import CtcPieces

Doubles = npt.NDArray[np.float64]

BLANK = 0
MAX_FRAMES = 192  # 7.7 s of frames that may wait for words
KEPT_BEFORE = 12  # frames before the last written word's end: it may have ended earlier
TINY = 1e-100  # less than this is nothing


@dataclass(frozen=True)
class PieceTable:
    """The pieces of a vocabulary, by text; made once per model."""

    texts: tuple[str, ...]  # by id; "" for blank

    @classmethod
    def of(cls, pieces: CtcPieces) -> PieceTable:
        return cls(("", *(pieces.piece(i) for i in range(1, pieces.size))))

    @cached_property
    def ids(self) -> dict[str, int]:
        return {text: i for i, text in enumerate(self.texts) if text}

    @cached_property
    def longest(self) -> int:
        return max(map(len, self.texts))

    @cached_property
    def longer(self) -> dict[str, tuple[int, ...]]:
        """Ids of the pieces that begin with a text and go on."""
        out: dict[str, list[int]] = defaultdict(list)
        for i, text in enumerate(self.texts):
            for n in range(1, len(text)):
                out[text[:n]].append(i)
        return {text: tuple(ids) for text, ids in out.items()}


@dataclass(frozen=True, slots=True)
class Scores:
    """Of one text each, all up to the same factor.

    `prefix`: it begins like this. `ended`: and its last word is over, by another word or by the
    end of what was heard.
    """

    prefix: Doubles  # (N,)
    ended: Doubles  # (N,)


@dataclass(slots=True)
class CtcPrefix:
    """What was heard and not used up by words that are written, and the word that is open."""

    table: PieceTable
    probs: Doubles = field(init=False)  # (T, V) of each frame
    base: Doubles = field(init=False)  # (T + 1,) all written words are said after t frames
    word: str = ""  # written after `base`: the open word, its space included
    done: int = 0  # frames of `probs` that the written text has most likely used
    left: str = ""  # of the piece that the written text most likely ends in

    def __post_init__(self) -> None:
        self.probs = np.zeros((0, len(self.table.texts)))
        self.base = np.ones(1)

    def hear(self, log_probs: Tensor) -> None:
        """log_probs (C, V) of new frames."""
        new = log_probs.double().softmax(dim=-1).cpu().numpy()
        self.probs = np.concatenate([self.probs, new])
        tail = self.base[-1] * np.cumprod(new[:, BLANK])
        self.base = np.concatenate([self.base, tail])
        self._drop(len(self.probs) - MAX_FRAMES)

    @property
    def n_frames(self) -> int:
        return len(self.probs)

    def scores(self, texts: Sequence[str]) -> Scores:
        """Of texts that could follow what is written; "" is the open word as it stands."""
        whole = [self.word + text for text in texts]
        lattice = _Lattice.of([x for text in whole for x in (text, text + " ")], self.table)
        prefix, last = lattice.run(self.probs, self.base)
        ended = prefix[1::2] + last[::2]
        if not self.word:  # nothing is open, so nothing can go on
            empty = np.array([not text for text in whole])
            prefix, ended = np.where(np.repeat(empty, 2), 1.0, prefix), np.where(empty, 1.0, ended)
        return Scores(prefix[::2], ended)

    def write(self, text: str) -> None:
        """Appends text to what is written; words before its last one are over."""
        *over, self.word = _split(self.word + text)
        for word in over:
            said = self._said(word)
            self.base = said.trace / said.trace.max() if said.trace.max() > TINY else self._lost()
            self.done, self.left = max(self.done, _middle(said.entered)), ""
        if over:
            self._drop(self.done - KEPT_BEFORE)
        if self.word.strip():
            self._find_end()

    def rest(self) -> list[tuple[str, int]]:
        """The best path after the written text: pieces and the frame after each, from now.

        Frames are negative or 0: 0 is the end of what was heard. The first piece is what is left of
        the one that the written text ends in, if it does.
        """
        out, last = list[tuple[str, int]](), BLANK
        if self.left:
            out.append((self.left, self.done - self.n_frames))
        for t, piece in enumerate(self.probs.argmax(axis=1).tolist()):
            if t >= self.done and piece not in (BLANK, last):
                out.append((self.table.texts[piece], t + 1 - self.n_frames))
            last = piece
        return out

    def skip(self) -> None:
        """What is left of the open word, or the next word, will not be written."""
        for i, (text, end) in enumerate(self.rest()):
            if i and text.startswith(" "):
                break
            self.done = max(self.done, self.n_frames + end)
        self.word = self.left = ""
        self.base = self._lost()

    def _find_end(self) -> None:
        """Where the open word's letters end: after a piece, or within a longer one."""
        said = self._said(self.word)
        inside = said.beyond.sum(axis=0)
        if inside.sum() <= said.entered.sum():
            self.done, self.left = max(self.done, _middle(said.entered)), ""
            return
        end = _middle(inside)
        if end >= self.done:
            self.done, self.left = end, said.rest_of_piece(self.probs[end - 1], self.table)

    def _said(self, text: str) -> _Lattice:
        lattice = _Lattice.of([text], self.table)
        lattice.run(self.probs, self.base)
        return lattice

    def _lost(self) -> Doubles:
        """Nothing heard says the written text: it is taken as said where it should have been."""
        base = np.zeros(self.n_frames + 1)
        base[self.done :] = np.concatenate([[1.0], np.cumprod(self.probs[self.done :, BLANK])])
        return base if base.max() > TINY else np.ones(self.n_frames + 1)

    def _drop(self, n: int) -> None:
        """Forgets the oldest n frames."""
        if n <= 0:
            return
        self.probs, self.base = self.probs[n:], self.base[n:]
        self.done = max(0, self.done - n)
        if self.base.max() < TINY:
            self.base = self._lost()


def _split(text: str) -> list[str]:
    """Words with the space before each; the last one may be open."""
    parts = text.split(" ")
    head = [parts[0]] if parts[0] else []
    return head + [" " + part for part in parts[1:]] or [""]


def _middle(mass: Doubles) -> int:
    """The first index by which half of the mass is there."""
    total = np.cumsum(mass)
    return int(np.searchsorted(total, total[-1] / 2)) if total[-1] > 0 else 0


@dataclass(frozen=True, slots=True)
class _End:
    """An arc that begins inside a text and leads beyond it."""

    text: int
    arc: int
    n_letters: int  # of its pieces that are the text's


@dataclass(slots=True)
class _Lattice:
    """Texts as one tree of characters, and the pieces that lead from node to node.

    Node 0 is what is written. An arc with `to` 0 leads beyond the end of a text: it counts for the
    text's prefix score and goes nowhere.
    """

    n_nodes: int
    start: npt.NDArray[np.int64]  # (A,) node at which an arc begins
    to: npt.NDArray[np.int64]  # (A,)
    same: npt.NDArray[np.int64]  # (A,) arc into `start` with the same piece, A for none
    pieces: list[tuple[int, ...]]  # of each arc
    texts: npt.NDArray[np.int64]  # (N,) node of each text
    ends: list[_End]
    # Of the first text, after every frame (T + 1): it is said; its last piece has just begun; and
    # the same of each end beyond it (E, T + 1).
    trace: Doubles = field(init=False)
    entered: Doubles = field(init=False)
    beyond: Doubles = field(init=False)

    @classmethod
    def of(cls, texts: list[str], table: PieceTable) -> _Lattice:
        nodes: dict[str, int] = {"": 0}
        for text in texts:
            for n in range(1, len(text) + 1):
                nodes.setdefault(text[:n], len(nodes))
        start, to, pieces = list[int](), list[int](), list[tuple[int, ...]]()
        into: dict[tuple[int, int], int] = {}  # (node, piece) -> arc
        for text, node in nodes.items():
            for n in range(1, min(table.longest, len(text)) + 1):
                piece = table.ids.get(text[-n:])
                if piece is not None:
                    into[node, piece] = len(start)
                    start.append(nodes[text[:-n]])
                    to.append(node)
                    pieces.append((piece,))
        ends = list[_End]()
        for i, text in enumerate(texts):
            for n in range(1, min(table.longest, len(text) + 1)):
                ids, node = table.longer.get(text[-n:], ()), nodes[text[:-n]]
                again = [(piece,) for piece in ids if (node, piece) in into]
                rest = tuple(piece for piece in ids if (node, piece) not in into)
                for group in [*again, rest] if rest else again:
                    ends.append(_End(i, len(start), n))
                    start.append(node)
                    to.append(0)
                    pieces.append(group)
        none = len(start)
        same = [
            into.get((node, ids[0]), none) if len(ids) == 1 else none
            for node, ids in zip(start, pieces, strict=True)
        ]
        last = [nodes[text] for text in texts]
        index = [np.array(x, dtype=np.int64) for x in (start, to, same, last)]
        return cls(len(nodes), index[0], index[1], index[2], pieces, index[3], ends)

    def run(self, probs: Doubles, base: Doubles) -> tuple[Doubles, Doubles]:
        """probs (T, V), base (T + 1,) -> prefix mass and mass at the end, (N,) each."""
        n_arcs, n_frames = len(self.start), len(probs)
        chances = probs[:, [ids[0] for ids in self.pieces]]
        for arc, ids in enumerate(self.pieces):
            if len(ids) > 1:
                chances[:, arc] = probs[:, ids].sum(axis=1)
        held, total = np.zeros(n_arcs + 1), np.zeros(self.n_nodes)
        entered = np.zeros(n_arcs)
        node = int(self.texts[0])
        last_of = self.to == node if node else np.zeros(n_arcs, bool)
        self.trace, self.entered = np.zeros(n_frames + 1), np.zeros(n_frames + 1)
        beyond = [end.arc for end in self.ends if end.text == 0]
        self.beyond = np.zeros((len(beyond), n_frames + 1))
        is_inner = self.to > 0
        for t in range(n_frames):
            total[0] = base[t]
            coming = chances[t] * (total[self.start] - held[self.same])
            held[:n_arcs] = chances[t] * held[:n_arcs] + coming
            total *= probs[t, BLANK]
            total += np.bincount(
                self.to, weights=np.where(is_inner, held[:n_arcs], 0.0), minlength=self.n_nodes
            )
            entered += coming
            self.trace[t + 1] = total[node]
            self.entered[t + 1] = coming[last_of].sum()
            self.beyond[:, t + 1] = coming[beyond]
        total[0] = base[-1]
        into_node = np.bincount(self.to, entered, self.n_nodes).astype(np.float64)
        prefix = into_node[self.texts]
        for end in self.ends:
            prefix[end.text] += entered[end.arc]
        last: Doubles = total[self.texts]
        return prefix, last

    def rest_of_piece(self, probs: Doubles, table: PieceTable) -> str:
        """probs (V,) of a frame -> what its likeliest piece beyond the first text adds to it."""
        ends = [end for end in self.ends if end.text == 0]
        found = [
            (probs[i], table.texts[i][e.n_letters :]) for e in ends for i in self.pieces[e.arc]
        ]
        return max(found)[1] if found else ""
