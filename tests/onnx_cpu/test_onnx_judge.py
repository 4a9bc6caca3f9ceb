"""judge.py: readings judged in the passes of the captions are judged as torch judges them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from sparqle_stream import llm as llm_stage
from sparqle_stream.judge import Judge, n_slots
from sparqle_stream.onnx_cpu import model as onnx_model
from sparqle_stream.onnx_cpu.calibrate import slot_scales
from sparqle_stream.onnx_cpu.export import export
from sparqle_stream.onnx_cpu.slots import PATIENCE, Slots
from sparqle_stream.testing import ByteTokenizer
from tests.prefixes import prefix_of

N_ROWS = 3
NATS = 0.02  # of a reading, in float32; embeddings are float16 there
NATS_INT8 = 1.0


def nothing(_row):
    return []


@pytest.fixture(scope="module")
def judging(tiny):
    return replace(tiny, text=prefix_of(tiny))


@pytest.fixture(scope="module", params=["float32", "int8"])
def dtype(request):
    return request.param


@pytest.fixture(scope="module")
def graphs(judging, dtype, tmp_path_factory):
    folder = tmp_path_factory.mktemp("judging") / "tiny"
    export(judging, folder, dtype)
    return onnx_model.load(folder, tokenizer=ByteTokenizer())


@pytest.fixture
def slots(graphs):
    return Slots(graphs, N_ROWS)


@pytest.fixture
def torch_judge(judging):
    state = llm_stage.init_state(judging.cfg.llm, n_slots(judging.text, N_ROWS))
    return Judge(judging.llm, state, judging.text, N_ROWS, judging.tokenizer.bos_id)


def readings(rng, n, longest=6):
    return [rng.integers(60, 150, rng.integers(1, longest)).tolist() for _ in range(n)]


def watch(slots, passes, monkeypatch):
    """Appends how many rows each slot has in every pass."""
    run = slots._run

    def watched(new, *rest):
        passes.append({slot: len(embeds) for slot, embeds in new.items()})
        return run(new, *rest)

    monkeypatch.setattr(slots, "_run", watched)


@pytest.mark.parametrize("seed", range(4))
def test_as_torch_over_a_story(slots, torch_judge, dtype, seed):
    """Words are said, few or many at once; rows end; queries and tokens come in between."""
    rng = np.random.default_rng(seed)
    atol = NATS if dtype == "float32" else NATS_INT8
    for _ in range(30):
        rows = rng.permutation(N_ROWS)[: rng.integers(1, N_ROWS + 1)].tolist()
        for row in rows:
            if rng.random() < 0.1:
                slots.wipe(row)
                torch_judge.wipe(row)
            ids = rng.integers(60, 150, rng.choice([0, 1, 3, 8, 30])).tolist()
            slots.note({row: ids})
            torch_judge.say(row, ids)
            if rng.random() < 0.5:
                slots.leave_embedded(row, rng.standard_normal((4, 64)).astype(np.float32))
        doubts = {row: readings(rng, rng.integers(2, 5)) for row in rows}
        got, expected = slots.judge(doubts, list(doubts), nothing), torch_judge.judge(doubts)
        for row in rows:
            np.testing.assert_allclose(got[row], expected[row], atol=atol)
        slots.read({row: [] for row in rows})
        for row in rows:
            if slots.length[row] > 500:
                slots.forget(row)


def test_what_waits_is_read_in_the_same_pass(slots, monkeypatch):
    passes = []
    watch(slots, passes, monkeypatch)
    slots.judge({0: [[100, 101], [99, 98]]}, [0], nothing)
    passes.clear()
    slots.leave_embedded(0, np.ones((4, 64), np.float32))
    slots.note({0: [100, 101]})
    slots.judge({0: [[100, 101], [99, 98]]}, [0], nothing)
    assert passes == [{0: 4, N_ROWS: 4}]
    slots.read({0: []})
    assert len(passes) == 1


def test_rows_that_go_on_are_read_with_the_doubts_of_others(slots, monkeypatch):
    passes = []
    watch(slots, passes, monkeypatch)
    slots.note({0: [100], 1: [101, 102], 2: [103]})
    for row in range(N_ROWS):
        slots.leave_embedded(row, np.ones((4, 64), np.float32))
    slots.judge({0: [[100, 101], [99, 98]]}, [0, 1], lambda row: [[100 + row]])
    slots.read({0: [], 1: []}, nothing)
    # What is read ahead is known: what waits, a row ahead; a beginning, a word, two nodes.
    assert passes == [{0: 5, 1: 5, N_ROWS: 4, N_ROWS + 1: 3}]
    assert slots.n_waiting(2) == 4


def test_where_much_waits_it_is_read_with_others(slots, monkeypatch):
    passes = []
    watch(slots, passes, monkeypatch)
    slots.leave_embedded(0, np.ones((4, 64), np.float32))
    slots.leave_embedded(1, np.ones((PATIENCE + 1, 64), np.float32))
    slots.leave_embedded(2, np.ones((PATIENCE, 64), np.float32))
    slots.read({0: []}, nothing)
    assert [set(of) for of in passes] == [{0, 1, N_ROWS, N_ROWS + 1}]


def test_plain_text_is_read_along_with_captions(slots, monkeypatch):
    slots.judge({0: [[100, 101], [99, 98]]}, [0], nothing)
    passes = []
    watch(slots, passes, monkeypatch)
    slots.note({0: [100, 101], 1: [100]})
    slots.leave_embedded(0, np.ones((4, 64), np.float32))
    slots.read({0: []})
    slots.judge({0: [[99, 98], [97]]}, [0], nothing)
    assert passes == [{0: 4, N_ROWS: 2}, {N_ROWS: 1}]


def test_channels_that_rotate_together_have_one_step(judging):
    """Else rows of q and k could not carry the steps, which they do before they rotate."""
    for name, steps in slot_scales(judging).items():
        if name.startswith("k"):
            first, second = np.split(steps, 2, axis=-1)
            np.testing.assert_array_equal(first, second)


def test_captions_are_those_of_slots_without_doubts(graphs):
    """Bit for bit: what is judged lies in other slots."""
    quiet, loud = Slots(graphs, N_ROWS), Slots(graphs, N_ROWS)
    rng = np.random.default_rng(0)
    for _ in range(5):
        queries = rng.standard_normal((4, 64)).astype(np.float32)
        for slots in (quiet, loud):
            slots.leave_embedded(1, queries)
        loud.judge({1: readings(rng, 4)}, [1], nothing)
        loud.note({1: [100]})
        quiet.read({1: []})
        loud.read({1: []})
        np.testing.assert_array_equal(quiet.hidden[1], loud.hidden[1])
    n = quiet.length[1]
    assert n == loud.length[1] == 20
    for name, array in quiet.kv_of(1).items():
        assert array[:, :n].any()
        np.testing.assert_array_equal(array[:, :n], loud.kv_of(1)[name][:, :n])


def test_a_row_is_judged_as_if_it_were_alone(slots):
    rng = np.random.default_rng(0)
    doubts = {row: readings(rng, 4) for row in range(N_ROWS)}
    together = slots.judge(doubts, list(doubts), nothing)
    for row, of in doubts.items():
        alone = slots.judge({row: of}, [row], nothing)[row]
        np.testing.assert_allclose(together[row], alone, atol=1e-3)


def test_readings_do_not_see_each_other(slots, torch_judge, dtype, monkeypatch):
    """Whatever they begin with in common: each is judged as if it were the only one."""
    passes = []
    watch(slots, passes, monkeypatch)
    found = [[100, 101, 102], [100, 101, 103, 104], [100, 99], [98, 101, 102], [100, 101]]
    slots.note({1: [90, 91]})
    together = slots.judge({1: found}, [1], nothing)[1]
    assert passes == [{N_ROWS + 1: 3 + 5}]  # what waits; 100, 101, 103, 98, 101
    alone = [slots.judge({1: [reading]}, [1], nothing)[1][0] for reading in found]
    np.testing.assert_allclose(together, alone, atol=1e-3 if dtype == "float32" else 1e-6)
    torch_judge.say(1, [90, 91])
    expected = torch_judge.judge({1: found})[1]
    np.testing.assert_allclose(together, expected, atol=NATS if dtype == "float32" else NATS_INT8)


def test_more_readings_than_a_tree_holds(slots, torch_judge, dtype, monkeypatch):
    """Long ones that share nothing are judged in several passes; a long story is caught up."""
    rng, passes = np.random.default_rng(3), []
    watch(slots, passes, monkeypatch)
    found = [[60 + i, *rng.integers(60, 150, 40)] for i in range(10)]
    story = rng.integers(60, 150, 40).tolist()
    slots.note({0: story})
    torch_judge.say(0, story)
    got, expected = (
        slots.judge({0: found, 2: found[:1]}, [0, 2], nothing),
        torch_judge.judge({0: found}),
    )
    np.testing.assert_allclose(got[0], expected[0], atol=NATS if dtype == "float32" else 8.0)
    assert len(got[0]) == 8
    assert len(got[2]) == 1
    assert passes[0] == {N_ROWS: 41}
    assert passes[1:] == [{N_ROWS: 31, N_ROWS + 2: 32}, *[{N_ROWS: 31}] * 7]


def test_a_broken_prefix_is_one_line(graphs, tmp_path):
    import shutil

    from sparqle_stream.errors import ModelError

    folder = tmp_path / "broken"
    shutil.copytree(graphs.folder, folder)
    (folder / "text.npz").write_bytes(b"PK")
    with pytest.raises(ModelError, match=r"cannot read .*text\.npz"):
        onnx_model.load(folder, tokenizer=ByteTokenizer())
