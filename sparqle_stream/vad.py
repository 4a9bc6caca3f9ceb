"""VAD: PCM (S,) at 16 kHz -> segments of speech: start, audio, stop.

A detector says for every frame (Silero 32 ms, WebRTC 20 ms) how likely speech is; two thresholds
make voiced or not of it; `min_speech_ms` of voice open a segment, `stop_ms` without close it,
`pause_ms` without are a pause in it. A segment begins `preroll_ms` before its first voiced frame,
because detectors hesitate at first phones, but never before the end of the segment before it.

Contract: cutting the input anywhere gives the same starts, pauses, stops and samples as one call.
What is handed out between a start and its stop is exactly pcm[start:stop]: no sample lost, none
doubled.
Latency: until a segment is open, `min_speech_ms` and the rest of a frame; in it none: samples are
handed out as they come, also before their frame is judged, since a stop can only come after them.
"""

from __future__ import annotations

import functools
import importlib.util
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from sparqle_stream.config import SAMPLE_RATE_HZ, VadConfig
from sparqle_stream.errors import AudioFormatError, ConfigError, ModelError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

Pcm = npt.NDArray[np.float32]

SILERO_SAMPLES = 512  # the model's frame at 16 kHz
SILERO_CONTEXT = 64  # it sees this much of the frame before as well
WEBRTC_SAMPLES = 320
NEVER = 1 << 62  # samples
FLOOR_DB = -120.0  # level of digital silence
MAX_PEAK = 100.0  # samples are meant to be in -1..1: beyond this they are something else


@dataclass(frozen=True, slots=True)
class SegmentStart:
    """Speech began at stream sample `sample`; that was known once `known_at` samples had come."""

    sample: int
    known_at: int


@dataclass(frozen=True, slots=True)
class SegmentAudio:
    """The next samples of the open segment, (S,)."""

    pcm: Pcm


@dataclass(frozen=True, slots=True)
class SegmentStop:
    """The segment ends before stream sample `sample`, known once `known_at` samples had come."""

    sample: int
    known_at: int
    n_quiet: int = 0  # so many samples before its end nobody speaks


@dataclass(frozen=True, slots=True)
class SegmentPause:
    """In an open segment nobody has spoken for `pause_ms`, or somebody does again; that was known
    once `known_at` samples had come."""

    is_on: bool
    known_at: int


SegmentEvent = SegmentStart | SegmentAudio | SegmentPause | SegmentStop


@dataclass(frozen=True, slots=True)
class Detector:
    """What judges frames; shared by all streams. A stream's memory lies in its state."""

    cfg: VadConfig
    frame_samples: int
    init_memory: Callable[[], Any]
    # Memory and next frame (F,) of some streams -> memory and probability of each.
    judge: Callable[[Sequence[Any], Sequence[Pcm]], list[tuple[Any, float]]]
    is_always_on: bool = False  # everything is one segment, from its first sample


@dataclass(slots=True)
class VadState:
    """What a stream keeps: a detector's memory, and at most pre-roll + min_speech + a frame."""

    memory: Any  # WebRTC's is inside its library, so a state with it cannot be copied
    recent: Pcm  # (R,) the last samples: not judged yet, or perhaps the start of a segment
    n_in: int = 0  # samples received
    n_judged: int = 0  # whole frames judged, in samples
    n_out: int = 0  # everything before was handed out, or lies before the last stop
    is_voiced: bool = False  # the last frame, after hysteresis
    run_samples: int = 0  # for how long is_voiced has been what it is
    is_speech: bool = False  # a segment is open
    is_paused: bool = False  # and nobody speaks in it at present
    probability: float = 0.0  # of the last frame
    level_db: float = FLOOR_DB  # RMS of the last frame; 0 dB: a square wave of full scale
    foreseen: deque[float] = field(default_factory=deque)  # probabilities of the next frames


def load_detector(cfg: VadConfig) -> Detector:
    """The detector that `cfg.kind` names. Silero's model is loaded once in a process."""
    if not 0 < cfg.threshold_off <= cfg.threshold <= 1:
        raise ConfigError(
            f"VAD thresholds {cfg.threshold_off} (off) and {cfg.threshold} (on) cannot be used",
            hint="both above 0 and at most 1, off not above on",
        )
    if cfg.preroll_ms < 0 or cfg.min_speech_ms < 0 or cfg.webrtc_mode not in range(4):
        raise ConfigError(
            "a negative VAD time, or a WebRTC mode other than 0 to 3", hint=f"got {cfg}"
        )
    return {"silero": _silero, "webrtc": _webrtc, "off": _off}[cfg.kind](cfg)


def init_state(detector: Detector) -> VadState:
    return VadState(detector.init_memory(), np.zeros(0, np.float32))


def step(detector: Detector, state: VadState, pcm: Pcm) -> tuple[VadState, list[SegmentEvent]]:
    """pcm (S,) -> what begins, goes on and ends with it, in order."""
    if pcm.ndim != 1:
        raise AudioFormatError(
            f"expected mono audio of shape (S,), got {pcm.shape}",
            hint="mix down first: pcm.mean(axis=-1)",
        )
    events: list[SegmentEvent] = []
    heard = np.concatenate([state.recent, pcm], dtype=np.float32)
    first = state.n_in - len(state.recent)  # stream sample of heard[0]
    state.n_in += len(pcm)
    if detector.is_always_on and not state.is_speech and len(pcm):
        _open(state, state.n_out, state.n_out + 1, events)
    while state.n_in - state.n_judged >= detector.frame_samples:
        at = state.n_judged - first
        _judge(detector, state, heard[at : at + detector.frame_samples])
        _decide(detector.cfg, state, heard[: state.n_judged - first], events)
    if state.is_speech:
        _hand_out(state, heard, state.n_in, events)
    state.recent = heard[_oldest_needed(detector.cfg, state) - first :].copy()
    return state, events


def foresee(rows: Sequence[tuple[Detector, VadState, Pcm]]) -> None:
    """Asks detectors about the pcm (S,) that `step` will be given next, for many streams at once.

    Streams of one kind of detector, of any settings, share its calls: a frame of a network that is
    run for eight of them costs a third. How a frame is judged does not depend on the others.
    """
    waiting = [(detector, state, _unjudged(detector, state, pcm)) for detector, state, pcm in rows]
    while waiting := [row for row in waiting if row[2]]:
        for judge in {detector.judge for detector, _, _ in waiting}:
            some = [
                (state, frames) for detector, state, frames in waiting if detector.judge is judge
            ]
            said = judge([s.memory for s, _ in some], [frames.popleft() for _, frames in some])
            for (state, _), (memory, probability) in zip(some, said, strict=True):
                state.memory = memory
                state.foreseen.append(probability)


def _unjudged(detector: Detector, state: VadState, pcm: Pcm) -> deque[Pcm]:
    """The whole frames that nobody has judged yet, up to one that `step` will refuse."""
    size = detector.frame_samples
    at = state.n_judged - state.n_in + len(state.recent) + size * len(state.foreseen)
    heard = np.concatenate([state.recent, pcm], dtype=np.float32)
    frames = deque[Pcm]()
    while at + size <= len(heard) and _is_sound(heard[at : at + size]):
        frames.append(heard[at : at + size])
        at += size
    return frames


def patience(detector: Detector, state: VadState) -> int:
    """Samples that have to come before a segment can begin or end: until then nothing is known
    later because they wait unheard. A pause is no such event: it counts when a chunk is whole."""
    if detector.is_always_on:
        return NEVER if state.is_speech else 0
    limit_ms = detector.cfg.stop_ms if state.is_speech else detector.cfg.min_speech_ms
    # Only the other kind of frames brings it, in a row.
    run = state.run_samples if state.is_voiced != state.is_speech else 0
    n_frames = -(-(limit_ms * SAMPLE_RATE_HZ // 1000 - run) // detector.frame_samples)
    return max(1, n_frames) * detector.frame_samples - (state.n_in - state.n_judged)


def flush(detector: Detector, state: VadState) -> tuple[VadState, list[SegmentEvent]]:
    """Ends the open segment where the audio ends now. The stream goes on.

    Voice too short to have opened a segment gets one: a word cut off by the end must not be lost.
    Voice that goes on after a flush has to last `min_speech_ms` again, but loses no sample.
    """
    events: list[SegmentEvent] = []
    if not state.is_speech and state.is_voiced:
        _open(state, _segment_start(detector.cfg, state), state.n_in, events)
        _hand_out(state, state.recent, state.n_in, events)
    if state.is_speech:
        _close(state, state.n_in, events)
    state.is_voiced, state.run_samples = False, 0
    return state, events


def finish(detector: Detector, state: VadState) -> list[SegmentEvent]:
    """The end of the audio: what `flush` gives."""
    return flush(detector, state)[1]


# Segments


def _judge(detector: Detector, state: VadState, frame: Pcm) -> None:
    """frame (F,), the next one -> the state's figures."""
    if state.foreseen:
        state.probability = state.foreseen.popleft()
    elif _is_sound(frame):
        ((state.memory, state.probability),) = detector.judge([state.memory], [frame])
    else:
        raise AudioFormatError(
            "samples that are not numbers, or far above 1",
            hint="scale 16-bit samples by 1 / 32768; replace NaN by 0",
        )
    power = float(np.dot(frame, frame)) / len(frame)
    state.level_db = max(FLOOR_DB, 10 * float(np.log10(power))) if power > 0 else FLOOR_DB
    # Between the thresholds a frame is what the one before it was.
    cfg = detector.cfg
    is_voiced = state.probability >= (cfg.threshold_off if state.is_voiced else cfg.threshold)
    if is_voiced != state.is_voiced:
        state.is_voiced, state.run_samples = is_voiced, 0
    state.run_samples += len(frame)
    state.n_judged += len(frame)


def _is_sound(frame: Pcm) -> bool:
    """NaN would stay in the detector's memory for ever."""
    return bool(np.abs(frame).max() < MAX_PEAK)


def _decide(cfg: VadConfig, state: VadState, heard: Pcm, events: list[SegmentEvent]) -> None:
    """Opens or closes a segment after a frame. heard (R,) ends with that frame."""
    lasts_ms = state.run_samples * 1000 // SAMPLE_RATE_HZ
    if not state.is_speech and state.is_voiced and lasts_ms >= cfg.min_speech_ms:
        _open(state, _segment_start(cfg, state), state.n_judged, events)
    elif state.is_speech and not state.is_voiced and lasts_ms >= cfg.stop_ms:
        _hand_out(state, heard, state.n_judged, events)
        _close(state, state.n_judged, events, n_quiet=state.run_samples)
    is_paused = state.is_speech and not state.is_voiced and lasts_ms >= cfg.pause_ms
    if is_paused != state.is_paused:
        state.is_paused = is_paused
        events.append(SegmentPause(is_paused, state.n_judged))


def _segment_start(cfg: VadConfig, state: VadState) -> int:
    """Where a segment begins whose voice is the present run of voiced frames, if it is one."""
    voiced_samples = state.run_samples if state.is_voiced else 0
    preroll_samples = cfg.preroll_ms * SAMPLE_RATE_HZ // 1000
    return max(state.n_out, state.n_judged - voiced_samples - preroll_samples)


def _oldest_needed(cfg: VadConfig, state: VadState) -> int:
    """The first stream sample that a frame or a segment may still ask for."""
    if state.is_speech:
        return state.n_judged
    return min(state.n_judged, _segment_start(cfg, state))


def _open(state: VadState, sample: int, known_at: int, events: list[SegmentEvent]) -> None:
    events.append(SegmentStart(sample, known_at))
    state.is_speech = True
    state.n_out = sample


def _hand_out(state: VadState, heard: Pcm, end: int, events: list[SegmentEvent]) -> None:
    """heard (R,) ends before stream sample `end`; what was not handed out of it is."""
    n_new = end - state.n_out
    if n_new:
        # A copy: a view would keep all of `heard` in memory as long as it waits in a queue.
        events.append(SegmentAudio(heard[len(heard) - n_new :].copy()))
        state.n_out = end


def _close(state: VadState, sample: int, events: list[SegmentEvent], n_quiet: int = 0) -> None:
    events.append(SegmentStop(sample, sample, n_quiet))
    state.is_speech = state.is_paused = False


# Detectors


def _silero(cfg: VadConfig) -> Detector:
    """Silero VAD: a small recurrent network on 32 ms frames."""
    _silero_session()  # what is wrong with it shows now

    def init_memory() -> tuple[Pcm, Pcm]:
        return np.zeros((2, 1, 128), np.float32), np.zeros(SILERO_CONTEXT, np.float32)

    return Detector(cfg, SILERO_SAMPLES, init_memory, _judge_by_silero)


def _judge_by_silero(
    memories: Sequence[tuple[Pcm, Pcm]], frames: Sequence[Pcm]
) -> list[tuple[tuple[Pcm, Pcm], float]]:
    """Hidden state (2, 1, 128) and the end of the last frame (64,), frame (512,) of each stream."""
    x = np.stack([np.concatenate([m[1], frame]) for m, frame in zip(memories, frames, strict=True)])
    hidden = np.concatenate([hidden for hidden, _ in memories], axis=1)
    rate = np.array(SAMPLE_RATE_HZ, np.int64)
    said, hidden = _silero_session().run(None, {"input": x, "state": hidden, "sr": rate})
    return [
        ((hidden[:, i : i + 1].copy(), frame[-SILERO_CONTEXT:].copy()), float(said[i, 0]))
        for i, frame in enumerate(frames)
    ]


@functools.cache
def _silero_session() -> Any:  # noqa: ANN401 - onnxruntime has no types
    """The ONNX model that the package silero-vad carries.

    Only the file is wanted: importing the package would load torch and look for audio libraries.
    """
    spec = importlib.util.find_spec("silero_vad")
    if spec is None or spec.origin is None:
        raise ModelError(
            "the package silero-vad is missing",
            hint="pip install silero-vad, or use --vad webrtc or --vad off",
        )
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1  # 0.14 ms; threads only cost
    options.log_severity_level = 3
    path = Path(spec.origin).parent / "data" / "silero_vad.onnx"
    try:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as err:  # onnxruntime's own errors share no other base
        raise ModelError(
            f"the model of silero-vad cannot be loaded: {err}",
            hint="pip install --force-reinstall --no-deps silero-vad",
        ) from err
    inputs = {one.name: list(one.shape[-1:]) for one in session.get_inputs()}
    if set(inputs) != {"input", "state", "sr"} or inputs["state"] != [128]:
        raise ModelError(
            f"silero-vad's model has inputs that are not known here: {inputs}",
            hint="use silero-vad 5 or 6",
        )
    return session


def _webrtc(cfg: VadConfig) -> Detector:
    """WebRTC's detector: Gaussian mixtures on band energies of 20 ms, yes or no."""
    import webrtcvad

    return Detector(cfg, WEBRTC_SAMPLES, lambda: webrtcvad.Vad(cfg.webrtc_mode), _judge_by_webrtc)


def _judge_by_webrtc(memories: Sequence[Any], frames: Sequence[Pcm]) -> list[tuple[Any, float]]:
    """webrtcvad.Vad and frame (320,) of each stream."""
    raw = [np.clip(frame * 32_768, -32_768, 32_767).astype("<i2").tobytes() for frame in frames]
    return [
        (memory, float(memory.is_speech(bits, SAMPLE_RATE_HZ)))
        for memory, bits in zip(memories, raw, strict=True)
    ]


def _off(cfg: VadConfig) -> Detector:
    """No detector: all audio is speech. Frames serve the level alone."""
    return Detector(cfg, SILERO_SAMPLES, lambda: None, _judge_as_speech, is_always_on=True)


def _judge_as_speech(memories: Sequence[None], _: Sequence[Pcm]) -> list[tuple[None, float]]:
    return [(memory, 1.0) for memory in memories]
