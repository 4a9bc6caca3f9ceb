"""Terminal: the live view, and single key presses.

Final words flow into the scrollback as plain text, row by row; below it lie the row that is still
filling, the grey provisional tail, and one status line (speech, level, lag). Only these last rows
are ever redrawn; the screen is never cleared. Colours go away with NO_COLOR.
"""

from __future__ import annotations

import contextlib
import os
import select
import sys
import time
from typing import TYPE_CHECKING, Any, Protocol, TextIO

from sparqle_stream import messages

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType

    from rich.console import Console, RenderableType
    from rich.text import Text

    from sparqle_stream.messages import Event

REFRESH_S = 0.1
PARAGRAPH_S = 2.0  # a pause that starts a new paragraph
METER_CELLS = 10
METER_RANGE_DBFS = (-60.0, -6.0)
TAIL_ROWS = 2
WIDEST = 2  # cells of a character
MIN_COLUMNS = 8


class View(Protocol):
    """What a live session shows itself on."""

    def __enter__(self) -> View: ...

    def __exit__(self, *exc: object) -> None: ...

    def event(self, event: Event) -> None: ...

    def status(self, dbfs: float, note: str) -> None: ...

    def notice(self, text: str) -> None: ...


class QuietView:
    """For output that is no terminal: notices on stderr, and nothing else."""

    def __enter__(self) -> QuietView:
        return self

    def __exit__(self, *exc: object) -> None:
        """Nothing to put back."""

    def event(self, event: Event) -> None:
        if isinstance(event, messages.Warning):
            self.notice(event.message)

    def status(self, dbfs: float, note: str) -> None:
        """Not shown."""

    def notice(self, text: str) -> None:
        sys.stderr.write(f"note: {text}\n")


class LiveView:
    """Captions on a terminal; a context manager that leaves only the transcript behind."""

    def __init__(self, console: Console, title: str) -> None:
        from rich.live import Live

        self._console = console
        self._title = title
        self._row = ""  # final text that does not fill a row yet
        self._tail = ""
        self._is_speech = False
        self._lag_s = 0.0
        self._dbfs = -120.0
        self._note = ""
        self._last_end = 0.0
        self._drawn_at = 0.0
        self._is_gone = False
        self._live = Live(
            console=console,
            auto_refresh=False,  # a thread of rich's would draw while we change the text
            transient=True,
            redirect_stdout=False,
            redirect_stderr=sys.stderr.isatty(),  # log lines go above the view
        )

    def __enter__(self) -> LiveView:
        self._live.start()
        self._draw()
        return self

    def __exit__(self, *exc: object) -> None:
        self._tail = ""
        with self._if_there():
            self._live.update("", refresh=True)
            self._live.stop()
        self._end_row()

    @contextlib.contextmanager
    def _if_there(self) -> Iterator[None]:
        """Whoever closes the terminal's window must not lose what goes into a file."""
        try:
            yield
        except OSError:
            self._is_gone = True

    def event(self, event: Event) -> None:
        match event:
            case messages.Final():
                self._append(event)
            case messages.Tail():
                self._tail = event.text
            case messages.SpeechStarted():
                self._is_speech = True
            case messages.SpeechStopped():
                self._is_speech, self._tail = False, ""
            case messages.Warning():
                self.notice(event.message)
        if isinstance(event, messages.Final | messages.Tail):
            self._lag_s = event.lag
            self._draw()

    def status(self, dbfs: float, note: str) -> None:
        """Level of the sound and a remark for the status line; redraws ten times a second."""
        self._dbfs, self._note = dbfs, note
        if time.monotonic() - self._drawn_at >= REFRESH_S:
            self._draw()

    def notice(self, text: str) -> None:
        """A line for the reader, in between the captions."""
        self._end_row()
        self._print(f"[{text}]", style="yellow")

    def _append(self, final: messages.Final) -> None:
        from rich.cells import cell_len

        text = final.text  # begins with a space where one belongs
        if final.words:
            if self._row and final.words[0].start - self._last_end > PARAGRAPH_S:
                self._end_row()
            self._last_end = final.words[-1].end
        self._row += text if self._row else text.lstrip()
        self._tail = ""
        while cell_len(self._row) > self._console.width:
            row, self._row = _split_row(self._row, self._console.width)
            self._print(row)

    def _end_row(self) -> None:
        if self._row.strip():
            self._print(self._row.strip())
        self._row = ""

    def _print(self, text: str, style: str | None = None) -> None:
        if not self._is_gone:
            with self._if_there():
                self._console.print(text, style=style, markup=False, highlight=False, emoji=False)

    def _draw(self) -> None:
        self._drawn_at = time.monotonic()
        if not self._is_gone:
            with self._if_there():
                self._live.update(self._renderable(), refresh=True)

    def _renderable(self) -> RenderableType:
        from rich.console import Group
        from rich.text import Text

        captions = Text(self._row, overflow="fold")
        tail = self._tail.strip()
        room = self._console.width * TAIL_ROWS
        if len(tail) > room:  # the newest end of it
            tail = "…" + tail[-room + 1 :]
        if tail:
            captions.append(("" if self._row.endswith(" ") or not self._row else " ") + tail, "dim")
        return Group(captions, self._status_line())

    def _status_line(self) -> Text:
        from rich.text import Text

        is_unicode = self._console.encoding.lower().startswith("utf")
        full, empty, dot = ("▮", "▯", "●") if is_unicode else ("#", "-", "*")
        low, high = METER_RANGE_DBFS
        share = (min(max(self._dbfs, low), high) - low) / (high - low)
        n_full = round(share * METER_CELLS)
        line = Text(no_wrap=True, overflow="crop")
        line.append(
            *(f"{dot} speech ", "bold red") if self._is_speech else (f"{dot} quiet  ", "dim")
        )
        line.append(full * n_full, "green")
        line.append(empty * (METER_CELLS - n_full), "dim")
        line.append(f" {self._dbfs:4.0f} dBFS  lag {self._lag_s:.1f} s  {self._title}", "dim")
        if self._note:
            line.append(f"  {self._note}", "yellow")
        return line


def _split_row(text: str, width: int) -> tuple[str, str]:
    """text -> the longest start of whole words within `width` cells, and the rest.

    Never nothing: a character that is wider than the terminal is printed all the same.
    """
    from rich.cells import cell_len, chop_cells

    at = len(text)
    while (at := text.rfind(" ", 0, at)) > 0:
        if cell_len(text[:at]) <= width:
            return text[:at], text[at + 1 :]
    # One word wider than the terminal, or no spaces at all.
    first = chop_cells(text, max(width, WIDEST))[0]
    return first, text[len(first) :]


def open_view(out: TextIO, title: str) -> View:
    """The live view where `out` is a terminal that can draw and has room, else a quiet one."""
    from rich.console import Console

    console = Console(file=out)
    has_room = console.width >= MIN_COLUMNS  # COLUMNS=0 would swallow every word
    if console.is_terminal and not console.is_dumb_terminal and has_room:
        return LiveView(console, title)
    return QuietView()


def _is_in_background(fd: int) -> bool:
    """Whether the shell would stop us for touching its terminal."""
    try:
        return os.tcgetpgrp(fd) != os.getpgrp()
    except OSError:  # it is not the terminal that we were started from
        return False


class Keys:
    """Single key presses from the terminal, without Return; a context manager.

    The terminal's settings are put back whatever happens. Where stdin is no terminal (or the
    system has no termios), and for a job in the background, there are no keys.
    """

    def __init__(self, stdin: TextIO) -> None:
        self._stdin = stdin
        self._saved: list[Any] | None = None

    def __enter__(self) -> Keys:
        # AttributeError: a closed stdin is None
        with contextlib.suppress(ImportError, OSError, ValueError, AttributeError):
            import termios
            import tty

            fd = self._stdin.fileno()
            if os.isatty(fd) and not _is_in_background(fd):
                self._saved = termios.tcgetattr(fd)
                tty.setcbreak(fd)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, err: BaseException | None, tb: TracebackType | None
    ) -> None:
        if self._saved is not None:
            import termios

            with contextlib.suppress(OSError, termios.error):  # the terminal is gone
                termios.tcsetattr(self._stdin.fileno(), termios.TCSADRAIN, self._saved)
            self._saved = None

    def pressed(self) -> str:
        """The keys pressed since the last call; never waits."""
        if self._saved is None:
            return ""
        fd = self._stdin.fileno()
        keys = b""
        with contextlib.suppress(OSError):  # the terminal is gone
            while select.select([fd], [], [], 0)[0]:
                data = os.read(fd, 64)
                if not data:
                    break
                keys += data
        return keys.decode(errors="ignore")
