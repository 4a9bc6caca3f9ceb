"""Captioning: sources of every kind through a stream; ends, errors, stops and a full engine."""

from __future__ import annotations

import io
import os
import signal
import sys
import threading
from types import SimpleNamespace

import numpy as np
import pytest

from sparqle_stream import live, messages, testing, transcribe
from sparqle_stream.audio import AudioFormat
from sparqle_stream.captioning import Captioning, EngineFailedError, Listener, StopSignals
from sparqle_stream.config import EngineConfig
from sparqle_stream.errors import (
    AudioFormatError,
    BacklogError,
    ConfigError,
    DeviceError,
    SparqleError,
)
from sparqle_stream.latency import Latency
from sparqle_stream.messages import Word
from sparqle_stream.outputs import Outputs
from sparqle_stream.server import openai_session
from sparqle_stream.sources import FileSource, PacedSource, PipeSource
from sparqle_stream.terminal import QuietView

SECOND = np.ones(16_000, np.float32)


class Echo:
    """A stream whose every second is the word 'one'; says Done when it is finished."""

    def __init__(self, on_event, room_s: float = 30.0, ends_with=None) -> None:
        self.on_event = on_event
        self.room_s = room_s
        self.ends_with = ends_with
        self.fed: list[np.ndarray] = []
        self.calls: list[str] = []
        self.asked_room: list[float] = []

    def feed(self, pcm) -> None:
        self.calls.append("feed")
        self.fed.append(pcm)
        at = sum(map(len, self.fed)) / 16_000
        if self.ends_with:
            return self.on_event(self.ends_with)
        word = Word("one", at - 0.5, at - 0.3, at)
        return self.on_event(messages.Final(" one", (word,), 0, time=at))

    def finish(self) -> None:
        self.calls.append("finish")
        seconds = sum(map(len, self.fed)) / 16_000
        self.on_event(messages.SpeechStopped(seconds))
        self.on_event(messages.Done(seconds, seconds / 4, seconds))

    def cancel(self) -> None:
        self.calls.append("cancel")

    def wait_for_room(self, seconds, timeout=None) -> bool:
        self.asked_room.append(seconds)
        return self.room_s >= seconds


def caption(source, stream_options=None, **kwargs):
    """Runs one captioning over an Echo; the stream and its events."""
    streams, events = [], []

    def open_stream(on_event):
        streams.append(Echo(on_event, **(stream_options or {})))
        return streams[0]

    run = Captioning(open_stream, source, Listener(lambda e, _at: events.append(e)), **kwargs)
    try:
        run.run()
    finally:
        run_result = SimpleNamespace(stream=streams[0], events=events, run=run)
        caption.last = run_result
    return run_result


def kinds(events) -> list[str]:
    return [type(event).__name__ for event in events]


def test_a_file_is_fed_finished_and_heard_to_the_end():
    done = caption(FileSource("x", iter([SECOND, SECOND])))
    assert done.stream.calls == ["feed", "feed", "finish"]
    assert kinds(done.events) == ["Final", "Final", "SpeechStopped", "Done"]


def test_stopping_captions_what_was_heard():
    heard = []
    done = caption(
        FileSource("x", iter([SECOND] * 100)),
        is_stopped=lambda: len(heard) >= 3 or bool(heard.append(1)),
    )
    assert done.stream.calls == ["feed"] * 3 + ["finish"]
    assert kinds(done.events)[-1] == "Done"


def test_a_source_that_breaks_is_told_after_the_last_word():
    """A microphone that is pulled out must not cost the words that were said before."""

    def blocks():
        yield SECOND
        raise DeviceError("the microphone is gone", hint="plug it in")

    with pytest.raises(DeviceError, match="gone"):
        caption(FileSource("x", blocks()))
    assert caption.last.stream.calls == ["feed", "finish"]
    assert kinds(caption.last.events) == ["Final", "SpeechStopped", "Done"]


@pytest.mark.parametrize(
    ("code", "kind"),
    [("backlog", BacklogError), ("internal", EngineFailedError), ("invalid_option", ConfigError)],
)
def test_an_error_event_becomes_its_exception(code, kind):
    end = messages.Error(code, "it broke", "do this", time=1.0)
    with pytest.raises(kind, match="it broke"):
        caption(FileSource("x", iter([SECOND] * 5)), {"ends_with": end})
    assert caption.last.stream.calls == ["feed"]  # nothing is sent to a stream that has ended


def test_a_servers_own_kinds_of_error_are_none_of_the_users():
    assert issubclass(openai_session.FieldError, SparqleError)
    end = messages.Error(openai_session.FieldError.code, "it broke", "do this", time=1.0)
    with pytest.raises(SparqleError, match="it broke"):
        caption(FileSource("x", iter([SECOND] * 5)), {"ends_with": end})


def test_a_second_ctrl_c_frees_the_slot():
    def interrupt():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        caption(FileSource("x", iter([SECOND])), is_stopped=interrupt)
    assert caption.last.stream.calls == ["cancel"]


def test_a_file_waits_for_room_and_a_microphone_does_not():
    waiting = caption(
        FileSource("x", iter([SECOND])), {"room_s": 27.0}, room_s=27.0
    ).stream.asked_room
    assert waiting == [27.0]
    dropped = caption(FileSource("x", iter([SECOND] * 2)), {"room_s": 0.5}, can_wait=False)
    assert dropped.run.dropped_s == 2.0
    assert dropped.stream.fed == []


class Filling(Echo):
    """A stream that has no room for a while, and then room for so many seconds at a time."""

    def __init__(self, on_event, room_by_ask) -> None:
        super().__init__(on_event)
        self.room_by_ask = iter(room_by_ask)

    def wait_for_room(self, seconds, timeout=None) -> bool:
        return next(self.room_by_ask, 30.0) >= seconds


def test_silence_takes_the_place_of_what_a_microphone_lost():
    """Else the times of all that follows are early. Two and a half seconds are lost, then one more
    while only two of them can be made up for."""
    streams, blocks = [], [SECOND, SECOND, SECOND[:8000], SECOND, 2 * SECOND]

    def open_stream(on_event):
        streams.append(Filling(on_event, [30.0, 0.0, 0.0, 1.0, 1.0, 0.0]))
        return streams[0]

    source = FileSource("x", iter([*blocks[:1], *[SECOND] * 2, *blocks[2:]]))
    run = Captioning(open_stream, source, Listener(lambda *_: None), can_wait=False)
    run.run()
    said = sum(map(len, [SECOND] * 3)) + len(blocks[2]) + len(SECOND) + len(blocks[4])
    heard = np.concatenate(streams[0].fed)
    assert run.dropped_s > 0
    assert len(heard) == said
    lost = heard == 0
    assert lost.sum() == run.dropped_s * 16_000
    np.testing.assert_array_equal(heard[:16_000], SECOND)
    np.testing.assert_array_equal(heard[-16_000:], 2 * SECOND)


def test_a_stop_is_noticed_while_waiting_for_room():
    asked = []
    done = caption(
        FileSource("x", iter([SECOND])),
        {"room_s": 0.0},
        is_stopped=lambda: len(asked) >= 5 or bool(asked.append(1)),
    )
    assert done.stream.calls == ["finish"]


def test_what_was_spoken_before_a_stop_is_heard():
    """A microphone's reader may be behind; what it has was said before somebody pressed q."""
    is_stopped = iter([False, True])
    done = caption(
        FileSource("x", iter([SECOND] * 5)), can_wait=False, is_stopped=lambda: next(is_stopped)
    )
    assert done.stream.calls == ["feed", "feed", "finish"]


def test_a_packet_that_is_longer_than_a_backlog_is_no_error():
    """A terminal that holds up its writer (Ctrl-S) holds up the microphone's reader, too."""
    long = np.concatenate([SECOND] * 45 + [SECOND[:800]])
    options = EngineConfig(n_slots=1, backlog_s=30.0)
    with testing.oracle_engine(options) as engine:
        run = Captioning(
            lambda on_event: engine.open(on_event=on_event),
            FileSource("x", iter([long, SECOND])),
            Listener(lambda *_: None),
            can_wait=False,
        )
        run.run()
    assert run.dropped_s <= 46.05 - 29  # what fits, and a piece


def test_the_first_signal_is_a_wish_and_the_second_ctrl_c_is_meant():
    before = signal.getsignal(signal.SIGINT)
    with StopSignals() as stop:
        assert not stop()
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="no SIGHUP here")
def test_nohup_is_heeded():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_paced_file_comes_at_the_speed_of_speech():
    now = SimpleNamespace(s=50.0)
    blocks = [np.full(640, i, np.float32) for i in range(10)]
    source = PacedSource("x", iter(blocks), lambda: now.s, lambda s: setattr(now, "s", now.s + s))
    seen = []
    while not source.is_finished:
        pcm = source.read(0.05)
        if pcm is not None:
            seen.append((int(pcm[0]), round(now.s - 50.0, 3)))
    assert seen == [(i, round(0.04 * (i + 1), 3)) for i in range(10)]


def test_a_paced_file_waits_no_longer_than_it_was_told():
    """The view is redrawn and keys are read in between, however long the packets are."""
    now = SimpleNamespace(s=0.0)
    source = PacedSource("x", iter([SECOND]), lambda: now.s, lambda s: setattr(now, "s", now.s + s))
    assert source.read(0.05) is None
    assert now.s == pytest.approx(0.05)


def test_a_pipe_is_decoded_as_it_comes_whatever_the_packets():
    reading, writing = os.pipe()
    stereo = np.array([[1000, 3000], [-2000, 2000], [32767, 32767]], "<i2").tobytes()
    with os.fdopen(reading, "rb") as pipe:
        source = PipeSource(pipe, AudioFormat("s16le", 16_000, 2))
        assert source.read(0.01) is None  # nothing there yet: no waiting for a full buffer
        parts = []
        for cut in (stereo[:3], stereo[3:9], stereo[9:]):
            os.write(writing, cut)
            parts.append(source.read(5.0))
        os.close(writing)
        while not source.is_finished:
            parts.append(source.read(5.0))
    pcm = np.concatenate([part for part in parts if part is not None])
    np.testing.assert_allclose(pcm, [2000 / 32768, 0.0, 32767 / 32768], atol=1e-7)


def test_latency_is_told_in_one_line():
    latency = Latency()
    for i in range(10):
        word = Word("x", float(i), i + 0.5, i + 1.0 + 0.01 * i)
        latency.add(messages.Final(" x", (word,), 0, time=i + 1.0), arrived_s=i + 1.2)
    latency.add(messages.SpeechStopped(10.0), arrived_s=10.5)
    latency.add(messages.SpeechStopped(11.0), arrived_s=11.5)  # a segment without words
    latency.add(messages.Done(12.0, 3.0, 12.0), arrived_s=12.5)
    assert latency.line() == (
        "emission delay p50 545 ms, p90 581 ms (10 words) | end of speech to final 700 ms"
        " | RTF 0.25 (3.0 s for 12.0 s)"
    )
    assert "no words" in Latency().line()


def test_a_file_with_a_header_on_standard_input_is_told_and_not_captioned_as_noise():
    read_fd, write_fd = os.pipe()
    with open(read_fd, "rb") as pipe, open(write_fd, "wb") as writer:
        writer.write(b"RIFF\x00\x00\x00\x00WAVEfmt ")
        writer.flush()
        source = PipeSource(pipe, AudioFormat())
        with pytest.raises(AudioFormatError, match="is a wav file, and raw PCM is expected"):
            source.read(5.0)


# --- destinations ------------------------------------------------------------------------------


def test_several_files_go_into_a_folder_each_with_its_own_name(tmp_path):
    names = ["a/talk.wav", "b/talk.mp3", "other.ogg", "-"]
    with Outputs(names, "srt", str(tmp_path / "new" / "captions") + "/") as outputs:
        for name in names:
            with outputs.open(name) as writer:
                writer.add(messages.Final(" hi", (Word("hi", 0, 0.2, 1),), 0, 1.0))
    written = sorted(path.name for path in (tmp_path / "new" / "captions").iterdir())
    assert written == ["other.srt", "stdin.srt", "talk.mp3.srt", "talk.wav.srt"]


def test_several_files_share_one_text_with_headings(tmp_path):
    with Outputs(["a.wav", "b.wav"], "txt", str(tmp_path / "all.txt")) as outputs:
        for name in ("a.wav", "b.wav"):
            with outputs.open(name) as writer:
                writer.add(messages.Final(f" {name}", (Word("x", 0, 0.2, 1),), 0, 1.0))
    assert (tmp_path / "all.txt").read_text() == "==> a.wav <==\na.wav\n\n==> b.wav <==\nb.wav\n"


@pytest.mark.parametrize(
    ("names", "kind", "output", "message"),
    [
        (["a.wav", "b.wav"], "srt", None, "one srt file cannot hold"),
        (["a.wav", "b.wav"], "json", "x.json", "one json file cannot hold"),
        (["a.wav"], "txt", "no/folder/x.txt", "there is no folder"),
        (["talk.txt"], "txt", "./talk.txt", "is also to be read"),
    ],
)
def test_a_destination_that_cannot_be_is_told_before_any_work(names, kind, output, message):
    with pytest.raises(ConfigError, match=message):
        Outputs(names, kind, output)


# --- whole runs --------------------------------------------------------------------------------


def test_a_place_without_permission_is_told_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everywhere
    with pytest.raises(ConfigError, match="no permission"):
        Outputs(["a.wav"], "txt", str(tmp_path / "a.txt"))


def test_a_source_without_sound_leaves_no_object_and_a_broken_one_does(tmp_path):
    """'file has no words' and 'file could not be read' must differ for who reads the JSON."""
    for err, n_lines in ((AudioFormatError("no sound", ""), 0), (DeviceError("gone", ""), 1)):
        path = tmp_path / f"{n_lines}.jsonl"
        with (
            Outputs(["a.wav"], "jsonl", str(path)) as outputs,
            pytest.raises(type(err)),
            outputs.open("a.wav"),
        ):
            raise err
        assert len(path.read_text().splitlines()) == n_lines


def test_one_bad_file_does_not_lose_the_others(tmp_path, monkeypatch, capsys):
    failed = []
    good = tmp_path / "good.wav"
    sources = {
        str(good): lambda: FileSource("good", iter([SECOND])),
        "bad.wav": lambda: FileSource("bad", _raise(AudioFormatError("damaged", "again"))),
    }
    monkeypatch.setattr(transcribe, "open_source", lambda name, fmt: sources[name]())
    with Outputs(list(sources), "txt", None) as outputs:
        transcribe.transcribe(
            Echo,
            {"bad.wav": 1.0, str(good): None},
            AudioFormat(),
            outputs,
            room_s=0.0,
            on_error=lambda name, err: failed.append((name, err.message)),
        )
    assert failed == [("bad.wav", "damaged")]
    assert capsys.readouterr().out.endswith(f"==> {good} <==\none\n")


def _raise(err):
    raise err
    yield


def test_ctrl_c_writes_what_was_heard_and_then_interrupts(monkeypatch, capsys):
    def blocks():
        yield SECOND
        os.kill(os.getpid(), signal.SIGINT)
        yield SECOND
        while True:
            yield SECOND

    monkeypatch.setattr(transcribe, "open_source", lambda name, fmt: FileSource(name, blocks()))
    with Outputs(["x"], "jsonl", None) as outputs, pytest.raises(KeyboardInterrupt):
        transcribe.transcribe(Echo, {"x": None}, AudioFormat(), outputs, 0.0, print)
    assert '"text": "one one"' in capsys.readouterr().out


def test_probing_names_what_is_no_sound(tmp_path):
    (tmp_path / "notes.wav").write_text("no sound at all")
    names = ["-", str(tmp_path / "notes.wav"), str(tmp_path / "missing.wav")]
    failed = {}
    assert transcribe.probe(names, failed.__setitem__) == {"-": None}
    assert set(failed) == set(names[1:])
    assert "there is no file" in failed[names[2]].message


def test_a_progress_bar_is_for_terminals_only(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for out, is_shown in ((Terminal(), True), (io.StringIO(), False)):
        monkeypatch.setattr(sys, "stderr", out)
        with transcribe.ProgressBar() as bar:
            for name in ("one.wav", "two.wav"):
                bar.start(name, 8.0)
                for _ in range(7):  # some of it still waits in the engine
                    bar.heard(SECOND)
                bar.event(messages.Done(8.0, 1.0, 8.0))
        assert ("two.wav" in out.getvalue() and "100%" in out.getvalue()) == is_shown


def test_a_live_session_writes_measures_and_tells(capsys):
    out = io.StringIO()
    from sparqle_stream import formats

    session = live.LiveSession(
        FileSource("x", iter([SECOND, SECOND])), QuietView(), formats.open_writer("txt", out, "x")
    )
    session.run(Echo)
    assert out.getvalue() == "one one\n"
    assert len(session.latency.emission_s) == 2
    assert not session.was_stopped


def test_a_stop_from_another_thread_ends_a_live_session():
    def forever():
        while True:
            yield SECOND[:160]

    session = live.LiveSession(FileSource("x", forever()), QuietView(), None)
    timer = threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGTERM))
    timer.start()
    session.run(Echo)
    timer.join()
    assert session.was_stopped
