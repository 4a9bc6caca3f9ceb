"""encoder.py: Whisper's encoder, chunk by chunk, with rings that remember and never leak."""

from __future__ import annotations

import copy
from dataclasses import fields

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from sparqle_stream import encoder as stage
from sparqle_stream.config import SILENT_MEL, EncoderConfig
from sparqle_stream.encoder import Encoder

CFG = EncoderConfig(n_mels=8, width=16, n_heads=2, n_layers=2, n_positions=20, left_frames=12)
TOLERANCE = {"atol": 1e-5, "rtol": 0}
ONE = torch.tensor([True])


def make_encoder(cfg=CFG, seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = Encoder(cfg).requires_grad_(False)
        for parameter in encoder.parameters():  # large enough that attention is not flat
            if parameter.ndim > 1:
                parameter.normal_(std=1.2 * parameter[0].numel() ** -0.5)
            else:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return encoder


@pytest.fixture(scope="module")
def encoder():
    return make_encoder()


def mel_of(n_frames, seed=0, batch=1):
    """Mel (B, 2 T, M) of `n_frames` encoder frames."""
    gen = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 2 * n_frames, CFG.n_mels, generator=gen)


def run(encoder, mel, chunks, state=None, ahead=0):
    """mel (1, 2 T, M) in chunks of so many frames -> frames (1, T', D) and the state."""
    state = state or stage.init_state(encoder.cfg, 1)
    at, parts = 0, []
    for n_frames in chunks:
        piece = mel[:, 2 * at : 2 * (at + n_frames)]
        state, frames = stage.step(encoder, state, piece, ONE, ahead)
        parts.append(frames)
        at += n_frames
    return torch.cat(parts, dim=1), state


# --- training and serving ------------------------------------------------------------------------


@pytest.mark.parametrize("ahead", [0, 1, 6, 16])
@pytest.mark.parametrize("offset", [0, 17, 1499])
@pytest.mark.parametrize(
    ("chunk", "left"),
    [(4, 12), (4, 8), (8, 12), (12, 12), (16, 12), (16, 4), (1, 3), (2, 5), (64, 12)],
)
def test_the_training_path_equals_steps(chunk, left, offset, ahead):
    """64 frames: rings and the table of 20 positions wrap several times, chunks exceed the ring."""
    cfg = EncoderConfig(8, 16, 2, 2, CFG.n_positions, left)
    encoder, mel = make_encoder(cfg), mel_of(64)
    whole = encoder.forward_train(mel, chunk, left, torch.tensor([offset]), ahead)
    state = stage.init_state(cfg, 1)
    state.position += offset
    chunks = [min(chunk, 64 - at) for at in range(0, 64, chunk)]
    steps, _ = run(encoder, mel, chunks, state, ahead)
    torch.testing.assert_close(steps, whole, **TOLERANCE)


@pytest.mark.parametrize("ahead", [0, 5])
def test_the_last_chunk_may_be_short(encoder, ahead):
    mel = mel_of(19)
    whole = encoder.forward_train(mel, 8, CFG.left_frames, torch.tensor([0]), ahead)
    torch.testing.assert_close(run(encoder, mel, [8, 8, 3], ahead=ahead)[0], whole, **TOLERANCE)


@pytest.mark.parametrize("ahead", [0, 5])
def test_full_context_equals_one_step(encoder, ahead):
    """Chunk 0 means no mask in training; a file heard in one step is the same."""
    mel = mel_of(40)
    whole = encoder.forward_train(mel, 0, 0, torch.tensor([0]), ahead)
    torch.testing.assert_close(run(encoder, mel, [40], ahead=ahead)[0], whole, **TOLERANCE)


def test_look_ahead_is_a_lag_that_sees_more(encoder):
    """Frame p is of the audio of p - 6; it knows 6 frames past its chunk, to the last of them."""
    mel = mel_of(24)
    frames = run(encoder, mel, [4] * 6, ahead=6)[0]
    for first_changed, is_same in ((12, True), (11, False)):  # chunk 3 ends where frame 12 begins
        changed = mel.clone()
        changed[:, 2 * first_changed :] += 1.0
        again = run(encoder, changed, [4] * 6, ahead=6)[0]
        assert torch.equal(frames[:, :12], again[:, :12]) == is_same
    silent = torch.full_like(mel[:, :12], SILENT_MEL)
    late = torch.cat([silent, mel], dim=1)  # chunks of a stream without look-ahead, 6 frames late
    whole = run(encoder, late, [30])[0][:, :24]
    torch.testing.assert_close(run(encoder, mel, [24], ahead=6)[0], whole, **TOLERANCE)


@pytest.mark.usefixtures("poisoned")
def test_what_lay_ahead_is_not_kept(encoder):
    """Rings hold the frames that came out and nothing of those that were only looked at."""
    _, state = run(encoder, mel_of(12), [4] * 3, ahead=8)
    assert sorted(state.ring_position[0].tolist()) == list(range(12))
    assert state.position.item() == 12


@settings(max_examples=25, deadline=None)
@given(chunks=st.lists(st.integers(1, 20), min_size=1, max_size=8))
def test_the_chunk_may_change_in_mid_stream(chunks):
    """Every mix of chunk sizes equals one pass under a mask written out frame by frame."""
    encoder, n_frames = make_encoder(), sum(chunks)
    mel = mel_of(n_frames, seed=3)
    mask, at = torch.zeros(n_frames, n_frames, dtype=torch.bool), 0
    for size in chunks:
        mask[at : at + size, max(0, at - CFG.left_frames) : at + size] = True
        at += size
    x = encoder.stem(F.pad(mel, (0, 0, 3, 0), value=SILENT_MEL), torch.tensor([0]))
    for block in encoder.layers():
        x = block.merge(x, F.scaled_dot_product_attention(*block.qkv(x), attn_mask=mask))
    torch.testing.assert_close(run(encoder, mel, chunks)[0], encoder.ln_post(x), **TOLERANCE)


@pytest.mark.parametrize("n_frames", [9, 1030])
def test_both_ways_of_masked_attention_agree(n_frames):
    """Matrix products up to 1024 frames, the fused kernel from there on."""
    gen = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 2, 2, n_frames, 4, generator=gen)
    _, mask = stage.windows(n_frames, 4, 8, 0, q.device)
    for seen in (mask, None):
        out = stage.masked_attention(q, k, v, seen)
        expected = F.scaled_dot_product_attention(
            q.double(), k.double(), v.double(), attn_mask=seen
        )
        torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=0)


def test_gradients_respect_the_mask():
    """What training learns from a frame comes from the frames that it may see, and from those."""
    cfg = EncoderConfig(8, 16, 2, 1, CFG.n_positions, 4)
    mel = mel_of(24).requires_grad_()
    frames = make_encoder(cfg).forward_train(mel, 4, 4, torch.tensor([0]))
    frames[0, 12:16].square().sum().backward()  # chunk 3: sees frames 8..15
    touched = mel.grad[0].abs().sum(dim=1) > 0
    first, last = 2 * 8 - 3, 2 * 15 + 1  # the stem of frame p reads mel 2 p - 3 .. 2 p + 1
    expected = torch.zeros(48, dtype=torch.bool)
    expected[first : last + 1] = True
    assert torch.equal(touched, expected)


# --- Whisper -------------------------------------------------------------------------------------

WHISPER_NAMES = {
    "self_attn.q_proj": "query",
    "self_attn.k_proj": "key",
    "self_attn.v_proj": "value",
    "self_attn.out_proj": "out",
    "self_attn_layer_norm": "attn_ln",
    "final_layer_norm": "mlp_ln",
    "fc1": "fc1",
    "fc2": "fc2",
}


@pytest.fixture(scope="module")
def whisper():
    """A random Whisper encoder of transformers and ours with the same weights."""
    from transformers import WhisperConfig
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    config = WhisperConfig(
        num_mel_bins=CFG.n_mels,
        d_model=CFG.width,
        encoder_attention_heads=CFG.n_heads,
        encoder_layers=CFG.n_layers,
        encoder_ffn_dim=4 * CFG.width,
        max_source_positions=CFG.n_positions,
    )
    ours = make_encoder(seed=5)
    theirs = WhisperEncoder(config).eval().requires_grad_(False)
    own = ours.state_dict()
    state = {"embed_positions.weight": ours.positions, "layer_norm.weight": own["ln_post.weight"]}
    state["layer_norm.bias"] = own["ln_post.bias"]
    for name in theirs.state_dict():
        if name.startswith("conv"):
            state[name] = own[name]
        elif name.startswith("layers."):
            _, i, part = name.split(".", 2)
            module, kind = part.rsplit(".", 1)
            state[name] = own[f"blocks.{i}.{WHISPER_NAMES[module]}.{kind}"]
    assert {id(value) for value in own.values()} <= {id(value) for value in state.values()}
    positions = theirs.state_dict()["embed_positions.weight"].clone()
    theirs.load_state_dict(state)
    return theirs, ours, positions


def test_the_positions_are_whispers(whisper):
    """Theirs are made by transformers before any weight of ours is loaded."""
    torch.testing.assert_close(whisper[1].positions, whisper[2], atol=1e-6, rtol=0)


def test_a_step_equals_transformers_whisper(whisper):
    """One chunk of a whole file, every frame of it.

    Whisper pads each convolution with zeros. The mel on both sides is zero here; so that the first
    convolution gives zero before the file too, its bias is zero and so is the first mel frame.
    Our frame p is Whisper's p - 1: when Whisper's first is due, three mel frames are in the tail.
    """
    theirs, ours, _ = whisper
    mel = mel_of(CFG.n_positions, seed=6)
    mel[:, 0] = 0.0
    theirs, ours = copy.deepcopy((theirs, ours))
    for encoder in (theirs, ours):
        encoder.conv1.bias.zero_()
    expected = theirs(mel.transpose(1, 2)).last_hidden_state
    state = stage.init_state(CFG, 1)
    state.mel_tail[:] = 0.0  # Whisper's mel frames -2, -1 and 0
    later = F.pad(mel[:, 1:], (0, 0, 0, 1))
    _, frames = stage.step(ours, state, later, ONE)
    torch.testing.assert_close(frames, expected, **TOLERANCE)


def test_the_stem_equals_transformers_whisper(whisper):
    """With its biases: everywhere but at the first frame, before which ours hears silence."""
    theirs, ours, _ = whisper
    mel = mel_of(CFG.n_positions, seed=7)
    stems = []
    hook = theirs.layers[0].register_forward_pre_hook(lambda _, args: stems.append(args[0]))
    expected = theirs(mel.transpose(1, 2)).last_hidden_state
    hook.remove()
    # Frame p of ours is frame p - 1 of theirs and has its position.
    heard = F.pad(mel, (0, 0, 4, 0), value=SILENT_MEL)[:, : 2 * CFG.n_positions + 3]
    stem = ours.stem(heard, torch.tensor([CFG.n_positions - 1]))
    torch.testing.assert_close(stem[:, 2:], stems[0][:, 1:-1], **TOLERANCE)

    x = stems[0]
    for block in ours.layers():
        x = block.merge(x, stage.masked_attention(*block.qkv(x), None))
    torch.testing.assert_close(ours.ln_post(x), expected, **TOLERANCE)


# --- the state -----------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(chunks=st.lists(st.integers(1, 30), min_size=2, max_size=10))
def test_what_the_ring_holds_never_changes(chunks):
    """A key is written once; its bytes go when the ring comes round to it and not before."""
    encoder, left = make_encoder(), CFG.left_frames
    mel, state, at = mel_of(sum(chunks), seed=1), stage.init_state(CFG, 1), 0
    written = {}
    for size in chunks:
        state, _ = stage.step(encoder, state, mel[:, 2 * at : 2 * (at + size)], ONE)
        at += size
        held = sorted(p for p in state.ring_position[0].tolist() if p >= 0)
        assert held == list(range(max(0, at - left), at))
        for position in held:
            slot = position % left
            assert state.ring_position[0, slot] == position
            now = torch.stack([state.k[:, 0, :, slot], state.v[:, 0, :, slot]])
            assert torch.equal(written.setdefault(position, now.clone()), now)
    assert state.position.item() == at


def test_half_an_hour_leaves_the_state_as_large_as_it_was(encoder):
    """90 000 frames, in long steps: positions go on, memory stays where it is."""
    state = stage.init_state(CFG, 1)
    places = [getattr(state, f.name).data_ptr() for f in fields(state)]
    n_bytes = sum(getattr(state, f.name).nbytes for f in fields(state))
    mel = mel_of(250)
    for _ in range(360):
        state, frames = stage.step(encoder, state, mel, ONE)
    assert frames.isfinite().all()
    assert state.position.item() == 90_000
    assert [getattr(state, f.name).data_ptr() for f in fields(state)] == places
    assert sum(getattr(state, f.name).nbytes for f in fields(state)) == n_bytes


def test_a_stream_outlives_the_table_of_positions(encoder):
    """Whole tables and whole rings apart, two places are the same to the encoder, bit for bit."""
    mel, outputs = mel_of(24, seed=2), []
    turns = CFG.n_positions * CFG.left_frames
    for start in (0, turns, 10**9 * turns):
        state = stage.init_state(CFG, 1)
        state.position += start
        outputs.append(run(encoder, mel, [4] * 6, state)[0])
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])


def test_a_chunk_knows_nothing_of_the_next(encoder):
    mel = mel_of(24)
    changed = mel.clone()
    changed[:, 2 * 12 :] += 1.0
    before, after = run(encoder, mel, [4] * 6)[0], run(encoder, changed, [4] * 6)[0]
    assert torch.equal(before[:, :12], after[:, :12])
    assert not torch.equal(before[:, 12], after[:, 12])


def test_a_frame_sees_all_of_its_chunk(encoder):
    mel = mel_of(8)
    changed = mel.clone()
    changed[:, -1] += 1.0
    before, after = run(encoder, mel, [4, 4])[0], run(encoder, changed, [4, 4])[0]
    assert (before[:, 4] - after[:, 4]).abs().max() > 1e-4


def poison(state, rows=slice(None)):
    """NaN wherever nothing was written; positions say where that is."""
    unwritten = state.ring_position[rows] < 0
    for ring in (state.k, state.v):
        ring[:, rows] = ring[:, rows].masked_fill(unwritten[None, :, None, :, None], torch.nan)


@pytest.mark.parametrize("chunks", [[4] * 8, [1, 2, 3, 30, 1], [13, 13]])
def test_memory_that_was_never_written_does_not_leak(encoder, chunks):
    mel = mel_of(sum(chunks))
    state = stage.init_state(CFG, 1)
    poison(state)
    assert state.k.isnan().all()
    frames, state = run(encoder, mel, chunks, state)
    assert torch.equal(frames, run(encoder, mel, chunks)[0])
    assert not state.k.isnan().any()  # every chunk list fills the ring


def test_a_slot_recovers_from_a_stream_of_nan(encoder):
    """One stream of NaN samples ruined its slot for all that came after it: 0 * NaN is NaN."""
    state = stage.init_state(CFG, 1)
    _, state = run(encoder, torch.full((1, 48, CFG.n_mels), torch.nan), [8] * 3, state)
    assert state.v.isnan().any()
    stage.reset_rows(state, ONE)
    mel = mel_of(16)
    assert torch.equal(run(encoder, mel, [4] * 4, state)[0], run(encoder, mel, [4] * 4)[0])


@pytest.mark.usefixtures("poisoned")
def test_no_output_is_left_unwritten(encoder):
    frames, state = run(encoder, mel_of(16), [4] * 4)
    assert frames.isfinite().all()
    assert state.k[:, :, :, :12].isfinite().all()


@pytest.mark.parametrize("seed", range(3))
def test_a_row_is_alone(encoder, seed):
    """Four streams start, pause, reset at random; each gets what it gets alone.

    Rows that wait hold NaN, keep every field bit for bit and give zeros.
    """
    rng = np.random.default_rng(seed)
    batch = 4
    together = stage.init_state(CFG, batch)
    alone = [stage.init_state(CFG, 1) for _ in range(batch)]
    names = [f.name for f in fields(together)]
    for turn in range(25):
        size = int(rng.choice([1, 4, 4, 8, 16]))
        active = torch.from_numpy(rng.random(batch) < 0.6)
        if rng.random() < 0.25:
            mask = torch.from_numpy(rng.random(batch) < 0.4)
            stage.reset_rows(together, mask)
            for i in mask.nonzero()[:, 0].tolist():
                alone[i] = stage.init_state(CFG, 1)
        mel = mel_of(size, seed=100 * seed + turn, batch=batch)
        mel[~active] = torch.nan
        held = {name: rows_of(together, name).clone() for name in names}
        together, frames = stage.step(encoder, together, mel, active)
        for i in range(batch):
            if not active[i]:
                assert not frames[i].any()
                assert all(torch.equal(rows_of(together, n)[i], held[n][i]) for n in names)
                continue
            alone[i], expected = stage.step(encoder, alone[i], mel[i : i + 1], ONE)
            torch.testing.assert_close(frames[i], expected[0], **TOLERANCE)
            assert torch.equal(together.ring_position[i], alone[i].ring_position[0])
            assert torch.equal(together.position[i], alone[i].position[0])


def rows_of(state, name):
    """A field of the state with its batch axis first."""
    value = getattr(state, name)
    return value.transpose(0, 1) if name in ("k", "v") else value


def test_a_reset_row_is_a_new_stream(encoder):
    mel = mel_of(20, seed=8)
    _, state = run(encoder, mel_of(30), [5] * 6)
    stage.reset_rows(state, ONE)
    assert torch.equal(run(encoder, mel, [4] * 5, state)[0], run(encoder, mel, [4] * 5)[0])


def test_nobody_active_and_nothing_to_hear(encoder):
    state = stage.init_state(CFG, 2)
    nobody = torch.zeros(2, dtype=torch.bool)
    state, frames = stage.step(encoder, state, mel_of(4, batch=2), nobody)
    assert frames.shape == (2, 4, CFG.width)
    assert not frames.any()
    state, frames = stage.step(encoder, state, mel_of(0, batch=2), ~nobody)
    assert frames.shape == (2, 0, CFG.width)
    assert not state.position.any()


def test_bfloat16_stays_near_float32(encoder):
    """Rings take the weights' type; frames leave in the type of the mel."""
    low = make_encoder().bfloat16()
    state = stage.init_state(CFG, 1, dtype=torch.bfloat16)
    frames, state = run(low, mel_of(32), [4] * 8, state)
    assert (frames.dtype, state.k.dtype) == (torch.float32, torch.bfloat16)
    error = (frames - run(encoder, mel_of(32), [4] * 8)[0]).square().mean().sqrt()
    assert error < 0.05
