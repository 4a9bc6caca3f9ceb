"""stages.py: the graphs equal torch over a stream, and the streaming contract holds on them too."""

from __future__ import annotations

import numpy as np
import pytest

from sparqle_stream import stages
from sparqle_stream.onnx_cpu.slots import PATIENCE, Slots
from sparqle_stream.writer import Greedy

S = 5120  # samples of a chunk
AHEAD = 6  # frames
TOLERANCE = 1e-3  # DESIGN: over a stream, in float32
INT8_NATS = 0.02  # a CTC frame, of a random model whose CTC head is twelve times as sure


def noise(n, seed):
    return (0.3 * np.random.default_rng(seed).standard_normal(n)).astype(np.float32)


class Listener:
    """Lets every row write up to n tokens, and keeps what was heard."""

    def __init__(self, n_tokens=3):
        self.n_tokens, self.heard = n_tokens, {}

    def __call__(self, row, log_probs):
        self.heard.setdefault(row, []).append(np.array(log_probs))
        return Greedy(self.n_tokens)


def play(model, rows, chunks, *, n_rows=3, n_tokens=3, sizes=S, ahead=AHEAD):
    """Chunks of noise on some rows from a new segment on: tokens by row, log-probs by row."""
    made, listener = model.make_stages(n_rows), Listener(n_tokens)
    tokens = {row: [] for row in rows}
    with made.working(1):
        for row in rows:
            made.wipe(row)
        leads = {row: 0.03 * noise(S + 7, row) for row in rows}  # what follows is louder
        made.begin({row: stages.prefix_ids(model.tokenizer, "before") for row in rows}, leads)
        for i in range(chunks):
            pcm = {row: noise(sizes, 100 * row + i) for row in rows}
            result = made.step(pcm, dict.fromkeys(rows, 240), ahead, listener)
            for row in rows:
                tokens[row].append(result.tokens[row])
    return tokens, {row: np.concatenate(heard) for row, heard in listener.heard.items()}, made


@pytest.mark.parametrize("ahead", [0, AHEAD])
@pytest.mark.parametrize("sizes", [1280, S, 20480])
def test_graphs_equal_torch_over_a_stream(graphs, torch_model, sizes, ahead):
    """Longer than every ring, so that all of them wrap."""
    chunks = 8 * S // sizes * 3
    expected, heard, torch_stages = play(torch_model, [0, 2], chunks, sizes=sizes, ahead=ahead)
    got, heard_too, onnx_stages = play(graphs, [0, 2], chunks, sizes=sizes, ahead=ahead)
    for row in (0, 2):
        np.testing.assert_allclose(heard_too[row], heard[row], atol=TOLERANCE)
        hidden = torch_stages.state.llm.hidden[row].numpy()
        if not onnx_stages.slots.n_waiting(row):
            atol = TOLERANCE * np.abs(hidden).max()  # after all layers of the LLM, on its own past
            np.testing.assert_allclose(onnx_stages.slots.hidden[row], hidden, atol=atol)
        recent = torch_stages.state.recent[row].numpy()
        np.testing.assert_allclose(onnx_stages.recent[row], recent, atol=TOLERANCE)
        peak = torch_stages.state.features.peak[row].item()
        assert onnx_stages.peak[row] == pytest.approx(peak, abs=TOLERANCE)
    assert got == expected
    assert sum(map(len, got[0])) > 0


def test_int8_is_heard_alike(int8_graphs, torch_model):
    """What is written may differ at near ties."""
    got, heard, _ = play(int8_graphs, [1], 6)
    _, expected, _ = play(torch_model, [1], 6)
    divergence = (np.exp(expected[1]) * (expected[1] - heard[1])).sum(axis=-1)
    assert divergence.mean() < INT8_NATS
    assert all(len(tokens) <= 3 for tokens in got[1])


def test_int8_is_heard_alone(int8_graphs):
    """Rows beside a row, louder ones too, change no number of what it hears."""
    _, alone, _ = play(int8_graphs, [1], 4, n_tokens=0)
    _, shared, _ = play(int8_graphs, [0, 1, 2], 4, n_tokens=0)
    np.testing.assert_allclose(shared[1], alone[1], atol=1e-5)


def test_int8_slots_hold_what_float32_holds(int8_graphs, graphs):
    """In steps that fit every channel: what the first layer keeps is off by a step at most."""
    ids = stages.prefix_ids(graphs.tokenizer, "so far")
    slots = Slots(int8_graphs, 1), Slots(graphs, 1)
    for each in slots:
        each.leave({0: ids})
        each.read({0: []})
    assert all(array.dtype == np.int8 for array in slots[0].kv.values())
    for part in "kv":
        kept, true = (each.kv[f"{part}_0"][0, :, : len(ids)] for each in slots)
        step = np.abs(true).max(axis=1, keepdims=True) / np.abs(kept).max(axis=1, keepdims=True)
        assert np.abs(kept).max() > 20  # steps are not too coarse
        np.testing.assert_allclose(kept * step, true, atol=0.1 * np.abs(true).max())


def test_int8_state_is_smaller(int8_graphs, graphs):
    small, large = (model.make_stages(2).state_bytes() for model in (int8_graphs, graphs))
    assert small < 0.4 * large  # slots a quarter, rings half


def test_a_row_is_alone(graphs):
    """Neighbours that start, pause and are wiped change no number of a row."""
    rng = np.random.default_rng(5)
    alone, shared = graphs.make_stages(1), graphs.make_stages(4)
    single, crowd = Listener(), Listener()
    prefix = stages.prefix_ids(graphs.tokenizer, "so far")
    alone.begin({0: prefix})
    shared.begin({2: prefix})
    for i in range(16):
        for row in (0, 1, 3):
            if rng.random() < 0.2:
                shared.wipe(row)
                shared.begin({row: prefix[: int(rng.integers(1, 5))]})
        others = [row for row in (0, 1, 3) if rng.random() < 0.5]
        is_heard = rng.random() < 0.8
        rows = sorted([*others, 2] if is_heard else others)
        if not rows:
            continue
        pcm = {row: noise(S, i if row == 2 else 1000 + 10 * i + row) for row in rows}
        result = shared.step(pcm, dict.fromkeys(rows, 240), AHEAD, crowd)
        if is_heard:
            expected = alone.step({0: noise(S, i)}, {0: 240}, AHEAD, single)
            assert result.tokens[2] == expected.tokens[0]
            np.testing.assert_allclose(crowd.heard[2][-1], single.heard[0][-1], atol=1e-5)
    n = int(alone.slots.length[0])
    assert n == shared.slots.length[2] > 40
    for name, slots in alone.slots.kv.items():
        np.testing.assert_allclose(
            shared.slots.kv[name][2, :, :n], slots[0, :, :n], atol=1e-4, err_msg=name
        )


def test_written_bytes_of_a_slot_never_change(graphs):
    made, listener = graphs.make_stages(2), Listener()
    made.begin({0: [1, 5, 7], 1: [1]})
    before, n_before = {}, np.zeros(2, int)
    for i in range(10):
        rows = [0, 1] if i % 3 else [1]
        made.step({row: noise(S, i + row) for row in rows}, dict.fromkeys(rows, 0), AHEAD, listener)
        for name, kept in before.items():
            for row in (0, 1):
                n = n_before[row]
                assert np.array_equal(made.slots.kv[name][row, :, :n], kept[row, :, :n]), name
        before = {name: array.copy() for name, array in made.slots.kv.items()}
        n_before = made.slots.length.copy()
    assert n_before.min() > 20


def test_rows_without_a_chunk_keep_every_byte(graphs):
    _, _, made = play(graphs, [0, 1], 4)
    kept = [array[1].copy() for array in arrays(made)]
    made.step({0: noise(S, 9)}, {0: 240}, AHEAD, Listener())
    for before, array in zip(kept, arrays(made), strict=True):
        assert np.array_equal(array[1], before)


def test_a_wiped_row_is_a_new_one(graphs):
    """Even if the stream before left numbers that are none."""
    used, fresh = graphs.make_stages(2), graphs.make_stages(2)
    for array in arrays(used):
        if array.dtype == np.float32 and array is not used.peak:
            array[1] = np.nan
    for made in (used, fresh):
        made.wipe(1)
        made.begin({1: [1, 2]})
    listeners = Listener(), Listener()
    for i in range(4):
        results = [
            made.step({1: noise(S, i)}, {1: 240}, AHEAD, listener)
            for made, listener in zip((used, fresh), listeners, strict=True)
        ]
        assert results[0].tokens == results[1].tokens
    assert np.array_equal(listeners[0].heard[1], listeners[1].heard[1])


def test_a_seam_renews_the_slot_and_hears_again(graphs, torch_model):
    """The next tokens are those of torch after the same seam."""
    out = []
    for model in (graphs, torch_model):
        tokens, _, made = play(model, [1], 8)
        with made.working(1):
            made.seam({1: stages.prefix_ids(model.tokenizer, "said")}, {1: 3})
            result = made.step({1: noise(S, 77)}, {1: 240}, AHEAD, Listener(6))
        out.append((tokens, result.tokens))
    assert out[0] == out[1]


def test_the_state_does_not_grow(graphs):
    _, _, made = play(graphs, [0], 2)
    size = made.state_bytes()
    for i in range(40):
        made.step({0: noise(S, i)}, {0: 240}, AHEAD, Listener(0))
        assert made.slots.n_waiting(0) <= PATIENCE
        if made.slots.length[0] > 500:
            made.begin({0: [1]})
    assert made.state_bytes() == size


def test_a_full_slot_says_so_and_stays_as_it_is(graphs):
    slots = Slots(graphs, 2)
    slots.leave({0: [1] * slots.n_slot})
    slots.read({0: []})
    before = {name: array.copy() for name, array in slots.kv.items()}
    with pytest.raises(Exception, match=f"slot of {slots.n_slot}"):
        slots.read({0: [2]})
    assert all(np.array_equal(slots.kv[name], array) for name, array in before.items())


def arrays(made):
    """All arrays of a state, rows first."""
    rings = [r for ring in (made.ear, made.queries, made.frames) for r in ring.arrays.values()]
    own = [made.tail, made.peak, made.mel_tail, made.position, made.posterior, made.recent]
    return [*own, *rings, *made.slots.kv.values(), made.slots.hidden, made.slots.length]
