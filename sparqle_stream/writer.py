"""Writers: what decides, for one row and one chunk, which tokens the LLM writes and when it stops.

`Greedy` takes the LLM's word for both. `Joint` asks CTC too (joint CTC / attention decoding,
Watanabe et al., 2017): a token's score is log p(LLM) + weight * log prefix score(CTC), and a
chunk's text ends when the heard path has no more words that are due. So the LLM chooses among what
was heard, and can hardly skip, repeat or invent. Contract: a writer sees what was heard until the
end of its chunk and what it wrote itself, nothing else. What they answer to is `llm.Writer`.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from sparqle_stream.ctc_prefix import TINY, CtcPrefix

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sparqle_stream.config import WriterConfig

APOSTROPHE = "'"
_SAID = frozenset("abcdefghijklmnopqrstuvwxyz")
_UNSAID = frozenset(' .,;:?!-–—"…()')
_JOINS = frozenset(' -–—"(')
_TRIPLE = re.compile(r"([a-z])\1\1")
_ALIKE = str.maketrans({"’": APOSTROPHE, "‘": APOSTROPHE})


class Decodes(Protocol):
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

    def pick(self, ids: Sequence[int], log_probs: Sequence[float]) -> int | None:
        self.n_written += 1
        return ids[0]


@dataclass(frozen=True, slots=True)
class Spelling:
    """Where written text stands, in the letters that CTC knows."""

    is_broken: bool = True  # the next letter begins a word
    is_held: bool = False  # an apostrophe waits for a letter
    is_joined: bool = False  # the next word needs no space before it

    def spell(self, text: str) -> tuple[str, Spelling] | None:
        """More text -> its letters, with a space before each new word.

        None: it cannot be said, or a word begins without a space.

        >>> Spelling().spell(" O'Neil, no!")[0]
        " o'neil no"
        """
        out, is_broken, is_held, is_joined = "", self.is_broken, self.is_held, self.is_joined
        for char in text.translate(_ALIKE).lower():
            if char in _SAID:
                if is_broken and not is_joined:
                    return None
                out += " " * is_broken + APOSTROPHE * (is_held and not is_broken) + char
                is_broken = is_held = is_joined = False
            elif char == APOSTROPHE:
                is_held = not is_broken
            elif char in _UNSAID:
                is_broken, is_held, is_joined = True, False, char in _JOINS
            else:
                return None
        return out, Spelling(is_broken, is_held, is_joined)


@dataclass(slots=True)
class Heard:
    """A segment's CTC evidence and how far it has been written: what `Joint` keeps per stream."""

    cfg: WriterConfig
    tokenizer: Decodes
    prefix: CtcPrefix
    spelling: Spelling = field(default_factory=Spelling)

    @property
    def is_open(self) -> bool:
        """Whether the last written word may have more letters, as far as its text tells."""
        return bool(self.prefix.word.strip()) and not self.spelling.is_broken

    def what_next(self) -> Next:
        """What the best path says after the written text."""
        going, word, end = "", "", 0
        going_end = 0
        for text, frame in self.prefix.rest():
            if text.startswith(" ") and word:
                break
            if text.startswith(" ") or word:
                word, end = word + text, frame
            else:
                going, going_end = going + text, frame
        quiet = self.prefix.n_frames - self.prefix.done
        is_open = self.is_open
        return Next(
            going=going if is_open else "",
            going_end=going_end,
            word=word,
            word_end=end,
            is_over=is_open and not going and (bool(word) or quiet >= self.cfg.quiet_frames),
        )

    def is_between_words(self) -> bool:
        """Whether the last written word will have no more letters."""
        return not self.is_open or self.what_next().is_over


@dataclass(frozen=True, slots=True)
class Next:
    """The best path after the written text; frames count from the end of what was heard, <= 0."""

    going: str  # letters that go on with the open word
    going_end: int  # frame after them
    word: str  # the next word, with its space
    word_end: int
    is_over: bool  # the open word: another follows, or silence does

    def is_due(self, n_delay: int) -> bool:
        """Whether letters or a word ended `n_delay` frames ago or earlier."""
        goes_on = bool(self.going) and self.going_end <= -n_delay
        return goes_on or (bool(self.word) and self.word_end <= -n_delay)


@dataclass(slots=True)
class Joint:
    """At most `n_most` tokens that LLM and CTC agree on, as far as words are due."""

    heard: Heard
    n_most: int
    n_delay: int  # CTC frames before the chunk's end after which no word is due
    n_written: int = 0

    def goes_on(self, stop: float) -> bool:
        if self.n_written >= self.n_most:
            return False
        following = self.heard.what_next()
        if following.is_due(self.n_delay):
            return True
        # Punctuation alone is left: the stop head knows where it belongs.
        return following.is_over and stop <= -self.heard.cfg.mark_odds

    def suggest(self) -> list[int]:
        """The first token of what the best path says next, as a word may go on or begin."""
        heard, following = self.heard, self.heard.what_next()
        texts = [following.going] if following.going else []
        if following.word:
            texts += [following.word, " " + following.word[1:].capitalize()]
        found = (heard.tokenizer.encode(text) for text in texts)
        return [ids[0] for ids in found if ids]

    def pick(self, ids: Sequence[int], log_probs: Sequence[float]) -> int | None:
        heard, following = self.heard, self.heard.what_next()
        known: dict[int, tuple[str, Spelling]] = {}  # index in ids -> letters, spelling after them
        for i, token in enumerate(ids):
            said = heard.spelling.spell(heard.tokenizer.decode([token]))
            if said and self._fits(*said, following):
                known[i] = said
        if not known:
            heard.prefix.skip()  # else it would be due for ever
            heard.spelling = Spelling()
            return None
        self.n_written += 1
        texts = list(dict.fromkeys(text for text, _ in known.values()))
        scores = heard.prefix.scores(texts)
        evidence = {
            text: float(begins if text else ended)
            for text, begins, ended in zip(texts, scores.prefix, scores.ended, strict=True)
        }

        def score(i: int) -> float:
            heard_as = max(evidence[known[i][0]], TINY)
            return log_probs[i] + heard.cfg.ctc_weight * math.log(heard_as)

        best = max(known, key=score)
        text, heard.spelling = known[best]
        heard.prefix.write(text)
        return ids[best]

    def _fits(self, text: str, after: Spelling, following: Next) -> bool:
        """A new word must be due, a token without letters must end a word that is over.

        No English word has a letter three times in a row; the LLM likes to draw words out.
        """
        if _TRIPLE.search(self.heard.prefix.word + text):
            return False
        if " " in text:
            return bool(following.word) and following.word_end <= -self.n_delay
        if text:
            return True
        return following.is_over and after != self.heard.spelling
