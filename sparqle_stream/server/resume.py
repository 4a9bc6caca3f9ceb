"""Resuming: a stream of /v1/stream goes on over another connection, on this server or another.

Nothing is kept here for a client that is gone. It keeps the audio that was not acknowledged and
comes back with where that begins (`offset`), the end of the last word it has (`after`) and the
number of its utterance (`segment`); the audio is heard again, words that the client has are
dropped, and times go on from the offset. So any replica can take the stream over.

Acknowledged is audio whose words are all out, best of all up to the end of an utterance, where the
model begins anew; within a long one up to some seconds ago, so that the first words are heard with
what was said before them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from sparqle_stream import messages
from sparqle_stream.config import SAMPLE_RATE_HZ

OVERLAP_S = 3.0  # heard again before the first word that matters, inside an utterance
LONG_S = 12.0  # of an utterance, past which it is acknowledged in parts
STEP_S = 2.0  # acknowledged at a time
GRID_SAMPLES = 1280  # 80 ms: the model's own
SAME_WORD_S = 0.02  # a word that is heard again may be found a little later


@dataclass(slots=True)
class Ledger:
    """What one connection owes its client; times are seconds of the whole stream."""

    origin: float = 0.0  # where this connection's audio begins
    after: float = 0.0  # end of the last word that the client has
    first_segment: int = 0
    acknowledged: float = 0.0
    _has_text: bool = False  # some text of this connection's engine stream has come
    _segment_start: float | None = None  # of the open utterance
    _last_word_end: float = 0.0
    _has_tail: bool = False  # something was heard that is not final yet

    def __post_init__(self) -> None:
        self.acknowledged = self.origin
        self._last_word_end = self.after

    def translate(self, event: messages.Event) -> messages.Event | None:
        """An event of the engine's stream as one of the whole; None when nothing is left of it."""
        event = replace(event, time=event.time + self.origin)
        match event:
            case messages.SpeechStarted():
                self._segment_start = event.time
            case messages.SpeechStopped():
                self._segment_start = None
                self._has_tail = False
            case messages.Tail():
                self._has_tail = bool(event.text)
            case messages.Final():
                self._has_tail = False
                return self._final(event)
            case messages.Done():
                return replace(event, duration=event.duration + self.origin)
        return event

    def _final(self, event: messages.Final) -> messages.Final | None:
        words = tuple(
            messages.Word(
                *(w.word, w.start + self.origin, w.end + self.origin, w.emitted + self.origin)
            )
            for w in event.words
        )
        is_first, self._has_text = not self._has_text, True
        known = [w for w in words if self._is_known(w)]
        text = event.text
        for word in known:
            _, found, rest = text.partition(word.word)
            text = rest if found else text
        words = tuple(w for w in words if w not in known)
        if known and not words:
            return None
        if is_first and self.after > 0 and not known and not text[:1].isspace():
            text = f" {text}"  # the engine does not know that it is not the first word of all
        self._last_word_end = max([self._last_word_end, *(w.end for w in words)])
        segment = event.segment + self.first_segment
        return replace(event, text=text, words=words, segment=segment)

    def _is_known(self, word: messages.Word) -> bool:
        """Whether the client has it; one that has none may hear a word at the very start."""
        return self.after > 0 and (word.start + word.end) / 2 <= self.after + SAME_WORD_S

    # --- acknowledging ---------------------------------------------------------------------------

    def settle(self, event: messages.Event) -> float | None:
        """After an event, seconds up to which everything is out now; None when that is not news."""
        if not isinstance(event, messages.SpeechStopped | messages.Flushed):
            return None
        return self._advance(event.time, 0.0)

    def settle_heard(self, heard_s: float, delay_s: float) -> float | None:
        """The same when `heard_s` of the connection's audio went through the model, whose words
        come `delay_s` late."""
        limit = self.origin + heard_s - delay_s - OVERLAP_S
        if self._has_tail:
            limit = min(limit, self._last_word_end - OVERLAP_S)
        start = self._segment_start
        if start is not None and limit - start < LONG_S:
            limit = min(limit, start)
        return self._advance(limit, STEP_S)

    def _advance(self, limit: float, step_s: float) -> float | None:
        sample = int(limit * SAMPLE_RATE_HZ) // GRID_SAMPLES * GRID_SAMPLES
        seconds = sample / SAMPLE_RATE_HZ
        if seconds <= self.acknowledged or seconds - self.acknowledged < step_s:
            return None
        self.acknowledged = seconds
        return seconds
