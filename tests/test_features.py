"""features.py: Whisper's log-mel, cut anywhere, with a gain that knows the past only."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparqle_stream import features
from sparqle_stream.config import SAMPLE_RATE_HZ, SILENT_MEL, FeatureConfig
from sparqle_stream.errors import AudioFormatError

CFG = FeatureConfig()
NO_GAIN = FeatureConfig(gain_max=0.0)
HOP = CFG.hop_samples
# No clamp at all (the spectrum's own floor is -10): differences between outputs are gains.
BARE = {"max_log10": -2.0}
WIDE = FeatureConfig(gain_max=9.0)
STATE_FIELDS = ("tail", "peak")


def voice(seconds, seed=0, level=0.3):
    """Something like speech (1, S): a gliding buzz with pauses and a breath of noise."""
    rng = np.random.default_rng(seed)
    t = np.arange(round(seconds * SAMPLE_RATE_HZ)) / SAMPLE_RATE_HZ
    pitch = np.cumsum(120 + 40 * np.sin(2 * np.pi * 0.7 * t)) / SAMPLE_RATE_HZ
    buzz = sum(np.sin(2 * np.pi * k * pitch) / k for k in range(1, 25))
    talking = np.sin(2 * np.pi * 1.3 * t) > -0.4
    pcm = level * (buzz * talking / 3 + 1e-3 * rng.standard_normal(len(t)))
    pcm = pcm[: len(pcm) // HOP * HOP]
    return torch.from_numpy(pcm.astype(np.float32))[None]


def run(pcm, cfg=CFG, cuts=()):
    """pcm (1, S) cut at `cuts` (in hops) -> mel (1, S / 160, 80), state at the end."""
    state = features.init_state(cfg, 1)
    edges = [0, *sorted(cuts), pcm.shape[1] // HOP]
    parts = []
    for low, high in zip(edges, edges[1:], strict=False):
        state, mel = features.step(cfg, state, pcm[:, low * HOP : high * HOP], torch.tensor([True]))
        parts.append(mel)
    return torch.cat(parts, dim=1), state


def whispers(pcm):
    """Whisper's own features (F, 80) by transformers, clamped to the utterance's maximum - 8."""
    from transformers import WhisperFeatureExtractor

    extractor = WhisperFeatureExtractor()
    out = extractor(
        pcm[0].numpy(),
        sampling_rate=SAMPLE_RATE_HZ,
        padding="longest",
        truncation=False,
        return_tensors="np",
    )
    return torch.from_numpy(out["input_features"][0].T.copy())


def assert_whispers(pcm):
    """Frame i is Whisper's frame i - 1 -> the share of values that had to be equal."""
    theirs = whispers(pcm)
    ours, _ = run(pcm, NO_GAIN)
    assert ours.shape[1:] == theirs.shape  # as many frames as Whisper has
    low = max(theirs.max().item() - 2.0, SILENT_MEL)
    ours, theirs = ours[0, 3:].clamp(min=low), theirs[2:-1].clamp(min=low)
    torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=0)
    return (theirs > low).float().mean().item()


@pytest.mark.parametrize("level", [0.9, 0.2, 0.03])
def test_equals_whisper_over_a_file(level):
    """Frame i is Whisper's frame i - 1; the first three look at what lies before the file.

    Whisper clamps at its maximum over the file - 8, we at a constant: above both the two agree.
    """
    compared = assert_whispers(voice(4.0, seed=1, level=level))
    assert compared > 0.4


def test_equals_whisper_on_real_speech(clip):
    pcm = torch.from_numpy(clip[: len(clip) // HOP * HOP].copy())[None]
    assert assert_whispers(pcm) > 0.4


@settings(max_examples=30, deadline=None)
@given(cuts=st.lists(st.integers(0, 150), max_size=12), seed=st.integers(0, 3))
def test_any_cut_equals_one_call(cuts, seed):
    """Empty steps, steps of one hop and steps shorter than a window included."""
    pcm = voice(1.5, seed, level=0.02)
    whole, whole_state = run(pcm)
    cut, cut_state = run(pcm, cuts=cuts)
    torch.testing.assert_close(cut, whole, atol=1e-5, rtol=0)
    assert torch.equal(cut_state.tail, whole_state.tail)
    torch.testing.assert_close(cut_state.peak, whole_state.peak, atol=1e-5, rtol=0)


@pytest.mark.parametrize("at", [1, 77, 160])
def test_no_frame_knows_the_future(at):
    """Frame i ends at sample 160 i + 40: change all after it and it stays, before it and not."""
    pcm = voice(2.0, level=0.01)
    changed = pcm.clone()
    changed[:, at * HOP :] = voice(2.0, seed=9, level=0.9)[:, at * HOP :]
    before, after = run(pcm)[0], run(changed)[0]
    assert torch.equal(before[:, :at], after[:, :at])
    assert not torch.equal(before[:, at], after[:, at])


def gains(pcm, cfg=CFG):
    """The gain of every frame (F,) in log10 units."""
    shape = {"gain_target": cfg.gain_target, "gain_decay_per_s": cfg.gain_decay_per_s}
    with_gain, _ = run(pcm, FeatureConfig(gain_max=cfg.gain_max, **shape, **BARE))
    without, _ = run(pcm, FeatureConfig(gain_max=0.0, **shape, **BARE))
    difference = (with_gain - without)[0] * 4.0
    assert difference.std(dim=1).max() < 1e-5  # one gain for all bands
    return difference[:, 0]


def peaks(pcm):
    """Loudest band of every frame (F,), log10."""
    bare, _ = run(pcm, FeatureConfig(gain_max=0.0, **BARE))
    return (bare[0] * 4.0 - 4.0).amax(dim=1)


def test_the_gain_follows_its_definition():
    """Frame by frame: the peak rises at once, falls 2 dB a second, and the gain is bounded."""
    pcm = torch.cat([voice(6, 1, 0.001), voice(3, 2, 0.05), voice(6, 3, 0.0003)], dim=1)
    loud, got = peaks(pcm), gains(pcm)
    peak, expected = features.FIRST_PEAK, []
    for level in loud.tolist():
        peak = max(level, peak - CFG.gain_decay_per_s * HOP / SAMPLE_RATE_HZ)
        peak = max(peak, CFG.gain_target - CFG.gain_max)
        expected.append(max(0.0, CFG.gain_target - peak))
    torch.testing.assert_close(got, torch.tensor(expected), atol=1e-4, rtol=0)


def test_quiet_speech_is_lifted_and_loud_speech_is_not():
    quiet = voice(12.0, level=0.1)
    lifted = gains(quiet)
    assumed = CFG.gain_target - features.FIRST_PEAK  # nothing is known yet
    assert lifted[0] == pytest.approx(assumed, abs=0.01)
    assert lifted[-1] > 1.0
    assert (peaks(quiet)[-200:] + lifted[-200:]).max() == pytest.approx(CFG.gain_target, abs=0.3)
    assert gains(voice(12.0, level=0.9))[2:].max() < 0.01  # known after 20 ms


def test_the_gain_is_bounded():
    """Near silence is not blown up without end, however long it lasts."""
    faint = 1e-5 * torch.randn(1, 30 * SAMPLE_RATE_HZ, generator=torch.Generator().manual_seed(0))
    assert gains(faint).max().item() == pytest.approx(CFG.gain_max, abs=1e-5)


def test_digital_silence_is_one_value():
    """What the encoder pads with is what this stage makes of zeros, at every gain."""
    mel, state = run(torch.zeros(1, 20 * SAMPLE_RATE_HZ))
    assert torch.equal(mel, torch.full_like(mel, SILENT_MEL))
    assert math.isfinite(state.peak.item())


def test_extremes_stay_finite():
    clipped = torch.ones(1, SAMPLE_RATE_HZ)
    clipped[:, ::2] = -1.0
    for pcm in (clipped, clipped * 1e-30, torch.full_like(clipped, 1.0)):
        mel, _ = run(pcm)
        assert mel.isfinite().all()
        assert mel.min() >= SILENT_MEL


def test_rows_do_not_touch_each_other():
    """Three streams that come and go at random get what each gets alone, in batches of any mask."""
    rng = np.random.default_rng(4)
    batch, n = 3, 8
    streams = [voice(1.0, seed, level) for seed, level in ((1, 0.5), (2, 0.001), (3, 0.03))]
    together = features.init_state(CFG, batch)
    alone = [features.init_state(CFG, 1) for _ in range(batch)]
    at = [0] * batch
    for _ in range(30):
        active = torch.from_numpy(rng.random(batch) < 0.6)
        if rng.random() < 0.2:
            mask = torch.from_numpy(rng.random(batch) < 0.5)
            wipe = features.forget_rows if rng.random() < 0.5 else features.reset_rows
            wipe(together, mask)
            for i in mask.nonzero()[:, 0].tolist():
                wipe(alone[i], torch.tensor([True]))
        pcm = torch.full((batch, n * HOP), float("nan"))  # rows that wait hold garbage
        for i in active.nonzero()[:, 0].tolist():
            pcm[i] = streams[i].roll(-at[i] * HOP, 1)[0, : n * HOP]
            at[i] += n
        held = {name: getattr(together, name).clone() for name in STATE_FIELDS}
        together, mel = features.step(CFG, together, pcm, active)
        for i in range(batch):
            if active[i]:
                alone[i], expected = features.step(CFG, alone[i], pcm[i : i + 1], active[i : i + 1])
                torch.testing.assert_close(mel[i], expected[0], atol=1e-5, rtol=0)
            else:
                assert not mel[i].any()
                for name, value in held.items():
                    assert torch.equal(getattr(together, name)[i], value[i])


def test_a_new_segment_keeps_the_gain_and_a_new_stream_does_not():
    _, state = run(voice(8.0, level=0.001))
    learned = state.peak.clone()
    assert learned < features.FIRST_PEAK - 1.0
    features.reset_rows(state, torch.tensor([True]))
    assert torch.equal(state.peak, learned)
    assert not state.tail.any()
    features.forget_rows(state, torch.tensor([True]))
    assert state.peak.item() == features.FIRST_PEAK


@pytest.mark.parametrize("scale", [1.0, 0.03, 0.003])
def test_a_segment_begins_with_the_gain_that_its_lead_needs(scale):
    """Speech 30 or 50 dB lower is heard as if it was not, from the first frame on."""
    pcm = scale * voice(4.0, level=0.1)
    state = features.init_state(WIDE, 3)
    state.peak[:] = torch.tensor([0.7, -0.3, 0.2])  # learned of others
    state.tail[:] = 1.0
    features.reset_rows(state, torch.tensor([False, True, False]))
    features.begin_row(WIDE, state, 1, pcm[0, : SAMPLE_RATE_HZ // 2 + 7])
    loudest = peaks(pcm)[:50].max().item()
    assert state.peak.tolist() == pytest.approx([0.7, loudest + WIDE.lead_rise, 0.2], abs=1e-4)
    assert [row.any().item() for row in state.tail] == [True, False, True]
    _, mel = features.step(WIDE, state, pcm.expand(3, -1), torch.tensor([False, True, False]))
    heard = (mel[1] * 4.0 - 4.0).amax(dim=1)
    assert heard.max().item() == pytest.approx(WIDE.gain_target, abs=WIDE.lead_rise)


@pytest.mark.parametrize("n_samples", [0, 1, HOP - 1])
def test_a_lead_without_a_frame_says_nothing(n_samples):
    """As without a detector, which knows of a segment before there is anything to hear."""
    _, state = run(voice(2.0))
    learned = state.peak.clone()
    features.reset_rows(state, torch.tensor([True]))
    features.begin_row(CFG, state, 0, torch.ones(n_samples))
    assert torch.equal(state.peak, learned)
    assert not state.tail.any()


def test_ten_minutes_leave_the_state_as_large_as_it_was():
    state = features.init_state(CFG, 1)
    places = [getattr(state, name).data_ptr() for name in STATE_FIELDS]
    pcm = voice(20.0)
    for _ in range(30):
        state, mel = features.step(CFG, state, pcm, torch.tensor([True]))
    assert mel.isfinite().all()
    assert state.tail.shape == (1, 360)
    assert [getattr(state, name).data_ptr() for name in STATE_FIELDS] == places


def test_a_step_takes_whole_hops():
    state = features.init_state(CFG, 1)
    with pytest.raises(AudioFormatError, match="multiple of 160 samples, got 161"):
        features.step(CFG, state, torch.zeros(1, 161), torch.tensor([True]))
    state, mel = features.step(CFG, state, torch.zeros(1, 0), torch.tensor([True]))
    assert mel.shape == (1, 0, 80)
