"""Live view: what a reader sees while it runs, and what is left in the scrollback afterwards."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import pty
import re
import termios
from types import SimpleNamespace

import pytest
from rich.console import Console

from sparqle_stream import messages, terminal
from sparqle_stream.messages import Word

TOKEN = re.compile(r"\x1b\[\??([\d;]*)([A-Za-z])|\r|\n|[^\x1b\r\n]+")


def screen_of(written: str) -> list[str]:
    """The lines of a terminal that was sent `written`; knows what rich's live display uses.

    Anything that would clear the screen or jump about fails: scrollback must survive.
    """
    lines, row, column = [""], 0, 0
    for match in TOKEN.finditer(written):
        text, code, kind = match.group(0), match.group(1), match.group(2)
        if text == "\r":
            column = 0
        elif text == "\n":
            row, column = row + 1, 0
            lines += [""] * (row + 1 - len(lines))
        elif kind is None:
            lines[row] = lines[row][:column].ljust(column) + text + lines[row][column + len(text) :]
            column += len(text)
        elif kind == "A":
            row -= int(code or 1)
            assert row >= 0, "the cursor left the rows that are ours"
        elif kind == "K":
            assert code == "2"
            lines[row] = ""
        else:
            assert kind in "mlh", f"unexpected control sequence {text!r}"
    return [line.rstrip() for line in lines]


def final(text: str, start: float = 0.0, segment: int = 0, lag: float = 0.5) -> messages.Final:
    words = [
        Word(word, start + 0.3 * i, start + 0.3 * i + 0.2, start + 0.3 * i + 0.7)
        for i, word in enumerate(text.split())
    ]
    return messages.Final(text, tuple(words), segment, time=start + 2, lag=lag)


@pytest.fixture
def out():
    return io.StringIO()


@pytest.fixture
def view(out):
    return terminal.LiveView(
        Console(file=out, force_terminal=True, width=40, height=20, _environ={}), "Webcam  q ends"
    )


def test_while_it_runs_the_tail_and_the_status_lie_below_the_finals(view, out):
    with view:
        view.event(messages.SpeechStarted(0.0))
        view.event(final(" Hello there,"))
        view.event(messages.Tail(" general keno", 2.0, lag=0.8))
        rows = [row for row in screen_of(out.getvalue()) if row]
        assert rows[0] == "Hello there, general keno"
        assert "\x1b[2m general keno" in out.getvalue()  # dim: it may still change
        assert rows[1].startswith("● speech ▯▯▯▯▯▯▯▯▯▯")
        assert "lag 0.8 s" in rows[1]
        assert len(rows) == 2


def test_only_the_transcript_is_left(view, out):
    """Rows as they filled up, the provisional tail and the status line gone."""
    with view:
        for i, text in enumerate(
            [" When in the course", " of human events it becomes", " necessary"]
        ):
            view.event(messages.Tail(" something provisional", i))
            view.event(final(text, start=float(i)))
            view.status(-20.0, "")
        view.event(messages.SpeechStopped(3.0))
        view.event(messages.Tail(" never confirmed", 4.0))
    rows = [row for row in screen_of(out.getvalue()) if row]
    assert rows == ["When in the course of human events it", "becomes necessary"]


def test_a_long_pause_begins_a_paragraph_and_a_short_one_does_not(view, out):
    with view:
        view.event(final(" One.", start=0.0))
        view.event(final(" Two.", start=1.0, segment=1))
        view.event(final(" Three.", start=9.0, segment=2))
    assert [row for row in screen_of(out.getvalue()) if row] == ["One. Two.", "Three."]


def test_a_notice_stands_between_the_captions(view, out):
    with view:
        view.event(final(" Hello."))
        view.event(messages.Warning("no_text", "speech without text", 3.0))
        view.event(final(" Again.", start=3.0))
    rows = [row for row in screen_of(out.getvalue()) if row]
    assert rows == ["Hello.", "[speech without text]", "Again."]


def test_the_meter_follows_the_level(view, out, monkeypatch):
    monkeypatch.setattr(terminal, "REFRESH_S", 0.0)
    with view:
        for dbfs, cells in [(-120.0, 0), (-33.0, 5), (0.0, 10)]:
            view.status(dbfs, "3 blocks lost")
            row = [row for row in screen_of(out.getvalue()) if row][-1]
            assert row.count("▮") == cells
            assert row.count("▯") == 10 - cells
        assert "▮" not in [row for row in screen_of(out.getvalue()) if row][:-1]


def test_wide_characters_fill_two_cells(view, out):
    """Twenty Japanese characters fill a row of 40 cells; a long word is broken, not lost."""
    with view:
        view.event(final(" " + "語" * 25))
    rows = [row for row in screen_of(out.getvalue()) if row]
    assert rows == ["語" * 20, "語" * 5]


@pytest.mark.parametrize(("width", "row"), [(0, "語"), (1, "語"), (3, "語"), (4, "語語")])
def test_a_row_is_never_nothing_however_narrow_the_window(width, row):
    """A window that was dragged to nothing: the same row would be cut off for ever."""
    assert terminal._split_row("語語語", width) == (row, "語語語"[len(row) :])


def test_a_terminal_without_unicode_gets_plain_signs():
    raw = io.BytesIO()
    out = io.TextIOWrapper(raw, encoding="ascii", write_through=True)
    console = Console(file=out, force_terminal=True, width=60, _environ={})
    with terminal.LiveView(console, "Webcam") as view:
        view.event(messages.SpeechStarted(0.0))
        view.event(messages.Tail(" hello", 1.0))
        shown = screen_of(raw.getvalue().decode())
    assert any(row.startswith("* speech ----------") for row in shown)


@pytest.mark.parametrize(("columns", "kind"), [("0", "QuietView"), ("40", "LiveView")])
def test_a_terminal_without_room_gets_plain_lines(monkeypatch, columns, kind):
    """Rich draws nothing at all on 0 columns: words would be lost."""
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setenv("TERM", "xterm")
    master, slave = pty.openpty()
    with os.fdopen(master, "rb"), os.fdopen(slave, "w") as terminal_out:
        view = terminal.open_view(terminal_out, "Webcam")
    assert type(view).__name__ == kind


def test_what_is_no_terminal_gets_no_view():
    assert isinstance(terminal.open_view(io.StringIO(), "Webcam"), terminal.QuietView)


def test_quiet_view_tells_warnings_on_stderr(capsys):
    with terminal.QuietView() as view:
        view.event(final(" Hello."))
        view.event(messages.Warning("backlog", "the machine is too slow", 3.0))
    assert capsys.readouterr() == ("", "note: the machine is too slow\n")


def test_keys_come_without_return_and_the_terminal_is_put_back():
    ours, theirs = pty.openpty()
    with open(theirs) as stdin, open(ours, "wb", buffering=0) as keyboard:
        before = termios.tcgetattr(theirs)
        with contextlib.suppress(ZeroDivisionError), terminal.Keys(stdin) as keys:
            assert not termios.tcgetattr(theirs)[3] & termios.ICANON
            assert keys.pressed() == ""
            keyboard.write(b"xq")
            assert keys.pressed() == "xq"
            _ = 1 / 0  # whatever happens inside
        assert termios.tcgetattr(theirs) == before


def test_a_job_in_the_background_leaves_the_terminal_alone(monkeypatch):
    """The shell would stop it."""
    _, theirs = pty.openpty()
    monkeypatch.setattr(terminal.os, "tcgetpgrp", lambda fd: terminal.os.getpgrp() + 1)
    with open(theirs) as stdin:
        before = termios.tcgetattr(theirs)
        with terminal.Keys(stdin) as keys:
            assert termios.tcgetattr(theirs) == before
            assert keys.pressed() == ""


def test_without_a_terminal_there_are_no_keys():
    with open(os.devnull) as stdin, terminal.Keys(stdin) as keys:
        assert keys.pressed() == ""
    for nothing in (io.StringIO(), None):  # None: stdin was closed by the shell
        with terminal.Keys(nothing) as keys:
            assert keys.pressed() == ""


def test_a_window_that_was_closed_costs_no_captions(out, view, monkeypatch):
    """The view raised, and what goes into a file ended with it."""

    def gone(*_):
        raise OSError(errno.EIO, "Input/output error")

    with view:
        view.event(final(" one two"))
        monkeypatch.setattr(view._console, "file", SimpleNamespace(write=gone, flush=gone))
        for i in range(3):
            view.event(final(" three four five six seven eight nine ten", 3.0 * i, i))
            view.status(-30.0, "")
            view.notice("told to nobody")


def test_keys_of_a_window_that_was_closed_are_no_error():
    ours, theirs = pty.openpty()
    with open(theirs) as stdin, terminal.Keys(stdin) as keys:
        assert keys._saved
        os.close(ours)
        assert keys.pressed() == ""
