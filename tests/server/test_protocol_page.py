"""docs/protocol.md names every field, frame, event, code and limit of the code, and no others."""

from __future__ import annotations

import ast
import re
from dataclasses import fields
from pathlib import Path

import pytest

from sparqle_stream import messages
from sparqle_stream.config import EngineConfig
from sparqle_stream.server import (
    deepgram,
    openai_files,
    openai_realtime,
    openai_session,
    request,
    settings,
    stream,
    vllm_realtime,
    whisper_live,
    whisper_live_kit,
    wyoming,
)

PAGE = (Path(__file__).parents[2] / "docs" / "protocol.md").read_text()


def section(title: str) -> str:
    return PAGE.split(f"## {title}", 1)[1].split("\n## ", 1)[0]


def rows(text: str, header: str) -> list[list[str]]:
    """Cells of the table whose header begins so."""
    lines = text[text.index(f"| {header}") :].split("\n\n", 1)[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip()[1:-1].split("|")] for line in lines]


def ticked(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


OWN, REALTIME, LIMITS = section("`/v1/stream`"), section("`/v1/realtime`"), section("Limits")


def test_query_fields():
    named = [name for row in rows(OWN, "query field") for name in ticked(row[0])]
    assert sorted(named) == sorted([*stream.QUERY_FIELDS, *request.KEY_FIELDS])


def test_frames():
    named = [re.search(r'"type": "(\w+)"', row[0]) for row in rows(OWN, "frame")]
    assert [m[1] for m in named if m] == list(stream.COMMANDS)


def test_events_and_their_fields():
    table = {ticked(row[0])[0]: row[1:] for row in rows(OWN, "`type`")}
    assert table.keys() == messages._NAMES.keys()
    for name, kind in messages._NAMES.items():
        own = [f.name for f in fields(kind) if f.name not in ("time", "lag")]
        assert ticked(table[name][0]) == own, name
    assert [f.name for f in fields(messages.Word)] == re.findall(
        r"\w+", re.search(r"`\{(word[^}]*)\}`", OWN)[1]
    )


def test_close_codes():
    table = {ticked(row[0])[0]: int(row[1]) for row in rows(OWN, "error `code`")}
    done = table.pop("done")
    assert done in (settings.Close.NORMAL, settings.Close.RESTART)
    assert table == {code: int(close) for code, close in settings.CLOSE_OF.items()}


def test_defaults_and_limits():
    cfg = settings.ServerConfig()
    for text in (
        f"`--idle-s` ({cfg.idle_s:g} s)",
        f"`--drain-s` ({cfg.drain_s:g} s)",
        f"| {cfg.outbox_events}; ",
        f"| {cfg.message_bytes >> 20} MiB |",
        f"| {cfg.frame_bytes >> 20} MiB |",
        f"| {cfg.append_bytes >> 20} MiB |",
        f"| {cfg.send_s:g} s |",
        f"`--slots` ({EngineConfig().n_slots})",
        f"| audio waiting to be captioned | {EngineConfig().backlog_s:g} s |",
    ):
        assert text in LIMITS, text
    assert f"ws://127.0.0.1:{cfg.port}/" in OWN
    assert f"the server's ({cfg.defaults.chunk_ms})" in OWN
    assert f"the server's ({cfg.defaults.delay_ms})" in OWN
    assert f"the server's ({cfg.defaults.vad.stop_ms})" in OWN
    assert f"up to {settings.MAX_PROMPT_CHARS} characters" in OWN


def test_openai_events():
    named = [name for row in rows(REALTIME, "event | |") for name in ticked(row[0])]
    assert list(openai_realtime.CLIENT_EVENTS) == named[: len(openai_realtime.CLIENT_EVENTS)]
    said = {name for row in rows(REALTIME, "event | when") for name in ticked(row[0])}
    source = Path(openai_realtime.__file__).read_text()
    sent = set()
    for call in [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Call)]:
        if ast.unparse(call.func) == "self._send":
            name = ast.unparse(call.args[0]).strip("f'\"")
            sent.add(name.replace("{TRANSCRIPTION}", openai_realtime.TRANSCRIPTION))
    assert said == sent - {"kind"}


def test_openai_fields():
    text = " ".join(row[0] for row in rows(REALTIME, "field"))
    for names in openai_session.REFUSED.values():
        assert any(name in text for name in names)
    for name, ms in openai_session.DELAY_MS.items():
        assert re.search(rf"`{name}` {ms}\b", REALTIME), name
    for name in openai_session.ENCODINGS:
        assert f"`{name}`" in REALTIME


@pytest.mark.parametrize("name", openai_realtime.QUERY_FIELDS)
def test_openai_query(name):
    assert f"`{name}`" in REALTIME.split("**`session` fields.**")[0]


def treatments(title: str, header: str) -> dict[str, str]:
    """field -> the first word that the table says about it: honoured, answered, refused, ..."""
    table = {}
    for names, said, *_ in rows(section(title), header):
        for name in ticked(names):
            table[name.removesuffix("[]")] = re.match(r"\w+", said.strip("`"))[0] if said else ""
    return table


def test_deepgram_fields():
    table = treatments("`/v1/listen`", "query field")
    assert {n for n, said in table.items() if said == "honoured"} == set(deepgram.HONOURED)
    assert {n for n, said in table.items() if said == "refused"} == set(deepgram.REFUSED)
    taken = {n for n, said in table.items() if said in ("answered", "accepted")}
    assert taken == set(deepgram.ACCEPTED)
    for command in deepgram.COMMANDS:
        assert f"`{command}`" in section("`/v1/listen`")


def test_whisper_live_fields():
    table = treatments("WhisperLive\n", "field of the first")
    assert {n for n, said in table.items() if said == "honoured"} == set(whisper_live.HONOURED)
    assert {n for n, said in table.items() if said == "refused"} == set(whisper_live.REFUSED)
    warned = {n for n, said in table.items() if said == "answered"}
    assert warned == {*whisper_live.WARNED, *whisper_live.WITHOUT_EFFECT}
    assert table["task"] == "transcribe"


def test_whisper_live_kit_fields():
    table = treatments("WhisperLiveKit", "query field")
    assert table.keys() == {*whisper_live_kit.QUERY_FIELDS, *request.KEY_FIELDS}


def test_file_fields():
    table = treatments("`/v1/audio/transcriptions`", "form field")
    refused = {n for n, said in table.items() if said == "refused"}
    assert refused == set(openai_files.REFUSED)
    assert table.keys() - refused == set(openai_files.HONOURED)
    cfg = settings.ServerConfig()
    assert f"up to {cfg.upload_bytes >> 20} MiB" in section("`/v1/audio/transcriptions`")


def test_vllm_fields():
    text = " ".join(
        row[0] for row in rows(REALTIME, "field | |\n|---|---|\n| `session.update` `model`")
    )
    for event, names in vllm_realtime.CLIENT_EVENTS.items():
        for name in names:
            assert f"`{event}` `{name}`" in text


def test_wyoming_events():
    text = " ".join(row[0] for row in rows(section("Wyoming"), "event and field"))
    for name in wyoming.CLIENT_EVENTS:
        assert f"`{name}`" in text


def test_new_limits():
    cfg = settings.ServerConfig()
    assert f"`--frames-per-s` ({cfg.frames_per_s:g})" in LIMITS
    assert f"`--max-stream-s` ({cfg.max_stream_s:g} s)" in LIMITS
