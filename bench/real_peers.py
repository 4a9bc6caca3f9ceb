"""Real peers: recognisers with the weights of whoever has them, as their makers' examples use them.

Each takes settings and the folder of its weights, and gives a function: PCM (S,) -> text. Nothing
is fetched. Raises ConfigError for a folder that it cannot load.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from bench.socket_target import s16
from sparqle_stream.config import SAMPLE_RATE_HZ
from sparqle_stream.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import numpy as np
    import numpy.typing as npt

    from bench.settings import Settings

    Pcm = npt.NDArray[np.float32]
    Hear = Callable[[Pcm, int], str]

VOSK_PIECE = SAMPLE_RATE_HZ // 5  # samples


def faster_whisper(wanted: Settings, folder: Path) -> Hear:
    """A folder in the format of CTranslate2; English, int8, its default beam."""
    from faster_whisper import WhisperModel

    def load() -> Any:  # noqa: ANN401 - its own class
        return WhisperModel(
            str(folder),
            device="cpu",
            compute_type="int8",
            cpu_threads=wanted.threads,
            local_files_only=True,
        )

    model = _loaded("faster-whisper", folder, load)

    def hear(pcm: Pcm, n_tokens: int) -> str:
        del n_tokens  # it writes what it hears
        segments, _ = model.transcribe(pcm, language="en")
        return " ".join(segment.text.strip() for segment in segments)

    return hear


def vosk(wanted: Settings, folder: Path) -> Hear:
    """A model folder of Vosk; it has one thread, always."""
    import vosk as package

    del wanted
    package.SetLogLevel(-1)
    model = _loaded("vosk", folder, lambda: package.Model(model_path=str(folder)))

    def hear(pcm: Pcm, n_tokens: int) -> str:
        del n_tokens
        recognizer = package.KaldiRecognizer(model, SAMPLE_RATE_HZ)
        pieces = (pcm[at : at + VOSK_PIECE] for at in range(0, len(pcm), VOSK_PIECE))
        # True: an utterance is over.
        ended = [recognizer.Result() for piece in pieces if recognizer.AcceptWaveform(s16(piece))]
        texts = (json.loads(one)["text"] for one in [*ended, recognizer.FinalResult()])
        return " ".join(filter(None, texts))

    return hear


def moonshine(wanted: Settings, folder: Path) -> Hear:
    """A model folder of Moonshine whose name begins with its kind: base-en, tiny-streaming-en."""
    from moonshine_voice import Transcriber, model_arch_to_string
    from moonshine_voice.moonshine_api import ModelArch

    del wanted  # it takes the threads that it wants
    kinds = {model_arch_to_string(arch): arch for arch in ModelArch}
    fitting = [kind for kind in kinds if folder.name.startswith(kind)]
    if not fitting:
        raise ConfigError(
            f"nobody can tell which Moonshine {folder.name} is",
            hint=f"its folder's name begins with one of {', '.join(kinds)}",
        )
    arch = kinds[max(fitting, key=len)]
    model = _loaded("moonshine", folder, lambda: Transcriber(str(folder), model_arch=arch))

    def hear(pcm: Pcm, n_tokens: int) -> str:
        del n_tokens
        found = model.transcribe_without_streaming(pcm.tolist(), SAMPLE_RATE_HZ)
        return " ".join(line.text.strip() for line in found.lines)

    return hear


def _loaded(name: str, folder: Path, load: Callable[[], Any]) -> Any:  # noqa: ANN401 - theirs
    if not folder.is_dir():
        raise ConfigError(f"{folder} is no folder", hint=f"--weights {name}=FOLDER")
    try:
        return load()
    except Exception as err:  # each has errors of its own
        raise ConfigError(
            f"{name} cannot load {folder.name}: {err}", hint="is it a model of that kind?"
        ) from err
