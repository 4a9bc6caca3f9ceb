"""Lost connections: nothing is lost, nothing comes twice, whatever breaks and wherever.

SPARQLE_TEST_DISCONNECTS=10000 breaks that many connections; the default is a hundred.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from chaos import FOREVER, Chaos, Lives
from server_harness import WAIT_S, open_stream, rest, s16, serving, text, words

from sparqle_stream import client, messages, testing
from sparqle_stream.client import FLUSH
from sparqle_stream.config import EngineConfig, StreamOptions, VadConfig
from sparqle_stream.remote import RemoteStream
from sparqle_stream.server.resume import Ledger

OFF = StreamOptions(vad=VadConfig(kind="off"))
N_DISCONNECTS = int(os.environ.get("SPARQLE_TEST_DISCONNECTS", "100"))
VOCABULARY = testing.vocabulary(3600)
FILE = {"pace": "file"}


@pytest.fixture(scope="module")
def oracle():
    with testing.oracle_engine(EngineConfig(n_slots=16)) as engine:
        yield engine


@pytest.fixture(scope="module")
def port(oracle):
    with serving(oracle, defaults=OFF) as url:
        yield int(url.rpartition(":")[2])


def spoken(rng, n_words: int, flush_every: int = 0) -> tuple[list[str], list]:
    """Random words as blocks of random length, with a flush after some of them."""
    said = [str(word) for word in rng.choice(VOCABULARY, n_words)]
    blocks: list = []
    group = flush_every or n_words
    for start in range(0, n_words, group):
        pcm = testing.say(said[start : start + group])
        cuts = np.sort(rng.integers(0, len(pcm), 6))
        blocks += [part for part in np.split(pcm, cuts) if len(part)]
        if flush_every:
            blocks.append(FLUSH)
    return said, blocks


def check(events, said: list[str], n_flushes: int) -> None:
    found = words(events)
    assert [w.word for w in found] == said
    assert text(events) == " ".join(said)
    ends = [w.end for w in found]
    assert ends == sorted(ends)
    assert sum(isinstance(e, messages.Flushed) for e in events) == n_flushes
    kinds = [type(e) for e in events]
    assert kinds.count(messages.Ready) == kinds.count(messages.Done) == 1
    turns = [k for k in kinds if k in (messages.SpeechStarted, messages.SpeechStopped)]
    assert turns == [messages.SpeechStarted, messages.SpeechStopped] * (len(turns) // 2)
    segments = [e.segment for e in events if isinstance(e, messages.Final)]
    assert segments == sorted(segments)


def test_random_disconnects(port):
    """Cuts anywhere: in the handshake, in a frame, before the last word, after it, before done."""

    def lives(rng) -> Lives:
        if rng.random() < 0.2:  # while it is sending, or before
            return rng.uniform(0, 150_000), 1e12
        return 1e12, rng.uniform(0, rng.choice([1_500, 8_000]))

    with Chaos(lambda: port, lives) as chaos:

        def one(seed: int) -> None:
            rng = np.random.default_rng(seed)
            said, blocks = spoken(rng, 40, flush_every=int(rng.choice([4, 5, 10])))
            events = list(client.stream_sync(chaos.url, blocks, options=FILE, resume_s=WAIT_S))
            check(events, said, sum(block is FLUSH for block in blocks))

        def worker(first: int) -> None:
            for seed in range(first, 1_000_000, 4):
                if chaos.n_cut >= N_DISCONNECTS:
                    return
                while True:  # the very first handshake is the caller's own to repeat
                    try:
                        one(seed)
                        break
                    except client.ServerError as err:
                        if isinstance(err, client.LostError) and "1006" not in err.message:
                            raise

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(worker, range(4)))
        assert chaos.n_cut >= N_DISCONNECTS


def test_speech_without_a_pause_is_acknowledged_in_parts(port):
    """40 s of one utterance: what is sent again is some seconds, not everything."""

    def lives(rng) -> Lives:
        return 1e12, rng.uniform(0, 40_000)

    with Chaos(lambda: port, lives) as chaos:
        for seed in range(3):
            said, blocks = spoken(np.random.default_rng(seed), 125)
            while True:
                try:
                    events = list(client.stream_sync(chaos.url, blocks, options=FILE))
                    break
                except client.ServerError:
                    continue
            check(events, said, 0)
        assert chaos.n_cut >= 1


def test_another_server_takes_over(oracle):
    """The first one drains (1012) in the middle: the second has never heard of the stream."""
    said = VOCABULARY[100:150]
    pcm = testing.say(said)
    stopped = threading.Event()
    ports: list[int] = []
    drained = threading.Event()

    def first_server() -> None:
        with serving(oracle, defaults=OFF, drain_s=0.2) as url:
            ports.append(int(url.rpartition(":")[2]))
            stopped.wait(WAIT_S)
        drained.set()

    thread = threading.Thread(target=first_server)
    thread.start()
    while not ports:
        time.sleep(0.01)

    def microphone():
        middle = len(pcm) // 2
        yield pcm[:middle]
        time.sleep(0.3)
        stopped.set()
        assert drained.wait(WAIT_S)
        yield pcm[middle:]

    with (
        testing.oracle_engine(EngineConfig(n_slots=2)) as other,
        serving(other, defaults=OFF) as url,
        Chaos(lambda: ports[-1], lambda _: FOREVER) as proxy,
    ):
        ports_of_second = int(url.rpartition(":")[2])
        stop_watch = threading.Thread(
            target=lambda: (stopped.wait(WAIT_S), ports.append(ports_of_second))
        )
        stop_watch.start()
        events = list(client.stream_sync(proxy.url, microphone(), options=FILE))
        stop_watch.join()
    thread.join()
    check(events, said, 0)
    codes = [e.code for e in events if isinstance(e, messages.Warning)]
    assert codes == ["draining", "reconnected"]
    assert events[-1].duration == pytest.approx(len(pcm) / 16_000)


def test_a_remote_stream_resumes_by_itself(port):
    """What the command line's `client` uses."""
    lives = iter([(1e12, 3_000.0)])
    said = VOCABULARY[200:240]
    told: list = []
    done = threading.Event()

    def on_event(event) -> None:
        told.append(event)
        if isinstance(event, messages.Done | messages.Error):
            done.set()

    with Chaos(lambda: port, lambda _: next(lives, FOREVER)) as chaos:
        stream = RemoteStream(chaos.url, on_event, FILE)
        for block in np.array_split(testing.say(said), 50):
            stream.feed(block)
        stream.finish()
        assert done.wait(WAIT_S)
        assert chaos.n_cut == 1
    check(told, said, 0)


def test_without_resuming_a_lost_connection_is_an_error(port):
    pcm = testing.say(VOCABULARY[:60])
    with Chaos(lambda: port, lambda _: (1e12, 3_000.0)) as chaos, pytest.raises(client.LostError):
        list(client.stream_sync(chaos.url, [pcm], options=FILE, resume_s=0))


def test_patience_ends(oracle):
    """The server is gone for good: the error says so, after the time that was asked for."""
    with serving(oracle, defaults=OFF) as url:
        gone = Chaos(lambda: 9, lambda _: FOREVER)
        port = int(url.rpartition(":")[2])
        targets = iter([port])
        gone._target = lambda: next(targets, 9)
        gone._lives = lambda _: (1e12, 3_000.0)
        with gone:
            start = time.perf_counter()
            pcm = testing.say(VOCABULARY[:60])
            with pytest.raises(client.ServerError):
                list(client.stream_sync(gone.url, [pcm], options=FILE, resume_s=0.5))
            assert 0.2 < time.perf_counter() - start < 30


def test_offsets_count_in_the_samples_that_are_sent(port):
    """By hand, at 8 kHz: the second connection begins at the acknowledged sample."""
    url = f"ws://127.0.0.1:{port}"
    first, second = testing.say(["first"]), testing.say(["second"])
    with open_stream(url, ack="on", format="s16le", sample_rate=16_000) as websocket:
        websocket.send(s16(first))
        websocket.send('{"type": "flush"}')
        seen = [messages.from_json(websocket.recv(timeout=WAIT_S))]
        while not isinstance(seen[-1], messages.Acknowledged) or seen[-1].time < 0.3:
            seen.append(messages.from_json(websocket.recv(timeout=WAIT_S)))
    ack, ready = seen[-1], seen[0]
    assert ack.offset == round(ack.time * 16_000)
    assert len(first) - 1280 <= ack.offset <= len(first)
    query = {"stream_id": ready.stream_id, "offset": ack.offset, "segment": 1, "after": "0.3"}
    with open_stream(url, ack="on", pace="file", **query) as websocket:
        websocket.send(s16(np.concatenate([first, second])[ack.offset :]))
        websocket.send(json.dumps({"type": "end"}))
        events = rest(websocket)
    assert events[0].stream_id == ready.stream_id
    assert text(seen) + text(events) == "first second"
    (final,) = [e for e in events if isinstance(e, messages.Final)]
    assert final.segment == 1
    assert final.words[0].start > len(first) / 16_000 - 0.05
    assert events[-1].duration == pytest.approx(len(first) / 16_000 + len(second) / 16_000)


@pytest.mark.parametrize(
    "query",
    [
        {"offset": 5},
        {"stream_id": "no spaces"},
        {"stream_id": "x", "after": "-1"},
        {"stream_id": "x", "after": "nan"},
        {"stream_id": "x", "offset": "-1"},
        {"stream_id": "x", "offset": "1e9"},
        {"ack": "yes"},
    ],
)
def test_fields_that_cannot_be(port, query):
    with open_stream(f"ws://127.0.0.1:{port}", **query) as websocket:
        (error,) = rest(websocket)
    assert error.code == "invalid_option"
    assert websocket.close_code == 1008


def test_silence_is_acknowledged(oracle):
    """With a detector: an hour of nothing must not have to be kept by the client."""
    with serving(oracle) as url, open_stream(url, ack="on", pace="file") as websocket:
        n_sent, event = 0, None
        while not isinstance(event, messages.Acknowledged):
            websocket.send(bytes(8_000))  # it is acknowledged while more comes
            n_sent += 4_000
            with contextlib.suppress(TimeoutError):
                event = messages.from_json(websocket.recv(timeout=0.1))
    assert 1.0 < event.time < n_sent / 16_000 - 3


def final(*spans, text: str) -> messages.Final:
    parts = zip(text.split(), spans, strict=True)
    return messages.Final(text, tuple(messages.Word(w, a, b, b) for w, (a, b) in parts), 0, 1.0)


def test_words_that_the_client_has_are_dropped():
    ledger = Ledger(origin=10.0, after=11.0, first_segment=3)
    told = ledger.translate(final((0.2, 0.5), (0.6, 1.01), (1.05, 1.4), text="half known new"))
    assert (told.text, told.segment) == (" new", 3)
    assert [(w.start, w.end) for w in told.words] == [(11.05, 11.4)]
    assert ledger.translate(final((0.2, 0.5), text=" old")) is None


def test_a_word_at_the_very_start_is_no_old_one():
    """A client that has no word yet gets all of them, one of no length at 0 too."""
    words = (messages.Word("oh", 0.0, 0.0, 0.5), messages.Word("no", 0.0, 0.2, 0.5))
    final = messages.Final("oh no", words, 0, 0.5)
    assert Ledger().translate(final) == final


def test_a_new_word_gets_its_space():
    assert Ledger(origin=10.0, after=9.0).translate(final((0.2, 0.5), text="new")).text == " new"
    assert Ledger(origin=10.0).translate(final((0.2, 0.5), text="new")).text == "new"


def test_what_may_be_forgotten():
    """Inside an utterance its beginning, in a long one some seconds, never a word still to come."""
    ledger = Ledger()
    ledger.translate(messages.SpeechStarted(5.0))
    assert ledger.settle_heard(10.0, 0.5) == pytest.approx(4.96)
    ledger.translate(final((18.0, 19.0), text="word"))
    assert ledger.settle_heard(25.0, 0.5) == pytest.approx(21.44)
    ledger.translate(messages.Tail("heard", 30.0))
    assert ledger.settle_heard(60.0, 0.5) is None
    ledger.translate(messages.SpeechStopped(31.0))
    assert ledger.settle(messages.SpeechStopped(31.0)) == pytest.approx(30.96, abs=0.08)
