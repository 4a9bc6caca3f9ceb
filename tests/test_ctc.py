"""ctc.py: the head, the best path and the pieces."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparqle_stream import ctc
from sparqle_stream.config import CtcConfig
from sparqle_stream.ctc import CtcHead
from sparqle_stream.pieces import BLANK, CtcPieces, greedy_path
from training.text import spoken, train_pieces

CFG = CtcConfig(width=6, hidden=8, n_pieces=5)
BOOK = [
    "The cat sat on the mat, and the dog's bowl was empty.",
    "It was the best of times, it was the worst of times.",
    "Finally the one party went off exulting.",
]


@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
    return train_pieces(BOOK, 64, tmp_path_factory.mktemp("pieces") / "pieces.json")


@pytest.fixture
def head():
    torch.manual_seed(0)
    return CtcHead(CFG).requires_grad_(False)


def frames_of(n_frames, batch=2):
    return torch.randn(batch, n_frames, CFG.width, generator=torch.Generator().manual_seed(1))


def test_a_frame_of_ctc_is_a_pair_of_frames(head):
    """The formula in float64: norm, hidden layer, pieces; each row of pieces sums to one."""
    frames, truth = frames_of(10), head.double()
    pair = torch.cat([frames[1, 6], frames[1, 7]]).double()
    expected = truth.out(torch.nn.functional.gelu(truth.hidden(truth.norm(pair)))).log_softmax(-1)
    log_probs = head.float()(frames)
    assert log_probs.shape == (2, 5, CFG.n_pieces)
    torch.testing.assert_close(log_probs[1, 3].double(), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(log_probs.exp().sum(dim=-1), torch.ones(2, 5), atol=1e-5, rtol=0)


def test_chunks_equal_one_call(head):
    frames = frames_of(24)
    chunks = torch.cat([head(part) for part in frames.split(8, dim=1)], dim=1)
    torch.testing.assert_close(chunks, head(frames), atol=1e-6, rtol=0)
    assert head(frames[:, :0]).shape == (2, 0, CFG.n_pieces)


def looking_back(seed=0):
    torch.manual_seed(seed)
    return CtcHead(replace(CFG, n_blocks=2, kernel=4)).requires_grad_(False)


def test_a_block_is_a_gated_convolution_over_the_past_and_an_mlp():
    """The formula in float64, frame by frame; before the beginning there are zeros."""
    block = looking_back().double().blocks[0]
    x = torch.randn(1, 7, 8, generator=torch.Generator().manual_seed(2)).double()
    value, gate = block.gate(block.gate_ln(x[0])).chunk(2, dim=-1)
    seen = torch.cat([torch.zeros(3, 8).double(), value * gate.sigmoid()])
    gelu = torch.nn.functional.gelu
    for i in range(7):
        mixed = (seen[i : i + 4].T * block.conv.weight[:, 0]).sum(dim=1) + block.conv.bias
        y = x[0, i] + block.merge(gelu(block.conv_ln(mixed)))
        y = y + block.fc2(gelu(block.fc1(block.mlp_ln(y))))
        torch.testing.assert_close(block(x, seen[None, :3])[0][0, i], y)
    torch.testing.assert_close(block(x, seen[None, :3])[1][0], seen[-3:])


@settings(max_examples=20, deadline=None)
@given(cuts=st.lists(st.integers(1, 5), min_size=1, max_size=6), seed=st.integers(0, 9))
def test_any_cut_is_one_call_and_nothing_looks_ahead(cuts, seed):
    """Rows that are not active keep their past, and get zeros."""
    head, frames = looking_back(seed), frames_of(2 * sum(cuts))
    whole, state = head(frames), ctc.init_state(head, 3)
    got, at = [], 0
    for n in cuts:
        part = torch.cat([frames[:, at : at + 2 * n], torch.full((1, 2 * n, 6), torch.nan)])
        state, log_probs = ctc.step(head, state, part, torch.tensor([True, True, False]))
        assert not log_probs[2].any()
        assert not state.past[2].any()
        got.append(log_probs[:2])
        at += 2 * n
        later = frames.clone()
        later[:, at:] = 9.0
        torch.testing.assert_close(head(later)[:, : at // 2], whole[:, : at // 2])
    torch.testing.assert_close(torch.cat(got, dim=1), whole, atol=1e-5, rtol=0)
    ctc.reset_rows(state, torch.tensor([True, False, False]))
    assert not state.past[0].any()
    assert state.past[1].any()


def test_half_a_pair_is_refused(head):
    with pytest.raises(RuntimeError, match="shape"):
        head(frames_of(9))


def test_low_precision_frames_give_float32_posteriors(head):
    out = head.bfloat16()(frames_of(8).bfloat16())
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.exp().sum(dim=-1), torch.ones(2, 4), atol=1e-5, rtol=0)


@given(path=st.lists(st.integers(0, 3), max_size=30))
def test_the_greedy_path_collapses_as_ctc_does(path):
    """Runs become one entry at their first frame; blanks go last (Graves et al., 2006)."""
    log_probs = torch.nn.functional.one_hot(torch.tensor(path, dtype=torch.long), 4).float()
    expected, at = [], 0
    for piece, run in itertools.groupby(path):
        if piece != BLANK:
            expected.append((at, piece))
        at += len(list(run))
    assert greedy_path(log_probs) == expected


def test_a_blank_between_makes_a_repeat():
    log_probs = torch.nn.functional.one_hot(torch.tensor([0, 2, 2, 0, 2, 3, 2])).float()
    assert greedy_path(log_probs) == [(1, 2), (4, 2), (5, 3), (6, 2)]


def test_pieces_are_blank_the_letters_and_what_the_text_repeats(pieces):
    texts = {pieces.piece(i) for i in range(1, pieces.size)}
    assert pieces.size == 64
    assert set("abcdefghijklmnopqrstuvwxyz' ") <= texts
    assert " the" in texts
    assert pieces.decode([BLANK]) == ""


WORDS = st.text("abcdefghijklmnopqrstuvwxyz'", min_size=1, max_size=9)


@settings(max_examples=60)
@given(words=st.lists(WORDS, min_size=1, max_size=6))
def test_spoken_text_survives_pieces(pieces, words):
    """Any spoken words, seen in training or not, come back; blank is never among their pieces."""
    text = spoken(" ".join(words))
    ids = pieces.encode(text)
    assert pieces.decode(ids) == text
    assert all(BLANK < i < pieces.size for i in ids)
    # Words are spelled one by one, which alignment relies on, and begin with their space.
    assert ids == [i for word in text.split() for i in pieces.encode(word)]
    assert sum(pieces.piece(i).startswith(" ") for i in ids) == len(text.split())


def test_pieces_come_back_from_their_file(pieces, tmp_path):
    again = train_pieces(BOOK, 64, tmp_path / "pieces.json")
    loaded = CtcPieces.load(tmp_path / "pieces.json")
    text = "the cat's off to the worst party"
    assert loaded.size == again.size == pieces.size
    assert loaded.encode(text) == again.encode(text) == pieces.encode(text)
    assert loaded.decode(loaded.encode(text)) == text
