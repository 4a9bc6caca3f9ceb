"""Session: from an oracle's tokens to words that leave whole, in time, and to the last one."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from gates import LONG_S, Gate

from sparqle_stream import testing
from sparqle_stream.config import EngineConfig, StreamOptions, VadConfig
from sparqle_stream.session import Session
from sparqle_stream.stream import Stream
from sparqle_stream.testing import oracle_engine, say, text_of, vocabulary, words_of

OFF = VadConfig(kind="off")
OPTIONS = StreamOptions(vad=OFF)


@pytest.fixture
def engine():
    with oracle_engine() as engine:
        yield engine


@pytest.mark.parametrize("delay_ms", [0, 240, 960])
def test_words_leave_with_the_first_chunk_that_ends_late_enough(engine, delay_ms):
    words = vocabulary(20)
    events = engine.transcribe(say(words), StreamOptions(vad=OFF, delay_ms=delay_ms))
    out = words_of(events)
    assert [w.word for w in out] == words
    for i, word in enumerate(out[:-5]):
        end = 0.04 + 0.32 * i + 0.16  # four letters and a gap of 160 ms a word, 40 ms before
        assert word.end == pytest.approx(end + 0.04, abs=0.021)
        assert word.start == pytest.approx(end - 0.16 - 0.04, abs=0.021)
        # The oracle knows that a word is over 40 ms after it; then the delay, then the chunk.
        assert delay_ms / 1000 <= word.emitted - end <= delay_ms / 1000 + 0.32 + 0.04


def test_the_last_word_comes_out_at_the_end(engine):
    """The audio stops with the last sample of the word: no silence follows that could show it."""
    pcm = np.trim_zeros(say(["only", "this"]))
    pcm = np.concatenate([np.zeros(640, np.float32), pcm])
    for delay_ms in (0, 240, 960):
        events = engine.transcribe(pcm, StreamOptions(vad=OFF, delay_ms=delay_ms))
        assert text_of(events) == "only this"
        assert all(w.end <= w.emitted <= len(pcm) / 16_000 for w in words_of(events))


def test_words_leave_whole_however_slowly_they_may_be_written(engine, monkeypatch):
    """Words of six tokens each, four words a second, 12 tokens a second allowed: every chunk ends
    at the cap, mostly in a word, which then waits for its rest.
    """
    encode = testing.WordTokenizer.encode

    def by_letter(tokenizer, text):
        pieces = (text[:2], *text[2:])  # a letter with its space, letters
        return [i for piece in pieces for i in encode(tokenizer, piece)]

    words = ["absent", "butane", "candle", "disney", "efront", "finger"]
    monkeypatch.setattr(testing.WordTokenizer, "encode", by_letter)
    pcm = np.concatenate([say(words), np.zeros(64_000, np.float32)])
    out = words_of(engine.transcribe(pcm, OPTIONS))
    assert [w.word for w in out] == words
    assert len({w.emitted for w in out}) >= 4


@pytest.mark.parametrize("chunk_ms", [80, 320])
def test_times_of_words_know_nothing_of_the_delay(engine, chunk_ms):
    """Look-ahead is a lag of the encoder; what it takes of the delay must not show in them."""
    pcm, said = say(vocabulary(12)), {}
    for delay_ms in (0, 100, 240, 320, 400, 960):
        options = StreamOptions(vad=OFF, chunk_ms=chunk_ms, delay_ms=delay_ms)
        words = words_of(engine.transcribe(pcm, options))
        said[delay_ms] = [(w.word, w.start, w.end) for w in words]
        late = [w.emitted - w.end for w in words[:-4]]  # the end of the stream brings the last
        assert min(late) >= delay_ms / 1000 - 0.081
        assert max(late) <= (delay_ms + chunk_ms) / 1000 + 0.081
    assert len(said[0]) == 12
    assert all(words == said[0] for words in said.values())


def test_patience_ends_with_a_chunk():
    """However long speech has to last: nobody's backlog is filled by what waits."""
    options = StreamOptions(vad=VadConfig(kind="webrtc", min_speech_ms=60_000))
    assert Session(testing.oracle_model(), options, 8).patience == options.chunk_samples


def test_who_waits_for_room_is_heard_although_the_worker_was_listening(engine, monkeypatch):
    gate = Gate(monkeypatch, Session, "listen")
    stream = engine.open(StreamOptions(vad=VadConfig(kind="webrtc")))
    stream.feed(np.zeros(320, np.float32))
    assert gate.entered.wait(LONG_S)
    stream.feed(np.zeros(100, np.float32))  # may wait, says the worker in a moment
    with ThreadPoolExecutor() as pool:
        has_room = pool.submit(stream.wait_for_room, 1e9, 5.0)
        time.sleep(0.05)
        gate.opened.set()
        assert has_room.result()


@pytest.mark.parametrize("kind", ["webrtc", "silero"])
@pytest.mark.parametrize("n_packet", [100, 5_120, 16_000])
def test_speech_takes_no_more_room_than_its_packet_had(clip, kind, n_packet):
    """What the detector kept of the time before it was sure comes back into the queue when
    somebody else may have seen that there is room."""
    session = Session(testing.oracle_model(), StreamOptions(vad=VadConfig(kind=kind)), 8)
    heard = np.concatenate([np.zeros(32_000, np.float32), clip])
    is_back = False
    for at in range(0, len(heard), n_packet):
        part, n_new, n_waiting = heard[at : at + n_packet], session.n_new, session.n_waiting
        session.enqueue(session.listen(part))
        assert session.n_new <= n_new + len(part)
        is_back |= session.n_waiting > n_waiting + len(part)
    assert is_back or n_packet >= 16_000
    assert 0 < session.n_new < session.n_waiting


def test_who_saw_room_may_feed_although_speech_was_found_since(clip, monkeypatch):
    gate = Gate(monkeypatch)
    with oracle_engine(EngineConfig(backlog_s=4.0)) as engine:
        stream = engine.open(StreamOptions(vad=VadConfig(kind="webrtc")))
        stream.feed(np.zeros(32_000, np.float32))
        assert stream.wait_for_room(4.0, LONG_S)  # all of it was silence
        stream.feed(clip[:24_000])
        room_s = stream.room_s
        assert gate.entered.wait(LONG_S)  # speech was found
        assert stream.backlog_s > 1.5 >= stream.taken_s
        stream.feed(clip[24_000:][: int(room_s * 16_000)])
        gate.opened.set()
        stream.cancel()


def test_audio_on_its_way_into_the_session_is_no_room():
    """A server asks without the worker's lock."""

    class Moving:
        @property
        def n_new(self) -> int:
            stream.n_inbox = 0  # the worker has just taken it
            return 0

    stream = Stream(None, 0, OPTIONS, None)
    stream.n_inbox, stream.session = 16_000, Moving()
    assert stream.taken_s == 1.0
