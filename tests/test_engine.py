"""Engine: slots, one worker, admission, backlog, failures; with an oracle for a model."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
from gates import LONG_S, Gate

from sparqle_stream import messages, testing, vad
from sparqle_stream.config import EngineConfig, StreamOptions, VadConfig
from sparqle_stream.engine import Engine
from sparqle_stream.errors import (
    AudioFormatError,
    BacklogError,
    BusyError,
    ConfigError,
    ProtocolError,
)
from sparqle_stream.session import Session
from sparqle_stream.testing import OracleBatch, say, text_of, vocabulary, words_of

OFF = VadConfig(kind="off")
OPTIONS = StreamOptions(vad=OFF)


@pytest.fixture
def oracle():
    """Makes engines that hear exactly what `say` spelled."""
    engines = []

    def make(**changes) -> Engine:
        engines.append(testing.oracle_engine(EngineConfig(**{"n_slots": 2} | changes)))
        return engines[-1]

    yield make
    for one in engines:
        one.close()


@pytest.fixture
def tiny_engine(tiny):
    with Engine(tiny, EngineConfig(n_slots=2)) as engine:
        yield engine


def kinds(events) -> list[str]:
    return [type(e).__name__ for e in events]


def wait_until(condition) -> None:
    deadline = time.perf_counter() + LONG_S
    while not condition():
        assert time.perf_counter() < deadline, "it did not happen"
        time.sleep(0.005)


# --- life of a stream ----------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [np.full(800, np.nan, np.float32), np.zeros((800, 2), np.float32)])
def test_a_recording_that_is_no_audio_gives_its_slot_back(bad):
    """Each such call of `transcribe` took one slot for good."""
    with testing.oracle_engine(EngineConfig(n_slots=1)) as engine:
        for _ in range(2):
            with pytest.raises(AudioFormatError):
                engine.transcribe(bad)
        assert engine.metrics().n_streams == 0
        assert kinds(engine.transcribe(say(["bird"]), StreamOptions(vad=OFF)))[-1] == "Done"


def test_events_come_in_order(oracle):
    events = oracle().transcribe(say(["hello", "world"]), OPTIONS)
    names = [name for name in kinds(events) if name != "Tail"]
    assert names[:2] == ["Ready", "SpeechStarted"]
    assert names[-2:] == ["SpeechStopped", "Done"]
    assert set(names[2:-2]) == {"Final"}
    assert text_of(events) == "hello world"
    ready, done = events[0], events[-1]
    assert (ready.sample_rate, ready.chunk_ms, ready.delay_ms) == (16_000, 320, 240)
    assert done.duration == pytest.approx(len(say(["hello", "world"])) / 16_000)
    assert done.compute_seconds > 0


def test_flush_brings_the_last_word_and_the_stream_goes_on(oracle):
    stream = oracle().open(OPTIONS)
    stream.feed(say(["first"], gap_ms=40))
    stream.flush()
    events = []
    for event in stream.events(timeout=LONG_S):
        events.append(event)
        if isinstance(event, messages.SpeechStopped):
            break
    assert text_of(events) == "first"
    stream.feed(say(["second"]))
    stream.finish()
    rest = list(stream.events())
    assert text_of(rest) == " second"
    assert [e.segment for e in (*events, *rest) if isinstance(e, messages.Final)] == [0, 1]


def test_an_empty_stream_is_done_at_once(oracle):
    events = oracle().transcribe(np.zeros(0, np.float32), OPTIONS)
    assert kinds(events) == ["Ready", "Done"]


def test_silence_costs_no_step(tiny_engine):
    events = tiny_engine.transcribe(np.zeros(160_000, np.float32), StreamOptions())
    assert kinds(events) == ["Ready", "Done"]
    metrics = tiny_engine.metrics()
    assert (metrics.steps, metrics.audio_seconds) == (0, 10.0)
    assert metrics.stage_seconds.keys() == {"vad"}


def test_events_can_be_read_in_pieces(oracle):
    stream = oracle().open(OPTIONS)
    assert kinds(stream.events(timeout=0.2)) == ["Ready"]
    assert kinds(stream.events(timeout=0.01)) == []
    stream.finish()
    assert kinds(stream.events()) == ["Done"]
    assert kinds(stream.events()) == []


def test_streams_of_different_chunks_share_an_engine(oracle):
    engine, words = oracle(n_slots=3), vocabulary(12)
    sizes = (80, 320, 1280)
    streams = [engine.open(StreamOptions(vad=OFF, chunk_ms=ms)) for ms in sizes]
    for packet in np.array_split(say(words), 17):
        for stream in streams:
            stream.feed(packet)
    for stream in streams:
        stream.finish()
    for stream, ms in zip(streams, sizes, strict=True):
        out = words_of(stream.events())
        assert [w.word for w in out] == words
        assert all(round(w.emitted * 1000) % ms == 0 for w in out[:-8])


def test_the_callers_buffer_may_be_used_again(oracle):
    stream, pcm = oracle().open(OPTIONS), say(["kept"])
    packet = pcm.copy()
    stream.feed(packet)
    packet[:] = 0.5
    stream.finish()
    assert text_of(stream.events()) == "kept"


# --- admission, backlog, misuse ------------------------------------------------------------------


def test_a_full_engine_says_so_and_frees_slots(oracle):
    engine = oracle(n_slots=2)
    first, second = engine.open(OPTIONS), engine.open(OPTIONS)
    with pytest.raises(BusyError, match="2 slots"):
        engine.open(OPTIONS)
    first.cancel()
    third = engine.open(OPTIONS)  # at once
    second.finish()
    list(second.events())  # Done is told when the slot is free
    fourth = engine.open(OPTIONS)
    assert engine.metrics().n_streams == 2
    assert engine.metrics().streams_refused == 1
    for stream in (third, fourth):
        stream.feed(say(["fine"]))
        stream.finish()
        assert text_of(stream.events()) == "fine"


def test_cancel_in_the_middle_of_a_step_frees_the_slot_and_says_nothing_more(oracle, monkeypatch):
    gate = Gate(monkeypatch)
    engine = oracle(n_slots=1)
    stream = engine.open(OPTIONS)
    stream.feed(say(vocabulary(5)))
    assert gate.entered.wait(LONG_S)
    stream.cancel()
    other = engine.open(OPTIONS)  # its row is inside the step
    other.feed(say(["next"]))
    other.finish()
    gate.opened.set()
    assert text_of(other.events()) == "next"
    assert "Final" not in kinds(stream.events())
    stream.feed(say(["late"]))  # dropped: nothing to fail on
    stream.cancel()
    assert engine.metrics().n_streams == 0


def test_too_much_audio_is_told_once(oracle, monkeypatch):
    gate = Gate(monkeypatch)
    engine = oracle(backlog_s=2.5)
    stream = engine.open(OPTIONS)
    stream.feed(say(vocabulary(4)))
    assert gate.entered.wait(LONG_S)
    stream.feed(np.zeros(16_000, np.float32))
    assert stream.backlog_s == pytest.approx(1 + len(say(vocabulary(4))) / 16_000)
    with pytest.raises(BacklogError, match="limit is 2.5 s"):
        stream.feed(np.zeros(32_000, np.float32))
    stream.feed(np.zeros(160, np.float32))  # told already
    gate.opened.set()
    last = list(stream.events())[-1]
    assert (type(last), last.code) == (messages.Error, "backlog")
    assert last.hint
    metrics = engine.metrics()
    assert (metrics.backlogs, metrics.streams_failed, metrics.n_streams) == (1, 1, 0)


def test_a_source_that_can_wait_loses_nothing(oracle):
    engine, words = oracle(backlog_s=0.7), vocabulary(60)
    assert [w.word for w in words_of(engine.transcribe(say(words), OPTIONS))] == words
    assert engine.metrics().backlogs == 0


def test_silence_makes_room_without_a_step(tiny_engine):
    """More silence than the backlog holds: nothing is ever stepped, and nobody waits for ever."""
    stream = tiny_engine.open(StreamOptions(vad=VadConfig(kind="webrtc")))
    for _ in range(90):
        assert stream.wait_for_room(1.0, timeout=LONG_S)
        stream.feed(np.zeros(16_000, np.float32))
    stream.finish()
    assert kinds(stream.events()) == ["Ready", "Done"]
    assert tiny_engine.metrics().steps == 0


def test_what_no_event_can_follow_from_waits_for_more(tiny_engine):
    """In silence at least `min_speech_ms` must come: five frames of WebRTC's detector."""
    stream = tiny_engine.open(StreamOptions(vad=VadConfig(kind="webrtc", min_speech_ms=100)))
    for n_new, n_unheard in ((320, 0), (1_599, 1_599), (1, 0), (100, 100)):
        stream.feed(np.zeros(n_new, np.float32))
        time.sleep(0.05)
        wait_until(lambda n=n_unheard: stream.session and stream.n_inbox == n)
    assert stream.wait_for_room(1e9, timeout=LONG_S)  # who waits for room has it heard
    stream.feed(np.zeros(100, np.float32))
    stream.flush()
    stream.finish()
    assert kinds(stream.events()) == ["Ready", "Flushed", "Done"]


def test_room_is_waited_for(oracle, monkeypatch):
    gate = Gate(monkeypatch)
    stream = oracle(backlog_s=1.0).open(OPTIONS)
    assert stream.room_s == 1.0
    stream.feed(np.zeros(16_000, np.float32))
    assert gate.entered.wait(LONG_S)
    assert not stream.wait_for_room(1.0, timeout=0.05)
    gate.opened.set()
    assert stream.wait_for_room(0.9, timeout=LONG_S)
    gate.opened.clear()
    stream.cancel()
    gate.opened.set()
    assert stream.wait_for_room(1.0, timeout=0.0)  # a closed stream keeps nobody waiting


def test_a_backlog_must_hold_two_chunks(oracle):
    with pytest.raises(ConfigError, match="too short"):
        oracle(backlog_s=2.0).open(StreamOptions(chunk_ms=1280))


@pytest.mark.parametrize(
    ("pcm", "message"),
    [
        (np.zeros((10, 2), np.float32), "mono"),
        (np.array([0.0, np.nan], np.float32), "NaN"),
        (np.array([np.inf], np.float32), "infinity"),
    ],
)
def test_what_is_no_audio_is_refused(oracle, pcm, message):
    stream = oracle().open(OPTIONS)
    with pytest.raises(AudioFormatError, match=message):
        stream.feed(pcm)
    stream.feed(say(["still"]))
    stream.finish()
    assert text_of(stream.events()) == "still"


def test_audio_after_the_end_is_a_mistake(oracle, monkeypatch):
    gate = Gate(monkeypatch)
    stream = oracle().open(OPTIONS)
    stream.feed(say(["end"]))
    stream.finish()
    with pytest.raises(ProtocolError, match="after the end"):
        stream.feed(say(["more"]))
    stream.finish()
    stream.flush()
    gate.opened.set()
    assert text_of(stream.events()) == "end"


# --- failures ------------------------------------------------------------------------------------


def test_a_callback_hears_everything_from_the_worker(oracle):
    engine, heard, done = oracle(), [], threading.Event()

    def on_event(event) -> None:
        heard.append((threading.current_thread().name, event))
        if isinstance(event, messages.Done):
            done.set()

    stream = engine.open(OPTIONS, on_event=on_event)
    stream.feed(say(["called", "back"]))
    stream.finish()
    assert done.wait(LONG_S)
    assert {name for name, _ in heard} == {"sparqle-worker"}
    assert text_of(event for _, event in heard) == "called back"
    with pytest.raises(ProtocolError):
        next(stream.events())


def test_a_broken_callback_ends_its_own_stream_only(oracle, caplog):
    engine = oracle()

    def on_event(event) -> None:
        if isinstance(event, messages.Final):
            raise RuntimeError("broken callback")

    bad, good = engine.open(OPTIONS, on_event=on_event), engine.open(OPTIONS)
    for stream in (bad, good):
        stream.feed(say(["both", "speak"]))
    good.finish()
    assert text_of(good.events()) == "both speak"
    wait_until(lambda: engine.metrics().n_streams == 0)
    assert "on_event of stream" in caplog.text


def test_a_stream_that_fails_leaves_its_neighbour_alone(oracle, monkeypatch, caplog):
    engine, take = oracle(), Session.take

    def fragile(session, tokens):
        if session.options.prompt == "fragile":
            raise RuntimeError("a bug in one row")
        return take(session, tokens)

    monkeypatch.setattr(Session, "take", fragile)
    bad = engine.open(StreamOptions(vad=OFF, prompt="fragile"))
    good = engine.open(OPTIONS)
    for stream in (bad, good):
        stream.feed(say(["both", "speak"]))
        stream.finish()
    last = list(bad.events())[-1]
    assert (last.code, last.message) == ("internal", "RuntimeError: a bug in one row")
    assert text_of(good.events()) == "both speak"
    assert engine.metrics().streams_failed == 1
    assert "a bug in one row" in caplog.text


def test_a_detector_that_fails_with_one_stream_leaves_its_neighbour_alone(oracle, monkeypatch):
    """Frames of both are judged in one call, which fails; then each is judged alone."""
    engine, loud = oracle(), 0.9

    def judge(memories, frames):
        if any(abs(frame).max() > loud for frame in frames):
            raise RuntimeError("the network failed")
        return [(memory, 1.0) for memory in memories]

    monkeypatch.setattr(vad, "_off", lambda cfg: vad.Detector(cfg, 512, lambda: None, judge, True))
    bad, good = engine.open(OPTIONS), engine.open(OPTIONS)
    with engine.workers[0]._change:  # both are waiting when the worker looks
        for stream in (bad, good):
            said = say(["both", "speak"])
            said[600] = 0.95 if stream is bad else 0.0
            stream.feed(said)
            stream.finish()
    assert list(bad.events())[-1].message == "RuntimeError: the network failed"
    assert text_of(good.events()) == "both speak"


def test_a_failed_step_ends_its_streams_and_not_the_worker(oracle, monkeypatch, caplog):
    engine, run = oracle(), OracleBatch.run
    failures = iter([MemoryError("out of memory")])

    def once_broken(batch, sessions):
        for failure in failures:
            raise failure
        return run(batch, sessions)

    monkeypatch.setattr(OracleBatch, "run", once_broken)
    idle = engine.open(OPTIONS)
    stream = engine.open(OPTIONS)
    stream.feed(say(["lost"]))
    assert list(stream.events())[-1].code == "internal"
    idle.feed(say(["unharmed"]))
    idle.finish()
    assert text_of(idle.events()) == "unharmed"
    assert text_of(engine.transcribe(say(["again"]), OPTIONS)) == "again"
    assert "out of memory" in caplog.text


def test_a_detector_that_cannot_be_loaded_is_the_streams_error(oracle):
    bad = oracle().open(StreamOptions(vad=VadConfig(kind="webrtc", webrtc_mode=9)))
    last = list(bad.events())[-1]
    assert (type(last), last.code) == (messages.Error, "invalid_option")


def test_close_ends_every_stream(oracle):
    engine = oracle()
    stream = engine.open(OPTIONS)
    engine.close()
    assert list(stream.events())[-1].code == "busy"
    with pytest.raises(BusyError, match="shutting down"):
        engine.open(OPTIONS)
    engine.close()
    assert not any(worker.is_alive for worker in engine.workers)


# --- rule 9, metrics, log ------------------------------------------------------------------------


def write_the_same(batch, slot, delay_ms) -> list[int]:
    """An LLM that has fallen into a loop and writes as much as it may."""
    slot.unsaid.clear()
    return batch.model.tokenizer.encode(" again" * 20)


def test_a_loop_is_stopped_and_counted(oracle, monkeypatch):
    monkeypatch.setattr(OracleBatch, "_write", write_the_same)
    engine = oracle()
    events = engine.transcribe(say(vocabulary(30), gap_ms=80), OPTIONS)
    metrics = engine.metrics()
    assert metrics.loops_stopped >= 1
    assert metrics.seams >= metrics.loops_stopped - 1
    # Each loop is stopped at its 18th token, the cap lets 12 a second through before.
    assert len(text_of(events).split()) <= 17 * (metrics.loops_stopped + 1)


def test_speech_without_text_is_a_warning_and_a_counter(oracle, monkeypatch):
    monkeypatch.setattr(OracleBatch, "_write", lambda *_: [])
    engine = oracle()
    events = engine.transcribe(say(vocabulary(30)), OPTIONS)
    warnings = [e for e in events if isinstance(e, messages.Warning)]
    assert [w.code for w in warnings] == ["speech_without_text"]
    assert warnings[0].time == pytest.approx(3.2)
    assert engine.metrics().speech_without_text == 1
    assert text_of(events) == ""


def test_noise_that_ctc_does_not_hear_gives_no_text(oracle, monkeypatch):
    """An LLM that would write on and on over a segment of which CTC hears nothing."""
    monkeypatch.setattr(OracleBatch, "_write", write_the_same)
    assert text_of(oracle().transcribe(np.zeros(80_000, np.float32), OPTIONS)) == ""


def test_tails_are_provisional_and_end_with_the_segment(oracle):
    events = oracle().transcribe(say(vocabulary(9)), OPTIONS)
    shown, tails = "", []
    for event in events:
        if isinstance(event, messages.Final):
            shown = ""
        if isinstance(event, messages.Tail):
            assert event.text != shown
            shown = event.text
            tails.append(shown)
        if isinstance(event, messages.SpeechStopped):
            assert shown == ""
    assert any(tails)


def test_metrics_are_a_snapshot(oracle):
    engine = oracle()
    before = engine.metrics()
    events = engine.transcribe(say(vocabulary(10)), OPTIONS)
    after = engine.metrics()
    assert (before.steps, before.streams_opened, before.step_seconds.n) == (0, 0, 0)
    n_chunks = -(-(len(say(vocabulary(10))) + 640 + 1280 + 3840) // 5120)
    assert (after.n_slots, after.n_streams, after.streams_opened) == (2, 0, 1)
    assert after.steps == after.chunks == after.step_seconds.n == n_chunks
    assert after.audio_seconds == pytest.approx(len(say(vocabulary(10))) / 16_000)
    spent = sum(after.stage_seconds.values())
    assert events[-1].compute_seconds == pytest.approx(spent)
    assert after.step_seconds.quantile(0.5) <= after.step_seconds.quantile(0.99)
    assert after.step_seconds.quantile(1.0) == after.step_seconds.max_s


def test_lag_is_what_was_received_and_not_captioned(oracle, monkeypatch):
    gate = Gate(monkeypatch)
    stream = oracle().open(OPTIONS)
    stream.feed(say(vocabulary(20)))  # 6.44 s
    assert gate.entered.wait(LONG_S)
    gate.opened.set()
    wait_until(lambda: stream.backlog_s < 0.32)
    stream.finish()
    finals = [e for e in stream.events() if isinstance(e, messages.Final)]
    assert finals[0].lag == pytest.approx(6.44 - finals[0].time)
    assert all(e.lag <= 6.44 - e.time + 1e-9 for e in finals)
