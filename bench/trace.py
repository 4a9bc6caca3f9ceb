"""Trace: where each chunk's milliseconds go, for chrome://tracing or ui.perfetto.dev.

In: spans of seconds on one clock. Out: JSON in Chrome's trace event format.
"""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

PROCESS, THREAD = 1, 1


class Trace:
    """Spans on one thread; they nest by their times."""

    def __init__(self, origin: float | None = None) -> None:
        """`origin` is the clock's second that becomes 0; now, if none is given."""
        self._origin = time.perf_counter() if origin is None else origin
        self._events: list[dict[str, Any]] = []

    def restart(self) -> None:
        """Now is second 0: what came before, loading a model, is no part of it."""
        self._origin = time.perf_counter()

    def span(self, name: str, start: float, seconds: float, **facts: object) -> None:
        """Something that began when the clock said `start`."""
        self._add(name, start, facts, ph="X", dur=_microseconds(seconds))

    def mark(self, name: str, at: float, **facts: object) -> None:
        """A moment, such as that at which words left."""
        self._add(name, at, facts, ph="i", s="t")

    def stages(self, end: float, seconds: Mapping[str, float]) -> float:
        """Spans of stages that ran one after the other until `end` -> when the first began."""
        start = first = end - sum(seconds.values())
        for name, spent in seconds.items():
            self.span(name, start, spent)
            start += spent
        return first

    def write(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.as_json()) + "\n")

    def as_json(self) -> dict[str, Any]:
        """The document; events in the order of their beginnings, as viewers want them."""
        name = {"name": "thread_name", "ph": "M", "pid": PROCESS, "tid": THREAD}
        named = name | {"args": {"name": "sparqle-engine"}}
        events = sorted(self._events, key=lambda event: (event["ts"], -event.get("dur", 0.0)))
        return {"displayTimeUnit": "ms", "traceEvents": [named, *events]}

    def _add(self, name: str, start: float, facts: Mapping[str, object], **fields: object) -> None:
        event = {"name": name, "ts": _microseconds(start - self._origin)}
        self._events.append(event | {"pid": PROCESS, "tid": THREAD, "args": dict(facts)} | fields)


def _microseconds(seconds: float) -> float:
    return round(1e6 * seconds, 1)
