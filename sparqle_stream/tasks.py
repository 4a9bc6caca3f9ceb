"""Tasks by prompt: what the LLM is asked to write of what it hears, said in words before the audio.

Transcription needs no words. An instruction stands where a prompt does: a model that was trained
with it (training.joint, `tasks`) lists its name in config.json; others do not know what it means.
"""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING

from sparqle_stream.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

TRANSCRIBE = "transcribe"
TASKS = (TRANSCRIBE, "translate", "answer")
LANGUAGES = {
    **{"ar": "Arabic", "ca": "Catalan", "de": "German", "en": "English", "es": "Spanish"},
    **{"et": "Estonian", "fa": "Persian", "fr": "French", "id": "Indonesian", "it": "Italian"},
    **{"ja": "Japanese", "lv": "Latvian", "mn": "Mongolian", "nl": "Dutch", "pl": "Polish"},
    **{"pt": "Portuguese", "ru": "Russian", "sl": "Slovenian", "sv": "Swedish", "ta": "Tamil"},
    **{"tr": "Turkish", "uk": "Ukrainian", "cy": "Welsh", "zh": "Chinese"},
}


def name_of(task: str, to: str = "") -> str:
    """'transcribe', 'translate to de' or 'answer': a task as config.json lists it.

    Raises ConfigError for a task or language that has no name.

    >>> name_of("translate", "de")
    'translate to de'
    """
    if task not in TASKS:
        near = difflib.get_close_matches(task, TASKS, n=1)
        raise ConfigError(f"unknown task {task!r}", hint=f"use {', '.join(near or TASKS)}")
    if task != "translate":
        if to:
            raise ConfigError(f"--to {to} goes with --task translate", hint="leave --to out")
        return task
    if to not in LANGUAGES:
        raise ConfigError(
            f"--task translate needs a language, not {to!r}",
            hint=f"--to one of {', '.join(sorted(LANGUAGES))}",
        )
    return f"translate to {to}"


def instruction(name: str) -> str:
    """What the LLM reads before the audio; '' for transcription.

    >>> instruction("translate to de")
    'Translate into German:'
    """
    task, _, to = name.partition(" to ")
    if task == "translate":
        return f"Translate into {LANGUAGES[to]}:"
    return "Answer the question:" if task == "answer" else ""


def require(name: str, known: Sequence[str]) -> None:
    """Raises ConfigError unless the task is among those that a model was trained for."""
    if name not in known:
        raise ConfigError(
            f"the model was not trained to {name}; it can {', '.join(known)}",
            hint="leave --task out, or train one: training/README.md, Tasks",
        )
