"""Synthetic speech as vocabulary: public-domain text spoken by installed synthesizers.

Voices are crude; they teach the spelling of words that few hours of natural speech never hold.
flite, espeak-ng and festival (Debian packages) are called as programs, those that are installed.
"""

from __future__ import annotations

import random
import shutil
import subprocess
import tempfile
from pathlib import Path

from tqdm import tqdm

from training.corpus import SAMPLE_RATE_HZ, PackWriter, decode_file

FLITE_VOICES = ("slt", "rms", "awb", "kal16")
ESPEAK_VOICES = tuple(
    f"{accent}+{variant}"
    for accent in ("en-us", "en-gb", "en-gb-scotland")
    for variant in ("m1", "m3", "m7", "f2", "f4", "f5")
)
FESTIVAL_VOICES = ("cmu_us_slt_arctic_hts", "kal_diphone", "ked_diphone")


def command_for(voice: str, text: str, out: Path, rng: random.Random) -> list[str]:
    """The program call that speaks `text` in `voice` ('flite:slt', 'espeak:en-us+m3', ...)."""
    engine, name = voice.split(":", 1)
    if engine == "flite":
        stretch, pitch = rng.uniform(0.8, 1.2), rng.uniform(80, 210)
        settings = ["--setf", f"duration_stretch={stretch:.2f}"]
        settings += ["--setf", f"int_f0_target_mean={pitch:.0f}"]
        return ["flite", "-voice", name, *settings, "-t", text, "-o", str(out)]
    if engine == "espeak":
        speed, pitch = rng.randint(130, 200), rng.randint(25, 75)
        return ["espeak-ng", "-v", name, "-s", str(speed), "-p", str(pitch), "-w", str(out), text]
    if engine == "festival":
        return [
            "text2wave",
            "-eval",
            f"(voice_{name})",
            "-o",
            str(out),
            str(out.with_suffix(".txt")),
        ]
    raise ValueError(f"unknown synthesizer {engine!r}; known: flite, espeak, festival")


def installed_voices() -> list[str]:
    voices: list[str] = []
    if shutil.which("flite"):
        voices += [f"flite:{v}" for v in FLITE_VOICES]
    if shutil.which("espeak-ng"):
        voices += [f"espeak:{v}" for v in ESPEAK_VOICES]
    if shutil.which("text2wave"):
        voices += [f"festival:{v}" for v in FESTIVAL_VOICES]
    return voices


def pick_voice(voices: list[str], rng: random.Random) -> str:
    """An engine first, then one of its voices: flite has 4 good ones, espeak-ng many poor ones."""
    weight = {"flite": 0.6, "espeak": 0.25, "festival": 0.15}
    engines = sorted({v.split(":")[0] for v in voices})
    engine = rng.choices(engines, [weight[e] for e in engines])[0]
    return rng.choice([v for v in voices if v.startswith(engine + ":")])


def speak(sentences: list[str], out: Path, hours: float, seed: int = 0) -> float:
    """Speaks sentences in random voices into a pack until `hours` are full; returns the hours."""
    voices = installed_voices()
    if not voices:
        raise SystemExit("error: no synthesizer found\nhint: apt-get install flite espeak-ng")
    rng = random.Random(seed)
    rng.shuffle(sentences)
    bar = tqdm(total=round(hours * 3600), unit="s", desc="synth")
    with PackWriter(out) as writer, tempfile.TemporaryDirectory() as tmp:
        wav = Path(tmp) / "a.wav"
        for i, sentence in enumerate(sentences):
            if writer.seconds >= hours * 3600:
                break
            voice = pick_voice(voices, rng)
            wav.with_suffix(".txt").write_text(sentence)
            run = subprocess.run(command_for(voice, sentence, wav, rng), capture_output=True)
            if run.returncode or not wav.exists():
                continue
            pcm = decode_file(wav)
            wav.unlink()
            writer.add(
                pcm,
                id=f"synth-{seed}-{i}",
                text=sentence,
                speaker=voice,
                corpus="synthetic",
                licence="public-domain text",
            )
            bar.update(round(len(pcm) / SAMPLE_RATE_HZ))
    return writer.seconds / 3600
