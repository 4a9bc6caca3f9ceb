"""llm.py: decoding in slots equals the training forward, and Llama as transformers knows it."""

from __future__ import annotations

import pytest
import torch

from sparqle_stream import llm as llm_stage
from sparqle_stream.config import LlmConfig
from sparqle_stream.errors import ModelError
from sparqle_stream.llm import Llm
from sparqle_stream.writer import Greedy

CFG = LlmConfig(
    width=48, n_layers=3, n_heads=6, n_kv_heads=2, head_width=8, ffn=96, vocab=61, n_slot=64
)
TOLERANCE = 1e-5  # float32, three layers
N_QUERIES = 4


@pytest.fixture
def llm():
    torch.manual_seed(3)
    model = Llm(CFG).requires_grad_(False)
    for parameter in model.parameters():  # large enough that tokens differ and stops happen
        if parameter.ndim == 2:
            parameter.normal_(std=parameter.shape[1] ** -0.5)
    model.tokens.weight.normal_()
    model.stop.weight.mul_(6.0)
    return model


def queries_of(seed, n_chunks, batch=1):
    gen = torch.Generator().manual_seed(seed)
    return torch.randn(n_chunks, batch, N_QUERIES, CFG.width, generator=gen)


def greedy(*most):
    return [Greedy(n) for n in most]


def decode_alone(llm, chunks, prefix=(1, 5, 7), max_new=3, threshold=0.5):
    """One stream by itself: chunks (n, Q, E) -> tokens per chunk and the state at the end."""
    state = llm_stage.init_state(CFG, 1)
    state = llm_stage.prefill(llm, state, [list(prefix)])
    out = []
    for chunk in chunks:
        state, tokens = llm_stage.step(
            llm, state, chunk[None], torch.tensor([True]), [Greedy(max_new, threshold)]
        )
        out.append(tokens[0])
    return out, state


def test_steps_equal_the_training_forward(llm):
    """Prefix, queries and emitted text of all chunks as one sequence give the same K/V reading."""
    chunks = queries_of(0, 6)[:, 0]
    prefix = [1, 5, 7]
    parts = [llm.embed(torch.tensor(prefix))]
    state = llm_stage.init_state(CFG, 1)
    state = llm_stage.prefill(llm, state, [prefix])
    for chunk in chunks:
        state, tokens = llm_stage.step(llm, state, chunk[None], torch.tensor([True]), greedy(3))
        parts += [chunk, llm.embed(torch.tensor(tokens[0], dtype=torch.int64))]
        hidden = llm.forward_train(torch.cat(parts)[None])[0]
        assert int(state.length[0]) == len(hidden)
        torch.testing.assert_close(state.hidden[0], hidden[-1], atol=TOLERANCE, rtol=TOLERANCE)
        # the decisions that led to the tokens, read off the training forward
        first = len(hidden) - len(tokens[0]) - 1
        assert llm.logits(hidden[first:-1]).argmax(-1).tolist() == tokens[0]
        stops = llm.stop(hidden[first:])[:, 0] > 0
        assert not stops[:-1].any()
        assert bool(stops[-1]) or len(tokens[0]) == 3


def test_the_fixture_stops_early_and_late(llm):
    """Else the tests above and below would not see the stop head."""
    lengths = {len(t) for seed in range(4) for t in decode_alone(llm, queries_of(seed, 6)[:, 0])[0]}
    assert lengths >= {0, 3}
    assert lengths & {1, 2}


def test_right_padding_reaches_nothing(llm):
    x = queries_of(1, 1, batch=2)[0]
    alone = llm.forward_train(x[:, :3])
    torch.testing.assert_close(llm.forward_train(x)[:, :3], alone, atol=TOLERANCE, rtol=TOLERANCE)


def test_fused_and_plain_attention_agree():
    """Past 1024 rows training takes the fused kernel."""
    gen = torch.Generator().manual_seed(5)
    q = torch.randn(1, 4, 1030, 8, generator=gen)
    k, v = torch.randn(2, 1, 2, 1030, 8, generator=gen)
    long = llm_stage.causal_attention(q, k, v)
    short = llm_stage.causal_attention(q[:, :, :900], k[:, :, :900], v[:, :, :900])
    torch.testing.assert_close(long[:, :, :900], short, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("seed", range(4))
def test_a_row_is_alone(llm, seed):
    """Neighbours that begin, pause and reset at random change no token and no state of a row."""
    batch, n_steps = 4, 24
    gen = torch.Generator().manual_seed(seed)
    chunks = queries_of(100 + seed, n_steps, batch)
    state = llm_stage.init_state(CFG, batch)
    fed = [[] for _ in range(batch)]  # chunks since the last reset
    said = [[] for _ in range(batch)]
    cap = [3, 1, 2, 0]
    for i in range(n_steps):
        full = state.n_free < N_QUERIES + 3
        reset = (torch.rand(batch, generator=gen) < 0.1) | full
        llm_stage.reset_rows(state, reset)
        for row in reset.nonzero()[:, 0].tolist():
            fed[row], said[row] = [], []
        begin = [[1, 5, 7] if not int(n) else None for n in state.length]
        state = llm_stage.prefill(llm, state, begin)
        active = torch.rand(batch, generator=gen) < 0.6
        before = state.length.clone(), state.hidden.clone(), state.k.clone()
        state, tokens = llm_stage.step(llm, state, chunks[i], active, greedy(*cap))
        assert torch.equal(state.length[~active], before[0][~active])
        assert torch.equal(state.hidden[~active], before[1][~active])
        assert torch.equal(state.k[:, ~active], before[2][:, ~active])
        for row in range(batch):
            if active[row]:
                fed[row].append(chunks[i, row])
                said[row].append(tokens[row])
            else:
                assert tokens[row] == []
    for row in range(batch):
        alone, lone = decode_alone(llm, fed[row], max_new=cap[row])
        assert said[row] == alone
        n = int(state.length[row])
        assert n == int(lone.length[0])
        torch.testing.assert_close(state.k[:, row, :, :n], lone.k[:, 0, :, :n])
        torch.testing.assert_close(state.v[:, row, :, :n], lone.v[:, 0, :, :n])


def test_written_bytes_never_change(llm):
    state = llm_stage.init_state(CFG, 2)
    state = llm_stage.prefill(llm, state, [[1, 7], [1]])
    for i, chunk in enumerate(queries_of(2, 5, batch=2)):
        n = state.length.tolist()
        before = [x[:, b, :, : n[b]].clone() for x in (state.k, state.v) for b in range(2)]
        active = torch.tensor([True, i % 2 == 0])
        state, _ = llm_stage.step(llm, state, chunk, active, greedy(2, 3))
        after = [x[:, b, :, : n[b]] for x in (state.k, state.v) for b in range(2)]
        assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))


def test_state_is_written_in_place(llm):
    """A captured graph replays addresses: no field may move."""
    state = llm_stage.init_state(CFG, 2)
    where = [x.data_ptr() for x in (state.k, state.v, state.length, state.hidden)]
    state = llm_stage.prefill(llm, state, [[1], None])
    state, _ = llm_stage.step(
        llm, state, queries_of(3, 1, 2)[0], torch.tensor([True, True]), greedy(2, 2)
    )
    llm_stage.reset_rows(state, torch.tensor([True, False]))
    assert [x.data_ptr() for x in (state.k, state.v, state.length, state.hidden)] == where
    assert state.length.tolist()[0] == 0
    assert int(state.n_free[0]) == CFG.n_slot


def test_a_full_slot_is_an_error(llm):
    state = llm_stage.init_state(CFG, 2)
    active = torch.tensor([True, False])
    for _ in range(CFG.n_slot // N_QUERIES):
        state = llm_stage.append(llm, state, queries_of(4, 1, 2)[0], active)
    kept = state.k.clone()
    with pytest.raises(ModelError, match="do not fit into a slot of 64"):
        llm_stage.append(llm, state, queries_of(4, 1, 2)[0], torch.tensor([True, True]))
    assert torch.equal(state.k, kept)
    assert state.length.tolist() == [CFG.n_slot, 0]


def test_threshold_decides_when_to_stop(llm):
    chunks = queries_of(0, 4)[:, 0]
    assert decode_alone(llm, chunks, threshold=1e-6)[0] == [[], [], [], []]
    assert [len(t) for t in decode_alone(llm, chunks, threshold=1.0 - 1e-9)[0]] == [3, 3, 3, 3]


def test_a_writer_chooses_among_what_it_suggests(llm):
    """Each suggestion once, with its logit; what the writer picks is written whole."""
    offered = []

    class Picky(Greedy):
        def suggest(self):
            return [2, 2, 9]

        def pick(self, ids, scores):
            offered.append((list(ids), list(scores)))
            self.n_written += 1
            return [9, 3]

    state = llm_stage.prefill(llm, llm_stage.init_state(CFG, 1), [[1, 5, 7]])
    queries, active = queries_of(0, 1)[0], torch.tensor([True])
    state, tokens = llm_stage.step(llm, state, queries, active, [Picky(1, 1.0 - 1e-9)])
    assert tokens == [[9, 3]]
    assert int(state.length[0]) == 3 + queries.shape[1] + 2
    ids, scores = offered[0]
    hidden = llm.forward_train(torch.cat([llm.embed(torch.tensor([[1, 5, 7]])), queries], dim=1))
    expected = llm.logits(hidden[0, -1])
    assert ids == [2, 9]
    torch.testing.assert_close(torch.tensor(scores), expected[ids], atol=1e-4, rtol=1e-4)


def test_a_writer_without_suggestions_gets_the_best(llm):
    state = llm_stage.prefill(llm, llm_stage.init_state(CFG, 1), [[1, 5, 7]])
    chunk, active = queries_of(0, 1)[0], torch.tensor([True])
    writers = [Greedy(1, 1.0 - 1e-9)]
    _, tokens = llm_stage.step(llm, state, chunk, active, writers)
    hidden = llm.forward_train(torch.cat([llm.embed(torch.tensor([[1, 5, 7]])), chunk], dim=1))
    assert tokens == [[int(llm.logits(hidden[0, -1]).argmax())]]


def test_gradients_reach_adapters_under_frozen_weights(llm):
    """What training relies on: embeddings and replaced Linears learn, the LLM does not."""
    x = queries_of(6, 1)[0].requires_grad_(True)
    llm.layers[0].attn.q_proj.weight.requires_grad_(True)
    llm.logits(llm.forward_train(x)).logsumexp(-1).sum().backward()
    assert x.grad is not None
    assert float(x.grad.abs().sum()) > 0.0
    grad = llm.layers[0].attn.q_proj.weight.grad
    assert float(grad.abs().sum()) > 0.0
    assert llm.layers[1].mlp.up_proj.weight.grad is None
