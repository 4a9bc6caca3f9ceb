"""qformer.py: one query per 80 ms, the same in training and serving, of three kinds."""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparqle_stream import qformer as stage
from sparqle_stream.config import QFormerConfig
from sparqle_stream.errors import ConfigError
from sparqle_stream.qformer import PosteriorEmbedding, QFormer

WINDOW = QFormerConfig(
    kind="window",
    width=16,
    n_heads=2,
    n_layers=2,
    ffn=32,
    encoder_width=12,
    llm_width=10,
    n_pieces=7,
    n_phases=4,
    frame_ring=12,
    query_ring=3,
    n_queries=5,
)
STACK = replace(WINDOW, kind="stack")
UTTERANCE = replace(WINDOW, kind="utterance")
KINDS = pytest.mark.parametrize("cfg", [WINDOW, STACK], ids=lambda cfg: cfg.kind)
TOLERANCE = {"atol": 1e-5, "rtol": 0}
ONE = torch.tensor([True])


def make_qformer(cfg, seed=0):
    """Random everywhere: zeros that training starts from would hide what they multiply."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        qformer = QFormer(cfg).requires_grad_(False)
        for name, parameter in qformer.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
            else:
                parameter.normal_(std=1.0 if "bias" in name else parameter.shape[-1] ** -0.5)
    return qformer


def heard(n_frames, seed=0, batch=1, cfg=WINDOW):
    """Encoder frames (B, T, W) and log-probs (B, T / 2, V)."""
    gen = torch.Generator().manual_seed(seed)
    frames = torch.randn(batch, n_frames, cfg.encoder_width, generator=gen)
    scores = 2.0 * torch.randn(batch, n_frames // 2, cfg.n_pieces, generator=gen)
    return frames, scores.log_softmax(dim=-1)


def run(qformer, frames, log_probs, chunks, delay_ms=240, state=None):
    """One stream in chunks of so many frames -> queries (1, Q, E), state."""
    state = state or stage.init_state(qformer.cfg, 1)
    delay, at, parts = torch.tensor([delay_ms]), 0, []
    for size in chunks:
        new = frames[:, at : at + size], log_probs[:, at // 2 : (at + size) // 2]
        state, queries = stage.step(qformer, state, *new, delay, ONE)
        parts.append(queries)
        at += size
    return torch.cat(parts, dim=1), state


# --- training and serving ------------------------------------------------------------------------


@KINDS
@pytest.mark.parametrize("chunk", [4, 8, 12, 16, 24, 64])
def test_the_training_path_equals_steps(cfg, chunk):
    """64 frames: both rings wrap, chunks exceed them, the last chunk may be short."""
    qformer, (frames, log_probs) = make_qformer(cfg), heard(64)
    whole = qformer.forward_train(frames, log_probs, chunk, torch.tensor([400]))
    chunks = [min(chunk, 64 - at) for at in range(0, 64, chunk)]
    steps, _ = run(qformer, frames, log_probs, chunks, 400)
    assert whole.shape == (1, 16, cfg.llm_width)
    torch.testing.assert_close(steps, whole, **TOLERANCE)


@KINDS
def test_full_context_equals_one_step(cfg):
    qformer, (frames, log_probs) = make_qformer(cfg), heard(40)
    whole = qformer.forward_train(frames, log_probs, 0, torch.tensor([240]))
    torch.testing.assert_close(run(qformer, frames, log_probs, [40])[0], whole, **TOLERANCE)


def truth(qformer, frames, log_probs, chunks, delay_ms):
    """The window kind written out in float64, query by query, from the definition alone."""
    cfg, qformer = qformer.cfg, QFormer(qformer.cfg).double()
    qformer.load_state_dict(make_qformer(cfg).state_dict())
    frames, posterior = frames[0].double(), log_probs[0].double().exp()
    n_queries = len(frames) // 4
    starts = np.repeat(np.cumsum([0, *chunks[:-1]]), np.array(chunks) // 4)
    ends = np.repeat(np.cumsum(chunks), np.array(chunks) // 4)
    phases = [min((ends[q] - 4 * q) // 4 - 1, cfg.n_phases - 1) for q in range(n_queries)]
    x = torch.stack([qformer.queries[p] for p in phases])

    def attend(layer, x, source, keys_of, distance_of):
        out = []
        for q in range(n_queries):
            ids = keys_of(q)
            heads = (cfg.n_heads, cfg.width // cfg.n_heads)
            query = layer.query(layer.norm(x[q])).view(heads)
            key = layer.key(source[ids]).view(-1, *heads)
            value = layer.value(source[ids]).view(-1, *heads)
            age = [int(np.clip(distance_of(i, q), -layer.reach, layer.reach)) for i in ids]
            bias = layer.bias[:, [a + layer.reach for a in age]]
            scores = torch.einsum("hd,lhd->hl", query, key) / heads[1] ** 0.5 + bias
            mixed = torch.einsum("hl,lhd->hd", scores.softmax(dim=-1), value)
            out.append(x[q] + layer.out(mixed.flatten()))
        return torch.stack(out)

    def near_queries(q):
        return list(range(max(0, starts[q] // 4 - cfg.query_ring), ends[q] // 4))

    def near_frames(q):
        return list(range(max(0, starts[q] - cfg.frame_ring), ends[q]))

    for layer in qformer.layers:
        x = attend(layer.self_attn, x, x, near_queries, lambda i, q: i - q)
        x = attend(layer.cross_attn, x, frames, near_frames, lambda i, q: i - 4 * q)
        x = x + layer.feed_forward(layer.norm(x))
    rise = torch.stack(
        [(p - (posterior[t - 1] if t else 0.0)).clamp(min=0) for t, p in enumerate(posterior)]
    )
    pieces = rise @ qformer.posterior.pieces
    maps = qformer.posterior.maps
    told = pieces[0::2] @ maps[0] + pieces[1::2] @ maps[1] + qformer.delay.weight[delay_ms // 80]
    return qformer.out(qformer.out_norm(x)) + told


@settings(max_examples=15, deadline=None)
@given(chunks=st.lists(st.sampled_from([4, 8, 12, 16, 28]), min_size=1, max_size=6))
def test_any_mix_of_chunks_equals_the_definition(chunks):
    qformer, (frames, log_probs) = make_qformer(WINDOW), heard(sum(chunks), seed=2)
    with torch.no_grad():
        expected = truth(qformer, frames, log_probs, chunks, 320)
    got, _ = run(qformer, frames, log_probs, chunks, 320)
    torch.testing.assert_close(got[0].double(), expected, **TOLERANCE)


@KINDS
def test_no_rows_are_no_queries(cfg):
    """A batch whose rows were all left out of training is empty, not an error."""
    qformer, (frames, log_probs) = make_qformer(cfg), heard(16, batch=0)
    out = qformer.forward_train(frames, log_probs, 8, torch.zeros(0, dtype=torch.int64))
    assert out.shape == (0, 4, cfg.llm_width)


@KINDS
def test_a_chunk_knows_nothing_of_the_next(cfg):
    qformer, (frames, log_probs) = make_qformer(cfg), heard(24)
    other_frames, other_log_probs = heard(24, seed=5)
    other_frames[:, :16], other_log_probs[:, :8] = frames[:, :16], log_probs[:, :8]
    before = run(qformer, frames, log_probs, [8] * 3)[0]
    after = run(qformer, other_frames, other_log_probs, [8] * 3)[0]
    assert torch.equal(before[:, :4], after[:, :4])
    assert (before[:, 4:] - after[:, 4:]).abs().amax(dim=2).min() > 1e-3


# --- posteriors, phases, delay -------------------------------------------------------------------


def one_hot(path, n_pieces=WINDOW.n_pieces):
    """A path of pieces, one per CTC frame -> log-probs (1, T / 2, V), certain ones."""
    log_probs = torch.full((1, len(path), n_pieces), -1e4)
    log_probs[0, range(len(path)), path] = 0.0
    return log_probs


def counting(cfg=WINDOW):
    """A Q-Former of the stack kind whose output is how often each piece was heard."""
    cfg = replace(cfg, kind="stack", llm_width=cfg.n_pieces)
    qformer = QFormer(cfg).requires_grad_(False)
    qformer.posterior.pieces.copy_(torch.eye(cfg.n_pieces))
    for parameter in (*qformer.out.parameters(), qformer.delay.weight):
        parameter.zero_()
    return qformer


@pytest.mark.parametrize("chunk", [4, 8, 16])
def test_a_piece_counts_once_when_it_rises(chunk):
    """CTC's rule, at chunk borders too: repeats are one piece, a blank between makes them two."""
    path = [0, 3, 3, 3, 3, 0, 3, 5, 5, 5, 2, 0, 0, 2, 2, 4]
    qformer, frames = counting(), torch.randn(1, 32, WINDOW.encoder_width)
    counts, _ = run(qformer, frames, one_hot(path), [chunk] * (32 // chunk))
    expected = torch.zeros(8, WINDOW.n_pieces)
    for t, piece in enumerate(path):
        if t == 0 or path[t - 1] != piece:
            expected[t // 2, piece] += 1
    torch.testing.assert_close(counts[0], expected, **TOLERANCE)


def test_each_half_of_a_query_has_its_own_map():
    """'ab' and 'ba' inside 80 ms are told apart."""
    embedding = PosteriorEmbedding(WINDOW).requires_grad_(False)
    embedding.pieces.normal_(generator=torch.Generator().manual_seed(0))
    embedding.maps[1] *= 2.0
    before = torch.zeros(1, 1, WINDOW.n_pieces)
    out = embedding(one_hot([1, 2]).exp(), before), embedding(one_hot([2, 1]).exp(), before)
    a, b = embedding.pieces[1], embedding.pieces[2]
    torch.testing.assert_close(out[0][0, 0], a + 2.0 * b, **TOLERANCE)
    torch.testing.assert_close(out[1][0, 0], b + 2.0 * a, **TOLERANCE)


def test_a_query_is_chosen_by_how_many_follow():
    """Without layers only the phase is left: 4 phases, the first ones of a long chunk alike."""
    cfg = replace(WINDOW, n_layers=0)
    qformer = make_qformer(cfg)
    qformer.posterior.pieces.zero_()
    qformer.delay.weight.zero_()
    by_phase = qformer.out(qformer.out_norm(qformer.queries))
    for n_queries, phases in ((1, [0]), (3, [2, 1, 0]), (6, [3, 3, 3, 2, 1, 0])):
        got, _ = run(qformer, *heard(4 * n_queries), [4 * n_queries])
        torch.testing.assert_close(got[0], by_phase[phases], **TOLERANCE)


@KINDS
def test_every_row_is_told_its_own_delay(cfg):
    """Rounded to 80 ms; the rest of the output does not depend on it."""
    qformer = make_qformer(cfg)
    frames, log_probs = heard(8)
    delays = torch.tensor([0, 39, 40, 100, 240, 960])
    rows = [1] * len(delays)
    state = stage.init_state(cfg, len(delays))
    everyone = torch.ones(len(delays), dtype=torch.bool)
    _, queries = stage.step(
        qformer,
        state,
        frames.repeat(len(rows), 1, 1),
        log_probs.repeat(len(rows), 1, 1),
        delays,
        everyone,
    )
    table = qformer.delay.weight[[0, 0, 1, 1, 3, 12]]
    expected = queries[:1] + (table - table[0])[:, None]
    torch.testing.assert_close(queries, expected, **TOLERANCE)


def test_time_is_relative():
    """Hours into a stream the same sounds give the same queries, bit for bit."""
    qformer, (frames, log_probs) = make_qformer(WINDOW), heard(32)
    late = stage.init_state(WINDOW, 1)
    late.position += 4 * 12 * 3 * 10**9
    early, _ = run(qformer, frames, log_probs, [8] * 4)
    assert torch.equal(run(qformer, frames, log_probs, [8] * 4, state=late)[0], early)


# --- the state -----------------------------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(chunks=st.lists(st.sampled_from([4, 8, 16, 20]), min_size=2, max_size=8))
def test_what_the_rings_hold_never_changes(chunks):
    qformer, (frames, log_probs) = make_qformer(WINDOW), heard(sum(chunks))
    state, at, written = stage.init_state(WINDOW, 1), 0, {}
    rings = {
        "frame": (state.frame_position, WINDOW.frame_ring, 1),
        "query": (state.query_position, WINDOW.query_ring, 4),
    }
    for size in chunks:
        _, state = run(qformer, frames[:, at:], log_probs[:, at // 2 :], [size], state=state)
        at += size
        for name, (positions, length, stride) in rings.items():
            held = sorted(p for p in positions[0].tolist() if p >= 0)
            assert held == list(range(max(0, at // stride - length), at // stride))
            for position in held:
                slot = position % length
                assert positions[0, slot] == position
                if name == "frame":
                    now = state.frames[0, slot]
                    assert torch.equal(now, frames[0, position])
                else:
                    now = torch.stack([state.k[:, 0, :, slot], state.v[:, 0, :, slot]])
                assert torch.equal(written.setdefault((name, position), now.clone()), now)


@KINDS
def test_memory_that_was_never_written_does_not_leak(cfg):
    qformer, heard_ = make_qformer(cfg), heard(48)
    state = stage.init_state(cfg, 1)
    for ring in (state.frames, state.k, state.v):
        ring.fill_(torch.nan)
    clean, _ = run(qformer, *heard_, [8] * 6)
    assert torch.equal(run(qformer, *heard_, [8] * 6, state=state)[0], clean)
    assert clean.isfinite().all()


@KINDS
def test_a_reset_row_is_a_new_stream_even_after_nan(cfg):
    qformer, (frames, log_probs) = make_qformer(cfg), heard(32, seed=1)
    nan = torch.full_like(frames, torch.nan), torch.full_like(log_probs, torch.nan)
    _, state = run(qformer, *nan, [8] * 4)
    stage.reset_rows(state, ONE)
    expected, _ = run(qformer, frames, log_probs, [8] * 4)
    assert torch.equal(run(qformer, frames, log_probs, [8] * 4, state=state)[0], expected)


@KINDS
def test_half_an_hour_leaves_the_state_as_large_as_it_was(cfg):
    qformer, (frames, log_probs) = make_qformer(cfg), heard(500)
    state = stage.init_state(cfg, 1)
    places = [getattr(state, f.name).data_ptr() for f in fields(state)]
    for _ in range(180):
        _, state = run(qformer, frames, log_probs, [500], state=state)
    assert state.position.item() == 90_000
    assert [getattr(state, f.name).data_ptr() for f in fields(state)] == places


def rows_of(state, name):
    """A field of the state with its batch axis first."""
    value = getattr(state, name)
    return value.transpose(0, 1) if name in ("k", "v") else value


@KINDS
@pytest.mark.parametrize("seed", range(2))
def test_a_row_is_alone(cfg, seed):
    """Four streams start, pause, reset at random; each gets what it gets alone."""
    rng, batch = np.random.default_rng(seed), 4
    qformer = make_qformer(cfg)
    together = stage.init_state(cfg, batch)
    alone = [stage.init_state(cfg, 1) for _ in range(batch)]
    delays = torch.tensor([0, 240, 480, 960])
    names = [f.name for f in fields(together)]
    for turn in range(25):
        size = int(rng.choice([4, 8, 8, 16]))
        active = torch.from_numpy(rng.random(batch) < 0.6)
        if rng.random() < 0.25:
            mask = torch.from_numpy(rng.random(batch) < 0.4)
            stage.reset_rows(together, mask)
            for i in mask.nonzero()[:, 0].tolist():
                alone[i] = stage.init_state(cfg, 1)
        frames, log_probs = heard(size, seed=100 * seed + turn, batch=batch)
        frames[~active] = torch.nan
        held = {name: rows_of(together, name).clone() for name in names}
        together, queries = stage.step(qformer, together, frames, log_probs, delays, active)
        for i in range(batch):
            if not active[i]:
                assert not queries[i].any()
                assert all(torch.equal(rows_of(together, n)[i], held[n][i]) for n in names)
                continue
            row = slice(i, i + 1)
            alone[i], expected = stage.step(
                qformer, alone[i], frames[row], log_probs[row], delays[row], ONE
            )
            torch.testing.assert_close(queries[i], expected[0], **TOLERANCE)


@KINDS
def test_nobody_active_and_nothing_to_hear(cfg):
    qformer, state = make_qformer(cfg), stage.init_state(cfg, 2)
    nobody, delay = torch.zeros(2, dtype=torch.bool), torch.zeros(2, dtype=torch.int64)
    state, queries = stage.step(qformer, state, *heard(8, batch=2), delay, nobody)
    assert queries.shape == (2, 2, cfg.llm_width)
    assert not queries.any()
    state, queries = stage.step(qformer, state, *heard(0, batch=2), delay, ~nobody)
    assert queries.shape == (2, 0, cfg.llm_width)
    assert not state.position.any()


# --- whole utterances ----------------------------------------------------------------------------


def ask(qformer, frames):
    log_probs = torch.zeros(len(frames), frames.shape[1] // 2, WINDOW.n_pieces)
    return qformer.forward_train(frames, log_probs, 0, torch.zeros(len(frames), dtype=torch.int64))


@pytest.mark.parametrize("n_frames", [1, 7, 64, 333])
def test_an_utterance_of_any_length_gets_as_many_queries(n_frames):
    frames = torch.randn(2, n_frames, WINDOW.encoder_width)
    assert ask(make_qformer(UTTERANCE), frames).shape == (2, UTTERANCE.n_queries, 10)
    assert QFormerConfig().n_queries == 100


def test_every_query_of_an_utterance_sees_all_frames_and_all_queries():
    qformer = make_qformer(UTTERANCE).requires_grad_()
    frames = heard(20)[0].requires_grad_()
    for i in range(UTTERANCE.n_queries):
        answer = ask(qformer, frames)[0, i].square().sum()
        to_frames, to_queries = torch.autograd.grad(answer, (frames, qformer.queries))
        assert to_frames[0].abs().amax(dim=1).min() > 1e-6
        assert to_queries.abs().amax(dim=1).min() > 1e-6


def test_the_queries_of_an_utterance_have_no_place_in_time():
    """SparQLe's queries carry no positions; when something was is the encoder's to tell."""
    qformer, frames = make_qformer(UTTERANCE), heard(20)[0]
    shuffled = frames[:, torch.randperm(20, generator=torch.Generator().manual_seed(0))]
    torch.testing.assert_close(ask(qformer, shuffled), ask(qformer, frames), **TOLERANCE)


def test_an_utterance_cannot_be_streamed():
    qformer, (frames, log_probs) = make_qformer(UTTERANCE), heard(8)
    state, delay = stage.init_state(UTTERANCE, 1), torch.tensor([0])
    with pytest.raises(ConfigError, match="offline only"):
        stage.step(qformer, state, frames, log_probs, delay, ONE)
    with pytest.raises(ConfigError, match="offline only"):
        qformer.forward_train(frames, log_probs, 8, delay)


def test_an_unknown_kind_is_refused():
    with pytest.raises(ConfigError, match="unknown qformer kind 'windows'"):
        QFormerConfig(kind="windows")
