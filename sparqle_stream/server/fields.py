"""Checks of single fields that several dialects share. Each raises ConfigError with the way out."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from sparqle_stream.errors import ConfigError
from sparqle_stream.server.openai_session import language_of
from sparqle_stream.server.settings import MAX_PROMPT_CHARS

if TYPE_CHECKING:
    from sparqle_stream.config import StreamOptions

NOTHING: tuple[object, ...] = (
    None,
    False,
    "",
    "false",
    "False",
    0,
    "0",
    [],
    {},
)  # asks for nothing


def truth(name: str, value: object) -> bool:
    """true or false, as JSON or as text."""
    if value is True or value is False:
        return value
    if isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    raise ConfigError(f"{name}={str(value)[:40]!r} is neither true nor false", hint="true or false")


def whole(name: str, value: object, low: int, high: int) -> int:
    """A whole number from `low` to `high`, as JSON or as text."""
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) <= 9:
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigError(
            f"{name}={str(value)[:40]!r} is not a whole number", hint=f"{low}..{high}"
        )
    if not low <= value <= high:
        raise ConfigError(f"{name}={str(value)[:20]} is out of range", hint=f"{low}..{high}")
    return value


def share(name: str, value: object) -> float:
    """A number from 0.01 to 1, as JSON or as text."""
    try:
        number = float(value) if isinstance(value, int | float | str) else float("nan")
    except (ValueError, OverflowError):
        number = float("nan")
    if not 0.01 <= number <= 1:
        raise ConfigError(f"{name}={str(value)[:20]!r} is out of range", hint="0.01 to 1")
    return number


def text(name: str, value: object) -> str:
    """A string; None is an empty one. Half characters, which JSON can smuggle in, are refused."""
    if value is None:
        return ""
    if not isinstance(value, str) or any("\ud800" <= char <= "\udfff" for char in value):
        raise ConfigError(f"{name} must be text", hint="a JSON string")
    return value


def refuse(name: str, value: object, why: str = "this server does not have it") -> None:
    """For fields that are known and not served: only a value that asks for nothing may be given."""
    if value not in NOTHING:
        raise ConfigError(f"{name} is not supported", hint=why)


def check_language(model: str, language: str) -> None:
    """Whether the model speaks it: 'en' and 'en-GB' for a model of English."""
    spoken = language_of(model)
    if language and spoken and language.replace("_", "-").partition("-")[0].lower() != spoken:
        raise ConfigError(
            f"language {language[:20]!r} is unknown", hint=f"{model} knows {spoken!r}"
        )


def with_prompt(options: StreamOptions, prompt: str) -> StreamOptions:
    """Options with `prompt` after the server's own."""
    whole_prompt = f"{options.prompt} {prompt}".strip()
    if len(whole_prompt) > MAX_PROMPT_CHARS:
        hint = f"at most {MAX_PROMPT_CHARS}"
        raise ConfigError(f"a prompt of {len(prompt)} characters is too long", hint)
    return replace(options, prompt=whole_prompt)
