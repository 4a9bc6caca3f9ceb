"""bridge.py: going on from a bridge, whatever is updated in the LLM, and what comes out."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from sparqle_stream.errors import ConfigError, ModelError
from sparqle_stream.weights import merge_lora, part
from training.bridge import Bridge, JointConfig, own_weights
from training.export import compact
from training.lora import LORA_SCALE


@pytest.fixture
def cfg(files, tiny_llm):
    return JointConfig(files.ear, files.pieces, "tiny", (), rank=4, n_layers=1)


@pytest.fixture
def trained(cfg, tmp_path):
    """A bridge as a model folder has it: halved, every weight moved."""
    bridge = Bridge(cfg)
    gen = torch.Generator().manual_seed(3)
    weights = {
        k: v + 0.1 * torch.randn(v.shape, generator=gen) for k, v in bridge.trained().items()
    }
    save_file(compact(weights), tmp_path / "bridge.safetensors")
    return tmp_path / "bridge.safetensors"


def hidden(bridge):
    ids = torch.arange(12).view(1, 12)
    with torch.no_grad():
        return bridge.llm.forward_train(bridge.llm.embed(ids)).float()


def test_a_bridge_goes_on_from_what_a_model_folder_has(cfg, trained):
    bridge = Bridge(replace(cfg, init=str(trained)))
    stored, ours = load_file(trained), bridge.trained()
    assert ours.keys() == stored.keys()
    for name, value in ours.items():
        torch.testing.assert_close(value, stored[name].float(), atol=0, rtol=0)
        assert value.dtype == torch.float32
    assert not torch.equal(hidden(bridge), hidden(Bridge(cfg)))


def test_what_is_frozen_is_in_bf16_only_where_that_is_fast(cfg):
    for bf16, dtype in ((False, torch.float32), (True, torch.bfloat16)):
        bridge = Bridge(cfg, bf16=bf16)
        kept = [*bridge.encoder.parameters(), *bridge.llm.parameters()]
        assert {p.dtype for p in kept if not p.requires_grad} == {dtype}
        assert {p.dtype for p in bridge.parameters() if p.requires_grad} == {torch.float32}


def test_adapters_melt_into_an_llm_that_is_updated_as_a_whole(cfg, trained, tmp_path, tiny_llm):
    """The same function at first; every weight of it learns; it is stored, and gone on with."""
    whole = Bridge(replace(cfg, init=str(trained), update="full"))
    lora = Bridge(replace(cfg, init=str(trained)))
    torch.testing.assert_close(hidden(whole), hidden(lora), atol=1e-4, rtol=1e-4)
    base = tiny_llm("", torch.float32)[0]
    state = {k: v.float() for k, v in own_weights(base).items()}
    merge_lora(state, part(load_file(trained), "lora"), LORA_SCALE)
    for name, value in own_weights(whole.llm).items():
        torch.testing.assert_close(value, state[name], atol=1e-6, rtol=0)
    out = whole.trained()
    assert not [name for name in out if name.startswith("lora.")]
    assert part(out, "llm").keys() == state.keys()
    groups = whole.groups(1e-3, 2e-5)
    assert groups[-1]["peak"] == 2e-5
    assert len(groups[-1]["params"]) == len(list(whole.llm.parameters())) - 2  # but the stop head
    save_file({k: v.contiguous() for k, v in out.items()}, tmp_path / "full.safetensors")
    again = Bridge(replace(cfg, init=str(tmp_path / "full.safetensors"), update="full"))
    torch.testing.assert_close(hidden(again), hidden(whole), atol=1e-6, rtol=0)
    again.load_trained({k: v + 1.0 for k, v in out.items()})
    torch.testing.assert_close(again.llm.norm.weight, whole.llm.norm.weight + 1.0)
    with pytest.raises(ConfigError, match="updated as a whole"):
        Bridge(replace(cfg, init=str(tmp_path / "full.safetensors")))


def test_frozen_adapters_stay_and_are_written_out_again(cfg, trained):
    bridge = Bridge(replace(cfg, init=str(trained), update="frozen"))
    learning = {id(p) for group in bridge.groups(1e-3, 1e-5) for p in group["params"]}
    assert bridge.adapters
    assert not learning & {id(a.a) for a in bridge.adapters.values()}
    assert [name for name in bridge.trained() if name.startswith("lora.")]
    assert not Bridge(replace(cfg, update="frozen")).adapters


def test_what_does_not_fit_is_told(cfg, trained, tmp_path):
    with pytest.raises(ConfigError, match="rank 4, the config of 8"):
        Bridge(replace(cfg, init=str(trained), rank=8))
    odd = load_file(trained)
    odd["qformer.extra"] = torch.zeros(2)
    save_file(odd, tmp_path / "odd.safetensors")
    with pytest.raises(ModelError, match=r"unexpected: extra"):
        Bridge(replace(cfg, init=str(tmp_path / "odd.safetensors")))


def test_queries_without_posteriors_hear_none(cfg):
    bridge = Bridge(replace(cfg, posteriors=False))
    assert not bridge.qformer.posterior.pieces.any()
    learning = {id(p) for group in bridge.groups(1e-3, 1e-5) for p in group["params"]}
    assert id(bridge.qformer.posterior.pieces) not in learning
    frames = torch.randn(1, 8, 64)
    some = torch.randn(2, 4, bridge.pieces.size).log_softmax(-1)
    asked = [bridge.qformer.forward_train(frames, x[None], 8, torch.zeros(1).long()) for x in some]
    assert torch.equal(*asked)


def test_the_first_stage_gives_the_q_former_alone(cfg, trained, tmp_path):
    """Its questions and layers; what speaks to the LLM begins as ever."""
    parts = ("qformer.queries", "qformer.layers.", "qformer.out_norm.")
    only = {k: v for k, v in load_file(trained).items() if k.startswith(parts)}
    save_file(only, tmp_path / "stage1.safetensors")
    bridge = Bridge(replace(cfg, init=str(tmp_path / "stage1.safetensors")))
    assert torch.equal(bridge.qformer.queries.data, only["qformer.queries"].float())
    assert not bridge.stop.weight.any()
    assert torch.equal(bridge.qformer.posterior.pieces.data, bridge.piece_embeddings())
