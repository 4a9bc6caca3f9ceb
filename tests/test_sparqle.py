"""sparqle.py: a synthetic checkpoint of exactly SparQLe's shape; the arithmetic of BLIP-2."""

from __future__ import annotations

import argparse

import pytest
import torch
from torch.nn import functional as F

from sparqle_stream import sparqle
from sparqle_stream.errors import ModelError
from sparqle_stream.sparqle import SparqleBridge, SparqleShape

SHAPE = SparqleShape(
    n_queries=7, width=128, n_layers=4, ffn=96, encoder_width=24, llm_width=40, asking_layers=(0, 2)
)
LAYER = "Qformer.bert.encoder.layer"


def add_linear(state, name, n_in, n_out):
    state[f"{name}.weight"] = 0.1 * torch.randn(n_out, n_in)
    state[f"{name}.bias"] = 0.1 * torch.randn(n_out)


def add_norm(state, name, width):
    state[f"{name}.weight"] = 1.0 + 0.1 * torch.randn(width)
    state[f"{name}.bias"] = 0.1 * torch.randn(width)


def checkpoint(shape=SHAPE, projector="llm_proj"):
    """Every name that models of this family store, written out here and not asked of our code."""
    torch.manual_seed(0)
    d, e = shape.width, shape.encoder_width
    state = {"query_tokens": torch.randn(1, shape.n_queries, d)}
    add_norm(state, "Qformer.bert.embeddings.LayerNorm", d)
    for i in range(shape.n_layers):
        at = f"{LAYER}.{i}"
        for kind, source in (("attention", d), ("crossattention", e)):
            if kind == "crossattention" and i % 2:
                continue
            for name, n_in in (("query", d), ("key", source), ("value", source)):
                add_linear(state, f"{at}.{kind}.self.{name}", n_in, d)
            add_linear(state, f"{at}.{kind}.output.dense", d, d)
            add_norm(state, f"{at}.{kind}.output.LayerNorm", d)
        add_linear(state, f"{at}.intermediate_query.dense", d, shape.ffn)
        add_linear(state, f"{at}.output_query.dense", shape.ffn, d)
        add_norm(state, f"{at}.output_query.LayerNorm", d)
    add_norm(state, "ln_speech", e)
    add_linear(state, projector, d, shape.llm_width)
    return state


def with_training(state):
    """What stage 1 and the frozen parts leave in a file besides."""
    more = dict(state)
    add_linear(more, "speech_proj", 128, 16)
    add_linear(more, "text_proj", 128, 16)
    add_linear(more, "itm_head", 128, 2)
    more["temp"] = torch.tensor(0.07)
    more["Qformer.bert.embeddings.word_embeddings.weight"] = torch.zeros(9, 128)
    more["Qformer.bert.embeddings.position_embeddings.weight"] = torch.zeros(9, 128)
    more["Qformer.bert.embeddings.position_ids"] = torch.arange(9)
    add_linear(more, "Qformer.cls.predictions.transform.dense", 128, 128)
    add_linear(more, f"{LAYER}.0.intermediate.dense", 128, 96)
    add_linear(more, f"{LAYER}.0.output.dense", 96, 128)
    add_norm(more, f"{LAYER}.0.output.LayerNorm", 128)
    more["speech_encoder.encoder.layers.0.fc1.weight"] = torch.zeros(3, 3)
    more["llm_model.model.norm.weight"] = torch.zeros(3)
    return more


def linear(state, name, x):
    return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])


def norm(state, name, x, eps=1e-12):
    weight = state[f"{name}.weight"]
    return F.layer_norm(x, weight.shape, weight, state[f"{name}.bias"], eps)


def attention(state, at, x, source):
    """Head by head, for one row."""
    q = linear(state, f"{at}.self.query", x)
    k, v = (linear(state, f"{at}.self.{name}", source) for name in ("key", "value"))
    heads = []
    for i in range(0, q.shape[-1], 64):
        part = slice(i, i + 64)
        scores = q[0, :, part] @ k[0, :, part].T / 8.0
        heads.append(scores.softmax(dim=-1) @ v[0, :, part])
    mixed = linear(state, f"{at}.output.dense", torch.cat(heads, dim=-1)[None])
    return norm(state, f"{at}.output.LayerNorm", mixed + x)


def plain(state, frames):
    """BERT with queries, by its formulas; frames (1, T, E)."""
    x = norm(state, "Qformer.bert.embeddings.LayerNorm", state["query_tokens"])
    frames = norm(state, "ln_speech", frames, 1e-5)
    for i in range(SHAPE.n_layers):
        at = f"{LAYER}.{i}"
        x = attention(state, f"{at}.attention", x, x)
        if i % 2 == 0:
            x = attention(state, f"{at}.crossattention", x, frames)
        inner = F.gelu(linear(state, f"{at}.intermediate_query.dense", x))
        x = x + linear(state, f"{at}.output_query.dense", inner)
        x = norm(state, f"{at}.output_query.LayerNorm", x)
    return linear(state, "llm_proj", x)


def save(path, held):
    torch.save(held, path)
    return path


@pytest.mark.parametrize("holder", ["model", "state_dict", ""])
@pytest.mark.parametrize("projector", ["llm_proj", "llama_proj"])
def test_a_checkpoint_is_found_whatever_it_is_wrapped_in(tmp_path, holder, projector):
    state = {f"module.{k}": v for k, v in with_training(checkpoint(projector=projector)).items()}
    held = {holder: state, "args": argparse.Namespace(lr=1), "epoch": 3} if holder else state
    bridge, report = sparqle.load(save(tmp_path / "SparQLe_best.pt", held))
    assert bridge.shape == SHAPE
    assert report.used == len(bridge.state_dict()) == len(checkpoint())
    assert torch.equal(bridge.query_tokens.data, checkpoint()["query_tokens"])
    told = report.lines()
    assert told[0] == f"{report.used} tensors used"
    assert "not used, not known: llm_model.* (1)" in told
    assert "not used, not known: speech_encoder.* (1)" in told
    assert "not used, of training: itm_head.* (2)" in told
    assert any("intermediate|output" in line and "(6)" in line for line in told)
    assert not any(line.startswith(("missing", "wrong")) for line in told)


def test_the_arithmetic_is_that_of_bert(tmp_path):
    state = checkpoint()
    bridge, _ = sparqle.load(save(tmp_path / "a.pt", {"model": state}))
    frames = torch.randn(1, 11, 24)
    expected = plain(state, frames)
    assert expected.shape == (1, 7, 40)
    torch.testing.assert_close(bridge(frames), expected, atol=1e-5, rtol=1e-5)
    padded = torch.cat([frames, torch.full((1, 5, 24), 9.0)], dim=1)
    again = bridge(padded, torch.tensor([11]))
    torch.testing.assert_close(again, expected, atol=1e-5, rtol=1e-5)


def test_halved_weights_become_whole(tmp_path):
    state = {k: v.half() for k, v in checkpoint().items()}
    bridge, _ = sparqle.load(save(tmp_path / "a.pt", state))
    assert {p.dtype for p in bridge.parameters()} == {torch.float32}


def test_names_that_do_not_match_are_told(tmp_path):
    state = checkpoint()
    del state[f"{LAYER}.3.output_query.dense.bias"]
    state["ln_speech.weight"] = torch.zeros(25)
    with pytest.raises(ModelError) as err:
        sparqle.load(save(tmp_path / "a.pt", {"model": state}))
    assert f"missing: {LAYER}.3.output_query.dense.bias" in err.value.message
    assert "wrong shape: ln_speech.weight (25,) instead of (24,)" in err.value.message


@pytest.mark.parametrize("gone", ["query_tokens", "llm_proj.bias"])
def test_another_file_is_no_checkpoint(tmp_path, gone):
    state = checkpoint()
    del state[gone]
    with pytest.raises(ModelError, match=f"no SparQLe checkpoint: it has no {gone}"):
        sparqle.load(save(tmp_path / "a.pt", state))
    save(tmp_path / "b.pt", [1, 2])
    with pytest.raises(ModelError, match="holds no table"):
        sparqle.load(tmp_path / "b.pt")
    (tmp_path / "c.pt").write_bytes(b"nothing")
    with pytest.raises(ModelError, match="cannot read"):
        sparqle.load(tmp_path / "c.pt")


class Evil:
    def __reduce__(self):
        return (print, ("this ran",))


def test_nothing_in_a_file_is_run(tmp_path, capsys):
    path = save(tmp_path / "a.pt", {"model": checkpoint(), "cfg": Evil()})
    with pytest.raises(ModelError, match="cannot read") as err:
        sparqle.load(path)
    assert "store its 'model' entry alone" in err.value.hint
    assert "this ran" not in capsys.readouterr().out


def test_queries_may_be_as_many_as_they_are():
    for n in (32, 100):
        shape = SparqleShape(n, 128, 2, 96, 24, 40, (0,))
        assert SparqleBridge(shape)(torch.randn(2, 5, 24)).shape == (2, n, 40)
