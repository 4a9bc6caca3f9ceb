"""settings.py: where results go, and what is said when they cannot, or when somebody interrupts."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest

from bench import settings
from sparqle_stream.errors import ConfigError, SparqleError

RESULT = {"bench": "x", "wer": 1.5}


def never() -> dict:
    raise AssertionError("nothing is measured")


def test_the_result_is_a_line_of_stdout_and_a_file(tmp_path, capsys):
    path = tmp_path / "new" / "x.json"
    assert settings.run_and_print(lambda: RESULT, path) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(path.read_text()) == RESULT
    assert [p.name for p in path.parent.iterdir()] == ["x.json"]


def test_a_device_is_written_to_and_not_replaced(capsys):
    """As root, --output /dev/null put a file in its place."""
    before = os.stat("/dev/null")
    assert settings.run_and_print(lambda: RESULT, Path("/dev/null")) == 0
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    assert os.stat("/dev/null").st_ino == before.st_ino


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_costs_the_file_and_not_the_result(capsys):
    assert settings.run_and_print(lambda: RESULT, Path("/dev/full")) == 2
    out, err = capsys.readouterr()
    assert json.loads(out) == RESULT
    assert err.startswith("error: cannot write /dev/full: No space left on device\nhint: ")


@pytest.mark.parametrize("name", ["a-file/x.json", "folder"])
def test_a_place_that_cannot_be_is_told_before_anything_is_measured(tmp_path, capsys, name):
    (tmp_path / "a-file").touch()
    (tmp_path / "folder").mkdir()
    assert settings.run_and_print(never, tmp_path / name) == 2
    assert str(tmp_path / name) in capsys.readouterr().err


def test_ctrl_c_is_a_status_and_no_traceback(capsys):
    def interrupted() -> dict:
        raise KeyboardInterrupt

    assert settings.run_and_print(interrupted, None) == 130
    assert capsys.readouterr() == ("", "interrupted\n")


def test_what_else_is_written_has_its_place_looked_at_first(tmp_path, capsys):
    (tmp_path / "a-file").touch()
    places = [("--trace", None), ("--plot", tmp_path / "a-file" / "x.png")]
    assert settings.run_and_print(never, None, places) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert "hint: check --plot" in said.err


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_is_read_only_is_told_first(tmp_path, capsys):
    (tmp_path / "x.json").touch()
    tmp_path.chmod(0o500)
    try:
        assert settings.run_and_print(never, tmp_path / "x.json") == 2
    finally:
        tmp_path.chmod(0o700)
    assert "Permission denied" in capsys.readouterr().err


def test_what_fails_afterwards_costs_neither_the_result_nor_the_others(tmp_path, capsys):
    kept = []

    def fails(result: dict) -> None:
        raise ConfigError("the plot is not written", hint="check --plot")

    path = tmp_path / "x.json"
    assert settings.run_and_print(lambda: RESULT, path, (), [fails, kept.append]) == 2
    out, err = capsys.readouterr()
    assert json.loads(out) == json.loads(path.read_text()) == RESULT
    assert kept == [RESULT]
    assert err == "error: the plot is not written\nhint: check --plot\n"


@pytest.mark.parametrize("is_there", [False, True])
def test_a_part_is_printed_and_takes_the_place_of_no_file(tmp_path, capsys, is_there):
    path, part, kept = tmp_path / "x.json", RESULT | {"interrupted": True}, []
    if is_there:
        path.write_text("whole")
    assert settings.run_and_print(lambda: part, path, (), [kept.append]) == 130
    out, err = capsys.readouterr()
    assert json.loads(out) == part
    assert err.startswith("interrupted")
    assert kept == [part]
    if is_there:
        assert path.read_text() == "whole"
        assert "stays as it was" in err
    else:
        assert json.loads(path.read_text()) == part


def test_a_figure_that_is_no_number_is_an_error_and_not_lost(tmp_path, capsys):
    result = {"bench": "x", "timing": {"rtf": float("nan")}, "sets": [{"wer": float("inf")}]}
    assert settings.run_and_print(lambda: result, tmp_path / "x.json") == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert (
        "error: figures of the result are no numbers: timing.rtf is nan, sets.0.wer is inf" in err
    )
    assert json.loads(err.splitlines()[0])["bench"] == "x"
    with pytest.raises(SparqleError, match=r"timing\.rtf"):
        settings.write(result, tmp_path / "x.json")
    assert list(tmp_path.iterdir()) == []


def test_offline_is_streaming_with_the_longest_chunk_and_delay():
    wanted = settings.Settings().offline()
    assert (wanted.chunk_ms, wanted.delay_ms, wanted.mode) == (1280, 960, "offline")
    assert settings.Settings(chunk_ms=1280).mode == "streaming"
