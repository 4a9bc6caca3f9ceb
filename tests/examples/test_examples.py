"""The examples, run against a server on this machine.

LiveKit and Pipecat are large and not installed here; SPARQLE_TEST_PLUGINS names a Python that has
them, and without one their tests skip.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import wave
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from sparqle_stream import server, testing
from sparqle_stream.config import EngineConfig, StreamOptions, VadConfig

REPO = Path(__file__).parents[2]
EXAMPLES = REPO / "examples"
PLUGINS = os.environ.get("SPARQLE_TEST_PLUGINS", sys.executable)
OFF = StreamOptions(vad=VadConfig(kind="off"))
WORDS = testing.vocabulary(12)
WAIT_S = 240.0
needs_ffmpeg = pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="no ffmpeg here")


def write_wav(path: Path, pcm) -> str:
    with wave.open(str(path), "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(2)
        out.setframerate(16_000)
        out.writeframes(np.round(pcm * 32_768).clip(-32_768, 32_767).astype("<i2").tobytes())
    return str(path)


def run(command: list[str], **env: str) -> subprocess.CompletedProcess[str]:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    # The command line takes a SPARQLE_ variable that it does not know for a mistake.
    own = {k: v for k, v in os.environ.items() if not k.startswith("SPARQLE_TEST_")}
    return subprocess.run(
        command,
        cwd=REPO,
        env=own | {"PATH": path} | env,
        capture_output=True,
        text=True,
        timeout=WAIT_S,
        check=False,
    )


@pytest.fixture(scope="module")
def oracle():
    with testing.oracle_engine(EngineConfig(n_slots=2, threads=1)) as engine:
        yield engine


@needs_ffmpeg
def test_ffmpeg_pipe(oracle, tmp_path):
    """A film's sound into a server; one channel, as ffmpeg's mixing would change the levels, which
    are the oracle's letters."""
    wav, film = write_wav(tmp_path / "talk.wav", testing.say(WORDS)), str(tmp_path / "talk.mka")
    ffmpeg = ["ffmpeg", "-nostdin", "-loglevel", "error", "-i", wav]
    subprocess.run([*ffmpeg, "-c:a", "flac", film], check=True)
    cfg = server.ServerConfig(port=0, defaults=OFF, drain_s=0.0)
    with server.background(oracle, cfg) as url:
        done = run(["bash", str(EXAMPLES / "ffmpeg_pipe.sh"), film, url, "--format", "txt"])
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == WORDS


@needs_ffmpeg
def test_ffmpeg_pipe_says_what_is_wrong(tmp_path):
    script = str(EXAMPLES / "ffmpeg_pipe.sh")
    assert run(["bash", script]).returncode == 2
    gone = run(["bash", script, str(tmp_path / "none.mp4"), "ws://127.0.0.1:9"])
    assert gone.returncode != 0
    assert "none.mp4" in gone.stderr


@pytest.mark.filterwarnings("ignore:'audioop' is deprecated:DeprecationWarning")
def test_home_assistant(oracle, tmp_path):
    name = write_wav(tmp_path / "command.wav", testing.say(WORDS))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    cfg = server.ServerConfig(port=0, wyoming_port=port, defaults=OFF, drain_s=0.0)
    with server.background(oracle, cfg):
        command = [sys.executable, "-W", "ignore", "-m", "examples.home_assistant", name]
        done = run([*command, f"tcp://127.0.0.1:{port}"])
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == WORDS
    heard = done.stderr.split("\n")[1]
    assert heard.split() == WORDS, "words were shown while they came"
    gone = run([*command, f"tcp://127.0.0.1:{port}"])
    assert gone.returncode == 1
    assert gone.stderr.startswith("error: ")
    assert "refused" in gone.stderr


@pytest.fixture(scope="module")
def english(tiny):
    """Random weights under the name of an English model: the plugins insist on a language."""
    from sparqle_stream.engine import Engine

    with Engine(replace(tiny, name="tiny-en"), EngineConfig(n_slots=2, threads=1)) as engine:
        yield engine


@pytest.fixture
def talk(clip, tmp_path):
    """6 s of real speech, which a detector hears, as a file."""
    return write_wav(tmp_path / "talk.wav", clip[: 6 * 16_000])


def needs_plugin(module: str) -> None:
    if run([PLUGINS, "-c", f"import {module}"]).returncode:
        pytest.skip(f"no {module} here; SPARQLE_TEST_PLUGINS=PYTHON names a Python that has it")


@pytest.mark.slow
def test_livekit(english, talk):
    """LiveKit's OpenAI plugin with its own default model, only `base_url` changed."""
    needs_plugin("livekit.plugins.openai")
    with server.background(english, server.ServerConfig(port=0, drain_s=0.0)) as url:
        address = url.replace("ws", "http", 1)
        done = run(
            [PLUGINS, "-m", "examples.livekit_agent", "try", talk],
            CAPTIONS_URL=address,
        )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) > 3, done.stderr


@pytest.mark.slow
def test_pipecat(english, talk):
    """Pipecat's OpenAI service with its own default model, only `base_url` changed."""
    needs_plugin("pipecat.services.openai.stt")
    with server.background(english, server.ServerConfig(port=0, drain_s=0.0)) as url:
        done = run([PLUGINS, "-m", "examples.pipecat_captions", talk, url])
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) > 3, done.stderr
