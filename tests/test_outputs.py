"""Destinations that fail under way: full disks, closed descriptors, names that would meet."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sparqle_stream import messages
from sparqle_stream.errors import ConfigError
from sparqle_stream.messages import Word
from sparqle_stream.outputs import OutputError, Outputs

REPO = Path(__file__).resolve().parent.parent
FULL = Path("/dev/full")  # takes nothing: every write fails as on a full disk
HI = messages.Final(" hi", (Word("hi", 0, 0.2, 1),), 0, 1.0)

needs_full = pytest.mark.skipif(not FULL.exists(), reason="no /dev/full here")


def shell(command: str) -> subprocess.CompletedProcess:
    """`command` in a shell, with `sparqle` for the command line."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(REPO), str(REPO / "kernels")])}
    script = f'sparqle() {{ "{sys.executable}" -m sparqle_stream.cli "$@"; }}; {command}'
    return subprocess.run(
        ["bash", "-c", script], env=env, capture_output=True, text=True, check=False
    )


# --- a disk that is full ------------------------------------------------------------------------


@needs_full
@pytest.mark.parametrize("kind", ["txt", "json", "jsonl", "srt", "vtt", "tsv"])
def test_a_full_disk_is_an_error_in_words_for_every_format(kind):
    with (
        pytest.raises(OutputError, match="cannot write /dev/full: No space left on device"),
        Outputs(["a.wav"], kind, str(FULL)) as outputs,
        outputs.open("a.wav") as writer,
    ):
        writer.add(HI)


@needs_full
def test_a_full_disk_ends_the_run_at_the_first_of_several_files(tmp_path, capfd):
    from sparqle_stream import cli
    from tests.fakes.oracle_cli import oracle
    from tests.test_cli import WORDS, save

    talks = [save(tmp_path / f"{i}.wav", WORDS) for i in range(2)]
    with oracle():
        status = cli.main([*talks, "--vad", "off", "--format", "txt", "--output", str(FULL)], {})
    assert status == 2
    err = capfd.readouterr().err
    assert err.count("error: cannot write /dev/full: No space left on device") == 1


@needs_full
def test_what_is_printed_onto_a_full_disk_is_an_error_too():
    done = shell("sparqle models list > /dev/full")
    assert done.returncode == 2
    assert done.stderr == "error: cannot write the output: No space left on device\n"


# --- descriptors that are closed ----------------------------------------------------------------


def test_without_standard_output_captions_need_a_file(tmp_path):
    done = shell(f"sparqle {tmp_path}/x.wav >&-")
    assert done.returncode == 2
    assert done.stderr.startswith("error: standard output is closed\nhint: use --output")


def test_without_standard_error_the_status_still_tells():
    done = shell("sparqle nothing.wav 2>&-")
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "")


def test_help_into_a_reader_that_leaves_ends_quietly():
    done = shell("sparqle --help | true; exit ${PIPESTATUS[0]}")
    assert done.returncode in (0, 141)  # 0: the pipe took it all before `true` ended
    assert done.stderr == ""


# --- names --------------------------------------------------------------------------------------


def test_files_of_one_name_in_two_folders_do_not_overwrite_each_other(tmp_path):
    names = ["mon/talk.wav", "tue/talk.wav", "/talk.wav", "other.wav"]
    with Outputs(names, "srt", f"{tmp_path}/") as outputs:
        for name in names:
            with outputs.open(name) as writer:
                writer.add(HI)
    written = sorted(path.name for path in tmp_path.iterdir())
    assert written == ["mon_talk.wav.srt", "other.srt", "talk.wav.srt", "tue_talk.wav.srt"]


def test_names_that_still_meet_are_told_before_any_work(tmp_path):
    with pytest.raises(ConfigError, match=r"x/a\.wav and \.\./x/a\.wav would both be written to"):
        Outputs(["x/a.wav", "../x/a.wav"], "srt", f"{tmp_path}/")


def test_a_file_that_is_named_twice_is_one_file(tmp_path):
    path = tmp_path / "a.txt"
    with Outputs(["a.wav", "a.wav"], "txt", str(path)) as outputs, outputs.open("a.wav") as writer:
        writer.add(HI)
    assert path.read_text() == "hi\n"


def test_a_name_that_is_no_text_does_not_cost_the_captions(tmp_path):
    name = os.fsdecode(b"bad\xff.wav")
    with Outputs([name], "json", str(tmp_path / "a.json")) as outputs, outputs.open(name) as writer:
        writer.add(HI)
    assert '"file": "bad?.wav"' in (tmp_path / "a.json").read_text()
