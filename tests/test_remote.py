"""Streams on a server: they end with Done or Error, whatever happens to the connection."""

from __future__ import annotations

import queue
import threading

import numpy as np
import pytest

from sparqle_stream import client, messages, testing
from sparqle_stream.config import EngineConfig, StreamOptions, VadConfig
from sparqle_stream.errors import ConfigError
from sparqle_stream.remote import PACKETS, RemoteStream
from sparqle_stream.server import ServerConfig, background

SPOKEN = {"vad": "off", "pace": "file"}
SECOND = np.zeros(16_000, np.float32)


@pytest.fixture
def url():
    options = StreamOptions(vad=VadConfig(kind="off"))
    with (
        testing.oracle_engine(EngineConfig(n_slots=1)) as engine,
        background(engine, ServerConfig(port=0, defaults=options)) as address,
    ):
        yield address


def events_until_the_end(told: queue.SimpleQueue) -> list[messages.Event]:
    events = [told.get(timeout=30)]
    while not isinstance(events[-1], messages.Done | messages.Error):
        events.append(told.get(timeout=30))
    return events


def test_a_stream_is_captioned_to_its_end(url):
    told = queue.SimpleQueue()
    stream = RemoteStream(url, told.put, SPOKEN)
    for block in np.array_split(testing.say(["far", "away"]), 20):
        assert stream.wait_for_room(1.0, timeout=30.0)
        stream.feed(block)
    stream.finish()
    events = events_until_the_end(told)
    text = "".join(event.text for event in events if isinstance(event, messages.Final))
    assert text == "far away"
    assert isinstance(events[-1], messages.Done)


def test_a_busy_server_is_an_error_event(url):
    first_told, told = queue.SimpleQueue(), queue.SimpleQueue()
    first = RemoteStream(url, first_told.put, SPOKEN)
    assert isinstance(first_told.get(timeout=30), messages.Ready)
    RemoteStream(url, told.put, SPOKEN)
    (error,) = events_until_the_end(told)
    assert isinstance(error, messages.Error)
    assert "slots are taken" in error.message
    first.finish()
    assert isinstance(events_until_the_end(first_told)[-1], messages.Done)


def test_feeding_after_the_connection_was_lost_does_not_block():
    told = queue.SimpleQueue()
    stream = RemoteStream("ws://127.0.0.1:9", told.put, SPOKEN)
    (error,) = events_until_the_end(told)
    assert "cannot connect" in error.message
    for _ in range(PACKETS + 5):  # more than fit into its queue
        assert stream.wait_for_room(1.0, timeout=1.0)
        stream.feed(SECOND)
    stream.finish()


def test_nothing_is_told_after_a_cancel(url):
    told = queue.SimpleQueue()
    stream = RemoteStream(url, told.put, SPOKEN)
    assert isinstance(told.get(timeout=30), messages.Ready)
    stream.cancel()
    stream._thread.join(timeout=30)
    assert not stream._thread.is_alive()
    assert told.empty()


def test_a_server_that_falls_silent_is_an_error(monkeypatch):
    monkeypatch.setattr(client, "stream_sync", lambda *args, **kwargs: iter([]))
    told = queue.SimpleQueue()
    RemoteStream("ws://127.0.0.1:9", told.put, {})
    (error,) = events_until_the_end(told)
    assert (error.code, error.message) == ("connection", "the server stopped talking")


def test_a_bug_of_the_server_is_none_of_ours(monkeypatch):
    """`internal` ended the client with a traceback, and the files after it were not tried."""
    error = messages.Error("internal", "a bug", "connect again", 1.0)
    monkeypatch.setattr(client, "stream_sync", lambda *args, **kwargs: iter([error]))
    told = queue.SimpleQueue()
    RemoteStream("ws://127.0.0.1:9", told.put, {})
    (heard,) = events_until_the_end(told)
    assert (heard.code, heard.message, heard.hint) == ("server", "a bug", "connect again")


def test_a_wrong_address_is_told_at_once():
    with pytest.raises(ConfigError, match="not the address of a server"):
        RemoteStream("ftp://nowhere", print, {})


def test_a_bug_is_told_once(url, monkeypatch, caplog):
    """As the last event and in the log, not by the thread's end as well."""

    def broken(*_, **__):
        raise ZeroDivisionError("a bug")

    raised, told = [], queue.SimpleQueue()
    monkeypatch.setattr(threading, "excepthook", raised.append)
    monkeypatch.setattr(client, "stream_sync", broken)
    stream = RemoteStream(url, told.put, SPOKEN)
    (error,) = events_until_the_end(told)
    stream._thread.join(30.0)
    assert (error.code, error.message) == ("internal", "ZeroDivisionError: a bug")
    assert [record.message for record in caplog.records] == ["the client failed"]
    assert not raised
