"""Files and pipes through the engine, as fast as the machine goes.

Contract: a file that cannot be captioned is reported and does not keep the others from being done;
a destination that cannot be written ends it.
Ctrl-C captions what was read so far, writes it, and then interrupts.
"""

from __future__ import annotations

import contextlib
import sys
from typing import TYPE_CHECKING

from sparqle_stream import audio, messages
from sparqle_stream.captioning import Captioning, Listener, StopSignals
from sparqle_stream.config import SAMPLE_RATE_HZ
from sparqle_stream.errors import AudioFormatError, SparqleError
from sparqle_stream.outputs import OutputError
from sparqle_stream.sources import FileSource, PipeSource

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from rich.progress import Progress, TaskID

    from sparqle_stream.captioning import CaptionStream, OnEvent
    from sparqle_stream.messages import Event
    from sparqle_stream.outputs import Outputs
    from sparqle_stream.sources import Source

    OnError = Callable[[str, SparqleError], None]

STDIN = "-"
# Audio that may wait in the engine: two long chunks, so that it never waits for us, and no more,
# so that Ctrl-C is soon done.
BACKLOG_S = 3.0


def probe(names: Sequence[str], on_error: OnError) -> dict[str, float | None]:
    """Seconds of each file that has sound, None where unknown; says which have none.

    Takes milliseconds a file: a typing error is answered before a model is loaded.
    """
    seconds: dict[str, float | None] = {}
    for name in names:
        try:
            seconds[name] = None if name == STDIN else audio.file_seconds(name)
        except SparqleError as err:
            on_error(name, err)
    return seconds


def open_source(name: str, pipe_format: audio.AudioFormat) -> Source:
    """A file, or raw PCM on standard input for '-'."""
    if name == STDIN:
        if sys.stdin is None:
            raise AudioFormatError("standard input is closed", hint="pipe sound into it")
        if sys.stdin.isatty():
            sys.stderr.write("note: reading raw PCM from the keyboard; pipe sound in instead\n")
        # Without its buffer: Python ends badly while a thread waits in that one's lock.
        return PipeSource(getattr(sys.stdin.buffer, "raw", sys.stdin.buffer), pipe_format)
    return FileSource(name)


def transcribe(
    open_stream: Callable[[OnEvent], CaptionStream],
    seconds: dict[str, float | None],
    pipe_format: audio.AudioFormat,
    outputs: Outputs,
    room_s: float,
    on_error: OnError,
) -> None:
    """Captions every file of `seconds` into `outputs`. Raises KeyboardInterrupt after Ctrl-C."""
    with StopSignals() as stop, ProgressBar() as bar:
        for name, total_s in seconds.items():
            bar.start(name, total_s)
            said = WordsSeen()
            try:
                with outputs.open(name) as writer:
                    Captioning(
                        open_stream,
                        open_source(name, pipe_format),
                        Listener(_all(writer.add, bar.event, said.event), bar.heard),
                        is_stopped=stop,
                        room_s=room_s,
                    ).run()
            except OutputError:
                raise
            except SparqleError as err:
                on_error(name, err)
            else:
                if not (said.any or stop()):
                    sys.stderr.write(f"note: no words were heard in {name}\n")
            if stop():
                raise KeyboardInterrupt


def _all(*told: Callable[[Event], None]) -> Callable[[Event, float], None]:
    def on_event(event: Event, _arrived: float) -> None:
        for tell in told:
            tell(event)

    return on_event


class WordsSeen:
    """Whether anything was captioned: an empty output may be music, or a mistake."""

    any = False

    def event(self, event: Event) -> None:
        self.any = self.any or (isinstance(event, messages.Final) and bool(event.text.strip()))


class ProgressBar:
    """Progress of the files on stderr, where that is a terminal; a context manager."""

    def __init__(self) -> None:
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._heard_s = 0.0

    def __enter__(self) -> ProgressBar:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import (
                BarColumn,
                Progress,
                TaskProgressColumn,
                TextColumn,
                TimeRemainingColumn,
            )

            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TaskProgressColumn(),
                TextColumn("{task.completed:.0f} s"),
                TimeRemainingColumn(),
                console=Console(stderr=True),
                transient=True,
                redirect_stdout=sys.stdout.isatty(),  # captions go above the bar
                redirect_stderr=True,
            )
            self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._progress is not None:
            with contextlib.suppress(OSError):  # the terminal is gone
                self._progress.stop()

    def start(self, name: str, total_s: float | None) -> None:
        self._heard_s = 0.0
        if self._progress is not None:
            with contextlib.suppress(OSError):
                if self._task is not None:
                    self._progress.remove_task(self._task)
                self._task = self._progress.add_task(name, total=total_s)

    def heard(self, pcm: audio.Pcm) -> None:
        """pcm (S,) was taken from the source."""
        self._heard_s += len(pcm) / SAMPLE_RATE_HZ
        self._show(self._heard_s - BACKLOG_S)

    def event(self, event: Event) -> None:
        if isinstance(event, messages.Done):
            self._show(event.duration)

    def _show(self, done_s: float) -> None:
        if self._progress is not None and self._task is not None:
            with contextlib.suppress(OSError):
                self._progress.update(self._task, completed=max(0.0, done_s))
