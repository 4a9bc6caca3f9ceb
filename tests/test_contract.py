"""The streaming contract (DESIGN 2) over the whole pipeline, on a tiny model of random weights.

Random weights make every number matter: whatever leaks from a neighbour, from the future or from
the size of a packet changes some argmax and with it some word.
"""

from __future__ import annotations

import random
import sys
import time
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparqle_stream import messages, testing
from sparqle_stream.batch import Batch
from sparqle_stream.config import EngineConfig, StreamOptions, VadConfig
from sparqle_stream.engine import Engine
from sparqle_stream.session import Session

RATE = 16_000
OFF = StreamOptions(vad=VadConfig(kind="off"), max_segment_s=3.0)
WEBRTC = StreamOptions(vad=VadConfig(kind="webrtc", webrtc_mode=3, stop_ms=200), delay_ms=400)
OPTIONS = pytest.mark.parametrize("options", [OFF, WEBRTC], ids=["off", "webrtc"])


def babble(seconds: float, seed: int = 0) -> np.ndarray:
    """(S,): buzzing syllables of changing pitch and colour with a long pause now and then."""
    rng = np.random.default_rng(seed)
    t = np.arange(round(seconds * RATE)) / RATE
    pitch = 140 + 40 * np.sin(2 * np.pi * 0.7 * t + rng.uniform(0, 6))
    phase = 2 * np.pi * np.cumsum(pitch) / RATE
    colour = 6 + 5 * np.sin(2 * np.pi * 1.3 * t + rng.uniform(0, 6))
    buzz = sum(np.exp(-((k - colour) ** 2) / 8) * np.sin(k * phase) for k in range(1, 20))
    syllables = np.clip(np.sin(2 * np.pi * 3.1 * t), 0, 1)
    speaks = np.sin(2 * np.pi * 0.4 * t + 0.5) > -0.6
    quiet = 1e-4 * rng.standard_normal(len(t))
    return (0.3 * buzz * syllables * speaks + quiet).astype(np.float32)


def cut(pcm: np.ndarray, size: int) -> list[np.ndarray]:
    """Packets of `size` samples; of 1 sample for the first 2 000 only, then of 511."""
    if size == 0:
        return [pcm]
    n_small = 2000 if size == 1 else len(pcm)
    small = [pcm[i : i + size] for i in range(0, n_small, size)]
    return small + [pcm[i : i + 511] for i in range(n_small, len(pcm), 511)]


def feed(stream, packets) -> None:
    for packet in packets:
        stream.wait_for_room(len(packet) / RATE)
        stream.feed(packet)


def plain(events) -> list[messages.Event]:
    """Events without what depends on the machine."""
    out = []
    for event in events:
        if isinstance(event, messages.Ready):
            event = replace(event, stream_id="")
        if isinstance(event, messages.Done):
            event = replace(event, compute_seconds=0.0)
        out.append(replace(event, lag=0.0))
    return out


def finals(events) -> list[messages.Final]:
    return [e for e in events if isinstance(e, messages.Final)]


def state_tensors(batch: Batch):
    state = batch.stages.state
    for stage in ("features", "encoder", "qformer", "llm"):
        part = getattr(state, stage)
        for field in fields(part):
            yield f"{stage}.{field.name}", getattr(part, field.name)
    yield "recent", state.recent


@pytest.fixture(scope="module")
def engine(tiny):
    with Engine(tiny, EngineConfig(n_slots=1)) as engine:
        yield engine


@pytest.fixture(scope="module")
def pcm():
    return babble(8.0)


@pytest.fixture(scope="module")
def expected(engine, pcm):
    """What one call gives, by kind of detector; both say enough to be worth comparing."""
    out = {}
    for options in (OFF, WEBRTC):
        out[options] = plain(engine.transcribe(pcm, options))
        assert sum(len(e.words) for e in finals(out[options])) >= 15
    starts = [e for e in out[WEBRTC] if isinstance(e, messages.SpeechStarted)]
    assert len(starts) >= 2
    return out


@OPTIONS
@pytest.mark.parametrize("size", [1, 7, 160, 4096, 0], ids=["1", "7", "160", "4096", "whole"])
def test_any_cut_equals_one_call(engine, pcm, expected, options, size):
    """The same words, times, tails and segments, however the audio is cut into packets."""
    stream = engine.open(options)
    feed(stream, cut(pcm, size))
    stream.finish()
    assert plain(stream.events()) == expected[options]


def test_any_cut_leaves_the_same_state(tiny, pcm):
    """In fp32 and in a batch of the same size not a bit differs."""
    states = []
    for size in (160, 0):
        with Engine(tiny, EngineConfig(n_slots=2)) as engine:
            stream = engine.open(OFF)
            feed(stream, cut(pcm, size))
            stream.finish()
            list(stream.events())
            states.append(dict(state_tensors(engine.workers[0].batch)))
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name]), name


@OPTIONS
@pytest.mark.parametrize("at_s", [0.33, 1.7, 3.0, 4.44, 6.9])
def test_the_future_does_not_reach_back(engine, pcm, expected, options, at_s):
    """Other samples after t: what was emitted up to t stays what it was, words, times and tails."""
    n = round(at_s * RATE)
    other = np.concatenate([pcm[:n], babble(3.0, seed=7), pcm[n:]])[: len(pcm)]
    got = plain(engine.transcribe(other, options))

    def told_by(events) -> list[messages.Event]:
        told = (messages.Final, messages.Tail)
        return [e for e in events if isinstance(e, told) and e.time <= at_s]

    assert told_by(got) == told_by(expected[options])
    assert got != expected[options]


@pytest.mark.parametrize("seed", range(3))
def test_a_stream_is_alone(tiny, pcm, expected, seed):
    """Neighbours that come, speak, pause, flush, hang up and leave at random change nothing."""
    rng = random.Random(seed)
    with Engine(tiny, EngineConfig(n_slots=4)) as engine:
        neighbours = [engine.open(OFF)]  # so that the stream is not in the first row
        streams = {options: engine.open(options) for options in (OFF, WEBRTC)}
        packets = cut(pcm, 1999)
        for packet in packets:
            for stream in streams.values():
                feed(stream, [packet])
            chance = rng.random()
            if chance < 0.3:
                rng.choice(neighbours).cancel()
            elif chance < 0.4:
                rng.choice(neighbours).flush()
            else:
                rng.choice(neighbours).feed(babble(rng.uniform(0.1, 0.9), rng.randrange(99)))
            if engine.metrics().n_streams < 4:
                chunk_ms = rng.choice([80, 320, 640])
                neighbours.append(engine.open(replace(OFF, chunk_ms=chunk_ms)))
        for options, stream in streams.items():
            stream.finish()
            assert plain(stream.events()) == expected[options]


@settings(max_examples=8, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    chunk_ms=st.sampled_from([80, 160, 320, 640, 1280]),
    delay_ms=st.sampled_from([0, 80, 240, 960]),
    limit_s=st.sampled_from([1.5, 24.0]),
)
def test_finals_are_append_only_and_in_order(engine, seed, chunk_ms, delay_ms, limit_s):
    """Text is never taken back: finals joined are the transcript, their words tell the same, and
    times run forwards inside what had been heard.
    """
    options = replace(OFF, chunk_ms=chunk_ms, delay_ms=delay_ms, max_segment_s=limit_s)
    pcm = babble(2.5, seed)
    text, last, last_time = "", 0.0, 0.0
    for event in engine.transcribe(pcm, options):
        if not isinstance(event, messages.Final):
            continue
        text += event.text
        assert "".join(event.text.split()) == "".join(w.word for w in event.words)
        assert last_time <= event.time <= len(pcm) / RATE
        last_time = event.time
        for word in event.words:
            assert last <= word.start <= word.end <= word.emitted == event.time
            last = word.end
    assert text == " ".join(text.split())


def reach(thing, seen: set[int]) -> int:
    """Bytes of everything that can be reached from a session, models and code left out."""
    if id(thing) in seen or isinstance(thing, type) or callable(thing):
        return 0
    seen.add(id(thing))
    size = sys.getsizeof(thing) + (thing.nbytes if isinstance(thing, np.ndarray) else 0)
    if isinstance(thing, dict):
        return size + sum(reach(x, seen) for pair in thing.items() for x in pair)
    if isinstance(thing, str | bytes | np.ndarray | torch.Tensor):
        return size
    if hasattr(thing, "__iter__") and hasattr(thing, "__len__"):
        return size + sum(reach(x, seen) for x in thing)
    names = list(getattr(thing, "__dict__", {}))
    names += [n for kind in type(thing).__mro__ for n in getattr(kind, "__slots__", ())]
    skipped = ("_model", "pieces", "tokenizer", "_detector", "options", "cfg", "_cfg")
    return size + sum(reach(getattr(thing, n, None), seen) for n in names if n not in skipped)


@pytest.mark.slow
def test_half_an_hour_runs_flat():
    """30 minutes without a pause: no tensor grows, the host keeps no more than before, and a step
    late in the stream costs what an early one did (CPU time of this thread, medians: a busy
    machine slows both).
    """
    model = testing.tiny_model(seed=1, n_layers=1)  # of few words: more would only take longer
    options = replace(OFF, chunk_ms=1280, max_segment_s=24.0)
    batch, session = Batch(model, 1), Session(model, options, n_context_words=8)
    size = {name: (t.shape, t.data_ptr()) for name, t in state_tensors(batch) if name != "recent"}
    minute, seconds, held, n_words = babble(60.0), [], [], 0
    with torch.inference_mode():
        for _ in range(30):
            session.enqueue(session.listen(minute))
            spent = []
            while session.has_chunk:
                start = time.thread_time()
                result = batch.run({0: session})
                events = list(session.take(result.tokens[0]))
                spent.append(time.thread_time() - start)
                n_words += sum(len(e.words) for e in finals(events))
            seconds.append(float(np.median(spent)))
            held.append(reach(session, set()))
    now = {name: (t.shape, t.data_ptr()) for name, t in state_tensors(batch) if name != "recent"}
    assert now == size
    assert n_words > 500
    assert max(held[3:]) <= 1.2 * max(held[:3]) + 4096
    assert np.median(seconds[-8:]) < 1.5 * np.median(seconds[2:10])


def test_fakes_are_deterministic():
    ours, theirs = testing.tiny_model(seed=3), testing.tiny_model(seed=3)
    assert all(
        torch.equal(a, b)
        for a, b in zip(ours.llm.parameters(), theirs.llm.parameters(), strict=True)
    )
