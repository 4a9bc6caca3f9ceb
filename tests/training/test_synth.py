"""synth.py: programs that speak sentences."""

from __future__ import annotations

import os
import random
import wave
from collections import Counter

import numpy as np
import pytest

from training import synth
from training.corpus import Pack


@pytest.mark.parametrize(
    ("voice", "program", "speaks"),
    [
        ("flite:slt", "flite", "-t"),
        ("espeak:en-us+m3", "espeak-ng", "-w"),
        ("festival:v", "text2wave", "-o"),
    ],
)
def test_commands_name_the_voice_and_the_file(voice, program, speaks, tmp_path):
    wav = tmp_path / "a.wav"
    command = synth.command_for(voice, "Good day; rm -rf", wav, random.Random(0))
    assert command[0] == program
    assert any(voice.split(":")[1] in part for part in command)
    assert str(wav) in command
    if program != "text2wave":  # festival reads the text from a file
        assert "Good day; rm -rf" in command  # one argument: no shell takes it apart
    assert speaks in command
    again = synth.command_for(voice, "Good day; rm -rf", wav, random.Random(0))
    assert again == command


def test_an_unknown_synthesizer_is_named(tmp_path):
    with pytest.raises(ValueError, match="unknown synthesizer 'siri'"):
        synth.command_for("siri:x", "a", tmp_path / "a.wav", random.Random(0))


def test_engines_are_drawn_by_weight_whatever_their_number_of_voices():
    voices = [f"flite:{v}" for v in synth.FLITE_VOICES]
    voices += [f"espeak:{v}" for v in synth.ESPEAK_VOICES]
    rng = random.Random(0)
    drawn = Counter(synth.pick_voice(voices, rng).split(":")[0] for _ in range(4000))
    # 0.6 to 0.25; the standard deviation of the share is 0.007.
    assert drawn["flite"] / 4000 == pytest.approx(0.6 / 0.85, abs=0.04)
    assert synth.pick_voice(["festival:v"], rng) == "festival:v"


@pytest.fixture
def flite(tmp_path, monkeypatch):
    """A program called flite, alone on the path: half a second of tone, or a failure on demand."""
    sound = tmp_path / "sound.wav"
    with wave.open(str(sound), "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(2)
        out.setframerate(16_000)
        out.writeframes(np.full(8_000, 1000, np.int16).tobytes())
    programs = tmp_path / "bin"
    programs.mkdir()
    script = programs / "flite"
    script.write_text(
        "#!/bin/sh\n"
        'case "$*" in *fail*) exit 1 ;; esac\n'
        f'while [ "$1" != -o ]; do shift; done\n/bin/cp {sound} "$2"\n'
    )
    os.chmod(script, 0o755)
    monkeypatch.setenv("PATH", str(programs))


@pytest.mark.usefixtures("flite")
def test_speaking_fills_a_pack(tmp_path):
    """Sentences that the program cannot speak are left out; the pack ends when it is full."""
    sentences = [f"sentence number {n} is here" for n in "abcdefghij"] + ["please fail"] * 5
    hours = synth.speak(sentences, tmp_path / "pack", hours=3.0 / 3600, seed=1)
    pack = Pack(tmp_path / "pack")
    assert hours == pytest.approx(3.0 / 3600)
    assert len(pack.clips) == 6
    assert len({c.text for c in pack.clips}) == 6
    assert not any("fail" in c.text for c in pack.clips)
    assert {c.speaker.split(":")[0] for c in pack.clips} == {"flite"}
    assert all(c.length == 8_000 for c in pack.clips)
    assert pack.pcm(pack.clips[5])[0] == np.float32(1000 / 32768)


def test_no_synthesizer_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert synth.installed_voices() == []
    with pytest.raises(SystemExit, match="apt-get install flite espeak-ng"):
        synth.speak(["a b c d"], tmp_path / "pack", 1.0)
