"""Live captions: a microphone, or a file at the speed of speech, with the view that shows them.

Contract: q, Ctrl-C, SIGTERM and the end of the source all end alike: what was heard is captioned to
its last word, written, and the terminal is as it was before. Audio that the machine is too slow for
is lost aloud, never silently.
"""

from __future__ import annotations

import contextlib
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from sparqle_stream.captioning import Captioning, Listener, StopSignals
from sparqle_stream.config import SAMPLE_RATE_HZ
from sparqle_stream.latency import Latency
from sparqle_stream.microphone import TOO_SLOW, LevelMeter, Microphone
from sparqle_stream.terminal import Keys, QuietView, open_view

if TYPE_CHECKING:
    from collections.abc import Callable

    from sparqle_stream.audio import Pcm
    from sparqle_stream.captioning import CaptionStream, OnEvent
    from sparqle_stream.formats import Writer
    from sparqle_stream.messages import Event
    from sparqle_stream.outputs import Outputs
    from sparqle_stream.sources import Source
    from sparqle_stream.terminal import View

QUIT_KEYS = frozenset("qQ\x03\x04")


class LiveSession:
    """One source shown live. `run` returns the latency of its words."""

    def __init__(self, source: Source, view: View, writer: Writer | None) -> None:
        self.latency = Latency()
        self.was_stopped = False  # by a signal, not by the end of the source or by a key
        self._source = source
        self._view = view
        self._writer = writer
        self._meter = LevelMeter()
        self._started_at: float | None = None  # clock time of the first sample
        self._captioning: Captioning | None = None
        self._is_loss_told = False

    def run(self, open_stream: Callable[[OnEvent], CaptionStream]) -> None:
        """Raises what broke the source or the stream, after everything else is done."""
        is_mic = isinstance(self._source, Microphone)
        with StopSignals() as signals, Keys(sys.stdin) as keys, self._view:
            self._captioning = Captioning(
                open_stream,
                self._source,
                Listener(self._event, self._audio, self._tick),
                is_stopped=lambda: signals() or bool(QUIT_KEYS & set(keys.pressed())),
                can_wait=not is_mic,
            )
            try:
                self._captioning.run()
            finally:
                self.was_stopped = signals.is_set

    def _event(self, event: Event, arrived: float) -> None:
        self.latency.add(event, arrived - (self._started_at or arrived))
        if self._writer is not None:
            self._writer.add(event)
        self._view.event(event)

    def _audio(self, pcm: Pcm) -> None:
        if self._started_at is None:
            # The packet's first sample was spoken when its last one was, less its length.
            self._started_at = time.perf_counter() - len(pcm) / SAMPLE_RATE_HZ
        self._meter.add(pcm)

    def _tick(self) -> None:
        if isinstance(self._source, Microphone):
            if told := self._meter.notice(self._source.name):
                self._view.notice(told)
            while self._source.notices:
                self._view.notice(self._source.notices.pop(0))
        if self._captioning and self._captioning.dropped_s and not self._is_loss_told:
            self._is_loss_told = True
            self._view.notice(TOO_SLOW)
        self._view.status(self._meter.dbfs, self._remark())

    def _remark(self) -> str:
        dropped_s = self._captioning.dropped_s if self._captioning else 0.0
        n_lost = self._source.n_overflows if isinstance(self._source, Microphone) else 0
        remarks = {
            f"too slow: {dropped_s:.1f} s lost": dropped_s > 0,
            f"{n_lost} blocks lost": n_lost > 0,
            "no sound": self._meter.is_silent,
        }
        return ", ".join(text for text, is_so in remarks.items() if is_so)


def watch(
    open_stream: Callable[[OnEvent], CaptionStream], source: Source, outputs: Outputs, name: str
) -> LiveSession:
    """Run one source live, with the view where standard output is a terminal and free for it.

    `name` is the source's among those that `outputs` was made for.
    """
    is_mic = isinstance(source, Microphone)
    title = f"{Path(source.name).name}  q ends"
    view: View = QuietView()
    if outputs.is_file or outputs.kind == "txt":
        view = open_view(sys.stdout, title)
    if isinstance(view, QuietView) and is_mic:
        view.notice(f"listening to {source.name}; Ctrl-C ends")
    with contextlib.ExitStack() as opened:
        writer = None
        if outputs.is_file or isinstance(view, QuietView):
            writer = opened.enter_context(outputs.open(name, is_live=is_mic))
        session = LiveSession(source, view, writer)
        session.run(open_stream)
    return session
