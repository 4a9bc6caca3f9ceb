"""What fails in one row is that row's; what fails in the step is everybody's, and only once.

On both backends: a tiny model, two streams in one batch, and something breaks.
"""

from __future__ import annotations

import dataclasses
import logging

import numpy as np
import pytest

from sparqle_stream import messages
from sparqle_stream.config import EngineConfig, StreamOptions, VadConfig
from sparqle_stream.engine import Engine
from sparqle_stream.server.hub import FAILING_STEPS
from sparqle_stream.session import Session
from sparqle_stream.testing import text_of
from sparqle_stream.writer import Greedy

OFF = VadConfig(kind="off")
GOOD = StreamOptions(vad=OFF)
BAD = StreamOptions(vad=OFF, prompt="bad")
CHUNK = GOOD.chunk_samples


@pytest.fixture(params=["torch", "onnx"])
def engine(request, graphs, torch_model):
    model = torch_model if request.param == "torch" else graphs
    with Engine(model, EngineConfig(n_slots=3, threads=1)) as engine:  # 3: the model has two layers
        yield engine


def noise(n_chunks, seed=0):
    return (0.3 * np.random.default_rng(seed).standard_normal(n_chunks * CHUNK)).astype(np.float32)


def both(engine, bad=BAD):
    """One stream that will fail and one that must not, in the same steps: their events."""
    batch, run, sizes = engine.workers[0].batch, engine.workers[0].batch.run, []

    def counted(sessions):
        sizes.append(len(sessions))
        return run(sessions)

    batch.run = counted
    with engine._lock:  # nothing is heard before both have all of their audio
        streams = engine.open(bad), engine.open(GOOD)
        for stream in streams:
            stream.feed(noise(6))
            stream.finish()
    events = [list(stream.events()) for stream in streams]
    batch.run = run
    assert 2 in sizes
    assert engine.metrics().n_streams == 0
    return events


@pytest.fixture
def alone(engine):
    text = text_of(engine.transcribe(noise(6), GOOD))
    assert len(text) > 5
    return text


def is_bad(session) -> bool:
    return session.options.prompt == "bad"


class BrokenWriter(Greedy):
    """Fails in one of its methods, at the second token; in what is asked once, at once."""

    def __init__(self, place):
        super().__init__(8, 1.0 - 1e-9)
        self.place, self.n_asked = place, 0

    def _break(self, place):
        self.n_asked += place == self.place
        if self.n_asked >= (1 if place in ("doubts", "judged") else 2):
            raise ZeroDivisionError("a writer's bug")

    def goes_on(self, stop):
        self._break("goes_on")
        return True

    def suggest(self):
        self._break("suggest")
        return []

    def pick(self, ids, scores):
        self._break("pick")
        return super().pick(ids, scores)

    def doubts(self):
        self._break("doubts")
        return [[3], [4]] if self.place == "judged" else []

    def judged(self, log_probs):
        self._break("judged")

    def plain(self):
        self._break("plain")
        return []

    def is_over(self):
        self._break("is_over")
        return super().is_over()


@pytest.mark.parametrize("place", ["goes_on", "suggest", "pick", "doubts", "plain", "is_over"])
def test_a_writer_that_fails(engine, alone, monkeypatch, caplog, place):
    hear = Session.hear

    def broken(session, log_probs):
        writer = hear(session, log_probs)
        return BrokenWriter(place) if is_bad(session) else writer

    monkeypatch.setattr(Session, "hear", broken)
    failed, fine = both(engine)
    assert (failed[-1].code, failed[-1].message) == (
        "internal",
        "ZeroDivisionError: a writer's bug",
    )
    assert text_of(fine) == alone
    assert "a writer's bug" in caplog.text
    assert engine.metrics().steps_failed == 0


@pytest.mark.parametrize("method", ["hear", "next_turn"])
def test_a_session_that_fails(engine, alone, monkeypatch, method):
    original, asked = getattr(Session, method), []

    def broken(session, *args):
        if is_bad(session):
            asked.append(1)
            if len(asked) == 3:
                raise KeyError("a session's bug")
        return original(session, *args)

    monkeypatch.setattr(Session, method, broken)
    failed, fine = both(engine)
    assert failed[-1].code == "internal"
    assert text_of(fine) == alone


@pytest.mark.parametrize(
    "change",
    [
        {"pcm": np.zeros(7, np.float32)},
        {"pcm": np.full(CHUNK, np.nan, np.float32)},
        {"prefix": [0, 10**9]},
        {"prefix": [-1]},
    ],
    ids=["shape", "nan", "token", "negative"],
)
def test_a_chunk_that_cannot_be_run(engine, alone, monkeypatch, change):
    next_turn = Session.next_turn

    def bent(session):
        turn = next_turn(session)
        return dataclasses.replace(turn, **change) if is_bad(session) else turn

    monkeypatch.setattr(Session, "next_turn", bent)
    failed, fine = both(engine)
    assert failed[-1].code == "internal"
    assert text_of(fine) == alone
    assert engine.metrics().steps_failed == 0


def test_figures_that_are_no_numbers_end_their_own_stream(engine, alone, monkeypatch):
    """A row whose state was spoiled is not captioned, and its slot is clean for the next one."""
    next_turn, turns = Session.next_turn, []

    def spoiled(session):
        if is_bad(session):
            turns.append(1)
            if len(turns) == 2:
                (row,) = [r for r, s in engine.workers[0].streams.items() if s.session is session]
                spoil(engine.workers[0].batch.stages, row)
        return next_turn(session)

    monkeypatch.setattr(Session, "next_turn", spoiled)
    failed, fine = both(engine)
    assert (failed[-1].code, failed[-1].message) == ("model", "the model heard what is no number")
    assert text_of(fine) == alone
    for _ in range(2):  # in either slot
        assert text_of(engine.transcribe(noise(6), GOOD)) == alone


def spoil(stages, row):
    """No number in everything that a row keeps of its past."""
    if hasattr(stages, "ear"):
        stages.mel_tail[row] = stages.recent[row] = stages.slots.hidden[row] = np.nan
        for rings in (stages.ear, stages.queries, stages.frames):
            for array in rings.arrays.values():
                array[row] = np.nan
        for array in stages.slots.kv.values():
            array[row] = np.nan
        return
    for part in (stages.state.encoder, stages.state.qformer, stages.state.llm):
        poison(part, row, stages.n_rows)


def poison(value, row, n_rows):
    import torch

    if isinstance(value, torch.Tensor):
        if value.is_floating_point():  # (B, ...) or (layers, B, ...)
            at = value if value.shape[0] == n_rows else value.transpose(0, 1)
            assert at.shape[0] == n_rows
            at[row] = torch.nan
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            poison(getattr(value, field.name), row, n_rows)
    elif isinstance(value, list | tuple):
        for part in value:
            poison(part, row, n_rows)


def break_step(engine, monkeypatch, failures):
    """The LLM of a step fails, when the stages before it have written their state already."""
    stages = engine.workers[0].batch.stages
    if hasattr(stages, "slots"):
        owner, name = type(stages.slots), "read"
    else:
        from sparqle_stream import llm

        owner, name = llm, "step"
    original = getattr(owner, name)

    def broken(*args, **kwargs):
        for failure in failures:
            raise failure
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, broken)


def test_a_step_that_fails_ends_its_streams_and_leaves_clean_slots(
    engine, alone, monkeypatch, caplog
):
    break_step(engine, monkeypatch, iter([MemoryError("no memory")]))
    told = both(engine)
    for events in told:
        assert isinstance(events[-1], messages.Error)
        assert (events[-1].code, events[-1].message) == (
            "internal",
            "a step of 2 streams failed: MemoryError: no memory",
        )
    tracebacks = [r for r in caplog.records if r.exc_info and r.levelno == logging.ERROR]
    assert len(tracebacks) == 1
    metrics = engine.metrics()
    assert (metrics.steps_failed, metrics.failing_steps, metrics.streams_failed) == (1, 1, 2)
    good = [engine.open(GOOD), engine.open(GOOD)]
    for stream in good:
        stream.feed(noise(6))
        stream.finish()
    assert [text_of(stream.events()) for stream in good] == [alone, alone]
    assert engine.metrics().failing_steps == 0


def test_a_device_that_is_gone_is_counted(engine, monkeypatch):
    def gone(*_):
        raise RuntimeError("device lost")

    monkeypatch.setattr(engine.workers[0].batch.stages, "wipe", gone)
    for _ in range(FAILING_STEPS):
        assert engine.transcribe(noise(1), GOOD)[-1].code == "internal"
    assert engine.metrics().failing_steps == FAILING_STEPS
