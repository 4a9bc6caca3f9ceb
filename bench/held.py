"""Held: what a stream and the slots keep on the host, in bytes, however long they have been open.

`reach` sizes all objects that can be reached from some. A `Witness` is a stream that stays open for
a whole run: it hears the same audio in every round, up to a flush, and is sized there, so that what
it keeps of what it has heard makes it larger from round to round: queues, captions, beam, inbox.

Contract: it is sized by its worker's thread, which hands out `Flushed`: nobody changes the session
meanwhile. What lies in other libraries' memory is not seen, nor is a queue of C (`SimpleQueue`).
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import sys
import threading
from collections import deque
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from sparqle_stream import messages

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from bench.reel import Pcm
    from sparqle_stream.config import StreamOptions
    from sparqle_stream.engine import Engine
    from sparqle_stream.models import Model

WAIT_S = 300.0  # for anything; far more than it takes


def reach(things: Iterable[object], left_out: Iterable[object] = ()) -> int:
    """Bytes of all objects that can be reached from `things`; code is left out, and so are the
    objects `left_out` with what only they lead to."""
    found = 0
    for one in _reached(things, left_out):
        found += sys.getsizeof(one)
        if _is_tensor(one):
            found += one.untyped_storage().nbytes()
    return found


def touch(things: Iterable[object]) -> None:
    """Writes to every page of the arrays that can be reached, what is there already; reads those
    that may not be written.

    States take memory page by page, as segments of a length come up for the first time in a row,
    and mapped weights as words do; what a process takes after this, it takes for something else.
    """
    for one in _reached(things, ()):
        if _is_tensor(one):
            one.add_(0)
        elif _is_plain(one):
            pages = one.reshape(-1).view(np.uint8)[:: mmap.PAGESIZE]
            if one.flags.writeable:
                pages |= 0
            else:
                pages.max()


def give_back() -> None:
    """The C library returns what is free to the system, so that resident memory is what is in use;
    glibc would keep it for later. Others do not offer that, and nothing happens."""
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def _reached(things: Iterable[object], left_out: Iterable[object]) -> Iterator[Any]:
    """`things` and what they lead to, each object once."""
    seen, waiting = {id(one) for one in left_out}, list(things)
    while waiting:
        one = waiting.pop()
        if id(one) in seen or isinstance(one, type | ModuleType) or callable(one):
            continue
        seen.add(id(one))
        yield one
        if not _is_tensor(one):
            waiting += _parts(one)


def _is_plain(one: object) -> bool:
    """An array of numbers, one behind the other."""
    if not isinstance(one, np.ndarray) or one.dtype.hasobject:
        return False
    return bool(one.size and one.flags.c_contiguous)


def _is_tensor(one: object) -> bool:
    return hasattr(one, "untyped_storage")  # torch need not be there


def _parts(one: object) -> Iterator[object]:
    """What an object leads to. Only containers that hold their items: an id must not come again."""
    if isinstance(one, np.ndarray):
        if one.base is not None:  # all of it stays because of this view
            yield one.base
        yield from one.ravel().tolist() if one.dtype == object else ()
        return
    if isinstance(one, dict):
        yield from one.keys()
        yield from one.values()
    elif isinstance(one, list | tuple | set | frozenset | deque):
        yield from one
    yield from attributes(one)


def attributes(one: object) -> Iterator[object]:
    """Values in an object's dict and slots."""
    yield from getattr(one, "__dict__", {}).values()
    for kind in type(one).__mro__:
        names = kind.__dict__.get("__slots__", ())
        for name in (names,) if isinstance(names, str) else names:
            if name not in ("__dict__", "__weakref__") and hasattr(one, name):
                yield getattr(one, name)


def of_model(model: Model) -> list[object]:
    """What all streams of a model share, for `left_out`."""
    return [model, *attributes(model)]


class Witness:
    """A stream of an engine in this process that stays open until it is closed."""

    def __init__(self, engine: Engine, options: StreamOptions) -> None:
        self._left_out = [*of_model(engine.model), *engine.workers]
        self._on_event: Callable[[messages.Event], None] = lambda event: None
        self._is_told = threading.Event()
        self._held_bytes: int | None = None
        self.is_open = True
        self._stream = engine.open(options, self._note)

    def hear(
        self, packets: Iterable[Pcm], on_event: Callable[[messages.Event], None]
    ) -> int | None:
        """Packets of at most a second -> bytes held once all of it was captioned; None when the
        stream has ended, which `on_event` was told."""
        self._on_event = on_event
        self._held_bytes = None
        self._is_told.clear()
        for packet in packets:
            if not self.is_open:
                return None
            self._stream.wait_for_room(1.0, WAIT_S)
            self._stream.feed(packet)
        self._stream.flush()
        self._is_told.wait(WAIT_S)
        return self._held_bytes

    def close(self) -> None:
        self.is_open = False
        self._stream.cancel()

    def _note(self, event: messages.Event) -> None:  # on the worker's thread
        self._on_event(event)
        if isinstance(event, messages.Flushed):
            self._held_bytes = reach([self._stream], self._left_out)
            self._is_told.set()
        elif isinstance(event, messages.Done | messages.Error):
            self.is_open = False
            self._is_told.set()
