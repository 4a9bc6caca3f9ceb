"""settings.py: where results go, and what is said when they cannot, or when somebody interrupts."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest

from bench import settings

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
