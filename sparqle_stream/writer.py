"""Writers: what decides, for one row and one chunk, what the LLM writes and when it stops.

`Greedy` takes the LLM's word for both. `Joint` lets the word beam say which words are due and how
well each was heard, and the LLM how well each goes on with what it has read and written (joint
CTC / attention decoding, Watanabe et al., 2017, word by word):

    score = log p(heard; words) + llm_weight * log p(LLM)

where logits do for log p(LLM): what is compared in one place of a text has one normaliser. So the
LLM chooses among what was heard, and can hardly skip, repeat or invent; case and punctuation
are its own. Where rival readings are close, the LLM judges them before that as a language model of
plain text (`judge`), all words of them together: `Hearing.weighed` is what log p(heard; words) is
then. Contract: a writer sees what was heard until the end of its chunk and what it wrote itself,
nothing else; what it wrote is committed. What writers answer to is `decode.Writer`.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Protocol

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from sparqle_stream.config import WriterConfig
    from sparqle_stream.word_beam import Candidate, Reading, WordBeam

    Words = tuple[str, ...]

MARKS = (".", ",", "?", "!")
ENDS = (".", "?", "!")  # of a sentence
MOST_CANDIDATES = 8
# Of a word; no real one has more. A slot has room for as many as `Captions.max_allowance` and no
# more in the chunk that fills it, and a word that is spelled may be as long as somebody hums.
MOST_WORD_TOKENS = 12


class Decodes(Protocol):
    bos_id: int

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: list[int]) -> str: ...


@dataclass(slots=True)
class Greedy:
    """At most `n_most` tokens, each the LLM's best, until the stop head says so."""

    n_most: int
    stop_threshold: float = 0.5  # probability above which the text ends
    n_written: int = 0

    def goes_on(self, stop: float) -> bool:
        odds = math.log(self.stop_threshold / (1.0 - self.stop_threshold))
        return self.n_written < self.n_most and stop <= odds

    def suggest(self) -> list[int]:
        return []

    def pick(self, ids: Sequence[int], scores: Sequence[float]) -> list[int]:
        self.n_written += 1
        return [ids[0]]

    def expect(self) -> list[list[int]]:
        return []

    def doubts(self) -> list[list[int]]:
        return []

    def judged(self, log_probs: Sequence[float]) -> None:
        raise AssertionError("there was no doubt")

    def plain(self) -> list[int]:
        return []

    def is_over(self) -> bool:
        return self.n_written >= self.n_most


@dataclass(slots=True)
class Hearing:
    """A segment's word beam and where its text stands: what `Joint` keeps per stream."""

    cfg: WriterConfig
    tokenizer: Decodes
    beam: WordBeam
    is_judged: bool = False  # the LLM can judge readings as plain text, and shall
    is_paused: bool = False  # nobody speaks at the end of the chunk
    may_mark: bool = False  # the text ends in a word that punctuation may follow
    is_beginning: bool = True  # of a sentence: what comes next has a capital, as a rule

    def due(self, n_delay: int, *, is_last: bool) -> list[Candidate]:
        """What the next word may be, best first; nothing while none is over and old enough.

        What is said next often decides what was said: a word waits until most readings agree on
        it, or it is too old, or nobody says more.
        """
        found, everything, nothing = self.beam.candidates()
        if not found or nothing > found[0].score:
            return []
        is_due = is_last or self._is_due(found[0], everything, n_delay)
        return found[:MOST_CANDIDATES] if is_due else []

    def _is_due(self, said: Candidate, everything: float, n_delay: int) -> bool:
        age, cfg = self.beam.n_frames - said.word.end, self.cfg
        if self.is_paused and age >= max(n_delay, cfg.pause_frames):
            return True
        is_over = said.is_closed or age >= cfg.quiet_frames
        is_sure = math.exp(said.score - everything) >= cfg.sure or age >= cfg.patience_frames
        return age >= n_delay and is_over and is_sure

    def rivals(self) -> list[Reading]:
        """Readings that are close enough to the best to be judged; none where one is alone."""
        if not self.is_judged:
            return []
        found = [reading for reading in self.beam.rivals() if reading.words]
        close = [r for r in found if r.score > found[0].score - self.cfg.rival_gap]
        close = close[: self.cfg.n_rivals]
        return close if len({reading.words[0] for reading in close}) > 1 else []

    def plain(self, words: Iterable[str]) -> list[int]:
        """Tokens of words as plain text."""
        return [i for word in words for i in self.tokenizer.encode(f" {word}")]

    def gain(self, reading: Reading, log_prob: float) -> float:
        """What a reading's score changes by, once it is judged."""
        cfg = self.cfg
        told = cfg.text_weight * log_prob + cfg.text_bonus * len(reading.words)
        return told - cfg.text_share * reading.gram_score

    def weighed(self, due: list[Candidate], gains: Mapping[Words, float]) -> list[Candidate]:
        """Those of `due` with which a judged reading begins, with the mass of these readings."""
        sums: dict[str, float] = {}
        for reading in self.beam.rivals():
            if reading.words and reading.words in gains:
                word, score = reading.words[0], reading.score + gains[reading.words]
                sums[word] = float(np.logaddexp(sums.get(word, -math.inf), score))
        return [replace(said, score=sums[said.word.text]) for said in due if said.word.text in sums]

    def expected(self, n_delay: int, *, is_last: bool) -> list[str]:
        """Words that are due, by the likeliest reading."""
        course, everything = self.beam.course()

        def is_due(said: Candidate) -> bool:
            return is_last or self._is_due(said, everything, n_delay)

        return [said.word.text for said in itertools.takewhile(is_due, course)]

    def forms(self, word: str, *, is_first: bool) -> list[tuple[list[int], bool]]:
        """Tokens of a word as it is and with a capital, and whether it is usual to write it so:
        with one if it is the first of a sentence.
        """
        capital = word[:1].upper() + word[1:]
        forms = {word: not is_first, capital: is_first} if capital != word else {word: True}
        return [
            (self.tokenizer.encode(f" {form}")[:MOST_WORD_TOKENS], is_usual)
            for form, is_usual in forms.items()
        ]

    def marks(self) -> list[int]:
        """Tokens of the punctuation that may follow."""
        return [ids[0] for ids in map(self.tokenizer.encode, MARKS) if ids] if self.may_mark else []

    def rest_score(self, word: str, first: int) -> float:
        """log p(the rest of a word | its first token), from how often words begin like this."""
        begun = self.tokenizer.decode([first]).strip().lower()
        return 0.0 if len(begun) >= len(word) else self.beam.lexicon.share(word, begun)


@dataclass(slots=True)
class Joint:
    """At most `n_most` tokens of words that LLM and CTC agree on, as far as words are due."""

    hearing: Hearing
    n_most: int
    n_delay: int  # CTC frames before the chunk's end after which no word is due
    is_last: bool = False  # the segment ends with this chunk: everything is due
    n_written: int = 0
    # What the next word may be, in each of its forms, with its handicap; the punctuation before it.
    _due: list[tuple[Candidate, list[int], float]] = field(default_factory=list)
    _marks: list[int] = field(default_factory=list)
    _is_known: bool = False  # whether both are of now
    _rivals: list[Reading] = field(default_factory=list)
    _gains: dict[Words, float] = field(default_factory=dict)  # of judged readings, by their words
    _plain: list[int] = field(default_factory=list)  # what was picked last

    def goes_on(self, stop: float) -> bool:
        if self.is_over():
            return False
        # Punctuation alone may be left: the stop head knows where it belongs.
        return bool(self._due) or stop <= -self.hearing.cfg.mark_odds

    def is_over(self) -> bool:
        """No word is due, and no place where punctuation could stand."""
        if self.n_written >= self.n_most:
            return True
        if not self._is_known:
            self._look()
        is_quiet = self.is_last or not self.hearing.beam.is_open
        return not self._due and not (is_quiet and self.hearing.may_mark)

    def _look(self) -> None:
        hearing = self.hearing
        due = hearing.due(self.n_delay, is_last=self.is_last)
        due = (hearing.weighed(due, self._gains) if self._gains else []) or due
        self._due = [
            (said, form, 0.0 if is_usual else hearing.cfg.case_margin)
            for said in due
            for form, is_usual in hearing.forms(said.word.text, is_first=hearing.is_beginning)
            if form
        ]
        self._marks = hearing.marks()
        self._is_known = True

    def doubts(self) -> list[list[int]]:
        """The readings that are close, where a word is due."""
        self._rivals = [] if self.is_over() or not self._due else self.hearing.rivals()
        return [self.hearing.plain(reading.words) for reading in self._rivals]

    def judged(self, log_probs: Sequence[float]) -> None:
        pairs = zip(self._rivals, log_probs, strict=True)
        self._gains = {reading.words: self.hearing.gain(reading, p) for reading, p in pairs}
        self._is_known = False

    def plain(self) -> list[int]:
        return self._plain

    def expect(self) -> list[list[int]]:
        """The words that are due without punctuation, and without capitals but the first's."""
        hearing = self.hearing
        words = hearing.expected(self.n_delay, is_last=self.is_last)
        forms = [
            hearing.forms(word, is_first=hearing.is_beginning and not i)
            for i, word in enumerate(words)
        ]
        return [next(tokens for tokens, is_usual in form if is_usual) for form in forms]

    def suggest(self) -> list[int]:
        """First tokens of all that could be written next."""
        return [form[0] for _, form, _ in self._due] + self._marks

    def pick(self, ids: Sequence[int], scores: Sequence[float]) -> list[int]:
        hearing, of = self.hearing, dict(zip(ids, scores, strict=True))
        self._is_known = False
        mark = max(self._marks, key=of.__getitem__, default=None)
        if not self._due:
            return self._write_mark(mark)

        def score(found: tuple[Candidate, list[int], float]) -> float:
            said, form, handicap = found
            llm = of[form[0]] + hearing.rest_score(said.word.text, form[0]) - handicap
            return said.score + hearing.cfg.llm_weight * llm

        said, form, _ = max(self._due, key=score)
        if mark is not None and of[mark] > of[form[0]] + hearing.cfg.mark_margin:
            return self._write_mark(mark)
        if self.n_written and self.n_written + len(form) > self.n_most:
            return []  # the next chunk may write it
        self._commit(said.word.text)
        hearing.may_mark, hearing.is_beginning = True, False
        self.n_written += len(form)
        return form

    def _commit(self, word: str) -> None:
        hearing = self.hearing
        hearing.beam.commit(word)
        self._gains = {words[1:]: x for words, x in self._gains.items() if words[:1] == (word,)}
        self._plain = hearing.plain([word]) if hearing.is_judged else []

    def _write_mark(self, mark: int | None) -> list[int]:
        self.hearing.may_mark, self._plain = False, []
        self.n_written += mark is not None
        if mark is None:
            return []
        hearing = self.hearing
        hearing.is_beginning = hearing.tokenizer.decode([mark]) in ENDS
        if hearing.is_beginning and hearing.is_judged:
            self._plain = [hearing.tokenizer.bos_id]  # plain texts are sentences
        return [mark]
