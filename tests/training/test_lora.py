"""lora.py: adapters that begin as nothing and can be merged into the weights."""

from __future__ import annotations

import pytest
import torch

from sparqle_stream.config import LlmConfig
from sparqle_stream.llm import Llm
from training.lora import TARGETS, adapter_weights, attach, lent

CFG = LlmConfig(
    width=16, n_layers=2, n_heads=4, n_kv_heads=2, head_width=4, ffn=24, vocab=30, n_slot=32
)
RANK, SCALE = 3, 2.0


@pytest.fixture
def llm():
    torch.manual_seed(0)
    return Llm(CFG).requires_grad_(False)


def embeds():
    return torch.randn(2, 7, CFG.width, generator=torch.Generator().manual_seed(1))


def test_a_new_adapter_changes_nothing(llm):
    before = llm.forward_train(embeds())
    adapters = attach(llm, RANK, SCALE)
    assert len(adapters) == CFG.n_layers * len(TARGETS)
    assert torch.equal(llm.forward_train(embeds()), before)


def test_only_the_adapters_learn(llm):
    frozen = {name: p.clone() for name, p in llm.named_parameters()}
    adapters = attach(llm, RANK, SCALE)
    trained = [p for p in llm.parameters() if p.requires_grad]
    assert len(trained) == 2 * len(adapters)
    optimizer = torch.optim.SGD(trained, lr=0.1)
    for _ in range(2):  # B is zero at first, so A learns from the second step on
        optimizer.zero_grad()
        llm.forward_train(embeds()).square().sum().backward()
        optimizer.step()
    assert all(a.a.grad.any() and a.b.grad.any() for a in adapters.values())
    for name, p in llm.named_parameters():
        if not p.requires_grad:
            assert torch.equal(p, frozen[name.replace(".base.", ".")])


def test_merging_equals_the_adapter(llm):
    """W + scale * B A, with the names under which the weights are stored."""
    torch.manual_seed(2)
    merged = Llm(CFG).requires_grad_(False)
    merged.load_state_dict(llm.state_dict())
    adapters = attach(llm, RANK, SCALE)
    for adapter in adapters.values():
        adapter.b.data.normal_(std=0.2)
    stored = adapter_weights(adapters)
    assert set(stored) == {
        f"lora.layers.{i}.{part}.{name}.{ab}"
        for i in range(CFG.n_layers)
        for part, names in (("attn", TARGETS[:4]), ("mlp", TARGETS[4:]))
        for name in names
        for ab in "ab"
    }
    for name, weight in merged.state_dict().items():
        key = f"lora.{name.removesuffix('.weight')}"
        if f"{key}.a" in stored:
            weight += SCALE * stored[f"{key}.b"] @ stored[f"{key}.a"]
    expected = merged.forward_train(embeds())
    torch.testing.assert_close(llm.forward_train(embeds()), expected, atol=1e-5, rtol=0)


def test_lent_weights_go_back(llm):
    adapters = attach(llm, RANK, SCALE)
    before, own = llm.forward_train(embeds()), adapter_weights(adapters)
    others = {name: weight + 0.1 for name, weight in own.items()}

    def interrupted():
        with lent(adapters, others):
            assert not torch.equal(llm.forward_train(embeds()), before)
            raise KeyError

    with pytest.raises(KeyError):
        interrupted()
    assert torch.equal(llm.forward_train(embeds()), before)
