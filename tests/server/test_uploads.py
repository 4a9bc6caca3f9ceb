"""/v1/audio/transcriptions with OpenAI's own client, and what goes wrong with a file."""

from __future__ import annotations

import contextlib
import errno
import http.client
import io
import json
import os
import socket
import threading
import time
import wave

import openai
import pytest
from openai import OpenAI
from server_harness import WAIT_S, get, s16, serving, wait_until

from sparqle_stream import testing
from sparqle_stream.config import EngineConfig, StreamOptions, VadConfig
from sparqle_stream.errors import ConfigError
from sparqle_stream.server import openai_files, uploads

OFF = StreamOptions(vad=VadConfig(kind="off"))
WORDS = testing.vocabulary(30)
PCM = testing.say(WORDS)
TEXT = " ".join(WORDS)


def wav(pcm) -> bytes:
    out = io.BytesIO()
    with wave.open(out, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16_000)
        file.writeframes(s16(pcm))
    return out.getvalue()


FILE = ("talk.wav", wav(PCM))


@pytest.fixture(scope="module")
def engine():
    with testing.oracle_engine(EngineConfig(n_slots=2)) as engine:
        yield engine


@pytest.fixture(scope="module")
def url(engine):
    with serving(engine, defaults=OFF, api_key="k", upload_bytes=4 << 20) as url:
        yield url


@pytest.fixture
def client(url):
    base = url.replace("ws", "http", 1)
    with OpenAI(base_url=f"{base}/v1", api_key="k", max_retries=0) as client:
        yield client


def create(client, **fields):
    return client.audio.transcriptions.create(file=FILE, model="tiny", **fields)


def test_json_and_text(client):
    answer = create(client)
    assert answer.text == TEXT
    assert answer.usage.type == "duration"
    assert answer.usage.seconds == pytest.approx(len(PCM) / 16_000, abs=0.01)
    assert create(client, response_format="text") == f"{TEXT}\n"


def test_a_full_temporary_folder_is_told_and_frees_the_slot(client, url, monkeypatch):
    """It was 500 and a traceback in the log: a tmpfs of 2 GiB is full after eight large files."""

    def full(*_args, **_kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(uploads, "_receive", full)
        with pytest.raises(openai.InternalServerError) as refused:
            create(client)
    assert refused.value.status_code == 503
    assert refused.value.response.headers["Retry-After"] == "5"
    assert "no room for the file" in refused.value.message
    assert get(url, "/readyz")[1]["slots_free"] == 2


def test_verbose_json(client):
    answer = create(
        client, response_format="verbose_json", timestamp_granularities=["word", "segment"]
    )
    assert answer.text == TEXT
    assert answer.task == "transcribe"
    assert answer.duration == pytest.approx(len(PCM) / 16_000, abs=0.01)
    assert [w.word for w in answer.words] == WORDS
    assert " ".join(s.text for s in answer.segments) == TEXT
    assert answer.segments[0].id == 0
    only_words = create(client, response_format="verbose_json", timestamp_granularities=["word"])
    assert only_words.segments is None


def test_subtitles(client):
    srt = create(client, response_format="srt")
    assert srt.startswith("1\n00:00:00,")
    vtt = create(client, response_format="vtt")
    assert vtt.startswith("WEBVTT\n\n00:00:00.")
    for text in (srt, vtt):
        assert [word for word in text.split() if word in WORDS] == WORDS


def test_server_sent_events(client):
    events = list(create(client, stream=True))
    assert {e.type for e in events[:-1]} == {"transcript.text.delta"}
    assert len(events) >= 5
    assert events[-1].type == "transcript.text.done"
    assert events[-1].text == "".join(e.delta for e in events[:-1]) == TEXT


def test_dials_reach_the_engine():
    form = [("prompt", "Anna"), ("chunking_strategy", '{"type": "server_vad", "threshold": 0.7}')]
    asked = openai_files.parse(form, "m-en", OFF)
    assert asked.options.prompt == "Anna"
    assert (asked.options.vad.kind, asked.options.vad.threshold) == ("silero", 0.7)
    assert openai_files.parse([("chunking_strategy", "auto")], "m-en", OFF).options == OFF


@pytest.mark.parametrize(
    ("form", "named"),
    [
        ([("temperature", "0.7")], "temperature"),
        ([("temperature", "warm")], "temperature"),
        ([("language", "fr")], "language"),
        ([("response_format", "diarized_json")], "diarized_json"),
        ([("include[]", "logprobs")], "include"),
        ([("keywords[]", "a")], "keywords"),
        ([("timestamp_granularities[]", "word")], "verbose_json"),
        ([("response_format", "srt"), ("stream", "true")], "stream"),
        ([("langauge", "en")], "did you mean language"),
        ([("chunking_strategy", "{}")], "chunking_strategy"),
        ([("prompt", "a"), ("prompt", "b")], "twice"),
        ([("stream", "maybe")], "stream"),
    ],
)
def test_what_is_not_honoured_is_refused(form, named):
    with pytest.raises(ConfigError) as refused:
        openai_files.parse(form, "m-en", OFF)
    assert named in str(refused.value)


def test_openais_own_name_means_the_model_that_runs(client):
    """Programs that were only given another address ask for it; the answer says what it got."""
    answer = client.audio.transcriptions.with_raw_response.create(file=FILE, model="whisper-1")
    assert answer.headers["openai-model"] == "tiny"
    assert answer.parse().text == create(client).text


def test_errors_in_openais_envelope(client, url):
    with pytest.raises(openai.NotFoundError, match="unknown model"):
        client.audio.transcriptions.create(file=FILE, model="whisper-2")
    with pytest.raises(openai.BadRequestError, match="temperature"):
        create(client, temperature=1.0)
    with pytest.raises(openai.BadRequestError) as refused:
        client.audio.transcriptions.create(file=("x.wav", b"no sound at all"), model="tiny")
    assert refused.value.code == "invalid_audio"
    assert "/tmp" not in str(refused.value), "a path of the server"
    with pytest.raises(openai.APIStatusError, match="over 4 MiB") as large:
        client.audio.transcriptions.create(file=("x.wav", bytes(5 << 20)), model="tiny")
    assert large.value.status_code == 413
    stranger = OpenAI(base_url=str(client.base_url), api_key="wrong", max_retries=0)
    with stranger, pytest.raises(openai.AuthenticationError):
        create(stranger)
    assert get(url, "/readyz")[1]["slots_free"] == 2


def post(url: str, body: bytes, content_type: str = "text/plain") -> tuple[int, dict]:
    host, port = url.removeprefix("ws://").split(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=WAIT_S)
    headers = {"Authorization": "Bearer k", "Content-Type": content_type}
    connection.request("POST", "/v1/audio/transcriptions", body, headers)
    response = connection.getresponse()
    answer = json.loads(response.read())
    connection.close()
    return response.status, answer


@pytest.mark.parametrize(
    ("body", "content_type"),
    [
        (b"hello", "text/plain"),
        (b"", "multipart/form-data; boundary=x"),
        (b"--x\r\nnonsense", "multipart/form-data; boundary=x"),
        (b"--x\r\n\r\nabc\r\n--x--", "multipart/form-data; boundary=x"),
        (b"a=b", "application/x-www-form-urlencoded"),
    ],
)
def test_what_is_no_form(url, body, content_type):
    status, answer = post(url, body, content_type)
    assert status == 400
    assert answer["error"]["type"] == "invalid_request_error"


def test_a_playlist_leads_nowhere(url, client):
    """FFmpeg follows names in playlists: to other files of the server, or into its network."""
    for text in ("#EXTM3U\n#EXTINF:1,\n/etc/hostname\n", "ffconcat version 1.0\nfile /etc/hosts\n"):
        with pytest.raises(openai.BadRequestError):
            client.audio.transcriptions.create(file=("x.m3u8", text.encode()), model="tiny")


def test_a_full_server(engine, client):
    streams = [engine.open(OFF) for _ in range(2)]
    with pytest.raises(openai.APIStatusError) as busy:
        create(client)
    assert busy.value.status_code == 503
    assert busy.value.response.headers["Retry-After"] == "5"
    for stream in streams:
        stream.cancel()
    assert create(client).text == TEXT


def test_a_client_that_hangs_up_frees_its_slot(engine, url):
    host, port = url.removeprefix("ws://").split(":")
    long = wav(testing.say(WORDS * 12))
    head = b"--x\r\nContent-Disposition: form-data; name=file; filename=a.wav\r\n\r\n"
    body = head + long + b"\r\n--x--\r\n"
    for n_sent in (len(body) // 2, len(body)):
        with socket.create_connection((host, int(port))) as sock:
            sock.sendall(
                b"POST /v1/audio/transcriptions HTTP/1.1\r\nHost: h\r\nAuthorization: Bearer k\r\n"
                b"Content-Type: multipart/form-data; boundary=x\r\n"
                b"Content-Length: %d\r\n\r\n" % len(body)
            )
            sock.sendall(body[:n_sent])
            time.sleep(0.3)
        wait_until(lambda: get(url, "/readyz")[1]["slots_free"] == 2)
        assert engine.metrics().n_streams == 0


def test_a_client_that_leaves_its_events_frees_its_slot(engine, url, client):
    for n_read in (0, 1):
        events = create(client, stream=True)
        for _ in range(n_read):
            next(iter(events))
        events.close()
        wait_until(lambda: get(url, "/readyz")[1]["slots_free"] == 2)
        assert engine.metrics().n_streams == 0


def test_a_recording_that_is_too_long(engine):
    with serving(engine, defaults=OFF, max_stream_s=2.0) as url:
        base = url.replace("ws", "http", 1)
        with OpenAI(base_url=f"{base}/v1", api_key="k", max_retries=0) as client:
            with pytest.raises(openai.APIStatusError, match="too long") as refused:
                create(client)
            assert refused.value.status_code == 413
            assert [m.id for m in client.models.list()] == ["tiny"]


def test_a_failure_while_the_file_is_read_is_an_answer(client, engine, monkeypatch):
    """What is no error of the file ended the reading and nothing else: the client waited on."""

    def broken(path, block):
        raise MemoryError("a bug")

    monkeypatch.setattr("sparqle_stream.server.uploads.audio.stream_file", broken)
    with pytest.raises(openai.APIStatusError) as failed:
        client.with_options(timeout=WAIT_S).audio.transcriptions.create(file=FILE, model="tiny")
    assert failed.value.status_code == 500
    assert failed.value.code == "internal"
    assert engine.metrics().n_streams == 0


def test_an_upload_does_not_wait_for_the_files_of_others(engine, monkeypatch):
    """The loop has few threads for all: whoever came when each had a file in it had to wait."""
    monkeypatch.setattr(os, "cpu_count", lambda: -3)  # the loop's pool has four more: one thread
    pump, is_held, may_go = uploads.Upload._pump, threading.Event(), threading.Event()

    def slow_for_the_first(self, stream, path):
        if not is_held.is_set():
            is_held.set()
            may_go.wait(WAIT_S)
        pump(self, stream, path)

    monkeypatch.setattr(uploads.Upload, "_pump", slow_for_the_first)
    body = form_of(PCM)
    try:
        with (
            serving(engine, defaults=OFF) as url,
            begin_post(url, len(body)) as first,
            begin_post(url, len(body)) as second,
        ):
            first.sendall(body)
            assert is_held.wait(WAIT_S)
            second.sendall(body)
            answer = b""
            while b"transcript.text.done" not in answer:
                answer = answer[-200:] + second.recv(1000)
            may_go.set()
    finally:
        may_go.set()


def begin_post(url: str, length: int, content_type: str = "multipart/form-data; boundary=x"):
    """A connection on which so many bytes of a form are to follow."""
    host, port = url.removeprefix("ws://").split(":")
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
    sock.settimeout(WAIT_S)
    sock.connect((host, int(port)))
    head = "POST /v1/audio/transcriptions HTTP/1.1\r\nHost: h\r\nContent-Type: {}\r\n"
    sock.sendall(f"{head.format(content_type)}Content-Length: {length}\r\n\r\n".encode())
    return sock


def form_of(pcm) -> bytes:
    """A form that asks for server-sent events."""
    part = b"--x\r\nContent-Disposition: form-data; name="
    return b"".join(
        (part, b"stream\r\n\r\ntrue\r\n")
        + (part, b"file; filename=a.wav\r\n\r\n", wav(pcm), b"\r\n--x--\r\n")
    )


@pytest.fixture
def long_words(monkeypatch):
    """Stands for hours of them: what waits for the reader is more than the kernel takes."""
    delta = openai_files.Result.delta

    def longer(self, event, *, is_first):
        return delta(self, event, is_first=is_first) + ": " + "x" * 4_000_000 + "\n\n"

    monkeypatch.setattr(openai_files.Result, "delta", longer)


@pytest.mark.usefixtures("no_traceback", "long_words")
def test_a_reader_that_stops_is_cut(engine):
    """Its slot was taken until it came back to its senses."""
    body = form_of(PCM)
    with serving(engine, defaults=OFF, send_s=0.5) as url:
        with begin_post(url, len(body)) as sock:
            sock.sendall(body)
            wait_until(lambda: get(url, "/readyz")[1]["slots_free"] == 1)
            wait_until(lambda: get(url, "/readyz")[1]["slots_free"] == 2)
            answer = b""
            with contextlib.suppress(ConnectionResetError):
                while part := sock.recv(1 << 20):
                    answer = answer[-100:] + part
            assert not answer.endswith(b"0\r\n\r\n"), "the last chunk of all"
        assert engine.metrics().n_streams == 0


@pytest.mark.usefixtures("no_traceback", "long_words")
def test_a_reader_that_is_slow_has_max_stream_s(engine):
    """It takes something all the time, so that no single send lasts too long."""
    body = form_of(testing.say(WORDS[:6]))  # not too long in audio
    with serving(engine, defaults=OFF, max_stream_s=3.0) as url:
        with begin_post(url, len(body)) as sock:
            began = time.monotonic()
            sock.sendall(body)
            answer = b""
            while b'"type": "error"' not in answer:
                part = sock.recv(100_000)
                assert part, "the end, and no error"
                answer = answer[-200:] + part
                time.sleep(0.1 if time.monotonic() - began < 3.0 else 0.0)
            assert b"takes too long" in answer
        wait_until(lambda: get(url, "/readyz")[1]["slots_free"] == 2)


@pytest.mark.usefixtures("no_traceback")
def test_a_form_that_drips_in_has_max_stream_s(engine):
    """One byte in a while kept a slot for as long as the client liked."""
    body = form_of(PCM)
    with serving(engine, defaults=OFF, idle_s=1.0, max_stream_s=1.5) as url:
        with begin_post(url, len(body)) as sock:
            sock.settimeout(0.1)
            answer = b""
            for i in range(200):
                sock.sendall(body[i : i + 1])
                with contextlib.suppress(TimeoutError):
                    answer = sock.recv(1000)
                    break
            sock.settimeout(WAIT_S)
            with contextlib.suppress(ConnectionResetError):
                while part := sock.recv(1000):  # the head and the body are two writes
                    answer += part
            assert answer.startswith(b"HTTP/1.1 408 ")
            assert b"takes too long" in answer
            assert b"connection: close" in answer.lower()
        assert get(url, "/readyz")[1]["slots_free"] == 2


@pytest.mark.usefixtures("no_traceback")
def test_a_form_that_cannot_hold_a_file_is_not_read(engine):
    """Starlette 1.0 would gather all of it in memory: its parser of such forms has no limits."""
    form = "application/x-www-form-urlencoded"
    with serving(engine, defaults=OFF) as url, begin_post(url, 1 << 20, form) as sock:
        sock.sendall(b"a=")
        assert sock.recv(1000).startswith(b"HTTP/1.1 400 ")
