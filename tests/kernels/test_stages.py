"""The stages of the engine over the kernels: the same numbers as over the references."""

from __future__ import annotations

import copy

import pytest
import torch

from sparqle_kernels import choice
from sparqle_kernels.choice import Choice
from sparqle_kernels.launch import Launch
from sparqle_stream import encoder, features, llm, qformer, testing

BATCH, CHUNK, AHEAD = 3, 16, 6
# Rows of each chunk: streams start, pause and go on; the third is reset before the last chunk.
ACTIVE = [(True, False, True), (True, True, True), (False, True, True)]


@pytest.fixture
def ran(monkeypatch) -> set[str]:
    """Names of the kernels that ran."""
    names: set[str] = set()
    run = Launch.run

    def noted(launch):
        names.add(launch.kernel.__name__)
        run(launch)

    monkeypatch.setattr(Launch, "run", noted)
    return names


def hear_and_read(model, device):
    """Three chunks of noise through all stages: everything they return and keep."""
    gen = torch.Generator().manual_seed(0)
    stages = [copy.deepcopy(x).to(device) for x in (model.encoder, model.qformer, model.llm)]
    modules = (encoder, qformer, llm)
    features_cfg = model.cfg.features
    sound = features.init_state(features_cfg, BATCH, device=device)
    configs = (model.cfg.encoder, model.cfg.qformer, model.cfg.llm)
    states = [m.init_state(c, BATCH, device=device) for m, c in zip(modules, configs, strict=True)]
    delay = torch.full((BATCH,), 240, device=device)
    outputs = []
    for number, rows in enumerate(ACTIVE):
        active = torch.tensor(rows, device=device)
        if number == 2:
            third = torch.tensor([False, False, True], device=device)
            for module, state in zip(modules, states, strict=True):
                module.reset_rows(state, third)
        pcm = 0.3 * torch.randn(BATCH, 320 * CHUNK, generator=gen)
        sound, mel = features.step(features_cfg, sound, pcm.to(device), active)
        heard = torch.randn(BATCH, CHUNK // 2, model.cfg.ctc.n_pieces, generator=gen)
        states[0], frames = encoder.step(stages[0], states[0], mel, active, AHEAD)
        log_probs = heard.log_softmax(dim=-1).to(device)
        states[1], queries = qformer.step(stages[1], states[1], frames, log_probs, delay, active)
        states[2] = llm.append(stages[2], states[2], queries, active)
        outputs += [mel, frames, queries, states[2].hidden.clone(), states[2].stop.clone()]
    kept = [states[0].k, states[0].v, states[1].k, states[1].v, states[2].k, states[2].v]
    return [x.cpu() for x in (*outputs, *kept)]


def test_stages_over_kernels_equal_stages_over_references(place, ran, monkeypatch):
    """In float32, rows that pause and restart included; and it is the kernels that ran."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # of the stem's convolutions
    model = testing.tiny_model(n_layers=1)
    with torch.inference_mode():
        expected = hear_and_read(model, "cpu")
        assert not ran
        monkeypatch.setattr(choice, "on_device", lambda op, kind: Choice("triton", "this test"))
        got = hear_and_read(model, place.device)
    assert ran == {
        "log_mel_fwd",
        "chunk_attention_fwd",
        "add_layer_norm_fwd",
        "query_attention_fwd",
        "frame_attention_fwd",
        "rms_norm_rope_append_fwd",
        "stop_head_fwd",
        "decode_attention_split",
        "decode_attention_merge",
    }
    for ours, reference in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, reference, atol=1e-4, rtol=1e-4)
