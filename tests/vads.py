"""A detector that says what a test wrote, its audio, and what its events must hold."""

from __future__ import annotations

import numpy as np

from sparqle_stream import vad
from sparqle_stream.config import VadConfig
from sparqle_stream.vad import Detector, SegmentAudio, SegmentPause, SegmentStart, SegmentStop

FRAME = 512
# 96 ms are 3 frames, 64 ms of silence are 2, the pre-roll is 2.5 frames; 1 frame is a pause.
CFG = VadConfig(
    min_speech_ms=96, stop_ms=64, pause_ms=32, preroll_ms=80, threshold=0.5, threshold_off=0.35
)


def by_peak(cfg: VadConfig = CFG) -> Detector:
    """A detector whose probability is the frame's peak: tests write what it will say as audio."""

    def judge(n_judged: list[int], frames: list[np.ndarray]) -> list[tuple[int, float]]:
        return [(n + 1, float(np.abs(f).max())) for n, f in zip(n_judged, frames, strict=True)]

    return Detector(cfg, FRAME, lambda: 0, judge)


def frames(*peaks: float) -> np.ndarray:
    """One frame per number, every sample different, so that a shifted sample would show."""
    ramp = np.linspace(0.5, 1, FRAME * max(1, len(peaks)), dtype=np.float32)
    return np.concatenate(
        [
            peak * ramp[i * FRAME : (i + 1) * FRAME] / ramp[(i + 1) * FRAME - 1]
            for i, peak in enumerate(peaks)
        ]
    ).astype(np.float32)


def run(detector: Detector, packets: list[np.ndarray], flush_after: set[int] = frozenset()):
    """All packets, with a flush after some, then the end -> (state, events)."""
    state, events = vad.init_state(detector), []
    for i, packet in enumerate(packets):
        state, new = vad.step(detector, state, packet)
        events += new
        if i in flush_after:
            state, new = vad.flush(detector, state)
            events += new
    return state, events + vad.finish(detector, state)


def segments_of(pcm: np.ndarray, events: list) -> list[tuple[int, int, int, int]]:
    """Events -> (start, known, stop, known) of each segment, after checking them against pcm."""
    found, parts, start, end = [], [], None, 0
    for event in events:
        match event:
            case SegmentStart(sample, known_at):
                assert start is None, "a segment began inside another"
                assert end <= sample <= known_at, "segments overlap"
                start, started_known, parts = sample, known_at, []
            case SegmentAudio(part):
                assert start is not None, "audio outside a segment"
                assert part.dtype == np.float32
                assert len(part)
                assert part.base is None, "a view would keep more than itself in memory"
                parts.append(part)
            case SegmentPause():
                assert start is not None, "a pause outside a segment"
            case SegmentStop(sample, known_at):
                end = sample
                np.testing.assert_array_equal(np.concatenate(parts), pcm[start:end])
                found.append((start, started_known, end, known_at))
                start = None
    assert start is None, "the last segment has no end"
    return found


def heard(detector: Detector, pcm: np.ndarray) -> list[tuple[int, int]]:
    """(start, stop) of the segments of one call."""
    return [(start, stop) for start, _, stop, _ in segments_of(pcm, run(detector, [pcm])[1])]


def figures(state: vad.VadState) -> tuple:
    """A state but for the detector's memory and the audio."""
    return (
        state.n_in,
        state.n_judged,
        state.n_out,
        state.is_voiced,
        state.run_samples,
        state.is_speech,
        state.is_paused,
        state.probability,
        state.level_db,
    )


def pulses(seconds: float, seed: int) -> np.ndarray:
    """Something like vowels: a pulse train through three resonators that change every 200 ms."""
    rng = np.random.default_rng(seed)
    at_s = np.arange(int(seconds * 16_000)) / 16_000
    phase = np.cumsum(120 + 20 * np.sin(2 * np.pi * 0.7 * at_s)) / 16_000
    source = np.diff(np.floor(phase), prepend=0) + 0.01 * rng.standard_normal(len(at_s))
    tail_s = np.arange(800) / 16_000
    out = np.zeros(len(at_s))
    for at in range(0, len(at_s), 3_200):
        part = source[at : at + 3_200]
        for hz in rng.choice([300, 500, 700, 900, 1_100, 1_800, 2_300, 2_800], 3, replace=False):
            response = np.exp(-250 * tail_s) * np.sin(2 * np.pi * hz * tail_s)
            out[at : at + len(part)] += np.convolve(part, response)[: len(part)]
    return (0.3 * out / np.abs(out).max()).astype(np.float32)


def talk(seed: int) -> np.ndarray:
    """Vowels and pauses of random lengths over faint noise, about 6 s."""
    rng = np.random.default_rng(seed)
    parts = []
    for i in range(5):
        parts.append(pulses(rng.uniform(0.1, 1), seed + i))
        parts.append(np.zeros(int(rng.integers(1_000, 12_000)), np.float32))
    pcm = np.concatenate(parts)
    return pcm + 1e-4 * rng.standard_normal(len(pcm)).astype(np.float32)
