"""A stream on a server, with the methods of one in this process.

Contract: as the engine's streams: events go to `on_event` from another thread, the last one is Done
or Error; a lost or refused connection is an Error event too.
"""

from __future__ import annotations

import logging
import queue
import threading
from dataclasses import replace
from typing import TYPE_CHECKING

from sparqle_stream import client, messages
from sparqle_stream.errors import SparqleError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from sparqle_stream.audio import Pcm
    from sparqle_stream.messages import Event

PACKETS = 50  # that may wait for the network: 2 s of a microphone's

log = logging.getLogger(__name__)


class RemoteStream:
    """Connects at once, in a thread; `options` are fields of the query (docs/protocol.md)."""

    def __init__(
        self,
        url: str,
        on_event: Callable[[Event], None],
        options: Mapping[str, str | int],
        api_key: str = "",
    ) -> None:
        client.stream_url(url)  # a wrong address is an error here and now
        self._packets: queue.Queue[Pcm | None] = queue.Queue(PACKETS)
        self._on_event = on_event
        self._is_cancelled = False
        self._is_over = False
        self._thread = threading.Thread(
            target=self._run, args=(url, options, api_key), name="sparqle-remote", daemon=True
        )
        self._thread.start()

    def feed(self, pcm: Pcm) -> None:
        """Waits while the network is behind."""
        self._put(pcm)

    def finish(self) -> None:
        self._put(None)

    def cancel(self) -> None:
        """Leaves the connection to the daemon thread; no event follows."""
        self._is_cancelled = True
        self._put(None)

    def wait_for_room(self, seconds: float, timeout: float | None = None) -> bool:
        """Whether a packet can be fed without waiting, whatever its length in `seconds`."""
        del seconds
        if self._packets.full() and timeout:
            self._thread.join(timeout)  # a pause that the end of the connection cuts short
        return not self._packets.full() or self._is_over

    def _put(self, item: Pcm | None) -> None:
        while not self._is_over:
            try:
                return self._packets.put(item, timeout=0.1)
            except queue.Full:
                continue
        return None

    def _blocks(self) -> Iterator[Pcm]:
        while (pcm := self._packets.get()) is not None:
            yield pcm

    def _run(self, url: str, options: Mapping[str, str | int], api_key: str) -> None:
        last: Event | None = None
        try:
            for event in client.stream_sync(url, self._blocks(), options=options, api_key=api_key):
                last = event
                if isinstance(event, messages.Error) and event.code == "internal":
                    event = replace(event, code="server")  # a bug, but none of this process
                self._tell(event)
        except SparqleError as err:
            self._tell(messages.Error(err.code, err.message, err.hint, time=0.0))
        except Exception as err:
            log.exception("the client failed")
            self._tell(messages.Error("internal", f"{type(err).__name__}: {err}", "", time=0.0))
        else:
            if not isinstance(last, messages.Done | messages.Error):
                self._tell(messages.Error("connection", "the server stopped talking", "", time=0.0))
        finally:
            self._is_over = True

    def _tell(self, event: Event) -> None:
        if not self._is_cancelled:
            self._on_event(event)
