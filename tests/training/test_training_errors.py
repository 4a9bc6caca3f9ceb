"""errors.py: what a user can cause is one line; Ctrl-C is none; a bug keeps its traceback."""

from __future__ import annotations

import errno

import numpy as np
import pytest
from safetensors.numpy import save_file

from sparqle_stream.errors import ConfigError
from training import words
from training.errors import reported


@pytest.mark.parametrize(
    ("raised", "status", "said"),
    [
        (ConfigError("no such step", "try another"), 2, "error: no such step\nhint: try another\n"),
        (FileNotFoundError(2, "No such file or directory", "x"), 2, "error: x: No such file"),
        (OSError(errno.ENOSPC, "No space left on device"), 2, "error: No space left on device"),
        (KeyboardInterrupt(), 130, ""),
    ],
    ids=["config", "file", "full", "ctrl-c"],
)
def test_the_status_tells_who_has_to_act(capsys, raised, status, said):
    with pytest.raises(SystemExit) as left, reported():
        raise raised
    assert left.value.code == status
    assert capsys.readouterr().err.startswith(said)


@pytest.mark.parametrize("bug", [ValueError("shape"), OSError("no file in it")])
def test_a_bug_keeps_its_traceback(bug):
    with pytest.raises(type(bug)), reported():
        raise bug


def test_weights_that_cannot_be_written_are_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as left, reported():
        save_file({"x": np.zeros(1)}, tmp_path / "nowhere" / "x.safetensors")
    assert left.value.code == 2
    assert capsys.readouterr().err.startswith("error: weights: ")


def test_words_of_a_file_that_is_not_there(tmp_path, monkeypatch, capsys):
    missing = str(tmp_path / "books.txt")
    monkeypatch.setattr("sys.argv", ["words", str(tmp_path / "out.safetensors"), missing])
    with pytest.raises(SystemExit) as left:
        words.main()
    assert left.value.code == 2
    assert f"error: {missing}: No such file or directory" in capsys.readouterr().err
