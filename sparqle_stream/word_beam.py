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
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from sparqle_stream.hypotheses import (
    AHEAD,
    BEGAN,
    BEGINS,
    BLANK_MASS,
    ENDS,
    HIST,
    LAST,
    MOVED,
    NEVER,
    NODE,
    PAST,
    PIECE_MASS,
    SOURCE,
    Hypotheses,
    joined,
)
from sparqle_stream.lexicon import UNKNOWN
from sparqle_stream.pieces import BLANK

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sparqle_stream.config import BeamConfig
    from sparqle_stream.hypotheses import Doubles, Ints
    from sparqle_stream.lexicon import Lexicon

MOST_KEPT = 16  # histories and spelled nodes for each place in the beam


@dataclass(frozen=True, slots=True)
class Word:
    """A word of a reading; frames count from the segment's start, `end` is after its last piece."""

    text: str
    start: int
    end: int


class _History(NamedTuple):
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


class Reading(NamedTuple):
    """All hypotheses with the same words since the last committed one; an open one counts for the
    words before it, or as if it ended here, as in `WordBeam.candidates`."""

    words: tuple[str, ...]
    score: float  # log mass
    gram_score: float  # what n-grams, bonus and spelling have in it, up to what all share


@dataclass(slots=True)
class _Spelled:
    """Nodes of words that are in no lexicon: texts, by node - first node."""

    texts: list[str] = field(default_factory=list)
    into: dict[tuple[int, int], int] = field(default_factory=dict)


def _sum(a: float, b: float) -> float:
    """log(e^a + e^b)"""
    low, high = (a, b) if a < b else (b, a)
    return high if low == NEVER else high + math.log1p(math.exp(low - high))


class WordBeam:
    """Beam search of one segment."""

    def __init__(self, lexicon: Lexicon, cfg: BeamConfig) -> None:
        self.lexicon, self.cfg = lexicon, cfg
        self.n_frames = 0
        self._roots = np.arange(lexicon.first[0], lexicon.first[1])
        self._root_pieces = lexicon.piece[self._roots]
        self._root_ahead = cfg.lm_weight * lexicon.best[self._roots]
        self._n_nodes = len(lexicon.piece)
        self._spelled = _Spelled()
        self._histories = [_History((), (UNKNOWN, UNKNOWN), 0.0)]
        self._after: dict[tuple[int, int], int] = {}  # (history, node) -> history with its word
        start = np.array([[0], [0], [0], [0], [BLANK], [1], [0], [0]], np.int64)
        self._now = Hypotheses(start, np.array([[0.0], [NEVER], [0.0], [0.0]]))

    # --- hearing ---------------------------------------------------------------------------------

    def hear(self, log_probs: npt.NDArray[np.float32]) -> None:
        """log_probs (C, V) of new frames."""
        rows = log_probs.astype(np.float64)
        rows[:, BLANK] -= self.cfg.blank_cost
        rows -= np.logaddexp.reduce(rows, axis=1, keepdims=True)
        for row in rows:
            self._frame(row)
            self.n_frames += 1
            if self.n_kept > MOST_KEPT * self.cfg.size:
                self._forget(0)

    def _frame(self, lp: Doubles) -> None:
        """lp (V,): every hypothesis stays or grows by a piece; the best `size` are kept."""
        if not self._now.ints[ENDS].any():
            self._break_off()
        total, floats, size = self._now.mass(), self._now.floats.copy(), self.cfg.size
        floats[BLANK_MASS] = total + lp[BLANK]
        floats[PIECE_MASS] += lp[self._now.ints[LAST]]
        stay = Hypotheses(self._now.ints, floats)
        scores = stay.scores()
        limit = float(scores.max()) - self.cfg.width
        made = [*self._go_on(lp, total, limit), *self._begin(lp, total, limit)]
        if made:
            grown = joined(made)
            reached = grown.scores()
            limit = max(limit, float(reached.max(initial=NEVER)) - self.cfg.width)
            likely = np.nonzero(reached > limit)[0]
            if len(likely) > size:
                likely = likely[np.argpartition(-reached[likely], size)[:size]]
            made = [grown.where(likely)]
        made += self._spell(lp, total, limit)
        after = stay.where(scores > limit)
        if made:
            after = self._merged(after, joined(made))
        if after.ints.shape[1] > size:
            after = after.where(np.argpartition(-after.scores(), size)[:size])
        self._now = after

    def _break_off(self) -> None:
        """Where no word can end, the likeliest may end as words of no lexicon: without this, what
        is said after a word that was misheard finds no way on, and is lost."""
        broken = self._now.where(np.argsort(-self._now.scores())[: self.cfg.n_spelled])
        for i, node in enumerate(broken.ints[NODE].tolist()):
            longer = -1
            for piece in self.lexicon.path(node):
                longer = self._spelled_node(longer, piece)
            broken.ints[NODE, i], broken.ints[ENDS, i] = longer, 1
            broken.floats[AHEAD, i] = -self._cost(self._spelled.texts[longer - self._n_nodes])
        self._now = joined([self._now, broken])

    def _go_on(self, lp: Doubles, total: Doubles, limit: float) -> list[Hypotheses]:
        """Words of the lexicon that are open, one piece longer."""
        (past, ahead), node = self._now.floats[PAST:], self._now.ints[NODE]
        # No piece is likelier than the likeliest, and no word below a node than its best.
        likely = total + (past + ahead) > limit - float(lp[1:].max())
        source = np.nonzero(likely & (node > 0) & (node < self._n_nodes))[0]
        if not len(source):
            return []
        at = node[source]
        begin = self.lexicon.first[at]
        count = self.lexicon.first[at + 1] - begin
        source = np.repeat(source, count)
        child = np.arange(len(source)) + np.repeat(begin - np.cumsum(count) + count, count)
        out = self._reached(lp, total, limit, source, child, past[source])
        out.ints[HIST] = self._now.ints[HIST][out.ints[SOURCE]]
        out.ints[BEGAN] = self._now.ints[BEGAN][out.ints[SOURCE]]
        out.ints[BEGINS] = 0
        return [out]

    def _begin(self, lp: Doubles, total: Doubles, limit: float) -> list[Hypotheses]:
        """Words of the lexicon that begin after others."""
        gain = lp[self._root_pieces]
        likely = np.nonzero(gain > self.cfg.piece_floor)[0]
        if not len(likely):
            return []
        gain = gain[likely] + self._root_ahead[likely]
        # No word is certain after others, and none begins likelier than the likeliest.
        most = total + self._now.floats[PAST] + (max(self.cfg.word_bonus, 0.0) + float(gain.max()))
        source = np.nonzero((most > limit) & (self._now.ints[ENDS] > 0))[0]
        if not len(source):
            return []
        hist = self._all_ended(source)
        past = np.array([self._histories[h].score for h in hist])
        row, column = np.nonzero(np.add.outer(total[source] + past, gain) > limit)
        into = np.zeros(len(total), np.int64)
        into[source] = hist
        out = self._reached(lp, total, limit, source[row], self._roots[likely[column]], past[row])
        out.ints[HIST] = into[out.ints[SOURCE]]
        out.ints[BEGAN] = self.n_frames
        out.ints[BEGINS] = 1
        return [out]

    def _reached(
        self, lp: Doubles, total: Doubles, limit: float, source: Ints, node: Ints, past: Doubles
    ) -> Hypotheses:
        """Those of hypotheses `source`, moved to `node`, that are likely; rows still to be set."""
        piece = self.lexicon.piece[node]
        gain = lp[piece]
        repeats = piece == self._now.ints[LAST][source]
        mass = np.where(repeats, self._now.floats[BLANK_MASS][source], total[source]) + gain
        ahead = self.cfg.lm_weight * self.lexicon.best[node]
        kept = np.nonzero((mass + (past + ahead) > limit) & (gain > self.cfg.piece_floor))[0]
        ints, floats = np.empty((8, len(kept)), np.int64), np.empty((4, len(kept)))
        node = node[kept]
        ints[NODE], ints[LAST], ints[SOURCE] = node, piece[kept], source[kept]
        ints[ENDS] = self.lexicon.word[node] > UNKNOWN
        ints[MOVED] = self.n_frames
        floats[BLANK_MASS] = NEVER
        floats[PIECE_MASS], floats[PAST], floats[AHEAD] = mass[kept], past[kept], ahead[kept]
        return Hypotheses(ints, floats)

    def _merged(self, stay: Hypotheses, grown: Hypotheses) -> Hypotheses:
        """Both; those that are equal become one, with the times of the likelier way there."""
        at, into = np.nonzero(grown.keys()[:, None] == stay.keys())
        is_best = np.ones(grown.ints.shape[1], np.bool_)
        is_new = is_best.copy()
        if len(at):
            mass = grown.floats[PIECE_MASS, at]
            better = mass > stay.floats[:PAST, into].max(axis=0)
            stay.floats[PIECE_MASS, into] = np.logaddexp(stay.floats[PIECE_MASS, into], mass)
            for row in (BEGAN, MOVED):
                stay.ints[row, into[better]] = grown.ints[row, at[better]]
            is_best[at], is_new[at] = better, False
        for source in set(grown.ints[SOURCE, is_best & (grown.ints[BEGINS] > 0)].tolist()):
            self._retime(source)
        return joined([stay, grown.where(is_new)])

    def _spell(self, lp: Doubles, total: Doubles, limit: float) -> list[Hypotheses]:
        """Words of no lexicon: begun after every word, gone on with by likely pieces."""
        likely = [p for p in np.nonzero(lp > self.cfg.spell_floor)[0].tolist() if p != BLANK]
        if not likely:
            return []
        (blank, _, past, ahead), found = self._now.floats, list[tuple[list[int], list[float]]]()
        order = np.argsort(-(total + (past + ahead)))[: self.cfg.n_spelled]
        columns = self._now.ints.T.tolist()
        for i, p in itertools.product(order.tolist(), likely):
            hist, node, began, _, last, ends, *_ = columns[i]
            begins = self.lexicon.begins[p]
            if not (ends if begins else node >= self._n_nodes):
                continue
            mass = float((blank[i] if p == last else total[i]) + lp[p])
            before = "" if begins else self._spelled.texts[node - self._n_nodes]
            cost = self._cost(before + self.lexicon.pieces[p])
            if mass + past[i] + begins * max(self.cfg.word_bonus, 0.0) - cost <= limit:
                continue  # not even if it were certain that a word begins here
            if begins:
                hist, began = self._ended(i), self.n_frames
            score = self._histories[hist].score
            if mass + score - cost > limit:
                longer = self._spelled_node(-1 if begins else node, p)
                ints = [hist, longer, began, self.n_frames, p, 1, i, int(begins)]
                found.append((ints, [NEVER, mass, score, -cost]))
        if not found:
            return []
        columns = np.array([row for row, _ in found], np.int64).T
        return [Hypotheses(columns, np.array([row for _, row in found]).T)]

    def _cost(self, text: str) -> float:
        """Of a word of no lexicon, spelled so far."""
        return self.cfg.spell_cost + self.cfg.letter_cost * len(text)

    def _spelled_node(self, parent: int, piece: int) -> int:
        known = self._spelled
        if (parent, piece) not in known.into:
            before = known.texts[parent - self._n_nodes] if parent >= 0 else ""
            known.into[parent, piece] = self._n_nodes + len(known.texts)
            known.texts.append(before + self.lexicon.pieces[piece])
        return known.into[parent, piece]

    def _all_ended(self, index: Ints) -> list[int]:
        """Histories of hypotheses with their open words added."""
        keys = zip(*self._now.ints[: NODE + 1, index].tolist(), strict=True)
        known = [self._after.get(key) for key in keys]
        return [
            self._ended(i) if hist is None else hist
            for i, hist in zip(index.tolist(), known, strict=True)
        ]

    def _ended(self, i: int) -> int:
        """History of hypothesis i with its open word added, if there is one."""
        hist, node, began, moved = self._now.ints[:LAST, i].tolist()
        if not node:
            return int(hist)
        if (hist, node) not in self._after:
            before, cfg = self._histories[hist], self.cfg
            text, word = self._text(node), UNKNOWN
            if node < self._n_nodes:
                word = int(self.lexicon.word[node])
                gain = cfg.lm_weight * self.lexicon.log_prob(before.context, word)
            else:
                gain = -self._cost(text)
            words = (*before.words, Word(text, began, moved + 1))
            context, score = (before.context[1], word), before.score + gain + cfg.word_bonus
            self._after[hist, node] = len(self._histories)
            self._histories.append(_History(words, context, score))
        return self._after[hist, node]

    def _retime(self, i: int) -> None:
        """The word that ends with hypothesis i, likelier than before, was said when it says."""
        hist, node, began, moved = self._now.ints[:LAST, i].tolist()
        if not node:
            return
        after = self._after[hist, node]
        history = self._histories[after]
        said = history.words[-1]
        if (said.start, said.end) != (began, moved + 1):
            words = (*self._histories[hist].words, Word(said.text, began, moved + 1))
            self._histories[after] = history._replace(words=words)

    # --- reading ---------------------------------------------------------------------------------

    def candidates(self) -> tuple[list[Candidate], float, float]:
        """Next words, best first; log mass of all readings that count, and of those without a word.

        A word that is open counts as if it ended here, where it can; elsewhere readings count for
        the word that they begin with, or not at all.
        """
        best: dict[str, tuple[float, Word, bool]] = {}
        sums: dict[str, float] = {}
        nothing = NEVER
        for words, n_closed, score, _ in self._counting():
            if not words:
                nothing = _sum(nothing, score)
                continue
            word = words[0]
            sums[word.text] = _sum(sums.get(word.text, NEVER), score)
            if word.text not in best or score > best[word.text][0]:
                best[word.text] = (score, word, n_closed > 0)
        found = [Candidate(w, sums[text], closed) for text, (_, w, closed) in best.items()]
        everything = float(np.logaddexp.reduce([nothing, *sums.values()]))
        return sorted(found, key=lambda c: -c.score), everything, nothing

    def course(self) -> tuple[list[Candidate], float]:
        """Words of the best reading, each with the mass of readings that agree up to it; all mass.

        It tells beforehand what `candidates` will say when its words are committed one by one.
        """
        sums, best = dict[tuple[str, ...], float](), (NEVER, tuple[Word, ...](), 0)
        everything = NEVER
        for words, n_closed, score, _ in self._counting():
            everything = _sum(everything, score)
            texts = tuple(word.text for word in words)
            for n in range(1, len(texts) + 1):
                sums[texts[:n]] = _sum(sums.get(texts[:n], NEVER), score)
            if score > best[0]:
                best = score, words, n_closed
        _, words, n_closed = best
        texts = tuple(word.text for word in words)
        found = [
            Candidate(word, sums[texts[: n + 1]], n < n_closed) for n, word in enumerate(words)
        ]
        return found, everything

    def rivals(self) -> list[Reading]:
        """Readings that count, best first."""
        sums: dict[tuple[str, ...], tuple[float, float]] = {}
        for words, _, score, past in self._counting():
            texts = tuple(word.text for word in words)
            known, _ = sums.get(texts, (NEVER, 0.0))
            sums[texts] = _sum(known, score), past
        return sorted((Reading(words, *of) for words, of in sums.items()), key=lambda r: -r.score)

    def _counting(self) -> Iterator[tuple[tuple[Word, ...], int, float, float]]:
        """Readings that count: their words, an open one as if it ended here, how many of them are
        closed, log mass, and what the language model has in it. Those of nothing but an open word
        that cannot end do not.
        """
        mass, scores = self._now.mass().tolist(), self._now.scores().tolist()
        for i, (hist, node, began, moved, _, ends, *_) in enumerate(self._now.ints.T.tolist()):
            words, past = self._histories[hist].words, self._histories[hist].score
            if node and ends:  # the look-ahead does not know which words are before this one
                past = self._histories[self._ended(i)].score
                word = Word(self._text(node), began, moved + 1)
                yield (*words, word), len(words), mass[i] + past, past
            elif words or not node:
                yield words, len(words), scores[i], past

    def readings(self) -> list[tuple[tuple[str, ...], float]]:
        """Words since the last committed one and their log mass, best first; open ones end here."""
        mass = self._now.mass().tolist()
        sums: dict[tuple[str, ...], float] = {}
        for i in np.nonzero(self._now.ints[ENDS])[0].tolist():
            history = self._histories[self._ended(i)]
            words = tuple(word.text for word in history.words)
            score = mass[i] + history.score
            sums[words] = _sum(sums.get(words, NEVER), score)
        return sorted(sums.items(), key=lambda found: -found[1])

    @property
    def tail(self) -> str:
        """The best reading of what is not committed."""
        found = self.readings()
        return " ".join(found[0][0]) if found else ""

    @property
    def n_hypotheses(self) -> int:
        return len(self._now.ints[HIST])

    @property
    def n_kept(self) -> int:
        """Histories and spelled nodes in memory."""
        return len(self._histories) + len(self._spelled.texts)

    @property
    def is_open(self) -> bool:
        """Whether the best reading holds anything that is not committed."""
        hist, node = self._now.ints[: NODE + 1, int(np.argmax(self._now.scores()))].tolist()
        return node > 0 or bool(self._histories[hist].words)

    def commit(self, text: str) -> None:
        """The next word is `text`: readings that say otherwise die."""
        keep, hists, nodes = list[int](), list[int](), list[int]()
        for i, (hist, node, _, _, _, ends, *_) in enumerate(self._now.ints.T.tolist()):
            words = self._histories[hist].words
            if words and words[0].text == text:
                keep.append(i)
                hists.append(hist)
                nodes.append(node)
            elif not words and node and ends and self._text(node) == text:
                keep.append(i)
                hists.append(self._ended(i))
                nodes.append(0)
        if not keep:
            raise ValueError(f"no reading begins with {text!r}")
        self._now = now = self._now.where(np.array(keep))
        now.ints[HIST], now.ints[NODE] = hists, nodes
        over = now.ints[NODE] == 0
        now.ints[LAST] = np.where(over, BLANK, now.ints[LAST])
        now.floats[BLANK_MASS] = np.where(over, now.mass(), now.floats[BLANK_MASS])
        now.floats[PIECE_MASS] = np.where(over, NEVER, now.floats[PIECE_MASS])
        now.floats[PAST] = [self._histories[hist].score for hist in hists]
        now.floats[AHEAD] = np.where(over, 0.0, now.floats[AHEAD])
        self._forget(1)

    def _forget(self, n_words: int) -> None:
        """Drops committed words from histories, and what no hypothesis needs any more."""
        ints = self._now.ints
        live, ints[HIST] = np.unique(ints[HIST], return_inverse=True)
        kept = [self._histories[old] for old in live.tolist()]
        self._histories = [h._replace(words=h.words[n_words:]) for h in kept]
        self._after = {}
        is_spelled = ints[NODE] >= self._n_nodes
        nodes, new = np.unique(ints[NODE, is_spelled], return_inverse=True)
        ints[NODE, is_spelled] = self._n_nodes + new
        old, known = (nodes - self._n_nodes).tolist(), self._spelled
        self._spelled = _Spelled([known.texts[n] for n in old])

    def _text(self, node: int) -> str:
        if node >= self._n_nodes:
            return self._spelled.texts[node - self._n_nodes].strip()
        return self.lexicon.words[int(self.lexicon.word[node])]
