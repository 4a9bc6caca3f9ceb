"""cuda_graphs.py without a GPU: what would be captured waits for nobody, and replays are steps.

A fake graph stands for the real one: it keeps the body and replays it by calling it again on the
static buffers. Between steps every buffer is spoilt, so that what was not copied anew shows.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sparqle_kernels import choice
from sparqle_stream import cuda_graphs, llm, models, pipeline, stages
from sparqle_stream.config import EngineConfig, StreamOptions, VadConfig
from sparqle_stream.cuda_graphs import CudaCapture, HostCopy
from sparqle_stream.engine import Engine
from sparqle_stream.errors import ModelError
from sparqle_stream.rows import Rows
from sparqle_stream.testing import text_of
from sparqle_stream.torch_stages import TorchStages
from sparqle_stream.writer import Greedy
from tests.prefixes import prefix_of
from tests.test_pipeline import tensors

N_ROWS, S = 5, 5120
TOLERANCE = 1e-4  # float32, where products of other shapes add up in another order
aten = torch.ops.aten
# On a GPU each of these makes the host wait, or has a shape that depends on data.
WAITS = {
    aten._local_scalar_dense,
    aten.item,
    aten.nonzero,
    aten.masked_select,
    aten.is_nonzero,
    aten.equal,
    aten.unique_dim,
    aten._unique2,
    aten.repeat_interleave,
}


@pytest.fixture(autouse=True)
def no_grad():
    with torch.inference_mode():
        yield


@pytest.fixture
def model():
    """As serving has it: joined matrices."""
    return models.load("random:tiny")


@pytest.fixture
def as_on_cuda(monkeypatch):
    """Ops as they are where there is no code for a CPU: that reads lengths back."""
    monkeypatch.setattr(choice, "ON_CPU", {})
    choice.on_device.cache_clear()
    yield
    choice.on_device.cache_clear()


def fake_capture(body):
    """Warms up, then replays by calling."""
    body()
    return body


def once(body):
    """A graph that must not be replayed: for stages that forget theirs after every step."""
    body()
    return body


class Chatty(Greedy):
    """Goes on whatever the stop head says, every other time among words of its own."""

    def goes_on(self, stop):
        assert np.isfinite(stop)
        return self.n_written < self.n_most

    def suggest(self):
        return [3, 3, 70, 9] if self.n_written % 2 else []

    def pick(self, ids, scores):
        assert len(ids) == len(scores)
        self.n_written += 1
        best = ids[int(np.argmax(scores))]
        return [best, 5] if best % 3 == 0 else [best]


def spoil(stages_):
    """Static buffers hold what nobody asked for; rows and ids stay valid numbers."""
    for graph in stages_._graphs.passes._graphs.values():
        for x in (*graph.inputs, *graph.outputs):
            x.fill_(torch.nan if x.is_floating_point() else N_ROWS)


class Story:
    """Rows that pause, end, begin segments, get new slots; chunks and look-ahead that change."""

    def __init__(self, model, seed):
        self.model, self.gen = model, np.random.default_rng(seed)
        self.prefix = stages.prefix_ids(model.tokenizer, "so far")
        self.begun = set()

    def steps(self, n):
        for at in range(n):
            draw = self.gen.random((N_ROWS, 4))
            wipes = [r for r in range(N_ROWS) if draw[r, 0] < 0.1]
            begins = [r for r in range(N_ROWS) if r in wipes or at == 0 or draw[r, 1] < 0.1]
            seams = [r for r in range(N_ROWS) if r not in begins and draw[r, 2] < 0.1]
            active = [r for r in range(N_ROWS) if draw[r, 3] < 0.6] or [N_ROWS - 1]
            self.gen.shuffle(active)
            size = S if at % 4 else 1280
            pcm = {r: 0.3 * self.gen.standard_normal(size).astype(np.float32) for r in active}
            wait = {r: int(self.gen.integers(0, 960)) for r in active}
            yield wipes, begins, seams, pcm, wait, 12 if at % 3 else 0

    def tell(self, to, step):
        """One step of the story -> what `to` hears and writes."""
        wipes, begins, seams, pcm, wait, ahead = step
        for row in wipes:
            to.wipe(row)
        if begins:
            to.begin(dict.fromkeys(begins, self.prefix))
        if seams:
            to.seam(dict.fromkeys(seams, self.prefix[:2]), dict.fromkeys(seams, 2))
        heard = {}

        def hear(row, log_probs):
            heard[row] = log_probs.copy()
            return Chatty(row % 4)

        result = to.step(pcm, wait, ahead, hear)
        return heard, result.tokens


def own_rows(state):
    """All tensors of a state but for the spare row, cut where only garbage differs."""
    out = {}
    for name, x in tensors(state).items():
        has_layers = x.ndim > 3 and name.endswith((".k", ".v"))
        out[name] = (x[:, :N_ROWS] if has_layers else x[:N_ROWS]).clone()
    for name in ("llm.k", "llm.v"):
        for row, n in enumerate(state.llm.length[:N_ROWS].tolist()):
            out[name][:, row, :, n:] = 0.0  # leftovers of former slots are not there
    return out


@pytest.mark.parametrize("seed", range(3))
def test_replays_are_bit_for_bit_the_same_step(model, as_on_cuda, seed):
    """As with buffers made anew for every step; resets and segment begins in between."""
    graphed, fresh = (TorchStages(model, N_ROWS, c) for c in (fake_capture, once))
    addresses = {name: x.data_ptr() for name, x in tensors(graphed.state).items()}
    story = Story(model, seed)
    for step in story.steps(14):
        got, tokens = story.tell(graphed, step)
        expected, same = story.tell(fresh, step)
        assert tokens == same
        assert got.keys() == expected.keys() == step[3].keys()
        for row, log_probs in got.items():
            np.testing.assert_array_equal(log_probs, expected[row])
        spoil(graphed)
        fresh._graphs.passes._graphs.clear()
        for (name, x), y in zip(
            own_rows(graphed.state).items(), own_rows(fresh.state).values(), strict=True
        ):
            assert torch.equal(x, y), name
    assert {name: x.data_ptr() for name, x in tensors(graphed.state).items()} == addresses


@pytest.mark.parametrize("seed", range(3))
def test_replays_are_steps_of_the_pipeline(model, seed):
    """The eager path, with as many rows as are active: same words, the same numbers."""
    graphed, eager = TorchStages(model, N_ROWS, fake_capture), TorchStages(model, N_ROWS)
    story = Story(model, 10 + seed)
    n_said = 0
    for step in story.steps(14):
        got, tokens = story.tell(graphed, step)
        expected, same = story.tell(eager, step)
        assert tokens == same
        n_said += sum(map(len, tokens.values()))
        for row, log_probs in got.items():
            np.testing.assert_allclose(log_probs, expected[row], atol=TOLERANCE, rtol=TOLERANCE)
        spoil(graphed)
        for (name, x), y in zip(
            own_rows(graphed.state).items(), own_rows(eager.state).values(), strict=True
        ):
            torch.testing.assert_close(x, y, atol=TOLERANCE, rtol=TOLERANCE, msg=name)
    assert n_said > 20


class Doubtful(Chatty):
    """Has doubts in every chunk, and keeps what it is told."""

    def __init__(self, n_most, told):
        super().__init__(n_most)
        self.told, self.last = told, []

    def doubts(self):
        return [[70], [71, 72, 73], [74, 75]]

    def judged(self, log_probs):
        self.told.append(list(log_probs))

    def pick(self, ids, scores):
        self.last = super().pick(ids, scores)
        return self.last

    def plain(self):
        return self.last


@pytest.mark.parametrize("seed", range(3))
def test_readings_are_judged_beside_replays(model, seed):
    """Spare row, captions and plain text of all rows keep out of each other's way."""
    model = replace(model, text=prefix_of(model))
    graphed, eager = TorchStages(model, N_ROWS, fake_capture), TorchStages(model, N_ROWS)
    story = Story(model, 20 + seed)
    for wipes, begins, _, pcm, wait, ahead in story.steps(14):
        told = []
        for to in (graphed, eager):
            heard = []
            for row in wipes:
                to.wipe(row)
            if begins:
                to.begin(dict.fromkeys(begins, story.prefix))
            writers = {row: Doubtful(row % 4, heard) for row in sorted(pcm)}
            result = to.step(pcm, wait, ahead, lambda row, _, writers=writers: writers[row])
            told.append((result.tokens, np.array([x for of in heard for x in of])))
        spoil(graphed)
        assert told[0][0] == told[1][0]
        np.testing.assert_allclose(told[0][1], told[1][1], atol=1e-3, rtol=1e-3)


class NoWaiting(TorchDispatchMode):
    """Fails where the host would wait for the device, except where a test allows it."""

    def __init__(self):
        super().__init__()
        self.is_allowed, self.is_body = False, False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not self.is_allowed:
            assert func.overloadpacket not in WAITS, f"{func} waits"
            if func.overloadpacket in (aten.index, aten.index_put, aten.index_put_):
                masks = [x for x in args[1] if x is not None and x.dtype == torch.bool]
                assert not masks, f"{func} looks where a mask is true"
            # In a graph, a constant of the host's would have to be copied in each time.
            assert not (self.is_body and func.overloadpacket is aten.lift_fresh), "from the host"
        return func(*args, **(kwargs or {}))

    @contextmanager
    def allowed(self):
        before, self.is_allowed = self.is_allowed, True
        yield
        self.is_allowed = before


def outside_only(mode, name):
    """A method that reads numbers: of the host's own the host may, inside a graph nothing is."""
    inner = getattr(torch.Tensor, name)

    def read(self, *args):
        assert not mode.is_body, f"{name} inside a graph"
        return inner(self, *args)

    return read


@pytest.fixture
def strict(monkeypatch):
    """A mode that looks at everything, also what needs no operator, but for HostCopy."""
    mode = NoWaiting()
    inner_init, inner_wait = HostCopy.__init__, HostCopy.wait

    def init(self, *tensors_):
        assert not mode.is_body
        with mode.allowed():
            inner_init(self, *tensors_)

    def wait(self):
        assert not mode.is_body
        with mode.allowed():
            return inner_wait(self)

    monkeypatch.setattr(HostCopy, "__init__", init)
    monkeypatch.setattr(HostCopy, "wait", wait)
    for name in ("tolist", "cpu", "numpy", "item", "__bool__", "__int__", "__float__"):
        monkeypatch.setattr(torch.Tensor, name, outside_only(mode, name))
    return mode


def test_nothing_waits_but_what_is_meant_to(model, as_on_cuda, strict):
    """One wait for what was heard; two in a round of writing: stop logits, scores."""

    def capture(body):
        def guarded():
            strict.is_body = True
            body()
            strict.is_body = False

        guarded()
        return guarded

    stages_ = TorchStages(model, N_ROWS, capture)
    prefix = stages.prefix_ids(model.tokenizer, "")
    stages_.begin(dict.fromkeys(range(N_ROWS), prefix))
    pcm = {row: np.full(S, 0.1 * row, np.float32) for row in (0, 3, 4)}
    delay = dict.fromkeys(pcm, 240)
    for at, most in enumerate((2, 0, 3, 1)):
        before = HostCopy.n_waits
        with strict:
            result = stages_.step(pcm, delay, 12, lambda _row, _heard, n=most: Chatty(n))
        assert all(len(tokens) >= most for tokens in result.tokens.values())
        lengths = 1 if at == 0 else 0  # somebody else had filled the slots
        assert HostCopy.n_waits - before == 1 + lengths + 2 * most


def test_the_guard_sees_what_waits(strict):
    """Else the test above could pass by looking away."""
    x, mask = torch.arange(4.0), torch.tensor([True, False, True, False])
    for waits in (
        lambda: mask.nonzero(),
        lambda: x[mask],
        lambda: x.__setitem__(mask, torch.zeros(2)),
        lambda: x.masked_select(mask),
        lambda: x.sum().item(),
    ):
        with pytest.raises(AssertionError), strict:
            waits()
    strict.is_body = True
    for waits in (lambda: torch.tensor([1.0]), lambda: x.tolist(), lambda: HostCopy(x)):
        with pytest.raises(AssertionError), strict:
            waits()
    strict.is_body = False


def test_bodies_need_no_data(model):
    """On the device 'meta' there is none: whatever looks at a number or copies it fails."""
    for module in (model.encoder, model.ctc, model.qformer, model.llm):
        module.to("meta")
    model.device = torch.device("meta")
    state = pipeline.init_state(model, N_ROWS)
    rows = torch.zeros(3, dtype=torch.int64, device="meta")
    pcm = torch.zeros(3, S, device="meta")
    heard, queries = pipeline.listen(model, state, pcm, Rows(rows), rows, 12, lambda _stage: None)
    llm.append_rows(model.llm, state.llm, queries, rows)
    scores, best = llm.score_rows(
        model.llm, state.llm, rows, torch.zeros_like(queries[..., 0]).long()
    )
    assert (heard.shape[:2], queries.shape[:2]) == ((3, 8), (3, 4))
    assert (scores.shape, best.shape) == ((3, 5), (3,))


def test_a_number_of_rows_is_rounded_up(model):
    """Few graphs for many numbers of rows; the last bucket has all of them."""
    passes = TorchStages(model, N_ROWS, fake_capture)._graphs.passes
    buckets = [passes.graph("score", n, 8)[1] for n in range(1, N_ROWS + 1)]
    assert buckets == [1, 2, 4, 4, 5]
    assert len(passes._graphs) == 4
    assert TorchStages(model, 1, fake_capture)._graphs.passes._buckets == [1]


def test_a_full_slot_is_an_error_that_the_host_finds(model):
    stages_ = TorchStages(model, 2, fake_capture)
    stages_.begin({0: [1], 1: [1]})
    pcm, delay = {0: np.zeros(S, np.float32)}, {0: 0}
    n_fit = (model.cfg.llm.n_slot - 1) // 4
    for _ in range(n_fit):
        stages_.step(pcm, delay, 12, lambda _row, _heard: Greedy(0))
    with pytest.raises(ModelError, match="do not fit into a slot"):
        stages_.step(pcm, delay, 12, lambda _row, _heard: Greedy(0))
    assert stages_.state.llm.length.tolist()[:2] == [1 + 4 * n_fit, 1]


def test_a_long_pick_needs_no_graph(model):
    """As long as a prefix: eagerly, and the slots' lengths are looked up again."""
    stages_ = TorchStages(model, 2, fake_capture)
    passes = stages_._graphs.passes
    stages_.begin({0: [1], 1: [1]})
    n = cuda_graphs.MOST_GRAPHED_ROWS + 1
    passes.read([0], [[5] * n])
    passes.read([0, 1], [[5], [5]])
    assert passes._lengths == [n + 2, 2, 0]
    assert stages_.state.llm.length.tolist()[:2] == [n + 2, 2]


@pytest.mark.gpu
def test_an_engine_on_a_gpu_replays_and_says_what_eager_steps_say(monkeypatch):
    """Two streams after each other on one row, so that graphs of the first serve the second."""
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    model = models.load("random:tiny", device="cuda", dtype="float32")
    noise = 0.1 * np.random.default_rng(0).standard_normal(48_000).astype(np.float32)
    options = StreamOptions(vad=VadConfig(kind="off"))
    said = []
    for capture in (CudaCapture(), None):
        monkeypatch.setattr(
            type(model), "make_stages", lambda m, n, c=capture: TorchStages(m, n, c)
        )
        with Engine(model, EngineConfig(n_slots=1, compute="cuda")) as engine:
            said.append([text_of(engine.transcribe(x, options)) for x in (noise, 2 * noise)])
    assert said[0] == said[1]
    assert all(said[0])


@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(2))
def test_captured_steps_equal_eager_ones_on_a_gpu(monkeypatch, seed):
    """The story above on the real thing: resets and segment begins between replays."""
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    model = models.load("random:tiny", device="cuda", dtype="float32")
    graphed, eager = TorchStages(model, N_ROWS, CudaCapture()), TorchStages(model, N_ROWS)
    story = Story(model, seed)
    for step in story.steps(14):
        got, tokens = story.tell(graphed, step)
        expected, same = story.tell(eager, step)
        assert tokens == same
        for row, log_probs in got.items():
            np.testing.assert_allclose(log_probs, expected[row], atol=1e-3, rtol=1e-3)
        spoil(graphed)
