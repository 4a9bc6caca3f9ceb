"""Captions: an LLM's tokens and the CTC path -> final words with times, and the grey tail.

Per stream, on the host. Tokens become text without splitting UTF-8; words leave once and are never
revised. Times come from the CTC head's greedy path (40 ms): written letters are matched to heard
letters (they spell the same speech differently) by a small edit distance, monotonically, and what
was matched stays matched. What was heard after the last match is the grey tail. What was heard also
pays for what may be written: a stream in which CTC hears nothing gets no text, however talkative
the LLM is. Latency: none; a word leaves with the chunk that wrote it.

Times inside are samples of the stream. CTC frame c covers samples 640 c - 320 .. 640 c + 320 after
the first sample of its segment, less the encoder's look-ahead.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from sparqle_stream.config import (
    FRAME_SAMPLES,
    FRAMES_PER_CTC,
    SAMPLE_RATE_HZ,
    CaptionConfig,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

CTC_SAMPLES = FRAMES_PER_CTC * FRAME_SAMPLES
CTC_MS = CTC_SAMPLES * 1000 // SAMPLE_RATE_HZ
REPLACEMENT = "\ufffd"  # what a tokenizer makes of bytes that are not UTF-8 (yet)
MAX_HELD_TOKENS = 8  # a character has at most 4 bytes; more incomplete tokens are rubbish
MAX_HEARD = 160  # letters of CTC that may wait for the LLM: some 10 s of speech
MAX_CONTEXT_CHARS = 400
SEAM_GUARD_WORDS = 4
MAX_WORD_SAMPLES = 4 * SAMPLE_RATE_HZ // 10  # of a word whose times had to be guessed
LETTERS_PER_TOKEN = 2  # a token of fewer letters is rare
BLANK = 0  # CTC's empty piece

# Costs of an alignment, in units of one wrong letter.
SUBSTITUTED = 1.0
NOT_HEARD = 1.0  # a written letter without a heard one
NOT_WRITTEN = 0.6  # a heard letter inside the text that was not written
SKIPPED = 0.15  # a heard letter before the text: the LLM left it out
SPACE = 0.5  # a space on one side only
SPACE_FOR_LETTER = 2.0
MIN_SHARE = 0.34  # of a word's letters that must be heard for its times to be believed

Span = tuple[int, int]


class Decodes(Protocol):
    def decode(self, ids: list[int]) -> str: ...


class HasPieces(Protocol):
    def piece(self, piece_id: int) -> str: ...


@dataclass(slots=True)
class Detokenizer:
    """Tokens -> text, holding back the bytes of a character that is not complete."""

    tokenizer: Decodes
    held: list[int] = field(default_factory=list)

    def push(self, tokens: list[int]) -> str:
        text = ""
        for token in tokens:
            self.held.append(token)
            piece = self.tokenizer.decode(self.held)
            if not piece.endswith(REPLACEMENT) or len(self.held) >= MAX_HELD_TOKENS:
                text += piece
                self.held.clear()
        return "".join(c for c in text if c != REPLACEMENT and not _is_control(c))


@dataclass(frozen=True, slots=True)
class Letter:
    """One letter of a CTC piece, or the space before a word."""

    text: str
    frame: int  # CTC frame of its piece, since the segment's first sample

    @property
    def key(self) -> str:
        return _letters(self.text)


@dataclass(slots=True)
class HeardPath:
    """The greedy CTC path of a segment: letters that no final word has claimed yet."""

    pieces: HasPieces
    letters: deque[Letter] = field(default_factory=lambda: deque(maxlen=MAX_HEARD))
    n_frames: int = 0
    last_piece: int = BLANK
    last_heard_frame: int = -1

    def hear(self, best: Sequence[int]) -> int:
        """The best piece of each new frame -> number of new letters; a chunk's edge is nothing."""
        n_new = 0
        for piece in best:
            if piece != BLANK:
                self.last_heard_frame = self.n_frames
                if piece != self.last_piece:
                    text = self.pieces.piece(piece)
                    self.letters.extend(Letter(char, self.n_frames) for char in text)
                    n_new += len(_letters(text).strip())
            self.last_piece = piece
            self.n_frames += 1
        return n_new

    def drop(self, n: int) -> None:
        for _ in range(n):
            self.letters.popleft()

    @property
    def n_quiet_frames(self) -> int:
        return self.n_frames - 1 - self.last_heard_frame


@dataclass(frozen=True, slots=True)
class FinalWord:
    """A word with its punctuation; samples of the stream."""

    text: str
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Spoken:
    """New final text: what to append to the transcript, and its words."""

    text: str = ""
    words: tuple[FinalWord, ...] = ()


class Captions:
    """Text state of one stream. Its size is bounded: what left is forgotten but for the context."""

    def __init__(
        self,
        cfg: CaptionConfig,
        tokenizer: Decodes,
        pieces: HasPieces,
        delay_samples: int,
        ahead_samples: int = 0,
    ) -> None:
        """`ahead_samples`: the part of the delay by which the encoder's frames come late."""
        self.cfg = cfg
        self.is_looping = False  # this segment's text was stopped
        self.heard = HeardPath(pieces)
        self._detokenizer = Detokenizer(tokenizer)
        self._delay_samples, self._ahead_samples = delay_samples, ahead_samples
        self._origin = 0  # stream sample at which the segment's CTC frames begin
        self._open = ""  # text that may still grow
        self._left = Spoken()  # of the slot before a seam; leaves with the next chunk
        self._context = ""  # end of the transcript
        self._has_text = False
        self._last_end = 0  # of the last final word, samples
        self._text_due = 0  # stream sample since which speech has had no text
        self._is_mute = False  # the warning was given
        self._is_fresh = True  # the next word is the first of its segment
        self._guard: list[str] = []  # last words before a seam
        self._run: deque[int] = deque(maxlen=cfg.repeat_ngram * cfg.repeat_times)
        self._token_budget = 0.0
        self._letter_credit = 0.0

    def begin(self, origin: int) -> None:
        """A segment after a pause; its first sample is `origin` of the stream."""
        self.heard = HeardPath(self.heard.pieces)
        self._origin = self._text_due = origin
        self._token_budget = self._letter_credit = 0.0
        self._is_mute = False
        self._start_text()

    def seam(self, at: int, *, may_repeat: bool) -> None:
        """A new LLM slot without a pause, from sample `at` on: the CTC path goes on, what was open
        is complete. What led to a loop is forgotten.

        `may_repeat`: whoever writes may say the context's last words again (`_n_doubled`).
        """
        if self.is_looping:
            self._context = ""
        done, self._open = self._open, ""
        left = self._finalize(done, at - self._delay_samples, at)
        self._start_text()
        self._left = left
        if may_repeat:
            self._guard = [_letters(word) for word in self._context.split()[-SEAM_GUARD_WORDS:]]

    def _start_text(self) -> None:
        self.is_looping, self._is_fresh, self._open, self._guard = False, True, "", []
        self._detokenizer.held.clear()
        self._run.clear()

    def hear(self, best: Sequence[int]) -> None:
        """The best CTC piece of every frame of the chunk that is about to be written."""
        cfg, was_silent = self.cfg, self.heard.last_heard_frame < 0
        n_letters = self.heard.hear(best)
        credit = self._letter_credit + cfg.letters_per_heard * n_letters
        if was_silent and self.heard.last_heard_frame >= 0:
            credit += cfg.letter_slack
        self._letter_credit = min(credit, cfg.max_letter_credit)

    def allowance(self, chunk_samples: int, *, by_letters: bool = True) -> int:
        """Most tokens that may be written in this chunk (DESIGN rule 9).

        `by_letters`: what CTC's best path heard must pay for them; False where what is written was
        heard anyway. Nothing is written before anything was heard.
        """
        new = self.cfg.max_tokens_per_s * chunk_samples / SAMPLE_RATE_HZ
        self._token_budget = min(self._token_budget + new, self.max_allowance(chunk_samples))
        if self.is_looping or self.heard.last_heard_frame < 0:
            return 0
        most = int(self._token_budget)
        if by_letters:
            most = min(most, math.ceil(self._letter_credit / LETTERS_PER_TOKEN))
        return max(0, most)

    def max_allowance(self, chunk_samples: int) -> int:
        """What `allowance` can come to at most."""
        seconds = chunk_samples / SAMPLE_RATE_HZ + self.cfg.token_burst_s
        return int(self.cfg.max_tokens_per_s * seconds)

    def write(
        self, tokens: list[int], *, is_complete: bool, chunk_end: int, emitted: int
    ) -> Spoken:
        """Tokens of one chunk -> final words. `is_complete`: the model stopped by itself.

        `chunk_end` is the chunk's end in samples of the stream, padding included; `emitted` the
        sample that had to be heard for it.
        """
        left, self._left = self._left, Spoken()
        self._token_budget -= len(tokens)
        for token in tokens:
            self._run.append(token)
            if _is_repetition(self._run, self.cfg.repeat_ngram):
                self.is_looping, self._open = True, ""
                return left
        self._open += self._detokenizer.push(tokens)
        cut = len(self._open.rstrip()) if is_complete else _last_word_at(self._open)
        done, self._open = self._open[:cut], self._open[cut:]
        spoken = self._finalize(done, chunk_end - self._delay_samples, emitted)
        return Spoken(left.text + spoken.text, left.words + spoken.words)

    def close(self, chunk_end: int, emitted: int) -> Spoken:
        """End of a segment: what is open leaves, what was heard only is forgotten."""
        done, self._open = self._open, ""
        spoken = self._finalize(done, chunk_end - self._delay_samples, emitted)
        self.heard.letters.clear()
        return spoken

    @property
    def tail(self) -> str:
        """Provisional text: what CTC heard after the last final word, from a word's start."""
        oldest = self.heard.n_frames - int(self.cfg.tail_s * 1000) // CTC_MS
        text = "".join(x.text for x in self.heard.letters if x.frame >= oldest)
        rest, _, words = text.partition(" ")
        return text.strip() if len(rest) > 2 else words.strip()

    def context(self, n_words: int) -> str:
        """The last words of the transcript, to prime a segment with."""
        return " ".join(self._context.split()[-n_words:]) if n_words else ""

    def is_quiet(self) -> bool:
        """CTC has been blank for longer than words wait: none is waiting to be written."""
        quiet = self.heard.n_quiet_frames * CTC_SAMPLES + self._ahead_samples
        return not self._open.strip() and quiet >= self._delay_samples + 2 * CTC_SAMPLES

    def is_newly_mute(self, chunk_end: int, *, is_speech: bool) -> bool:
        """True once for a time of speech that brought no text, `no_text_warning_s` long.

        `is_speech` is the detector's word for it; without a detector letters of CTC count.
        """
        too_long = chunk_end - self._text_due >= self.cfg.no_text_warning_s * SAMPLE_RATE_HZ
        if self._is_mute or not too_long or not (is_speech or self.heard.letters):
            return False
        self._is_mute = True
        return True

    def _finalize(self, done: str, latest: int, emitted: int) -> Spoken:
        """Text of whole words -> words with times. `latest`: where a word should have ended."""
        found = [(bool(m[1]), m[2]) for m in re.finditer(r"(\s*)(\S+)", done)]
        self._letter_credit -= sum(len(_letters(word)) for _, word in found)
        found = found[self._n_doubled([word for _, word in found]) :]
        if not found:
            return Spoken()
        times = self._times([word for _, word in found], latest, emitted)
        text, words = "", []
        for (has_space, word), (start, end) in zip(found, times, strict=True):
            starts_word = has_space or (self._is_fresh and bool(_letters(word)))
            text += " " + word if starts_word and (self._has_text or text) else word
            words.append(FinalWord(word, start, end))
            self._is_fresh = False
        self._context, self._has_text = (self._context + text)[-MAX_CONTEXT_CHARS:], True
        self._text_due, self._is_mute = emitted, False
        return Spoken(text, tuple(words))

    def _times(self, words: list[str], latest: int, emitted: int) -> list[tuple[int, int]]:
        """Start and end of every word in samples; a mark that stands alone takes no time."""
        end = min(max(self._last_end, self._origin), emitted)
        said = [word for word in words if _letters(word)]
        timed = iter(self._times_said(said, latest, emitted) if said else ())
        times = []
        for word in words:
            times.append(next(timed) if _letters(word) else (end, end))
            end = times[-1][1]
        return times

    def _times_said(self, words: list[str], latest: int, emitted: int) -> list[tuple[int, int]]:
        """Of words with letters: matched, or guessed between neighbours."""
        heard = list(self.heard.letters)
        matched, n_used = match_words([_letters(w) for w in words], [x.key for x in heard])
        lead, hold = (ms * SAMPLE_RATE_HZ // 1000 for ms in (self.cfg.lead_ms, self.cfg.hold_ms))
        spans = [
            (self._sample(heard[m[0]].frame) - lead, self._sample(heard[m[1]].frame + 1) + hold)
            if m
            else None
            for m in matched
        ]
        first = max(self._last_end, self._origin)
        spans_filled = fill_gaps(spans, first, max(latest, first), MAX_WORD_SAMPLES)
        times = []
        for start, end in spans_filled:
            start = min(max(start, first), emitted)
            first = min(max(end, start), emitted)
            times.append((start, first))
        if (
            spans[-1] is None
        ):  # what was heard until the guessed end has been written in other words
            n_used = sum(self._sample(x.frame) < first for x in heard)
        self.heard.drop(n_used)
        self._last_end = first
        return times

    def _sample(self, frame: int) -> int:
        return self._origin + CTC_SAMPLES * frame - FRAME_SAMPLES - self._ahead_samples

    def _n_doubled(self, words: list[str]) -> int:
        """How many of the first words after a seam only repeat the context.

        They are said to repeat when they continue a run of the context's last words and CTC has
        not heard them (again).
        """
        guard, keys = self._guard, [_letters(word) for word in words]
        if not guard or not keys:
            return 0
        self._guard = []
        heard = "".join(x.key for x in self.heard.letters)
        for at in range(len(guard)):
            n = _n_common(guard[at:], keys)
            reaches_end = at + n == len(guard)
            if n and (reaches_end or n == len(keys)):
                if same_share(keys[:n], heard) > self.cfg.doubled_share:
                    return 0
                self._guard = [] if reaches_end else guard[at + n :]
                return n
        return 0


def match_words(words: Sequence[str], heard: Sequence[str]) -> tuple[list[Span | None], int]:
    """words (letters only) against heard letters (one each, '' for none of those).

    Returns for every word the indices of its first and last heard letter, None where too few were
    heard, and how many heard letters are used up.
    """
    index = [i for i, letter in enumerate(heard) if letter]
    text = "".join(" " + word for word in words)
    pairs = align(text, "".join(heard[i] for i in index))
    spans: list[Span | None] = []
    at, n_used = 0, 0
    for word in words:
        at += 1  # the space
        inside = [p for p in pairs[at : at + len(word)] if p >= 0]
        same = [
            p
            for p, letter in zip(pairs[at : at + len(word)], word, strict=True)
            if p >= 0 and heard[index[p]] == letter
        ]
        at += len(word)
        if not same or len(same) < MIN_SHARE * len(word):
            spans.append(None)
            continue
        spans.append((index[same[0]], index[same[-1]]))
        n_used = index[inside[-1]] + 1
    return spans, n_used


def same_share(words: Sequence[str], heard: str) -> float:
    """Share of the words' letters that the heard text has in the same order."""
    text = "".join(" " + word for word in words)
    pairs = align(text, heard)
    letters = [(p, c) for p, c in zip(pairs, text, strict=True) if c != " "]
    return sum(p >= 0 and heard[p] == c for p, c in letters) / max(1, len(letters))


def align(written: str, heard: str) -> list[int]:
    """For every written character the index of the heard one beside it, -1 for none.

    The cheapest alignment; what is heard after the written text costs nothing. Ties go to what
    was heard first.
    """
    cost = [[SKIPPED * j for j in range(len(heard) + 1)]]
    for char in written:
        above = cost[-1]
        missing = SPACE if char == " " else NOT_HEARD
        row = [above[0] + missing]
        for j, other in enumerate(heard):
            extra = SPACE if other == " " else NOT_WRITTEN
            row.append(
                min(above[j] + _pair_cost(char, other), above[j + 1] + missing, row[j] + extra)
            )
        cost.append(row)
    last = cost[-1]
    return _trace(cost, written, heard, min(range(len(last)), key=last.__getitem__))


def _pair_cost(char: str, other: str) -> float:
    if char == other:
        return 0.0
    return SPACE_FOR_LETTER if " " in (char, other) else SUBSTITUTED


def _trace(cost: list[list[float]], written: str, heard: str, end: int) -> list[int]:
    """The path back through the cost table from column `end` of its last row."""
    pairs = [-1] * len(written)
    i, j = len(written), end
    while i:
        char, here = written[i - 1], cost[i][j]
        if j and here == cost[i - 1][j - 1] + _pair_cost(char, heard[j - 1]):
            i, j = i - 1, j - 1
            pairs[i] = j
        elif here == cost[i - 1][j] + (SPACE if char == " " else NOT_HEARD):
            i -= 1
        else:
            j -= 1
    return pairs


def fill_gaps(spans: Sequence[Span | None], first: int, last: int, max_width: int) -> list[Span]:
    """Guesses the spans that are None: side by side before the next known one, after the last.

    `first` and `last` bound them at both ends; no guessed span is wider than `max_width`.
    """
    out: list[Span] = []
    i = 0
    while i < len(spans):
        known = spans[i]
        if known is not None:
            out.append(known)
            i += 1
            continue
        n = next((k for k, span in enumerate(spans[i:]) if span is not None), len(spans) - i)
        after = spans[i + n] if i + n < len(spans) else None
        right = after[0] if after else last
        left = min(out[-1][1] if out else first, right)
        width = min((right - left) // n, max_width)
        out.extend((right - (n - k) * width, right - (n - k - 1) * width) for k in range(n))
        i += n
    return out


def _n_common(a: list[str], b: list[str]) -> int:
    """Length of the common beginning."""
    n = 0
    while n < min(len(a), len(b)) and a[n] == b[n]:
        n += 1
    return n


def _is_control(char: str) -> bool:
    return unicodedata.category(char) == "Cc" and not char.isspace()


def _letters(text: str) -> str:
    """What counts when written and heard text are compared: letters, digits, spaces."""
    return "".join(c for c in text.lower() if c.isalnum() or c == " ")


def _last_word_at(text: str) -> int:
    """Index at which the last, perhaps unfinished word begins, its space included."""
    last = re.search(r"\s+\S*$", text)
    return last.start() if last else 0


def _is_repetition(run: deque[int], max_period: int) -> bool:
    """A full window that repeats with a period of at most `max_period` tokens."""
    if len(run) != run.maxlen:
        return False
    tokens = list(run)
    return any(tokens[p:] == tokens[:-p] for p in range(1, max_period + 1))
