"""slots.py: what is read ahead counts when it is picked, and leaves no trace when it is not."""

from __future__ import annotations

import random

import numpy as np
import pytest

from sparqle_stream.onnx_cpu.settings import PASS_ROWS
from sparqle_stream.onnx_cpu.slot_memory import SlotMemory
from sparqle_stream.onnx_cpu.slots import Slots

TOLERANCE = 1e-4  # rows of one pass or of two are added in another order


class Counted(Slots):
    """Slots that count their passes and the rows of these."""

    def __init__(self, model, n_rows):
        super().__init__(model, n_rows)
        self.n_rows_read = []

    def _run(self, new, last, trees):
        self.n_rows_read.append(sum(map(len, new.values())))
        return super()._run(new, last, trees)


@pytest.fixture
def slots(graphs):
    return Counted(graphs, 3)


@pytest.fixture
def plain(graphs):
    """Slots that are never told what to expect."""
    return Slots(graphs, 3)


def embeds(model, n, seed=0):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((n, model.cfg.llm.width)).astype(np.float32)


def assert_alike(slots, plain, row):
    assert slots.length[row] == plain.length[row]
    np.testing.assert_allclose(slots.hidden[row], plain.hidden[row], atol=TOLERANCE)
    n = int(plain.length[row])
    for name, kept in plain.kv.items():
        np.testing.assert_allclose(slots.kv[name][row, :, :n], kept[row, :, :n], atol=TOLERANCE)


def test_what_was_expected_needs_no_pass_of_its_own(slots, plain, graphs):
    picks = [[5, 6], [7], [8, 9]]
    for each in (slots, plain):
        each.leave_embedded(0, embeds(graphs, 4))
    slots.read({0: []}, lambda _: picks)
    plain.read({0: []})
    assert_alike(slots, plain, 0)  # nothing of it counts yet
    for pick in picks:
        slots.read({0: pick}, lambda _: [])
        plain.read({0: pick})
        assert_alike(slots, plain, 0)
    assert slots.n_rows_read == [9]


@pytest.mark.parametrize("wrong", [[[4]], [[5], [6]], [[5, 6, 7]], [[5, 6], [4]]])
def test_what_was_not_expected_leaves_no_trace(slots, plain, graphs, wrong):
    for each in (slots, plain):
        each.leave_embedded(1, embeds(graphs, 4))
    slots.read({1: []}, lambda _: wrong)
    plain.read({1: []})
    for pick in ([5, 6], [7], [8]):
        slots.read({1: pick}, lambda _: [])
        plain.read({1: pick})
        assert_alike(slots, plain, 1)


def test_queries_end_what_was_read_ahead(slots, plain, graphs):
    """What was expected and not picked in a chunk is not there in the next."""
    for each in (slots, plain):
        each.leave_embedded(0, embeds(graphs, 4))
    slots.read({0: []}, lambda _: [[5], [6]])
    plain.read({0: []})
    for each in (slots, plain):
        each.leave({0: [5]})
        each.leave_embedded(0, embeds(graphs, 4, seed=1))
        each.leave({0: [6]})
        each.read({0: []})
    assert_alike(slots, plain, 0)


def test_a_new_slot_expects_nothing_of_the_old_one(slots, graphs):
    slots.leave_embedded(0, embeds(graphs, 4))
    slots.read({0: []}, lambda _: [[5]])
    slots.forget(0)
    slots.read({0: [5]}, lambda _: [])
    assert slots.length[0] == 1
    assert slots.n_rows_read == [5, 1]


def test_no_more_is_read_ahead_than_fits(slots, graphs):
    slots.leave_embedded(0, embeds(graphs, PASS_ROWS - 3))
    slots.read({0: []}, lambda _: [[5, 6], [7, 8]])
    slots.forget(1)
    slots.length[1] = slots.n_slot - 6
    slots.leave_embedded(1, embeds(graphs, 4))
    slots.read({1: []}, lambda _: [[5], [6], [7]])
    assert slots.n_rows_read == [PASS_ROWS - 1, 6]


@pytest.mark.parametrize("seed", range(6))
def test_any_guesses_give_the_same(slots, plain, graphs, seed):
    """Chunks of three rows, whose guesses are right, wrong or partly so, beside each other."""
    chance = random.Random(seed)
    for chunk in range(5):
        rows = [row for row in range(3) if chance.random() < 0.7]
        for row in rows:
            for each in (slots, plain):
                each.leave_embedded(row, embeds(graphs, 2, seed=9 * chunk + row))
        picks = {row: [pick(chance) for _ in range(chance.randrange(4))] for row in rows}
        guesses = {
            row: [p if chance.random() < 0.7 else pick(chance) for p in picks[row]] for row in rows
        }
        going = {row: [] for row in rows}
        for turn in range(5):
            slots.read(going, {row: guess[turn:] for row, guess in guesses.items()}.__getitem__)
            plain.read(going)
            for row in going:
                assert_alike(slots, plain, row)
            left = {row: picks[row][turn] for row in going if turn < len(picks[row])}
            over = {row: new for row, new in left.items() if chance.random() < 0.3}
            for each in (slots, plain):
                each.leave(over)
            going = {row: new for row, new in left.items() if row not in over}


@pytest.mark.parametrize(
    ("needed", "block"),
    [([3], (3, 4)), ([4, 5], (4, 6)), ([1, 2], (0, 4)), ([6], (6, 7)), ([3, 5], (0, 7))],
)
def test_a_pass_is_given_the_slots_it_needs(graphs, needed, block):
    found = SlotMemory(graphs, 7).block(np.array(needed))
    assert (found.start, found.stop) == block


@pytest.mark.parametrize("seed", range(4))
def test_any_block_gives_the_same(graphs, seed):
    """Rows in slots of their own and in slots far apart, with what idle ones hold between them."""
    chance = random.Random(seed)
    near, far = Slots(graphs, 2), Slots(graphs, 7)
    places = dict(enumerate(chance.sample(range(7), 2)))
    for row in set(range(7)) - set(places.values()):
        far.leave_embedded(row, embeds(graphs, 9, seed=row))
    far.read(dict.fromkeys(range(7), []))
    for chunk in range(6):
        for row in (row for row in places if chance.random() < 0.7):
            new = embeds(graphs, chance.randrange(1, 6), seed=9 * chunk + row)
            near.leave_embedded(row, new)
            far.leave_embedded(places[row], new)
        near.read({0: [], 1: []})
        far.read({places[0]: [], places[1]: []})
        for row, place in places.items():
            n = int(near.length[row])
            assert far.length[place] == n
            np.testing.assert_allclose(far.hidden[place], near.hidden[row], atol=TOLERANCE)
            for name, kept in near.kv_of(row).items():
                theirs = far.kv_of(place)[name]
                np.testing.assert_allclose(theirs[:, :n], kept[:, :n], atol=TOLERANCE)


def pick(chance):
    return [chance.randrange(3, 40) for _ in range(chance.choice((1, 1, 2, 3)))]
