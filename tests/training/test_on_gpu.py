"""on_gpu.sh: which commands it runs in which order, and how it goes on; Python is a stand-in."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "training" / "on_gpu.sh"
# Writes down its arguments; `prepare pack` makes what it would; commands with $BROKEN in them fail.
STAND_IN = """#!/usr/bin/env bash
echo "$*" >> "$CALLS"
case "$*" in
  *"$BROKEN"*) exit 3 ;;
  *"prepare pack"*) mkdir -p "$5" && touch "$5/index.jsonl" ;;
  *evaluate*) echo '{"wer": 1}' ;;
esac
"""


@pytest.fixture
def folder(tmp_path):
    work = tmp_path / "run"
    for name in ("sources/a", "sources/b", "score/dev"):
        (work / name).mkdir(parents=True)
        (work / name / "manifest.jsonl").touch()
    for name in ("adapt.toml", "joint.toml", "prefix.toml", "ear.safetensors"):
        (work / name).touch()
    python = tmp_path / "python"
    python.write_text(STAND_IN)
    python.chmod(0o755)
    return work


def run(folder, minutes="9", broken="nobody"):
    calls = folder.parent / "calls"
    calls.write_text("")
    env = os.environ | {"PYTHON": str(folder.parent / "python"), "CALLS": str(calls)}
    done = subprocess.run(
        ["bash", str(SCRIPT), str(folder), minutes],
        env=env | {"BROKEN": broken},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    said = [line.split() for line in calls.read_text().splitlines()]
    return done.returncode, [words[1].removeprefix("training.") for words in said], done.stderr


def test_all_stages_run_once_and_in_order(folder):
    status, said, _ = run(folder)
    assert status == 0
    assert said[:3] == ["prepare", "prepare", "prepare"]
    assert said[3:] == ["align", "align", "adapt", "evaluate", "joint", "prefix"]
    assert (folder / "score.jsonl").read_text() == '{"wer": 1}\n'
    assert run(folder)[:2] == (0, ["align", "align"])  # which has nothing left to do


def test_a_source_that_comes_later_is_packed(folder):
    assert run(folder)[0] == 0
    (folder / "sources/c").mkdir()
    (folder / "sources/c/manifest.jsonl").touch()
    assert run(folder)[1].count("prepare") == 1


def test_without_time_no_stage_is_begun_and_the_next_call_begins_it(folder):
    status, said, _ = run(folder, minutes="0")
    assert (status, said[-1]) == (75, "align")
    assert not (folder / "adapt.done").exists()
    assert run(folder)[1][-4:] == ["adapt", "evaluate", "joint", "prefix"]


def test_what_fails_is_told_and_ends_it(folder):
    status, said, told = run(folder, broken="sources/b")
    assert status == 1
    assert "adapt" not in said
    assert "error: b: see" in told
    status, said, _ = run(folder, broken="training.adapt")
    assert (status, said[-1]) == (3, "adapt")
