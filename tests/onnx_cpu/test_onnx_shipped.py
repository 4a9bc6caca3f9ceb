"""The shipped model: its graphs in float32 are its torch modules, judge and all; memory stays."""

from __future__ import annotations

import gc
from dataclasses import dataclass, field, replace

import numpy as np
import psutil
import pytest
import torch

from sparqle_stream import batch
from sparqle_stream.batch import Batch
from sparqle_stream.config import EngineConfig, StreamOptions, VadConfig
from sparqle_stream.onnx_cpu import model as onnx_model
from sparqle_stream.onnx_cpu.export import export
from sparqle_stream.session import Session
from sparqle_stream.testing import ByteTokenizer
from tests.prefixes import prefix_of

TOLERANCE = 1e-3
# Of the largest number, after 30 layers on a past of their own: 1.85e-3 were seen.
HIDDEN_TOLERANCE = 4e-3
NATS = 0.01  # of a reading

WARM_UP, STEPS = 200, 1000  # chunks
# A chunk is 20 kB of samples alone: an array of it kept at every step would be twice as much.
GROWN_MB = 10.0


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """On a busy machine a second thread is waited for at every product of matrices."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@dataclass
class Followed:
    """What a model computed in every chunk of a stream."""

    log_probs: list = field(default_factory=list)  # (C, V)
    queries: list = field(default_factory=list)  # (Q, E), of the last chunks
    hidden: list = field(default_factory=list)  # (E,), None while something waits to be read
    tokens: list = field(default_factory=list)
    judged: list = field(default_factory=list)  # log p of rival readings


def recent_and_hidden(stages):
    """On either backend."""
    if (state := getattr(stages, "state", None)) is not None:
        return state.recent[0].numpy().copy(), state.llm.hidden[0].numpy().copy()
    slots = stages.slots
    return stages.recent[0].copy(), None if slots.n_waiting(0) else slots.hidden[0].copy()


def follow(model, pcm, monkeypatch):
    """pcm (S,) through the stream of one client, in chunks, to its end."""
    session, got = Session(model, StreamOptions(), EngineConfig().context_words), Followed()
    hear, judged = session.hear, batch._Guarded.judged

    def heard(log_probs):
        got.log_probs.append(np.array(log_probs))
        return hear(log_probs)

    def noted(writer, log_probs):
        got.judged.append(list(log_probs))
        judged(writer, log_probs)

    monkeypatch.setattr(session, "hear", heard)
    rows = Batch(model, 1)
    with monkeypatch.context() as patched, rows.working(1):
        patched.setattr(batch._Guarded, "judged", noted)
        rows.wipe(0)
        session.enqueue(session.listen(pcm))
        session.enqueue(session.flush())
        while session.has_chunk:
            result = rows.run({0: session})
            assert not result.failed
            list(session.take(result.tokens[0]))  # its events are made as they are asked for
            queries, hidden = recent_and_hidden(rows.stages)
            got.queries.append(queries)
            got.hidden.append(hidden)
            got.tokens.append(result.tokens[0])
    return got


@pytest.fixture(scope="module")
def shipped(llm_pulled):
    """The default model with its prefix for plain text on both backends, in float32."""
    from sparqle_stream import models

    pair = [models.load(llm_pulled, backend=b, dtype="float32") for b in ("onnx", "torch")]
    assert all(model.text is not None for model in pair), "the shipped model has no judge"
    return pair


@pytest.mark.slow
def test_the_shipped_graphs_equal_torch_over_the_clip(shipped, clip, monkeypatch):
    got, expected = (follow(model, clip, monkeypatch) for model in shipped)
    assert got.tokens == expected.tokens
    assert sum(map(len, got.tokens)) > 10
    for one, other in zip(got.log_probs, expected.log_probs, strict=True):
        np.testing.assert_allclose(one, other, atol=TOLERANCE, rtol=0)
    size = np.abs(expected.queries).max()
    np.testing.assert_allclose(got.queries, expected.queries, atol=TOLERANCE * size)
    pairs = zip(got.hidden, expected.hidden, strict=True)
    read = [(one, other) for one, other in pairs if one is not None]
    assert len(read) > 10
    for one, other in read:
        np.testing.assert_allclose(one, other, atol=HIDDEN_TOLERANCE * np.abs(other).max())
    assert got.judged
    for one, other in zip(got.judged, expected.judged, strict=True):
        np.testing.assert_allclose(one, other, atol=NATS)


# --- memory --------------------------------------------------------------------------------------


def rss_mb() -> float:
    gc.collect()
    return psutil.Process().memory_info().rss / 1e6


@pytest.fixture(scope="module")
def judging(tiny, tmp_path_factory):
    """The tiny model as graphs, with a prefix for plain text."""
    folder = tmp_path_factory.mktemp("memory") / "tiny"
    export(replace(tiny, text=prefix_of(tiny)), folder, "int8")
    return onnx_model.load(folder, tokenizer=ByteTokenizer())


def grown_mb(model) -> float:
    """What a process holds more after STEPS chunks of a stream that is never silent, in MB.

    Memory that tests before this one gave back is filled first: alone it sees most.
    """
    options, rng = StreamOptions(vad=VadConfig(kind="off")), np.random.default_rng(0)
    session, rows = Session(model, options, EngineConfig().context_words), Batch(model, 1)
    before, n_written = 0.0, 0
    with rows.working(1):
        rows.wipe(0)
        for i in range(WARM_UP + STEPS):
            before = rss_mb() if i == WARM_UP else before
            pcm = (0.3 * rng.standard_normal(options.chunk_samples)).astype(np.float32)
            session.enqueue(session.listen(pcm))
            while session.has_chunk:
                result = rows.run({0: session})
                assert not result.failed
                n_written += len(result.tokens[0])
                list(session.take(result.tokens[0]))
    assert n_written > STEPS // 2, "too little was written to say much"
    assert session.counts["seams"] > 2, "no slot was renewed"
    return rss_mb() - before


def test_memory_does_not_grow_with_a_stream(judging):
    """Through slots that fill and are renewed; whatever ONNX Runtime takes, it took before."""
    assert grown_mb(judging) < GROWN_MB
