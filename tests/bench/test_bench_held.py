"""Held: what is sized, what is not, and a stream that keeps what it has heard is found out."""

from __future__ import annotations

import sys
from collections import deque

import numpy as np
import pytest
import torch

from bench import held, machine
from sparqle_stream import messages, testing
from sparqle_stream.config import EngineConfig, StreamOptions, VadConfig
from sparqle_stream.engine import Engine
from sparqle_stream.onnx_cpu.memory import sparse_zeros

NO_VAD = StreamOptions(vad=VadConfig(kind="off"))


class Slotted:
    __slots__ = ("thing",)

    def __init__(self, thing: object) -> None:
        self.thing = thing


@pytest.mark.parametrize(
    "wrap",
    [
        lambda x: [x],
        lambda x: {"k": x},
        lambda x: deque([x]),
        lambda x: {1: (x,)},
        Slotted,
        lambda x: np.array([x, None], dtype=object)[:1],
    ],
    ids=["list", "dict", "deque", "nested", "slots", "objects"],
)
def test_what_an_object_leads_to_is_sized(wrap):
    small, large = (held.reach([wrap(bytearray(n))]) for n in (10, 100_010))
    assert large - small == 100_000


def test_memory_that_is_taken_page_by_page_is_taken():
    """Else a soak takes the first long segment of a row for a leak."""
    memory = sparse_zeros((64, 1 << 20), np.int8)
    memory[3, :5] = 7
    before = machine.Process().read().rss_mb
    held.touch([Slotted({"k": memory}), np.array([None]), np.zeros(0), np.float32(1)])
    assert machine.Process().read().rss_mb - before > 60
    assert memory[3, :6].tolist() == [7] * 5 + [0]
    assert not memory[4:].any()


def test_weights_that_are_mapped_are_read(tmp_path):
    """Else a soak takes each word that is written for the first time for a leak."""
    np.save(tmp_path / "weights.npy", np.ones((64, 1 << 20), np.int8))
    weights = np.load(tmp_path / "weights.npy", mmap_mode="r")
    before = machine.Process().read().rss_mb
    held.touch([Slotted(weights)])
    assert machine.Process().read().rss_mb - before > 60


@pytest.mark.skipif(
    sys.platform != "linux", reason="only glibc keeps what is free, and can return it"
)
def test_what_is_free_goes_back_to_the_system():
    """Else a soak takes what the allocator keeps for later for what has grown."""
    pieces = [bytes(100_000) for _ in range(600)]  # below the size that has pages of its own
    kept = pieces[-1]  # at the end of the heap, which cannot shrink for it
    full = machine.Process().read().rss_mb
    del pieces
    held.give_back()
    assert full - machine.Process().read().rss_mb > 40
    assert len(kept) == 100_000


def test_tensors_are_touched_as_they_are():
    tensor = torch.arange(5.0)
    held.touch([[tensor]])
    assert tensor.tolist() == [0.0, 1.0, 2.0, 3.0, 4.0]


def test_nothing_is_sized_twice():
    one = bytearray(10_000)
    assert held.reach([[one, one]]) < 11_000
    ring: list = [one]
    ring.append(ring)
    assert held.reach([ring]) < 11_000


def test_a_view_keeps_its_whole_array():
    samples = np.zeros(10_000, np.float32)
    assert held.reach([samples[:10]]) >= 40_000
    assert held.reach([samples]) == sys.getsizeof(samples)


def test_code_and_what_is_left_out_are_not_sized():
    shared = [bytearray(100_000)]
    assert held.reach([[shared, test_nothing_is_sized_twice, np]], [shared]) < 200


def hear(witness, tape, note=lambda event: None):
    packets = (tape[i : i + 16_000] for i in range(0, len(tape), 16_000))
    return witness.hear(packets, note)


def test_a_stream_that_stays_open_holds_no_more_than_before():
    """The model is left out: it is larger by far. Words come out before it is sized."""
    tape, told = testing.say(["good", "day", "to", "you"] * 4), []
    with testing.oracle_engine(EngineConfig(n_slots=1, threads=1)) as engine:
        witness = held.Witness(engine, NO_VAD)
        found = [hear(witness, tape, told.append) for _ in range(6)]
        witness.close()
        assert engine.metrics().n_streams == 0
    assert sum(isinstance(event, messages.Flushed) for event in told) == 6
    assert sum(isinstance(event, messages.Final) for event in told) >= 6
    assert 1_000 < min(found) <= max(found[1:]) <= found[1] + 2_048
    assert max(found) < 200_000


def test_a_stream_that_keeps_what_it_heard_is_found_out(monkeypatch):
    from sparqle_stream.session import Session

    take = Session.take

    def leaky(session, tokens):
        session.kept = [*getattr(session, "kept", []), np.zeros(1_000, np.float32)]
        return take(session, tokens)

    monkeypatch.setattr(Session, "take", leaky)
    tape = testing.say(["good", "day", "to", "you"])
    with testing.oracle_engine(EngineConfig(n_slots=1, threads=1)) as engine:
        witness = held.Witness(engine, NO_VAD)
        found = [hear(witness, tape) for _ in range(4)]
    assert min(np.diff(found)) > 4_000


def test_a_stream_that_has_ended_holds_nothing_that_is_known(tiny):
    told = []
    with Engine(tiny, EngineConfig(n_slots=1, threads=1)) as engine:
        witness = held.Witness(engine, NO_VAD)
    assert hear(witness, np.zeros(16_000, np.float32), told.append) is None
    assert not witness.is_open
