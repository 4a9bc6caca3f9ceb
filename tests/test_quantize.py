"""quantize.py: joined matrices change nothing, int8 changes little, rows stay independent."""

from __future__ import annotations

import copy

import pytest
import torch

from sparqle_stream import artifacts, quantize
from sparqle_stream import llm as llm_stage
from sparqle_stream.config import LlmConfig
from sparqle_stream.errors import ConfigError, ModelError
from sparqle_stream.llm import Llm
from sparqle_stream.models import load_llm
from sparqle_stream.quantize import FEW_ROWS, Int8Linear
from sparqle_stream.writer import Greedy

CFG = LlmConfig(
    width=64, n_layers=3, n_heads=4, n_kv_heads=2, head_width=16, ffn=128, vocab=90, n_slot=48
)


def make_llm():
    torch.manual_seed(2)
    model = Llm(CFG).requires_grad_(False)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.normal_(std=parameter.shape[1] ** -0.5)
    model.stop.weight.mul_(6.0)
    return model


def read(model, embeds):
    """Logits of every row, decoded one by one in a slot."""
    dtype = model.norm.weight.dtype
    state = llm_stage.init_state(model.cfg, 1, dtype=dtype)
    out = []
    for row in embeds:
        state = llm_stage.append(model, state, row[None, None].to(dtype), torch.tensor([True]))
        out.append(model.logits(state.hidden)[0].float())
    return torch.stack(out)


@pytest.fixture
def embeds():
    return torch.randn(20, CFG.width, generator=torch.Generator().manual_seed(0))


def test_joined_matrices_change_nothing(embeds):
    expected = read(make_llm(), embeds)
    joined = quantize.prepare(make_llm(), "float32")
    assert joined.layers[0].attn.qkv_proj is not None
    assert not hasattr(joined.layers[0].attn, "q_proj")
    torch.testing.assert_close(read(joined, embeds), expected, atol=1e-5, rtol=1e-5)
    whole = joined.logits(joined.forward_train(embeds[None]))[0]
    torch.testing.assert_close(whole, expected, atol=1e-5, rtol=1e-5)


# bf16 has 8 bits: relative errors of 2^-9 a matrix, over three layers
@pytest.mark.parametrize(("dtype", "cosine"), [("bfloat16", 0.9995), ("int8", 0.999)])
def test_low_precision_stays_close(embeds, dtype, cosine):
    expected = read(make_llm(), embeds)
    model = quantize.prepare(make_llm(), dtype)
    assert model.norm.weight.dtype == torch.bfloat16
    got = read(model, embeds)
    assert float(torch.cosine_similarity(got, expected, dim=-1).mean()) > cosine
    assert not torch.equal(got, expected)


def test_int8_is_int8():
    model = quantize.prepare(make_llm(), "int8")
    linears = [m for m in model.modules() if isinstance(m, Int8Linear)]
    assert len(linears) == 4 * CFG.n_layers + 1
    assert {m.few.dtype for m in linears} == {torch.int8}
    left = {n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    assert left == {"stop"}


@pytest.mark.parametrize("n_rows", [1, 3, FEW_ROWS, FEW_ROWS + 1, 40])
def test_an_int8_matrix_multiplies(n_rows):
    """Both forms hold the same numbers: the error is that of rounding, whatever the row count."""
    gen = torch.Generator().manual_seed(n_rows)
    weight = torch.randn(48, 64, generator=gen) * torch.logspace(-4, 1, 48)[:, None]
    weight[7] = 0.0
    x = torch.randn(2, n_rows, 64, generator=gen).bfloat16()[0]
    linear = Int8Linear(weight)
    got = linear(x).float()
    stored = linear.few.float() * linear.scale.float()[:, None]
    # half a step of the scale; bf16 output
    assert bool(((stored - weight).abs() <= 0.505 * linear.scale.float()[:, None]).all())
    if n_rows <= FEW_ROWS:
        assert linear.many is None  # a single stream never pays for it
    exact = x.float() @ stored.T
    bound = x.float().abs() @ stored.abs().T * 2**-8 + 1e-6
    assert bool(((got - exact).abs() <= bound).all())
    assert torch.equal(got[:, 7], torch.zeros(n_rows))


def test_a_row_does_not_see_its_neighbours():
    """Activations are not quantised: a loud neighbour moves no bit of a quiet row."""
    gen = torch.Generator().manual_seed(3)
    linear = Int8Linear(torch.randn(48, 64, generator=gen))
    x = torch.randn(4, 64, generator=gen).bfloat16()
    loud = x.clone()
    loud[1:] *= 1000.0
    assert torch.equal(linear(x)[0], linear(loud)[0])


def test_without_bf16_instructions_one_form_serves_all(monkeypatch):
    monkeypatch.setattr(quantize, "has_fast_bf16", lambda: False)
    weight = torch.randn(48, 64, generator=torch.Generator().manual_seed(4))
    linear = Int8Linear(weight)
    x = torch.randn(40, 64, generator=torch.Generator().manual_seed(5)).bfloat16()
    expected = x.float() @ weight.T
    assert float(torch.cosine_similarity(linear(x).float(), expected, dim=-1).min()) > 0.9995
    assert linear.many is None


@pytest.mark.parametrize("n_slots", [1, 3, 12])
def test_int8_decodes_the_same_with_neighbours(n_slots):
    """12 slots take the form for many rows, one slot that for few: same tokens."""
    model = quantize.prepare(make_llm(), "int8")
    queries = torch.randn(12, 4, CFG.width, generator=torch.Generator().manual_seed(6)).bfloat16()
    alone = llm_stage.init_state(CFG, 1, dtype=torch.bfloat16)
    _, expected = llm_stage.step(model, alone, queries[:1], torch.tensor([True]), [Greedy(4)])
    state = llm_stage.init_state(CFG, n_slots, dtype=torch.bfloat16)
    everyone = torch.ones(n_slots, dtype=torch.bool)
    _, tokens = llm_stage.step(
        model, state, queries[:n_slots], everyone, [Greedy(4) for _ in range(n_slots)]
    )
    assert tokens[0] == expected[0]


def test_an_own_head_is_quantised_too(embeds):
    model = make_llm()
    model.head = torch.nn.Linear(CFG.width, CFG.vocab, bias=False).requires_grad_(False)
    expected = read(copy.deepcopy(model), embeds)
    got = read(quantize.prepare(model, "int8"), embeds)
    assert float(torch.cosine_similarity(got, expected, dim=-1).mean()) > 0.999


@pytest.mark.parametrize(
    ("dtype", "device", "hint"),
    [("float16", "cpu", "int8"), ("int8", "cuda", "bfloat16")],
)
def test_what_cannot_be_computed_is_refused(dtype, device, hint):
    with pytest.raises(ConfigError) as caught:
        quantize.resolve(dtype, device)
    assert hint in caught.value.hint


@pytest.mark.slow
def test_int8_keeps_the_default_llm():
    """Loss and direction of the logits over a text that it was not fitted to."""
    try:
        artifacts.path(artifacts.DEFAULT_LLM)
    except ModelError as err:
        pytest.skip(f"the LLM is not here: {err}")
    text = (
        "\nThe weather in Paris is nice and we walked along the river until the sun went down"
        " behind the old houses. Then he said that nobody would ever believe what had happened."
    )
    read_by = {}
    for dtype in ("float32", "int8"):
        llm, tokenizer = load_llm()
        ids = torch.tensor([tokenizer.bos_id, *tokenizer.encode(text)])
        llm = quantize.prepare(llm, dtype)
        with torch.inference_mode():
            read_by[dtype] = llm.logits(llm.forward_train(llm.embed(ids)[None]))[0].float()
    loss = {
        dtype: float(torch.nn.functional.cross_entropy(logits[:-1], ids[1:]))
        for dtype, logits in read_by.items()
    }
    cosine = torch.cosine_similarity(read_by["int8"], read_by["float32"], dim=-1)
    assert float(cosine.mean()) > 0.9985
    assert abs(loss["int8"] - loss["float32"]) < 0.05


def test_auto_is_resolved_by_device():
    assert quantize.resolve("auto", "cpu") == "int8"
    assert quantize.resolve("auto", "cuda") == "bfloat16"
    assert quantize.resolve("float32", "cuda") == "float32"
