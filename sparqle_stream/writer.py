"""Writers: what decides, for one row and one chunk, which tokens the LLM writes and when it stops.

`Greedy` takes the LLM's word for both. `Joint` asks CTC too (joint CTC / attention decoding,
Watanabe et al., 2017): a token's score is log p(LLM) + weight * log prefix score(CTC), and a
chunk's text ends when the heard path has no more words that are due. So the LLM chooses among what
was heard, and can hardly skip, repeat or invent. Contract: a writer sees what was heard until the
end of its chunk and what it wrote itself, nothing else.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from sparqle_stream.ctc_prefix import TINY, CtcPrefix

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sparqle_stream.config import WriterConfig

APOSTROPHE = "'"
_SAID = frozenset("abcdefghijklmnopqrstuvwxyz")
_UNSAID = frozenset(' .,;:?!-–—"…()')
_ALIKE = str.maketrans({"’": APOSTROPHE, "‘": APOSTROPHE})


class Decodes(Protocol):
    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: list[int]) -> str: ...


class Writer(Protocol):
    """One row's decisions in one chunk."""

    n_most: int  # tokens that may be written

    def goes_on(self, stop: float) -> bool:
        """Whether another token is wanted; `stop` is the stop head's logit."""
        ...

    def suggest(self) -> list[int]:
        """Tokens to be scored besides the LLM's best."""
        ...

    def pick(self, ids: Sequence[int], log_probs: Sequence[float]) -> int:
        """The token to write: one of ids (K,), best first, with the LLM's log-probabilities."""
        ...


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

    def pick(self, ids: Sequence[int], log_probs: Sequence[float]) -> int:
        self.n_written += 1
        return ids[0]


@dataclass(frozen=True, slots=True)
class Spelling:
    """Where written text stands, in the letters that CTC knows."""

    is_broken: bool = True  # the next letter begins a word
    is_held: bool = False  # an apostrophe waits for a letter

    def spell(self, text: str) -> tuple[str, Spelling] | None:
        """More text -> its letters, with a space before each new word. None: it cannot be said.

        >>> Spelling().spell("O'Neil, no!")[0]
        " o'neil no"
        """
        out, is_broken, is_held = "", self.is_broken, self.is_held
        for char in text.translate(_ALIKE).lower():
            if char in _SAID:
                out += " " * is_broken + APOSTROPHE * (is_held and not is_broken) + char
                is_broken = is_held = False
            elif char == APOSTROPHE:
                is_held = not is_broken
            elif char in _UNSAID:
                is_broken, is_held = True, False
            else:
                return None
        return out, Spelling(is_broken, is_held)


@dataclass(slots=True)
class Heard:
    """A segment's CTC evidence and how far it has been written: what `Joint` keeps per stream."""

    cfg: WriterConfig
    tokenizer: Decodes
    prefix: CtcPrefix
    spelling: Spelling = field(default_factory=Spelling)

    def next_word(self) -> tuple[str, int] | None:
        """The next word on the best path and the frame after it (0: the end of what was heard)."""
        word, end = "", 0
        for text, frame in self.prefix.rest():
            if text.startswith(" "):
                if word:
                    break
                word = text
            elif word:
                word += text
            end = frame
        return (word, end) if word else None

    def going_on(self) -> str:
        """Letters that the best path adds to the open word."""
        letters = ""
        for text, _ in self.prefix.rest():
            if text.startswith(" "):
                break
            letters += text
        return letters

    def over(self) -> float:
        """Probability that the open word is complete."""
        if self.spelling.is_broken or not self.prefix.word:
            return 1.0
        scores = self.prefix.scores([""])
        return min(1.0, float(scores.ended[0]) / max(float(scores.prefix[0]), TINY))


@dataclass(slots=True)
class Joint:
    """At most `n_most` tokens that LLM and CTC agree on, as far as words are due."""

    heard: Heard
    n_most: int
    n_delay: int  # CTC frames before the chunk's end after which no word is due
    n_written: int = 0

    def goes_on(self, stop: float) -> bool:
        cfg = self.heard.cfg
        if self.n_written >= self.n_most:
            return False
        if self._is_due():
            odds = -cfg.due_odds
        elif self.heard.spelling.is_broken or not self.heard.prefix.word:
            return False
        else:
            over = min(max(self.heard.over(), 1e-3), 1.0 - 1e-3)
            odds = math.log(over / (1.0 - over))
        return cfg.stop_weight * stop + odds <= 0.0

    def _is_due(self) -> bool:
        word = self.heard.next_word()
        return word is not None and word[1] <= -self.n_delay

    def suggest(self) -> list[int]:
        """The first token of what the best path says next, as a word may begin or go on."""
        heard, texts = self.heard, list[str]()
        if letters := heard.going_on():
            texts.append(letters)
        if word := heard.next_word():
            texts += [word[0], " " + word[0][1:].capitalize()]
        found = (heard.tokenizer.encode(text) for text in texts)
        return [ids[0] for ids in found if ids]

    def pick(self, ids: Sequence[int], log_probs: Sequence[float]) -> int:
        heard = self.heard
        spelt = [heard.spelling.spell(heard.tokenizer.decode([i])) for i in ids]
        is_due = self._is_due()
        known = [i for i, said in enumerate(spelt) if said is not None and self._fits(said, is_due)]
        self.n_written += 1
        if not known:
            heard.spelling = Spelling()
            return ids[0]
        said = [spelt[i] for i in known]
        texts = list(dict.fromkeys(s[0] for s in said if s is not None))
        scores = heard.prefix.scores(texts)
        evidence = {
            text: float(ended if not text else begins)
            for text, begins, ended in zip(texts, scores.prefix, scores.ended, strict=True)
        }
        weight = heard.cfg.ctc_weight
        best, best_score = known[0], -math.inf
        for i, one in zip(known, said, strict=True):
            assert one is not None
            score = log_probs[i] + weight * math.log(max(evidence[one[0]], TINY))
            if score > best_score:
                best, best_score = i, score
        chosen = spelt[best]
        assert chosen is not None
        heard.prefix.write(chosen[0])
        heard.spelling = chosen[1]
        return ids[best]

    def _fits(self, said: tuple[str, Spelling], is_due: bool) -> bool:
        """New words must be due; a token without letters must end a word or hold an apostrophe."""
        text, after = said
        if text:
            return is_due or " " not in text
        return after != self.heard.spelling and bool(self.heard.prefix.word.strip())
