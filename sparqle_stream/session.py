"""Session: what one stream needs on the host between its audio and its events.

PCM (S,) at 16 kHz goes through the detector into segments and chunks; the engine runs the chunks
and brings tokens back, which leave as events. Knows when the LLM's slot begins anew, with which
text before it, and how much the model may write. No threads, no clock: times are samples of the
stream, so events depend on the audio and the options alone.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from sparqle_stream import messages, stages, vad
from sparqle_stream.captions import CTC_MS, Captions, Spoken
from sparqle_stream.config import (
    FRAME_LAG_SAMPLES,
    FRAME_SAMPLES,
    FRAMES_PER_QUERY,
    QUERY_MS,
    SAMPLE_RATE_HZ,
    StreamOptions,
)
from sparqle_stream.errors import ConfigError
from sparqle_stream.metrics import Histogram
from sparqle_stream.segments import Chunk, SegmentQueue
from sparqle_stream.word_beam import WordBeam
from sparqle_stream.writer import Greedy, Hearing, Joint

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sparqle_stream.decode import Writer
    from sparqle_stream.models import Model

Floats = npt.NDArray[np.float32]

# After a segment's end the model hears silence through look-ahead and delay, and one query more:
# CTC's last piece may come a little after the end of the last word.
FLUSH_SAMPLES = FRAME_LAG_SAMPLES + FRAMES_PER_QUERY * FRAME_SAMPLES


class Start(Enum):
    """How a chunk finds the LLM's slot."""

    GOES_ON = "goes on"
    SEGMENT = "segment"  # after a pause: everything is new
    SEAM = "seam"  # no pause: only the LLM's slot is new


@dataclass(frozen=True, slots=True)
class Turn:
    """What the engine has to run for a stream's next chunk."""

    pcm: Floats  # (S,)
    start: Start
    prefix: list[int] | None  # what a new slot begins with
    n_again: int  # queries that a seam hears again
    lead: Floats | None = None  # (L,) what was heard of a segment before it was known of


@dataclass(slots=True)
class _Slot:
    """What the host knows of the stream's LLM slot."""

    n_used: int = 0  # rows
    since: int = 0  # stream sample at which it began
    n_allowed: int = 0  # tokens in the chunk that is being run
    wants_seam: bool = False  # before the next chunk


class Session:
    """One stream between its audio and its events; its size is bounded by the backlog."""

    def __init__(self, model: Model, options: StreamOptions, n_context_words: int) -> None:
        self.options = options
        self.counts: Counter[str] = Counter()  # for the engine's metrics, which empties it
        self.step_seconds = Histogram()
        self.position = 0  # stream samples whose captions are out
        self._model = model
        self._cfg = model.cfg.captions
        self._n_context_words = n_context_words
        delay_samples = options.delay_ms * SAMPLE_RATE_HZ // 1000
        self.ahead_frames = model.cfg.encoder.ahead_frames(options.delay_ms)
        ahead_samples = self.ahead_frames * FRAME_SAMPLES
        # What is left of the delay once the encoder has looked ahead.
        self.wait_ms = options.delay_ms - ahead_samples * 1000 // SAMPLE_RATE_HZ
        self._detector = vad.load_detector(options.vad)
        self._vad = vad.init_state(self._detector)
        self._queue = SegmentQueue(options.chunk_samples, FLUSH_SAMPLES + delay_samples)
        self._hearing = self._nothing_heard()
        self._captions = Captions(
            self._cfg, model.tokenizer, model.pieces, delay_samples, ahead_samples
        )
        self._chunk: Chunk | None = None  # being run
        self._slot = _Slot()
        # Rows that one more chunk may need; queries that a seam hears again.
        self._n_most = options.chunk_queries + self._captions.max_allowance(options.chunk_samples)
        again = self._cfg.seam_chunks_again * options.chunk_queries
        self._n_again = min(-(-self.wait_ms // QUERY_MS) + again, stages.N_RECENT)
        if model.cfg.llm.n_slot < 2 * (stages.PREFIX_TOKENS + self._n_again + self._n_most):
            raise ConfigError(
                f"the LLM's slot of {model.cfg.llm.n_slot} rows is too short for these options",
                hint="use a smaller --chunk-ms or --delay-ms",
            )
        self._n_segment = -1
        self._announced = -1  # origin of the segment that was announced last
        self._last_tail = ""

    # --- audio -----------------------------------------------------------------------------------

    def listen(self, pcm: Floats) -> list[vad.SegmentEvent]:
        """pcm (S,) of any length -> what the detector makes of it, for `enqueue`."""
        self._vad, found = vad.step(self._detector, self._vad, pcm)
        return found

    def asked(self, pcm: Floats) -> tuple[vad.Detector, vad.VadState, Floats]:
        """For `vad.foresee`: pcm (S,) is what `listen` will be given next."""
        return self._detector, self._vad, pcm

    def flush(self) -> list[vad.SegmentEvent]:
        """Ends the open segment, so that its last words come out; for `enqueue`."""
        self._vad, found = vad.flush(self._detector, self._vad)
        return found

    def enqueue(self, found: list[vad.SegmentEvent]) -> None:
        for event in found:
            if isinstance(event, vad.SegmentStart):
                self._queue.begin(event.sample, event.known_at)
            elif isinstance(event, vad.SegmentAudio):
                self._queue.append(event.pcm)
            elif isinstance(event, vad.SegmentPause):
                self._queue.pause(event.known_at, is_on=event.is_on)
            else:
                self._queue.end(event.known_at, event.n_quiet)

    @property
    def patience(self) -> int:
        """Samples that may wait for one another before `listen`: no event is later for it, and a
        backlog, which holds two chunks, is not filled by it."""
        return min(vad.patience(self._detector, self._vad), self._queue.n_missing)

    @property
    def has_chunk(self) -> bool:
        return self._queue.has_chunk

    @property
    def shape(self) -> tuple[int, int]:
        """What chunks must have in common to be run together: length (ms) and look-ahead."""
        return self.options.chunk_ms, self.ahead_frames

    @property
    def n_waiting(self) -> int:
        """Samples that were received and are not captioned; for the engine's backlog."""
        return self._queue.n_waiting

    @property
    def n_new(self) -> int:
        """Those of them that take room: not what the detector kept of the time before it was sure.
        It had left the backlog as silence, and is back when somebody may have been promised room.
        """
        return self._queue.n_new

    # --- chunks ----------------------------------------------------------------------------------

    def next_turn(self) -> Turn:
        """Takes the next chunk; `take` must follow."""
        self._chunk = chunk = self._queue.next_chunk()
        if chunk.is_first:
            self._captions.begin(chunk.origin)
            self._hearing = self._nothing_heard()
            return self._begin(Start.SEGMENT, n_again=0)
        if self._slot.wants_seam:
            # After a loop there is nothing to go on from: it was neither heard nor worth repeating.
            n_past = (chunk.start - chunk.origin) * 1000 // (QUERY_MS * SAMPLE_RATE_HZ)
            n_again = 0 if self._captions.is_looping else min(self._n_again, n_past)
            self.counts["seams"] += 1
            # A word beam goes on where it was, and what it wrote is committed.
            self._captions.seam(chunk.start, may_repeat=self._hearing is None)
            return self._begin(Start.SEAM, n_again)
        return Turn(chunk.pcm, Start.GOES_ON, None, 0)

    def _begin(self, start: Start, n_again: int) -> Turn:
        assert self._chunk is not None
        # The prompt first: what is too long loses its beginning, and must not lose the task.
        context = self._captions.context(self._n_context_words)
        told = (self.options.prompt, self.options.instruction, context)
        prefix = stages.prefix_ids(self._model.tokenizer, " ".join(filter(None, told)))
        self._slot = _Slot(n_used=len(prefix) + n_again, since=self._chunk.start)
        self._n_segment += 1
        return Turn(self._chunk.pcm, start, prefix, n_again, self._chunk.lead)

    def hear(self, log_probs: Floats) -> Writer:
        """log_probs (C, V) of the chunk -> who chooses its tokens."""
        self._captions.hear(log_probs.argmax(axis=-1).tolist())
        by_letters = self._hearing is None  # a word beam writes nothing but what was heard
        n_most = self._captions.allowance(self.options.chunk_samples, by_letters=by_letters)
        self._slot.n_allowed = n_most
        if self._hearing is None:
            return Greedy(n_most, self._model.cfg.writer.stop_threshold)
        assert self._chunk is not None
        self._hearing.beam.hear(log_probs)
        self._hearing.is_paused = self._chunk.is_paused
        is_last = self._chunk.segment_end is not None
        return Joint(self._hearing, n_most, self.wait_ms // CTC_MS, is_last)

    def _nothing_heard(self) -> Hearing | None:
        """None: without a lexicon the LLM alone decides."""
        model = self._model
        if model.lexicon is None:
            return None
        beam = WordBeam(model.lexicon, model.cfg.beam)
        is_judged = model.text is not None and model.cfg.writer.text_weight > 0
        return Hearing(model.cfg.writer, model.tokenizer, beam, is_judged)

    def take(self, tokens: list[int]) -> Iterator[messages.Event]:
        """The chunk's tokens -> its events."""
        chunk, captions = self._chunk, self._captions
        assert chunk is not None
        # A word that LLM and CTC agree on is written to its end.
        is_complete = self._hearing is not None or len(tokens) < self._slot.n_allowed
        was_looping = captions.is_looping
        self.position = chunk.known_at
        spoken = captions.write(
            tokens, is_complete=is_complete, chunk_end=chunk.end, emitted=chunk.known_at
        )
        yield from self._final(spoken, chunk.known_at)
        if captions.is_looping and not was_looping:
            self.counts["loops_stopped"] += 1
        if chunk.segment_end is not None:
            yield from self._stop(chunk, chunk.segment_end)
            return
        tail = self._hearing.beam.tail if self._hearing else captions.tail
        if tail != self._last_tail:
            self._last_tail = tail
            yield messages.Tail(self._last_tail, chunk.known_at / SAMPLE_RATE_HZ)
        yield from self._warn(chunk)
        self._plan(chunk, len(tokens))

    def _plan(self, chunk: Chunk, n_tokens: int) -> None:
        """After a chunk: must the next one begin a new slot, although nobody paused?"""
        slot, captions = self._slot, self._captions
        slot.n_used += self.options.chunk_queries + n_tokens
        limit = int(self.options.max_segment_s * SAMPLE_RATE_HZ)
        search = min(int(self._cfg.seam_search_s * SAMPLE_RATE_HZ), limit // 4)
        age = chunk.end - slot.since
        slot.wants_seam = (
            captions.is_looping
            or slot.n_used + self._n_most > self._model.cfg.llm.n_slot
            or age >= limit
            or (age >= limit - search and captions.is_quiet())
        )

    # --- events ----------------------------------------------------------------------------------

    def announce(self) -> Iterator[messages.Event]:
        """SpeechStarted, once the segment before is complete: events keep one order."""
        origin = self._queue.first_origin
        if origin is not None and origin != self._announced:
            self._announced = origin
            self.position = max(self.position, origin)
            yield messages.SpeechStarted(origin / SAMPLE_RATE_HZ)

    def _final(self, spoken: Spoken, emitted: int) -> Iterator[messages.Event]:
        if not spoken.text:
            return
        at = emitted / SAMPLE_RATE_HZ
        words = tuple(
            messages.Word(w.text, w.start / SAMPLE_RATE_HZ, w.end / SAMPLE_RATE_HZ, at)
            for w in spoken.words
        )
        self._last_tail = ""  # a final takes its place
        yield messages.Final(spoken.text, words, self._n_segment, at)

    def _stop(self, chunk: Chunk, segment_end: int) -> Iterator[messages.Event]:
        spoken = self._captions.close(chunk_end=chunk.end, emitted=chunk.known_at)
        yield from self._final(spoken, chunk.known_at)
        if self._last_tail:
            self._last_tail = ""
            yield messages.Tail("", chunk.known_at / SAMPLE_RATE_HZ)
        yield messages.SpeechStopped(segment_end / SAMPLE_RATE_HZ)
        yield from self.announce()

    def _warn(self, chunk: Chunk) -> Iterator[messages.Event]:
        is_speech = self.options.vad.kind != "off"
        if self._captions.is_newly_mute(chunk.end, is_speech=is_speech):
            self.counts["speech_without_text"] += 1
            yield messages.Warning(
                "speech_without_text",
                f"speech for {self._cfg.no_text_warning_s:g} s, but no words were recognised",
                chunk.known_at / SAMPLE_RATE_HZ,
            )
