"""VAD: segments are exact pieces of the audio, whatever the packets, and speech is inside them."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparqle_stream import audio, vad
from sparqle_stream.config import VadConfig
from sparqle_stream.errors import AudioFormatError, ConfigError, ModelError
from sparqle_stream.vad import SegmentPause, SegmentStart, SegmentStop
from tests.vads import CFG, FRAME, by_peak, figures, frames, heard, run, segments_of, talk

REPO = Path(__file__).resolve().parent.parent


def pauses_of(events: list) -> list[tuple[bool, int]]:
    return [(e.is_on, e.known_at) for e in events if isinstance(e, SegmentPause)]


# Any cut


@settings(max_examples=150, deadline=None)
@given(
    peaks=st.lists(st.sampled_from([0.0, 0.4, 0.9]), max_size=30),
    extra=st.integers(0, FRAME - 1),
    cuts=st.lists(st.tuples(st.integers(0, 31 * FRAME), st.booleans()), max_size=12),
    preroll_ms=st.sampled_from([0, 10, 80, 500]),
    min_speech_ms=st.sampled_from([0, 32, 96]),
)
def test_any_cut_equals_one_call_with_flushes(peaks, extra, cuts, preroll_ms, min_speech_ms):
    """Same segments, same samples, same state; flushes at the same samples in both."""
    detector = by_peak(replace(CFG, preroll_ms=preroll_ms, min_speech_ms=min_speech_ms))
    pcm = np.concatenate([frames(*peaks), np.full(extra, 0.9, np.float32)]) if peaks else frames(0)
    cuts = sorted((at, flush) for at, flush in dict(cuts).items() if at <= len(pcm))
    flush_at = [at for at, flush in cuts if flush]
    cut_state, cut = run(
        detector,
        np.split(pcm, [at for at, _ in cuts]),
        {i for i, (_, flush) in enumerate(cuts) if flush},
    )
    few_state, few = run(detector, np.split(pcm, flush_at), set(range(len(flush_at))))
    assert segments_of(pcm, cut) == segments_of(pcm, few)
    assert pauses_of(cut) == pauses_of(few)
    assert figures(cut_state) == figures(few_state)
    np.testing.assert_array_equal(cut_state.recent, few_state.recent)


@settings(max_examples=150, deadline=None)
@given(
    peaks=st.lists(st.sampled_from([0.0, 0.4, 0.9]), min_size=1, max_size=30),
    cuts=st.lists(st.integers(1, 3 * FRAME), max_size=12),
    stop_ms=st.sampled_from([32, 64, 100]),
    min_speech_ms=st.sampled_from([0, 32, 96]),
)
def test_nothing_begins_or_ends_before_patience_is_over(peaks, cuts, stop_ms, min_speech_ms):
    """And with the last sample of it something does, if only one kind of frames comes."""
    detector = by_peak(replace(CFG, stop_ms=stop_ms, pause_ms=20, min_speech_ms=min_speech_ms))
    state, pcm = vad.init_state(detector), frames(*peaks)
    for packet in np.split(pcm, np.cumsum(cuts)):
        n_waits = vad.patience(detector, state)
        assert n_waits > 0
        due, was_speech = state.n_in + n_waits, state.is_speech
        state, events = vad.step(detector, state, packet)
        known = [e.known_at for e in events if isinstance(e, SegmentStart | SegmentStop)]
        assert all(at >= due for at in known)
        assert known or state.is_speech == was_speech
    n_waits = vad.patience(detector, state)
    rest = np.full(n_waits, 0.0 if state.is_speech else 0.9, np.float32)
    state, early = vad.step(detector, state, rest[:-1])
    state, late = vad.step(detector, state, rest[-1:])
    assert not any(isinstance(e, SegmentStart | SegmentStop) for e in early)
    assert any(isinstance(e, SegmentStart | SegmentStop) for e in late)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("kind", ["silero", "webrtc", "off"])
def test_any_cut_equals_one_call_for_each_detector(kind, seed):
    """Silero's thresholds are set so low that these vowels switch it on and off often."""
    cfg = VadConfig(kind=kind, threshold=0.12, threshold_off=0.08, stop_ms=64, pause_ms=32)
    detector = vad.load_detector(cfg)
    pcm = talk(seed)
    rng = np.random.default_rng(seed)
    cuts = np.sort(rng.integers(0, len(pcm) + 1, size=int(rng.integers(1, 300))))
    cut_state, cut = run(detector, np.split(pcm, cuts))
    whole_state, whole = run(detector, [pcm])
    found = segments_of(pcm, whole)
    assert segments_of(pcm, cut) == found
    assert pauses_of(cut) == pauses_of(whole)
    assert figures(cut_state) == figures(whole_state)
    assert len(found) == 1 if kind == "off" else len(found) >= 1


@pytest.mark.parametrize("size", [1, 7, 160, 4_096])
def test_packets_of_one_size_equal_one_call(size):
    cfg = VadConfig(threshold=0.12, threshold_off=0.08, stop_ms=64)
    detector = vad.load_detector(cfg)
    pcm = talk(1)[:40_000]
    packets = [pcm[at : at + size] for at in range(0, len(pcm), size)]
    assert segments_of(pcm, run(detector, packets)[1]) == segments_of(pcm, run(detector, [pcm])[1])


def test_streams_that_share_a_detector_do_not_hear_each_other():
    """One Silero session, three streams in turns: each gives what it gives alone."""
    for kind in ("silero", "webrtc"):
        cfg = VadConfig(kind=kind, threshold=0.12, threshold_off=0.08, stop_ms=64)
        detector = vad.load_detector(cfg)
        pcms = [talk(seed)[:48_000] for seed in (3, 4, 5)]
        states = [vad.init_state(detector) for _ in pcms]
        events = [[] for _ in pcms]
        for at in range(0, 48_000, 1_600):
            for i, pcm in enumerate(pcms):
                states[i], new = vad.step(detector, states[i], pcm[at : at + 1_600])
                events[i] += new
        for pcm, state, found in zip(pcms, states, events, strict=True):
            found += vad.finish(detector, state)
            assert segments_of(pcm, found) == segments_of(pcm, run(detector, [pcm])[1])


@pytest.mark.parametrize("kind", ["silero", "webrtc", "off"])
@given(st.integers(0, 999), st.lists(st.integers(0, 3_000), min_size=1, max_size=6))
@settings(max_examples=12, deadline=None)
def test_frames_that_were_foreseen_together_are_judged_as_they_are_alone(kind, seed, sizes):
    """Packets of any size, taken in two parts; one stream is flushed between, one not foreseen."""
    detector = vad.load_detector(VadConfig(kind=kind, threshold=0.12, threshold_off=0.08))
    pcms = [talk(seed + i)[:24_000] for i in range(4)]
    states, events = [vad.init_state(detector) for _ in pcms], [[] for _ in pcms]
    taken: list[list[np.ndarray]] = [[] for _ in pcms]
    for turn in range(40):
        for i, pcm in enumerate(pcms):
            at = sum(map(len, taken[i]))
            packet = pcm[at : at + sizes[(turn + i) % len(sizes)]]
            taken[i] += np.array_split(packet, 2)
        vad.foresee([(detector, states[i], np.concatenate(taken[i][-2:])) for i in range(3)])
        for i, parts in enumerate(taken):
            for n, part in enumerate(parts[-2:], len(parts) - 2):
                states[i], new = vad.step(detector, states[i], part)
                events[i] += new
                if (i, n) == (1, 14):
                    events[i] += vad.flush(detector, states[i])[1]
    for i, parts in enumerate(taken):
        alone, expected = run(detector, parts, {14} if i == 1 else set())
        events[i] += vad.finish(detector, states[i])
        pcm = np.concatenate(parts)
        assert segments_of(pcm, events[i]) == segments_of(pcm, expected)
        assert figures(states[i]) == figures(alone)


def test_a_stream_of_no_numbers_fails_alone():
    detector = vad.load_detector(VadConfig())
    good, bad = vad.init_state(detector), vad.init_state(detector)
    pcm = talk(5)[:4_000]
    broken = pcm.copy()
    broken[1_500] = np.nan
    vad.foresee([(detector, good, pcm), (detector, bad, broken)])
    assert len(bad.foreseen) == 2  # before the frame that holds it
    with pytest.raises(AudioFormatError):
        vad.step(detector, bad, broken)
    alone = vad.step(detector, vad.init_state(detector), pcm)[0]
    assert figures(vad.step(detector, good, pcm)[0]) == figures(alone)


# Where segments begin and end


def test_a_segment_begins_before_its_voice_and_ends_after_the_hang_over():
    pcm = frames(0, 0, 0, 0, 1, 1, 1, 1, 0, 0, 0, 0)
    (segment,) = segments_of(pcm, run(by_peak(), [pcm])[1])
    # Voice from frame 4, pre-roll 1 280 samples, known after frame 6; silence in frames 8 and 9.
    assert segment == (4 * FRAME - 1_280, 7 * FRAME, 10 * FRAME, 10 * FRAME)


def test_the_pre_roll_ends_at_the_start_of_the_stream_and_at_the_stop_before():
    pcm = frames(0, 1, 1, 1, 0, 0, 0, 1, 1, 1, 0, 0)
    assert heard(by_peak(), pcm) == [(0, 6 * FRAME), (6 * FRAME, 12 * FRAME)]


def test_voice_shorter_than_min_speech_is_no_speech():
    assert heard(by_peak(), frames(0, 1, 1, 0, 1, 1, 0, 1, 0, 0)) == []


def test_a_pause_shorter_than_the_hang_over_does_not_end_a_segment():
    pcm = frames(1, 1, 1, 0, 1, 0, 1, 0, 0)
    assert heard(by_peak(), pcm) == [(0, 9 * FRAME)]


def test_a_pause_is_told_once_and_so_is_its_end():
    """One of a frame, one of two, and the one that ends the segment; none before it."""
    detector = by_peak(replace(CFG, stop_ms=96))
    pcm = frames(0, 0, 1, 1, 1, 0, 1, 0, 0, 1, 0, 0, 0)
    events = run(detector, [pcm])[1]
    told = [(True, 6), (False, 7), (True, 8), (False, 10), (True, 11)]
    assert pauses_of(events) == [(is_on, n * FRAME) for is_on, n in told]
    assert [e.n_quiet for e in events if isinstance(e, SegmentStop)] == [3 * FRAME]


def test_a_flush_ends_a_pause_with_its_segment():
    detector = by_peak(replace(CFG, stop_ms=5_000))
    packets = np.split(frames(1, 1, 1, 0, 0, 0, 1, 1, 1, 0), [4 * FRAME])
    events = run(detector, packets, flush_after={0})[1]
    assert pauses_of(events) == [(True, 4 * FRAME), (True, 10 * FRAME)]
    assert [e.n_quiet for e in events if isinstance(e, SegmentStop)] == [0, 0]


def test_hysteresis_between_the_thresholds_a_frame_is_what_the_one_before_was():
    """0.4 lies between 0.35 (off) and 0.5 (on): it opens nothing, and it closes nothing."""
    assert heard(by_peak(), frames(0.4, 0.4, 0.4, 0.4, 0.4)) == []
    pcm = frames(1, 1, 1, 0.4, 0.4, 0.4, 0.4, 0, 0, 0.4, 0.4)
    assert heard(by_peak(), pcm) == [(0, 9 * FRAME)]
    assert heard(by_peak(), frames(1, 0.4, 0.4, 0, 0)) == [(0, 5 * FRAME)]


def test_in_a_segment_samples_leave_as_they_come():
    """Also those whose frame is not complete: a chunk must not wait for the detector."""
    detector = by_peak()
    state, events = vad.step(detector, vad.init_state(detector), frames(1, 1, 1))
    assert state.is_speech
    state, events = vad.step(detector, state, frames(1)[:100])
    assert [len(event.pcm) for event in events] == [100]
    state, events = vad.step(detector, state, frames(1)[100:101])
    assert [len(event.pcm) for event in events] == [1]


def test_flush_ends_the_segment_and_voice_that_goes_on_loses_no_sample():
    """The flush falls inside a frame; voice must last min_speech again before it counts."""
    pcm = frames(*[1] * 10)
    packets = np.split(pcm, [5 * FRAME + 100])
    _, events = run(by_peak(), packets, flush_after={0})
    flushed = 5 * FRAME + 100
    assert segments_of(pcm, events) == [
        (0, 3 * FRAME, flushed, flushed),
        (flushed, 8 * FRAME, 10 * FRAME, 10 * FRAME),
    ]


def test_flush_without_voice_does_nothing():
    detector = by_peak()
    state, events = vad.step(detector, vad.init_state(detector), frames(0, 0, 0)[:-10])
    assert events == []
    assert vad.flush(detector, state)[1] == []


def test_a_word_cut_off_by_the_end_is_not_lost():
    """One voiced frame is not yet speech, but after the end there is nothing left to wait for."""
    pcm = np.concatenate([frames(0, 0, 0, 0, 1), frames(1)[:100]])
    (segment,) = segments_of(pcm, run(by_peak(), [pcm])[1])
    assert segment == (4 * FRAME - 1_280, len(pcm), len(pcm), len(pcm))


def test_off_is_one_segment_from_the_first_sample_to_the_last():
    detector = vad.load_detector(VadConfig(kind="off"))
    for n_samples in (1, 511, 20_000):
        pcm = np.random.default_rng(n_samples).uniform(-1, 1, n_samples).astype(np.float32)
        assert segments_of(pcm, run(detector, [pcm])[1]) == [(0, 1, n_samples, n_samples)]
    packets = np.split(pcm, [10_000])
    _, events = run(detector, packets, flush_after={0})
    assert [one[::2] for one in segments_of(pcm, events)] == [(0, 10_000), (10_000, 20_000)]
    assert run(detector, [])[1] == []


# Silence, figures, bounds


@pytest.mark.parametrize("kind", ["silero", "webrtc"])
@pytest.mark.parametrize("noise", [0, 1e-4, 3e-3])
def test_silence_and_steady_noise_give_no_events(kind, noise):
    """Digital silence, -80 dB and -50 dB of white noise, a faint hum with it."""
    rng = np.random.default_rng(0)
    pcm = noise * (
        rng.standard_normal(20 * 16_000) + np.sin(2 * np.pi * 50 / 16_000 * np.arange(320_000))
    )
    detector = vad.load_detector(VadConfig(kind=kind))
    state, events = run(detector, [pcm.astype(np.float32)])
    assert events == []
    assert not state.is_speech


def test_the_level_is_that_of_the_last_frame():
    detector = vad.load_detector(VadConfig(kind="off"))
    tone = 0.5 * np.sin(2 * np.pi * 1_000 / 16_000 * np.arange(FRAME)).astype(np.float32)
    state, _ = vad.step(detector, vad.init_state(detector), np.zeros(FRAME, np.float32))
    assert state.level_db == vad.FLOOR_DB
    state, _ = vad.step(detector, state, tone)
    assert state.level_db == pytest.approx(20 * np.log10(0.5 / np.sqrt(2)), abs=1e-3)


@pytest.mark.parametrize("peak", [0.0, 0.9])
def test_ten_minutes_keep_no_more_than_one_second(peak):
    """Idle: pre-roll and a frame. In a segment: less than a frame. The bytes stop growing."""
    detector = by_peak(VadConfig(preroll_ms=240))
    state, packet = vad.init_state(detector), np.full(700, peak, np.float32)
    most_bytes = []
    for _ in range(10 * 60 * 16_000 // 700):
        state, _ = vad.step(detector, state, packet)
        most_bytes.append(state.recent.nbytes)
        assert state.recent.base is None, "a view would keep the whole packet in memory"
    assert max(most_bytes) == max(most_bytes[:100])
    assert max(most_bytes) <= 4 * (240 * 16 + 3 * FRAME + FRAME)


# What cannot be used


@pytest.mark.parametrize("bad", [np.nan, -np.inf, 1e30, 20_000])
def test_samples_that_are_not_numbers_are_an_error_and_not_silence_for_ever(bad):
    detector = vad.load_detector(VadConfig())
    pcm = np.zeros(FRAME, np.float32)
    pcm[7] = bad
    with pytest.raises(AudioFormatError, match="not numbers"):
        vad.step(detector, vad.init_state(detector), pcm)


def test_two_channels_are_refused():
    detector = by_peak()
    with pytest.raises(AudioFormatError, match=r"got \(100, 2\)"):
        vad.step(detector, vad.init_state(detector), np.zeros((100, 2), np.float32))


@pytest.mark.parametrize(
    "change",
    [
        {"threshold": 0.3, "threshold_off": 0.4},
        {"threshold": 1.5},
        {"threshold_off": 0.0},
        {"preroll_ms": -1},
        {"min_speech_ms": -1},
        {"webrtc_mode": 4},
    ],
)
def test_settings_that_cannot_work_are_refused(change):
    with pytest.raises(ConfigError) as caught:
        vad.load_detector(VadConfig(**change))
    assert caught.value.hint


def silero_is_at(monkeypatch, folder: Path | None) -> None:
    """Lets the package silero-vad be found in another folder, or nowhere."""
    spec = folder and importlib.machinery.ModuleSpec(
        "silero_vad", None, origin=str(folder / "__init__.py")
    )
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    vad._silero_session.cache_clear()


def test_a_missing_damaged_or_unknown_silero_model_says_what_to_do(monkeypatch, tmp_path):
    data = Path(importlib.util.find_spec("silero_vad").origin).parent / "data"
    (tmp_path / "data").mkdir()
    target = tmp_path / "data" / "silero_vad.onnx"
    try:
        silero_is_at(monkeypatch, None)
        with pytest.raises(ModelError, match="is missing") as caught:
            vad.load_detector(VadConfig())
        assert "pip install silero-vad" in caught.value.hint
        silero_is_at(monkeypatch, tmp_path)
        for raw in (None, b"", b"not a model"):
            if raw is not None:
                target.write_bytes(raw)
            with pytest.raises(ModelError, match="cannot be loaded"):
                vad.load_detector(VadConfig())
        target.write_bytes((data / "silero_vad_16k_sequence.onnx").read_bytes())
        with pytest.raises(ModelError, match="not known here"):
            vad.load_detector(VadConfig())
    finally:
        vad._silero_session.cache_clear()


def test_silero_runs_without_its_package_being_imported():
    """Importing it would load torch: seconds and hundreds of MB for a detector of 2 MB."""
    code = (
        "import sys; from sparqle_stream import vad; from sparqle_stream.config import VadConfig\n"
        "assert not {'onnxruntime', 'webrtcvad'} & set(sys.modules)\n"
        "vad.load_detector(VadConfig())\n"
        "assert not {'torch', 'silero_vad'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=REPO, timeout=120)


# Real speech


@pytest.fixture(scope="module")
def speech() -> np.ndarray:
    """The bundled clip, else a recording beside the checkout; (S,), read only."""
    bundled = [
        path
        for path in sorted((REPO / "sparqle_stream" / "assets").glob("demo.*"))
        if path.suffix in {".wav", ".flac", ".ogg", ".opus", ".mp3", ".m4a", ".webm"}
    ]
    beside = sorted((REPO.parent / "shared" / "data" / "dev" / "single" / "audio").glob("*"))
    if not bundled and not beside:
        pytest.skip("no real speech: neither assets/demo.* nor ../shared/data/dev/single")
    pcm = audio.read_file((bundled or beside)[0])
    pcm.setflags(write=False)
    return pcm


def loud_frames(pcm: np.ndarray) -> np.ndarray:
    """(S / 320,) bool: 20 ms that are within 25 dB of the loudest: speech, if it is clean."""
    power = np.square(pcm[: len(pcm) // 320 * 320].reshape(-1, 320)).mean(axis=1)
    return power > power.max() * 10**-2.5


@pytest.mark.parametrize("gain_db", [0, -20])
@pytest.mark.parametrize("kind", ["silero", "webrtc"])
def test_real_speech_is_inside_the_segments(kind, gain_db, speech):
    """Silence before and after; nearly all that is loud is inside, the first of it in particular.

    Silero needs about 100 ms to make up its mind: without the pre-roll first phones are lost.
    """
    gap = 1e-4 * np.random.default_rng(0).standard_normal(16_000)
    pcm = np.concatenate([gap, 10 ** (gain_db / 20) * speech, gap]).astype(np.float32)
    found = heard(vad.load_detector(VadConfig(kind=kind)), pcm)
    is_inside = np.zeros(len(pcm) // 320, bool)
    for start, stop in found:
        is_inside[start // 320 : -(-stop // 320)] = True
    is_loud = loud_frames(pcm)
    first = int(np.argmax(is_loud))
    assert is_inside[first], (found[:1], first * 320)
    assert is_inside[is_loud].mean() > 0.99
    assert found[0][0] >= 16_000 - 16_000 * 400 // 1_000, "began long before anybody spoke"
    assert found[-1][1] <= len(pcm) - 8_000, "did not end after the speech"


def test_silero_gives_what_its_own_package_gives(speech):
    """The package's wrapper keeps context and state by itself: an independent caller."""
    import torch
    from silero_vad.utils_vad import OnnxWrapper

    folder = Path(importlib.util.find_spec("silero_vad").origin).parent
    reference = OnnxWrapper(str(folder / "data" / "silero_vad.onnx"), force_onnx_cpu=True)
    detector = vad.load_detector(VadConfig())
    memory = detector.init_memory()
    for at in range(0, min(len(speech), 5 * 16_000) - FRAME, FRAME):
        frame = speech[at : at + FRAME]
        ((memory, got),) = detector.judge([memory], [frame])
        want = float(reference(torch.from_numpy(frame.copy()), 16_000))
        assert got == pytest.approx(want, abs=1e-5)
