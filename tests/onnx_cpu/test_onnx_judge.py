"""judge.py: readings judged in the passes of the captions are judged as torch judges them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from sparqle_stream import llm as llm_stage
from sparqle_stream.judge import Judge, n_slots
from sparqle_stream.onnx_cpu import model as onnx_model
from sparqle_stream.onnx_cpu.export import export
from sparqle_stream.onnx_cpu.slots import Slots
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
        got, expected = slots.judge(doubts, nothing), torch_judge.judge(doubts)
        for row in rows:
            np.testing.assert_allclose(got[row], expected[row], atol=atol)
        slots.read({row: [] for row in rows})
        for row in rows:
            if slots.length[row] > 500:
                slots.forget(row)


def test_what_waits_is_read_in_the_same_pass(slots, monkeypatch):
    passes = []
    run = slots._run
    monkeypatch.setattr(slots, "_run", lambda new, last: passes.append(set(new)) or run(new, last))
    slots.judge({0: [[100, 101], [99, 98]]}, nothing)
    passes.clear()
    slots.leave_embedded(0, np.ones((4, 64), np.float32))
    slots.note({0: [100, 101]})
    slots.judge({0: [[100, 101], [99, 98]]}, nothing)
    assert passes == [{0, N_ROWS, 2 * N_ROWS, 2 * N_ROWS + 1}]
    slots.read({0: []})
    assert len(passes) == 1


def test_plain_text_is_read_along_with_captions(slots, monkeypatch):
    slots.judge({0: [[100, 101], [99, 98]]}, nothing)
    passes = []
    run = slots._run
    monkeypatch.setattr(slots, "_run", lambda new, last: passes.append(set(new)) or run(new, last))
    slots.note({0: [100, 101], 1: [100]})
    slots.leave_embedded(0, np.ones((4, 64), np.float32))
    slots.read({0: []})
    slots.judge({0: [[99, 98], [97]]}, nothing)
    assert passes == [{0, N_ROWS}, {2 * N_ROWS}]


def test_captions_are_those_of_slots_without_doubts(graphs):
    """Bit for bit: what is judged lies in other slots."""
    quiet, loud = Slots(graphs, N_ROWS), Slots(graphs, N_ROWS)
    rng = np.random.default_rng(0)
    for _ in range(5):
        queries = rng.standard_normal((4, 64)).astype(np.float32)
        for slots in (quiet, loud):
            slots.leave_embedded(1, queries)
        loud.judge({1: readings(rng, 4)}, nothing)
        loud.note({1: [100]})
        quiet.read({1: []})
        loud.read({1: []})
        np.testing.assert_array_equal(quiet.hidden[1], loud.hidden[1])
    n = quiet.length[1]
    assert n == loud.length[1] == 20
    for name, array in quiet.kv.items():
        np.testing.assert_array_equal(array[1, :, :n], loud.kv[name][1, :, :n])


def test_rows_share_the_places_in_turns(slots):
    rng = np.random.default_rng(0)
    doubts = {row: readings(rng, 4) for row in range(N_ROWS)}
    together = slots.judge(doubts, nothing)
    for row, of in doubts.items():
        alone = slots.judge({row: of}, nothing)[row]
        np.testing.assert_allclose(together[row], alone, atol=1e-3)


def test_a_broken_prefix_is_one_line(graphs, tmp_path):
    import shutil

    from sparqle_stream.errors import ModelError

    folder = tmp_path / "broken"
    shutil.copytree(graphs.folder, folder)
    (folder / "text.npz").write_bytes(b"PK")
    with pytest.raises(ModelError, match=r"cannot read .*text\.npz"):
        onnx_model.load(folder, tokenizer=ByteTokenizer())
