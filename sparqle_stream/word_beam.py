"""Word beam: what was most likely said, as words, frame by frame.

In: CTC log-probabilities (C, V) of each chunk. Out: ranked readings of what was heard since the
last committed word. CTC prefix beam search (Hannun et al., 2014) over a tree of words with n-gram
scores (Lexicon); words that are in no lexicon may be spelled at a price. Contract: committed words
are never taken back, readings that disagree with them die; a state is bounded by the beam.
Latency: none; how long a word waits is the writer's choice.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from sparqle_stream.ctc import BLANK
from sparqle_stream.lexicon import UNKNOWN

if TYPE_CHECKING:
    from sparqle_stream.config import BeamConfig
    from sparqle_stream.lexicon import Lexicon

Doubles = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
NEVER = -math.inf
MOST_KEPT = 16  # histories and spelled nodes for each place in the beam


@dataclass(frozen=True, slots=True)
class Word:
    """A word of a reading; frames count from the segment's start, `end` is after its last piece."""

    text: str
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class _History:
    """Words before a reading's open one; those that are committed are not kept."""

    words: tuple[Word, ...]
    context: tuple[int, int]  # ids of the last two words
    score: float  # of the language model so far, weighted


@dataclass(frozen=True, slots=True)
class Candidate:
    """What the next word may be: all readings that begin with it, together."""

    word: Word  # with the times of the best of them
    score: float  # log mass
    is_closed: bool  # another word follows it in the best of them


@dataclass(slots=True)
class _Spelled:
    """Nodes of words that are in no lexicon: text and last piece, by node - first node."""

    texts: list[str] = field(default_factory=list)
    last: list[int] = field(default_factory=list)
    into: dict[tuple[int, int], int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Grown:
    """Hypotheses that one more piece makes, (K,) each."""

    source: Ints  # the hypothesis before
    node: Ints
    begins: npt.NDArray[np.bool_]  # a word
    mass: Doubles  # log, of CTC
    score: Doubles  # with the language model


# (history, node) -> log mass in blank and in the piece, frames of the open word's first and last
# piece, log mass of the likeliest way here in this frame.
Found = dict[tuple[int, int], list[float]]


class WordBeam:
    """Beam search of one segment."""

    def __init__(self, lexicon: Lexicon, cfg: BeamConfig) -> None:
        self.lexicon, self.cfg = lexicon, cfg
        self.n_frames = 0
        self._roots = lexicon.child[lexicon.first[0] : lexicon.first[1]]
        self._n_nodes = len(lexicon.piece)
        self._spelled = _Spelled()
        self._histories = [_History((), (UNKNOWN, UNKNOWN), 0.0)]
        self._after: dict[tuple[int, int], int] = {}  # (history, node) -> history with its word
        self.hist = np.zeros(1, np.int64)
        self.node = np.zeros(1, np.int64)
        self.blank = np.zeros(1)  # log mass that ends in blank
        self.piece = np.full(1, NEVER)  # and in the node's piece
        self.began = np.zeros(1, np.int64)  # frame of the open word's first piece
        self.moved = np.zeros(1, np.int64)  # frame of its last piece

    # --- hearing ---------------------------------------------------------------------------------

    def hear(self, log_probs: npt.NDArray[np.float32]) -> None:
        """log_probs (C, V) of new frames."""
        for row in log_probs.astype(np.float64):
            self._frame(row)
            self.n_frames += 1
            if self.n_kept > MOST_KEPT * self.cfg.size:
                self._forget(0)

    def _frame(self, lp: Doubles) -> None:
        """lp (V,): every hypothesis stays or grows by a piece; the best `size` are kept."""
        cfg = self.cfg
        total = np.logaddexp(self.blank, self.piece)
        last = self._last_pieces(self.node)
        stay_blank = total + lp[BLANK]
        stay_piece = np.where(self.node > 0, self.piece + lp[last], NEVER)
        stay = np.logaddexp(stay_blank, stay_piece) + self._lm(self.hist, self.node)
        grown = self._grow(lp, total, last)
        limit = max(stay.max(), grown.score.max(initial=NEVER)) - cfg.width
        found: Found = {}
        hists, nodes = self.hist.tolist(), self.node.tolist()
        for i in np.nonzero(stay > limit)[0].tolist():
            row = [stay_blank[i], stay_piece[i], self.began[i], self.moved[i], NEVER]
            found[hists[i], nodes[i]] = [float(x) for x in row]
        likely = np.nonzero(grown.score > limit)[0]
        if len(likely) > cfg.size:
            likely = likely[np.argpartition(-grown.score[likely], cfg.size)[: cfg.size]]
        for i in likely.tolist():
            source, node = int(grown.source[i]), int(grown.node[i])
            self._join(found, source, node, float(grown.mass[i]), begins=bool(grown.begins[i]))
        self._spell(found, lp, total, last, limit)
        self._keep(found)

    def _last_pieces(self, nodes: Ints) -> Ints:
        """(N,) piece of each node, BLANK for the root."""
        lex, inner = self.lexicon, nodes < self._n_nodes
        out = lex.piece[np.where(inner, nodes, 0)]
        if not inner.all():
            spelled = np.array([*self._spelled.last, BLANK])
            out = np.where(inner, out, spelled[np.where(inner, -1, nodes - self._n_nodes)])
        return out

    def _lm(self, hists: Ints, nodes: Ints) -> Doubles:
        """Language-model scores of histories and the words that are open after them."""
        past = np.array([h.score for h in self._histories])[hists]
        inner = nodes < self._n_nodes
        ahead = self.cfg.lm_weight * self.lexicon.best[np.where(inner, nodes, 0)]
        if not inner.all():
            n = np.array([len(t) for t in self._spelled.texts] + [0])
            letters = n[np.where(inner, -1, nodes - self._n_nodes)]
            ahead = np.where(inner, ahead, -self.cfg.spell_cost - self.cfg.letter_cost * letters)
        return past + np.where(nodes == 0, 0.0, ahead)

    def _grow(self, lp: Doubles, total: Doubles, last: Ints) -> _Grown:
        """Hypotheses one piece longer, inside the lexicon: words go on, or begin after others."""
        lex = self.lexicon
        inside = np.where(self.node < self._n_nodes, self.node, 0)
        count = np.where(inside > 0, lex.first[inside + 1] - lex.first[inside], 0)
        on = np.repeat(np.arange(len(inside)), count)
        at = np.arange(len(on)) - np.repeat(np.cumsum(count) - count, count)
        going = lex.child[lex.first[inside[on]] + at]
        may_begin = np.nonzero(self._may_begin())[0]
        roots = self._roots[lp[lex.piece[self._roots]] > self.cfg.piece_floor]
        source = np.concatenate([on, np.repeat(may_begin, len(roots))])
        node = np.concatenate([going, np.tile(roots, len(may_begin))])
        begins = np.arange(len(source)) >= len(on)
        likely = lp[lex.piece[node]] > self.cfg.piece_floor
        source, node, begins = source[likely], node[likely], begins[likely]
        piece = lex.piece[node]
        mass = np.where(piece == last[source], self.blank[source], total[source]) + lp[piece]
        scores = np.array([h.score for h in self._histories])[self.hist]
        ended = scores.copy()
        for i in may_begin.tolist():  # what follows a word needs its n-gram score
            ended[i] = self._histories[self._ended(i)].score
        score = mass + np.where(begins, ended[source], scores[source])
        return _Grown(source, node, begins, mass, score + self.cfg.lm_weight * lex.best[node])

    def _keep(self, found: Found) -> None:
        keys, values = list(found), np.array(list(found.values()))
        self.hist, self.node = np.array(keys, np.int64).T
        self.blank, self.piece = values[:, 0], values[:, 1]
        self.began, self.moved = values[:, 2].astype(np.int64), values[:, 3].astype(np.int64)
        if len(keys) > self.cfg.size:
            score = np.logaddexp(self.blank, self.piece) + self._lm(self.hist, self.node)
            self._select(np.argpartition(-score, self.cfg.size)[: self.cfg.size])

    def _join(self, found: Found, source: int, node: int, mass: float, *, begins: bool) -> None:
        """Adds hypothesis `source`, moved to `node`, to what was found; equals become one."""
        hist = self._ended(source) if begins else int(self.hist[source])
        start = self.n_frames if begins else int(self.began[source])
        row = found.get((hist, node))
        is_best = row is None or mass > max(row[0], row[1], row[4])
        if row is None:
            found[hist, node] = [NEVER, mass, start, self.n_frames, mass]
        else:
            if is_best:
                row[2], row[3] = start, self.n_frames
            row[1], row[4] = float(np.logaddexp(row[1], mass)), max(row[4], mass)
        if is_best and begins and self.node[source]:
            self._retime(hist, source)

    def _spell(self, found: Found, lp: Doubles, total: Doubles, last: Ints, limit: float) -> None:
        """Words of no lexicon: begun after every word, gone on with by likely pieces."""
        likely = [p for p in np.nonzero(lp > self.cfg.spell_floor)[0].tolist() if p != BLANK]
        if not likely:
            return
        best = np.argsort(-(total + self._lm(self.hist, self.node)))[: self.cfg.n_spelled]
        may_begin = self._may_begin()
        for i, p in itertools.product(best.tolist(), likely):
            begins, node = self.lexicon.begins[p], int(self.node[i])
            if not (may_begin[i] if begins else node >= self._n_nodes):
                continue
            mass = float((self.blank[i] if p == last[i] else total[i]) + lp[p])
            hist = self._ended(i) if begins else int(self.hist[i])
            before = "" if begins else self._spelled.texts[node - self._n_nodes]
            letters = len(before) + len(self.lexicon.pieces[p])
            cost = self.cfg.spell_cost + self.cfg.letter_cost * letters
            if mass + self._histories[hist].score - cost > limit:
                longer = self._spelled_node(-1 if begins else node, p)
                self._join(found, i, longer, mass, begins=begins)

    def _spelled_node(self, parent: int, piece: int) -> int:
        known = self._spelled
        if (parent, piece) not in known.into:
            before = known.texts[parent - self._n_nodes] if parent >= 0 else ""
            known.into[parent, piece] = self._n_nodes + len(known.texts)
            known.texts.append(before + self.lexicon.pieces[piece])
            known.last.append(piece)
        return known.into[parent, piece]

    def _may_begin(self) -> npt.NDArray[np.bool_]:
        """Hypotheses after which a word may begin: at the root, at a word, at a spelled one."""
        inner = self.node < self._n_nodes
        at = np.where(inner, self.node, 0)
        out: npt.NDArray[np.bool_] = ~inner | (self.node == 0) | (self.lexicon.word[at] > 0)
        return out

    def _ended(self, i: int) -> int:
        """History of hypothesis i with its open word added, if there is one."""
        if not self.node[i]:
            return int(self.hist[i])
        key = (int(self.hist[i]), int(self.node[i]))
        if key not in self._after:
            before = self._histories[key[0]]
            inner = key[1] < self._n_nodes
            word = int(self.lexicon.word[key[1]]) if inner else UNKNOWN
            if inner:
                text = self.lexicon.words[word]
                gain = self.cfg.lm_weight * self.lexicon.log_prob(before.context, word)
            else:
                text = self._spelled.texts[key[1] - self._n_nodes].strip()
                gain = -self.cfg.spell_cost - self.cfg.letter_cost * len(text)
            said = Word(text, int(self.began[i]), int(self.moved[i]) + 1)
            score = before.score + gain + self.cfg.word_bonus
            history = _History((*before.words, said), (before.context[1], word), score)
            self._after[key] = len(self._histories)
            self._histories.append(history)
        return self._after[key]

    def _retime(self, hist: int, src: int) -> None:
        """The last word of a history was said when hypothesis `src`, likelier than before, says."""
        history = self._histories[hist]
        said = replace(history.words[-1], start=int(self.began[src]), end=int(self.moved[src]) + 1)
        before = self._histories[int(self.hist[src])].words
        self._histories[hist] = replace(history, words=(*before, said))

    def _select(self, index: Ints) -> None:
        self.hist, self.node = self.hist[index], self.node[index]
        self.blank, self.piece = self.blank[index], self.piece[index]
        self.began, self.moved = self.began[index], self.moved[index]

    # --- reading ---------------------------------------------------------------------------------

    def candidates(self) -> tuple[list[Candidate], float, float]:
        """Next words, best first; the log mass of all hypotheses, and of those without a word.

        A word that is open counts as if it ended here, where it can.
        """
        mass = np.logaddexp(self.blank, self.piece)
        scores = (mass + self._lm(self.hist, self.node)).tolist()
        may_end = self._may_begin().tolist()
        best: dict[str, tuple[float, Word, bool]] = {}
        sums: dict[str, float] = {}
        everything = float(np.logaddexp.reduce(scores))
        nothing = NEVER
        for i, (hist, node) in enumerate(zip(self.hist.tolist(), self.node.tolist(), strict=True)):
            words, score = self._histories[hist].words, scores[i]
            if words:
                word = words[0]
            elif node and may_end[i]:
                word = Word(self._text(node), int(self.began[i]), int(self.moved[i]) + 1)
                score = float(mass[i]) + self._histories[self._ended(i)].score
            else:
                if not node:
                    nothing = float(np.logaddexp(nothing, score))
                continue
            known = sums.get(word.text)
            sums[word.text] = score if known is None else float(np.logaddexp(known, score))
            if word.text not in best or score > best[word.text][0]:
                best[word.text] = (score, word, bool(words))
        found = [Candidate(w, sums[text], closed) for text, (_, w, closed) in best.items()]
        return sorted(found, key=lambda c: -c.score), everything, nothing

    def readings(self) -> list[tuple[tuple[str, ...], float]]:
        """Words since the last committed one and their log mass, best first; open ones end here."""
        mass = np.logaddexp(self.blank, self.piece).tolist()
        may_end = self._may_begin().tolist()
        sums: dict[tuple[str, ...], float] = {}
        for i in range(len(self.hist)):
            if not may_end[i]:
                continue
            history = self._histories[self._ended(i)]
            words = tuple(word.text for word in history.words)
            score = mass[i] + history.score
            sums[words] = float(np.logaddexp(sums.get(words, NEVER), score))
        return sorted(sums.items(), key=lambda found: -found[1])

    @property
    def tail(self) -> str:
        """The best reading of what is not committed."""
        found = self.readings()
        return " ".join(found[0][0]) if found else ""

    @property
    def n_kept(self) -> int:
        """Histories and spelled nodes in memory."""
        return len(self._histories) + len(self._spelled.texts)

    @property
    def is_open(self) -> bool:
        """Whether the best reading holds anything that is not committed."""
        best = int(np.argmax(np.logaddexp(self.blank, self.piece) + self._lm(self.hist, self.node)))
        return bool(self.node[best]) or bool(self._histories[int(self.hist[best])].words)

    def commit(self, text: str) -> None:
        """The next word is `text`: readings that say otherwise die."""
        keep, hists, nodes = list[int](), list[int](), list[int]()
        may_end = self._may_begin()
        for i, (hist, node) in enumerate(zip(self.hist.tolist(), self.node.tolist(), strict=True)):
            words = self._histories[hist].words
            if words and words[0].text == text:
                keep.append(i)
                hists.append(hist)
                nodes.append(node)
            elif not words and node and may_end[i] and self._text(node) == text:
                keep.append(i)
                hists.append(self._ended(i))
                nodes.append(0)
        if not keep:
            raise ValueError(f"no reading begins with {text!r}")
        self._select(np.array(keep))
        self.hist, self.node = np.array(hists), np.array(nodes)
        over = self.node == 0
        self.blank = np.where(over, np.logaddexp(self.blank, self.piece), self.blank)
        self.piece = np.where(over, NEVER, self.piece)
        self._forget(1)

    def _forget(self, n_words: int) -> None:
        """Drops committed words from histories, and what no hypothesis needs any more."""
        live = sorted(set(self.hist.tolist()))
        index = {old: new for new, old in enumerate(live)}
        self._histories = [
            _History(h.words[n_words:], h.context, h.score)
            for h in (self._histories[old] for old in live)
        ]
        self._after = {}
        self.hist = np.array([index[h] for h in self.hist.tolist()], np.int64)
        spelled = sorted({n for n in self.node.tolist() if n >= self._n_nodes})
        moved = {old: self._n_nodes + new for new, old in enumerate(spelled)}
        known = self._spelled
        self._spelled = _Spelled(
            [known.texts[n - self._n_nodes] for n in spelled],
            [known.last[n - self._n_nodes] for n in spelled],
        )
        self.node = np.array([moved.get(n, n) for n in self.node.tolist()], np.int64)

    def _text(self, node: int) -> str:
        if node >= self._n_nodes:
            return self._spelled.texts[node - self._n_nodes].strip()
        return self.lexicon.words[int(self.lexicon.word[node])]
