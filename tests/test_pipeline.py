"""Pipeline: the stages composed, for a batch of slots, on a tiny model."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch

from sparqle_stream import llm, models, pipeline, stages, testing
from sparqle_stream.writer import Greedy

S = 5120  # samples of a chunk
Q = 4  # its queries
TOLERANCE = 1e-4  # fp32 sums in another order, through twelve layers of random weights


@pytest.fixture(autouse=True)
def no_grad():
    with torch.inference_mode():
        yield


def allow(n: int):
    """Every row may write n tokens."""
    return lambda log_probs: [Greedy(n) for _ in log_probs]


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return 0.3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rows(batch: int, *which: int) -> torch.Tensor:
    mask = torch.zeros(batch, dtype=torch.bool)
    mask[list(which)] = True
    return mask


def begin(model, state, batch: int, *which: int, text: str = "") -> None:
    prefix = stages.prefix_ids(model.tokenizer, text)
    prefixes = [prefix if row in which else None for row in range(batch)]
    pipeline.begin_rows(model, state, rows(batch, *which), prefixes)


def step(model, state, pcm, *active: int, n_tokens: int = 3, delay_ms: int = 240):
    batch = len(pcm)
    delay = torch.full((batch,), delay_ms)
    return pipeline.step(model, state, pcm, rows(batch, *active), delay, allow(n_tokens))[1]


def tensors(state) -> dict[str, torch.Tensor]:
    """Every tensor of a pipeline state by its path."""
    out = {"recent": state.recent}
    for stage in ("features", "encoder", "qformer", "llm"):
        part = getattr(state, stage)
        out |= {f"{stage}.{f.name}": getattr(part, f.name) for f in fields(part)}
    return out


def row_of(name: str, tensor: torch.Tensor, row: int) -> torch.Tensor:
    """K/V have layers before rows."""
    has_layers = name in ("encoder.k", "encoder.v", "qformer.k", "qformer.v", "llm.k", "llm.v")
    return tensor[:, row] if has_layers else tensor[row]


def test_a_chunk_becomes_tokens(tiny):
    state = pipeline.init_state(tiny, 1)
    begin(tiny, state, 1, 0)
    results = [step(tiny, state, noise(1, S, seed=i), 0) for i in range(6)]
    assert results[0].log_probs.shape == (1, S // 640, tiny.cfg.ctc.n_pieces)
    torch.testing.assert_close(results[0].log_probs.exp().sum(-1), torch.ones(1, S // 640))
    assert set(results[0].seconds) == {"features", "encoder", "ctc", "qformer", "captions", "llm"}
    lengths = [len(result.tokens[0]) for result in results]
    assert 0 < sum(lengths) <= 18
    assert int(state.llm.length) == len(stages.prefix_ids(tiny.tokenizer, "")) + 6 * Q + sum(
        lengths
    )


def test_ctc_is_asked_before_a_token_is_written(tiny):
    """`hear` sees this chunk's posteriors; with no allowance the LLM hears and stays silent."""
    state = pipeline.init_state(tiny, 2)
    begin(tiny, state, 2, 0, 1)
    seen = []

    def nobody(log_probs):
        seen.append(log_probs.clone())
        return [Greedy(0), None]

    delay = torch.zeros(2, dtype=torch.int64)
    _, result = pipeline.step(tiny, state, noise(2, S), rows(2, 0), delay, nobody)
    torch.testing.assert_close(seen[0], result.log_probs)
    assert result.tokens == [[], []]
    assert state.llm.length.tolist() == [2 + Q, 2]


def test_rows_that_are_not_active_keep_every_field(tiny):
    state = pipeline.init_state(tiny, 3)
    begin(tiny, state, 3, 0, 1, 2)
    step(tiny, state, noise(3, S), 0, 1, 2)
    before = {name: tensor.clone() for name, tensor in tensors(state).items()}
    result = step(tiny, state, noise(3, S, seed=1), 1)
    assert result.tokens[0] == result.tokens[2] == []
    for name, tensor in tensors(state).items():
        for row in (0, 2):
            assert torch.equal(row_of(name, tensor, row), row_of(name, before[name], row)), name
        assert name == "features.peak" or not torch.equal(tensor, before[name]), name


def test_a_row_is_alone(tiny):
    """Four rows that start, pause, end and die at random give what each gives in a batch of one."""
    batch, n_steps = 4, 24
    gen = torch.Generator().manual_seed(1)
    shared = pipeline.init_state(tiny, batch)
    lone = [pipeline.init_state(tiny, 1) for _ in range(batch)]
    for at in range(n_steps):
        draw = torch.rand(batch, 2, generator=gen)
        active = [row for row in range(batch) if draw[row, 0] < 0.6]
        for row in range(batch):
            if at == 0 or draw[row, 1] < 0.15:
                pipeline.reset_rows(shared, rows(batch, row))
                begin(tiny, shared, batch, row, text="so far")
                pipeline.reset_rows(lone[row], rows(1, 0))
                begin(tiny, lone[row], 1, 0, text="so far")
        pcm = noise(batch, S, seed=at)
        together = step(tiny, shared, pcm, *active)
        for row in active:
            alone = step(tiny, lone[row], pcm[row : row + 1], 0)
            assert together.tokens[row] == alone.tokens[0]
            torch.testing.assert_close(
                together.log_probs[row], alone.log_probs[0], atol=TOLERANCE, rtol=TOLERANCE
            )
    for row in range(batch):
        length = int(shared.llm.length[row])
        assert length == int(lone[row].llm.length[0])
        torch.testing.assert_close(
            shared.llm.k[:, row, :, :length],
            lone[row].llm.k[:, 0, :, :length],
            atol=TOLERANCE,
            rtol=TOLERANCE,
        )


def test_written_bytes_of_the_slot_never_change(tiny):
    state = pipeline.init_state(tiny, 1)
    begin(tiny, state, 1, 0)
    for at in range(8):
        n = int(state.llm.length)
        k, v = state.llm.k[..., :n, :].clone(), state.llm.v[..., :n, :].clone()
        step(tiny, state, noise(1, S, seed=at), 0)
        assert int(state.llm.length) >= n + Q
        assert torch.equal(state.llm.k[..., :n, :], k)
        assert torch.equal(state.llm.v[..., :n, :], v)


def test_a_new_segment_knows_nothing_but_the_gain(tiny):
    """After `begin_rows` a used row gives what a new row with the same gain gives."""
    used, fresh = pipeline.init_state(tiny, 1), pipeline.init_state(tiny, 1)
    begin(tiny, used, 1, 0)
    for at in range(5):
        step(tiny, used, 2.0 * noise(1, S, seed=at), 0)
    begin(tiny, used, 1, 0, text="now")
    begin(tiny, fresh, 1, 0, text="now")
    assert not torch.equal(used.features.peak, fresh.features.peak)
    fresh.features.peak.copy_(used.features.peak)
    for at in range(5, 9):
        ours, theirs = (step(tiny, s, noise(1, S, seed=at), 0) for s in (used, fresh))
        assert ours.tokens == theirs.tokens
        assert torch.equal(ours.log_probs, theirs.log_probs)


def test_a_new_stream_knows_nothing(tiny):
    used, fresh = pipeline.init_state(tiny, 2), pipeline.init_state(tiny, 2)
    begin(tiny, used, 2, 0, 1)
    for at in range(3):
        step(tiny, used, 2.0 * noise(2, S, seed=at), 0, 1)
    pipeline.reset_rows(used, rows(2, 1))
    begin(tiny, used, 2, 1)
    begin(tiny, fresh, 2, 1)
    for at in range(3, 6):
        ours, theirs = (step(tiny, s, noise(2, S, seed=at), 1) for s in (used, fresh))
        assert ours.tokens == theirs.tokens
        assert torch.equal(ours.log_probs, theirs.log_probs)


def test_a_seam_renews_the_slot_and_nothing_else(tiny):
    """The slot holds the prefix and the last queries again; encoder and Q-Former do not notice."""
    cut, whole = pipeline.init_state(tiny, 2), pipeline.init_state(tiny, 2)
    for state in (cut, whole):
        begin(tiny, state, 2, 0, 1)
        for at in range(4):
            step(tiny, state, noise(2, S, seed=at), 0, 1)
    prefix = stages.prefix_ids(tiny.tokenizer, "said before")
    pipeline.seam_rows(tiny, cut, [None, prefix], [0, 3])
    expected = llm.init_state(tiny.cfg.llm, 1)
    llm.prefill(tiny.llm, expected, [prefix])
    llm.append(tiny.llm, expected, whole.recent[1:, -3:], rows(1, 0))
    n = len(prefix) + 3
    assert cut.llm.length.tolist() == [int(whole.llm.length[0]), n]
    torch.testing.assert_close(cut.llm.k[:, 1, :, :n], expected.k[:, 0, :, :n])
    torch.testing.assert_close(cut.llm.hidden[1], expected.hidden[0])
    before, after = tensors(whole), tensors(cut)
    for name in before:
        same_rows = (0,) if name.startswith("llm") else (0, 1)
        for row in same_rows:
            assert torch.equal(row_of(name, before[name], row), row_of(name, after[name], row))
    ours, theirs = (step(tiny, s, noise(2, S, seed=9), 0, 1) for s in (cut, whole))
    assert torch.equal(ours.log_probs, theirs.log_probs)


def test_the_recent_queries_are_those_that_the_slot_heard(tiny):
    state = pipeline.init_state(tiny, 1)
    begin(tiny, state, 1, 0)
    step(tiny, state, noise(1, S), 0, n_tokens=0)
    again = llm.init_state(tiny.cfg.llm, 1)
    llm.prefill(tiny.llm, again, [stages.prefix_ids(tiny.tokenizer, "")])
    llm.append(tiny.llm, again, state.recent[:, -Q:], rows(1, 0))
    torch.testing.assert_close(again.hidden, state.llm.hidden)


def test_the_model_is_told_its_delay(tiny):
    hidden = []
    for delay_ms in (0, 240, 960):
        state = pipeline.init_state(tiny, 1)
        begin(tiny, state, 1, 0)
        step(tiny, state, noise(1, S), 0, n_tokens=0, delay_ms=delay_ms)
        hidden.append(state.llm.hidden.clone())
    assert not torch.allclose(hidden[0], hidden[1])
    assert not torch.allclose(hidden[1], hidden[2])


def test_the_prefix_is_beginning_context_line_break():
    model = testing.oracle_model()
    tokenizer = model.tokenizer
    assert stages.prefix_ids(model.tokenizer, "") == [1, *tokenizer.encode("\n")]
    ids = stages.prefix_ids(model.tokenizer, "some words")
    assert ids == [1, *tokenizer.encode(" some words"), *tokenizer.encode("\n")]
    long = stages.prefix_ids(model.tokenizer, " ".join(f"w{i}" for i in range(100)))
    assert len(long) == 50
    assert tokenizer.decode(long).split() == [f"w{i}" for i in range(52, 100)]


@pytest.mark.parametrize("n_samples", [1280, 5120, 20480])
def test_chunks_of_every_size_run_on_one_state(tiny, n_samples):
    state = pipeline.init_state(tiny, 1)
    begin(tiny, state, 1, 0)
    size = {name: tensor.shape for name, tensor in tensors(state).items()}
    for at in range(3):
        result = step(tiny, state, noise(1, n_samples, seed=at), 0)
        assert result.log_probs.shape[1] == n_samples // 640
    assert {name: tensor.shape for name, tensor in tensors(state).items()} == size


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_states_follow_the_dtype_of_the_weights(dtype):
    model = models.load("random:tiny", dtype=dtype)
    state = pipeline.init_state(model, 2)
    begin(model, state, 2, 0, 1, text="so far")
    tokens = []
    for at in range(4):
        result = step(model, state, noise(2, S, seed=at), 0, 1)
        assert result.log_probs.dtype == torch.float32
        tokens += result.tokens[0]
    assert state.llm.k.dtype == getattr(torch, dtype)
    assert tokens
