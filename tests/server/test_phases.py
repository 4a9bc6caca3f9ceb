"""Pieces of a connection on their own: which phase may follow which, what waits in the outbox."""

from __future__ import annotations

import asyncio
import itertools

import pytest

from sparqle_stream.errors import ProtocolError
from sparqle_stream.server.connection import CloseFrame, Outbox, Phase, Signal, advance
from sparqle_stream.server.settings import Close

ALLOWED = {
    (Phase.CONNECTING, Signal.ACCEPTED): Phase.OPEN,
    (Phase.CONNECTING, Signal.CLOSE): Phase.CLOSING,
    (Phase.OPEN, Signal.ENDED): Phase.DRAINING,
    (Phase.OPEN, Signal.CLOSE): Phase.CLOSING,
    (Phase.DRAINING, Signal.CLOSE): Phase.CLOSING,
}


@pytest.mark.parametrize(("phase", "signal"), list(itertools.product(Phase, Signal)))
def test_every_pair_of_phase_and_signal(phase, signal):
    if signal is Signal.LOST:
        assert advance(phase, signal) is Phase.CLOSED
    elif (phase, signal) in ALLOWED:
        assert advance(phase, signal) is ALLOWED[phase, signal]
    else:
        with pytest.raises(ProtocolError, match=f"'{signal.value}' cannot follow"):
            advance(phase, signal)


def drain(outbox):
    async def all_of_it():
        frames = []
        while not isinstance(frame := await outbox.get(), CloseFrame):
            frames.append(frame)
        return frames, frame

    return asyncio.run(all_of_it())


def test_the_outbox_is_bounded():
    outbox = Outbox(2)
    assert [outbox.put(x) for x in "abc"] == [True, True, False]
    outbox.close(CloseFrame(Close.NORMAL, ""))
    assert drain(outbox) == (["a", "b"], CloseFrame(Close.NORMAL, ""))


def test_a_tail_replaces_the_tail_before_it_and_nothing_else():
    outbox = Outbox(4)
    for text, is_tail in [("a", False), ("t1", True), ("t2", True), ("b", False), ("t3", True)]:
        assert outbox.put(text, is_tail=is_tail)
    assert outbox.put("t4", is_tail=True)  # full, but it takes no room
    assert not outbox.put("c")
    outbox.close(CloseFrame(Close.NORMAL, "one"))
    outbox.close(CloseFrame(Close.INTERNAL, "two"))
    assert drain(outbox) == (["a", "t2", "b", "t4"], CloseFrame(Close.NORMAL, "one"))
