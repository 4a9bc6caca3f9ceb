"""Output formats: events of a stream in, txt, json, jsonl, srt, vtt or tsv out.

Contract: what a writer has written is never revised, and how the words were grouped into events
does not change it. txt, srt, vtt and tsv are written and flushed as soon as a line or a cue is
complete (a cue once the next word is known); json and jsonl when the stream is done.
Times come as seconds of stream time and are rounded to milliseconds.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from sparqle_stream import messages
from sparqle_stream.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import TextIO

    from sparqle_stream.messages import Event, Word

# What broadcasters ask of captions (BBC and Netflix style guides agree within a little).
LINE_CHARS = 42
CUE_LINES = 2
MIN_CUE_S = 1.0
MAX_CUE_S = 7.0
CHARS_PER_S = 17.0
PAUSE_S = 1.0  # a cue does not reach over a longer pause
SENTENCE_CHARS = 12  # a shorter one ('Yes.', 'Mr.') shares its cue with the next
CLAUSE_CHARS = 42  # past one full line, the end of a clause ends the cue


@dataclass(frozen=True, slots=True)
class Segment:
    """Words between two pauses; times in seconds."""

    start: float
    end: float
    text: str


class Segments:
    """Events in, segments out; only the words of the one that is open are held."""

    def __init__(self) -> None:
        self._open: list[messages.Final] = []

    def add(self, event: Event) -> Segment | None:
        """Take one event; the segment that it closed, if it closed one."""
        closed = None
        match event:
            case messages.Final():
                if self._open and self._open[-1].segment != event.segment:
                    closed = self.finish()
                self._open.append(event)
            case messages.SpeechStopped() | messages.Done() | messages.Error():
                closed = self.finish()
        return closed

    def finish(self) -> Segment | None:
        """The segment that was still open when the stream broke off."""
        words = [word for final in self._open for word in final.words]
        text = "".join(final.text for final in self._open).strip()
        self._open.clear()
        if not words or not text:
            return None
        return Segment(words[0].start, max(word.end for word in words), text)


@dataclass(slots=True)
class Transcript:
    """What was said in one stream so far."""

    file: str
    words: list[Word] = field(default_factory=list)
    segments: list[Segment] = field(default_factory=list)
    duration: float = 0.0
    compute_seconds: float = 0.0
    _texts: list[str] = field(default_factory=list)
    _gathered: Segments = field(default_factory=Segments)

    def add(self, event: Event) -> None:
        match event:
            case messages.Final():
                self._texts.append(event.text)
                self.words.extend(event.words)
            case messages.Done():
                self.duration = event.duration
                self.compute_seconds = event.compute_seconds
        self._keep(self._gathered.add(event))

    def finish(self) -> None:
        """The stream may have broken off in the middle of a segment."""
        self._keep(self._gathered.finish())

    @property
    def text(self) -> str:
        return "".join(self._texts).strip()

    @property
    def rtf(self) -> float:
        """Seconds of computing per second of audio."""
        return self.compute_seconds / self.duration if self.duration else 0.0

    def as_dict(self) -> dict[str, object]:
        """The object that json and jsonl hold; times rounded to milliseconds."""
        return {
            "file": self.file,
            "duration": round(self.duration, 3),
            "text": self.text,
            "words": [_rounded(asdict(word)) for word in self.words],
            "segments": [_rounded(asdict(segment)) for segment in self.segments],
            "compute_seconds": round(self.compute_seconds, 3),
            "rtf": round(self.rtf, 4),
        }

    def _keep(self, segment: Segment | None) -> None:
        if segment:
            self.segments.append(segment)


def _rounded(values: dict[str, object]) -> dict[str, object]:
    return {k: round(v, 3) if isinstance(v, float) else v for k, v in values.items()}


# --- cues --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Cue:
    """One subtitle: 1-7 s on the screen, at most two lines; times in seconds."""

    start: float
    end: float
    lines: tuple[str, ...]


class CueBuilder:
    """Words in, finished cues out; a cue is finished when the word after it is known.

    A cue ends before a word that would make it too long for two lines or for 7 s, after the end of
    a sentence, at a pause, and past one full line also after a clause. It then stays on the screen
    for as long as reading takes, but never into the next cue.
    """

    def __init__(self) -> None:
        self._words: list[Word] = []
        self._shown_until = 0.0

    def push(self, word: Word, *, is_glued: bool = False) -> list[Cue]:
        """Take the next word; `is_glued`: no space before it (a full stop that came late)."""
        if is_glued and self._words:
            last = self._words.pop()
            whole = replace(last, word=last.word + word.word, end=max(last.end, word.end))
            self._words.append(whole)
            return []
        if not self._words or not self._ends_before(word):
            self._words.append(word)
            return []
        cue = self._cue(next_start=word.start)
        self._words = [word]
        return [cue]

    def finish(self) -> list[Cue]:
        """The last cue."""
        cues = [self._cue(next_start=float("inf"))] if self._words else []
        self._words = []
        return cues

    def _ends_before(self, word: Word) -> bool:
        text = _joined(self._words)
        return (
            (text.endswith((".", "?", "!", "…")) and len(text) >= SENTENCE_CHARS)
            or (text.endswith((",", ";", ":", "–", "—")) and len(text) >= CLAUSE_CHARS)
            or word.start - self._words[-1].end > PAUSE_S
            or word.end - self._words[0].start > MAX_CUE_S
            or len(lay_out([*(w.word for w in self._words), word.word])) > CUE_LINES
        )

    def _cue(self, next_start: float) -> Cue:
        # Words of one segment can share a moment; a cue still starts where the last one ended.
        start = max(self._words[0].start, self._shown_until)
        spoken_until = max(word.end for word in self._words)
        reading_s = max(MIN_CUE_S, len(_joined(self._words)) / CHARS_PER_S)
        end = max(spoken_until, start + min(reading_s, MAX_CUE_S))
        end = max(start + 0.001, min(end, next_start))
        self._shown_until = end
        return Cue(start, end, lay_out([word.word for word in self._words]))


def _joined(words: Sequence[Word]) -> str:
    return " ".join(word.word.strip() for word in words)


def lay_out(words: Sequence[str]) -> tuple[str, ...]:
    """Words into lines of at most LINE_CHARS; two lines are balanced, or broken at a clause.

    >>> lay_out("When in the course of human events, it becomes necessary".split())
    ('When in the course of human events,', 'it becomes necessary')
    """
    text = " ".join(word.strip() for word in words)
    if len(text) <= LINE_CHARS:
        return (text,)
    pieces = text.split(" ")
    halves = [(" ".join(pieces[:i]), " ".join(pieces[i:])) for i in range(1, len(pieces))]
    fitting = [h for h in halves if max(map(len, h)) <= LINE_CHARS]
    if fitting:
        return min(fitting, key=_unevenness)
    lines = [""]
    for piece in pieces:
        if lines[-1] and len(lines[-1]) + 1 + len(piece) > LINE_CHARS:
            lines.append("")
        lines[-1] = f"{lines[-1]} {piece}".strip()
    return tuple(lines)


def _unevenness(halves: tuple[str, str]) -> int:
    """How bad a break is: characters of difference, but a clause's end is worth 20 of them."""
    clause_bonus = 20 if halves[0].endswith((",", ";", ":", ".", "?", "!")) else 0
    return abs(len(halves[0]) - len(halves[1])) - clause_bonus


def timestamp(seconds: float, decimal_mark: str) -> str:
    """Seconds as HH:MM:SS and milliseconds after `decimal_mark`.

    >>> timestamp(3661.5, ",")
    '01:01:01,500'
    """
    ms = max(0, round(seconds * 1000))
    minutes, ms = divmod(ms, 60_000)
    clock = f"{minutes // 60:02}:{minutes % 60:02}:{ms // 1000:02}"
    return f"{clock}{decimal_mark}{ms % 1000:03}"


# --- writers -----------------------------------------------------------------------------------


class Writer(Protocol):
    """Takes every event of a stream, then `finish` once, whether or not Done was among them."""

    def add(self, event: Event) -> None: ...

    def finish(self) -> None: ...


class TextWriter:
    """txt: one line a segment."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._segments = Segments()

    def add(self, event: Event) -> None:
        self._write(self._segments.add(event))

    def finish(self) -> None:
        self._write(self._segments.finish())

    def _write(self, segment: Segment | None) -> None:
        if segment:
            self._out.write(segment.text + "\n")
            self._out.flush()


class TsvWriter(TextWriter):
    """tsv: start, end (ms) and text, one row a segment, a header row."""

    def __init__(self, out: TextIO) -> None:
        super().__init__(out)
        out.write("start\tend\ttext\n")

    def _write(self, segment: Segment | None) -> None:
        if segment:
            text = " ".join(segment.text.split())  # no tab or line break inside a cell
            self._out.write(f"{segment.start * 1000:.0f}\t{segment.end * 1000:.0f}\t{text}\n")
            self._out.flush()


class CueWriter:
    """srt and vtt."""

    def __init__(self, out: TextIO, *, is_vtt: bool) -> None:
        self._out = out
        self._is_vtt = is_vtt
        self._cues = CueBuilder()
        self._n_cues = 0
        if is_vtt:
            out.write("WEBVTT\n\n")
            out.flush()

    def add(self, event: Event) -> None:
        if isinstance(event, messages.Final):
            at = 0
            for word in event.words:
                start = event.text.find(word.word, at)
                is_glued = start >= 0 and not event.text[:start][-1:].isspace()
                at = start + len(word.word)
                self._write(self._cues.push(word, is_glued=is_glued))

    def finish(self) -> None:
        self._write(self._cues.finish())

    def _write(self, cues: list[Cue]) -> None:
        for cue in cues:
            self._n_cues += 1
            mark = "." if self._is_vtt else ","
            times = f"{timestamp(cue.start, mark)} --> {timestamp(cue.end, mark)}"
            text = "\n".join(cue.lines)
            if self._is_vtt:  # markup characters; a bare arrow would read as a time line
                text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
            number = "" if self._is_vtt else f"{self._n_cues}\n"
            self._out.write(f"{number}{times}\n{text}\n\n")
        if cues:
            self._out.flush()


class JsonWriter:
    """json (indented) and jsonl (one line): one object a file, written at its end."""

    def __init__(self, out: TextIO, name: str, *, indent: int | None) -> None:
        self._out = out
        self._indent = indent
        self._transcript = Transcript(name)

    def add(self, event: Event) -> None:
        self._transcript.add(event)

    def finish(self) -> None:
        self._transcript.finish()
        text = json.dumps(self._transcript.as_dict(), ensure_ascii=False, indent=self._indent)
        self._out.write(text + "\n")
        self._out.flush()


class EventWriter:
    """jsonl of a microphone: every final event as one line, as on the wire, at once."""

    def __init__(self, out: TextIO) -> None:
        self._out = out

    def add(self, event: Event) -> None:
        if isinstance(event, messages.Final):
            self._out.write(messages.to_json(event) + "\n")
            self._out.flush()

    def finish(self) -> None:
        """Nothing is held back."""


_WRITERS: dict[str, Callable[[TextIO, str], Writer]] = {
    "txt": lambda out, name: TextWriter(out),
    "tsv": lambda out, name: TsvWriter(out),
    "srt": lambda out, name: CueWriter(out, is_vtt=False),
    "vtt": lambda out, name: CueWriter(out, is_vtt=True),
    "json": lambda out, name: JsonWriter(out, name, indent=2),
    "jsonl": lambda out, name: JsonWriter(out, name, indent=None),
}


def open_writer(kind: str, out: TextIO, name: str, *, is_live: bool = False) -> Writer:
    """A writer of format `kind` onto `out`; `is_live` for a stream whose end is not in sight."""
    return EventWriter(out) if is_live and kind == "jsonl" else _WRITERS[kind](out, name)


def format_of(output: str | None, asked: str | None, allowed: Sequence[str]) -> str:
    """The format: as asked for, else by the suffix of `output`, else txt. Raises ConfigError."""
    is_folder = output is not None and (output.endswith(("/", "\\")) or Path(output).is_dir())
    suffix = Path(output).suffix.removeprefix(".").lower() if output and not is_folder else ""
    kind = asked or suffix or "txt"
    if kind not in allowed:
        raise ConfigError(
            f"cannot write format {kind!r} here" if asked else f"no format for {output}",
            hint=f"use --format {', '.join(allowed[:-1])} or {allowed[-1]}",
        )
    return kind
